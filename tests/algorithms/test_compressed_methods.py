"""Methods whose messages are compressed end where they end without; and what they then send."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from prefmesh.algorithms.methods import METHODS, Population
from prefmesh.errors import InputError
from prefmesh.theory import laws, simulate
from prefmesh.topology.build import build_mixing_matrix
from tests.theory.test_laws import tastes

PROBLEM = tastes(6, 8, 20)
OPTIMUM = PROBLEM.optimum()
LR, GAMMA = 0.3, 0.3
CHAINS = [["sign"], [{"name": "top_k", "share": 0.25}, "int8"]]


def far(name: str, from_: np.ndarray, rounds: int = 500, **settings) -> float:
    found = simulate.method(PROBLEM, name, lr=LR, rounds=rounds, **settings)
    return float(np.abs(found.final - from_).max())


@pytest.mark.parametrize("chain", CHAINS, ids=str)
class TestLimits:
    def test_a_server(self, chain: list) -> None:
        """EF21 both ways: FedDPO's limit, bias and all; SCAFFOLD's is the optimum, also with some agents a round."""
        bias = laws.fed_dpo_fixed_point(PROBLEM, LR, 3)
        assert np.abs(bias - OPTIMUM).max() > 1e-2
        assert far("fed_dpo", bias, 100, local_steps=3, compression=chain) < 1e-6
        assert far("scaffold", OPTIMUM, 200, local_steps=3, participation=3, compression=chain) < 1e-5

    def test_gossip(self, chain: list) -> None:
        """CHOCO: DecDPO's limit for (1 - gamma) I + gamma W; with tracking the optimum."""
        w = build_mixing_matrix("ring", "metropolis", agents=6, seed=0).matrix.toarray()
        lazy = laws.dec_dpo_fixed_point(PROBLEM, (1 - GAMMA) * np.eye(6) + GAMMA * w, LR, 1)
        assert np.abs(lazy - OPTIMUM).max() > 1e-2
        assert far("dec_dpo", lazy, 400, compression=chain, consensus_step=GAMMA) < 1e-6
        assert far("gradient_tracking", OPTIMUM, 350, compression=chain, consensus_step=GAMMA) < 1e-6
        assert far("momentum_tracking", OPTIMUM, 350, compression=chain, consensus_step=GAMMA) < 1e-6


@pytest.mark.parametrize("name", ["exact_diffusion", "extra"])
def test_corrections_bear_little(name: str) -> None:
    """They add up what compression leaves out: with fine codes as good as without, with coarse ones for small gamma."""
    assert far(name, OPTIMUM, 350, compression=["int8"], consensus_step=GAMMA) < 1e-6
    chain = [{"name": "top_k", "share": 0.25}]
    assert far(name, OPTIMUM, 400, compression=chain, consensus_step=0.1) < 1e-3


def made(name: str, agents: int = 5, **settings):
    cls = METHODS[name]
    return cls(cls.Settings(name=name, **settings), Population(weights=np.full(agents, 1 / agents), seed=0))


def test_the_first_round_by_hand() -> None:
    """top-k of one entry in four, an update of (1, -4, 2, 3) and one of (0, 1, 0, 0): the largest of each is heard, then of the model."""
    method = made("fed_dpo", 2, compression=[{"name": "top_k", "share": 0.25}])
    state = method.begin({"w": torch.zeros(1, 4)})
    everyone = np.arange(2)
    end = {"w": torch.tensor([[1.0, -4.0, 2.0, 3.0], [0.0, 1.0, 0.0, 0.0]])}
    state = method.mix(state, 1, everyone, {"w": end["w"].clone()})
    assert state.theta["w"].tolist() == [[0, -1.5, 0, 0]] * 2  # (-4 + 1) / 2
    assert method.start(state, 2, everyone)["w"].tolist() == [[0, -1.5, 0, 0]] * 2
    # The same updates again, from where agents are: now the next largest entries of what is missing.
    start = method.start(state, 2, everyone)["w"]
    state = method.mix(state, 2, everyone, {"w": start + end["w"]})
    # Known of both: (0, -4, 0, 3) and (0, 1, 0, 0); a step along their mean.
    assert state.theta["w"].tolist() == [[0, -3.0, 0, 1.5]] * 2
    # Of the model's differences (0, -1.5, 0, 1.5) the first is heard.
    assert method.start(state, 3, everyone)["w"].tolist() == [[0, -3.0, 0, 0]] * 2


def test_bytes() -> None:
    """1,000 numbers of float32; of one in a hundred, 10 values, and where they stand: 10 bits each, 13 bytes."""
    row = {"w": torch.zeros(3, 1000)}
    chain = [{"name": "top_k", "share": 0.01}]
    assert made("fed_dpo").message_bytes(row) == 4000
    assert made("fed_dpo", compression=chain).message_bytes(row) == 40 + 13
    assert made("fed_dpo", compression=[*chain, "int8"]).message_bytes(row) == 10 + 4 + 13
    # Differences of models are for all, updates of two.
    assert made("fed_dpo", compression=chain, participation=2).bytes_sent(1, model_bytes=53, data_bytes=0) == 7 * 53  # fmt: skip
    assert made("dec_dpo", compression=chain).bytes_sent(1, model_bytes=53, data_bytes=0) == 10 * 53


def test_gossip_keeps_the_mean_whatever_is_lost() -> None:
    method = made("dec_dpo", compression=[{"name": "random_k", "share": 0.1}], consensus_step=0.2)
    state = method.begin({"w": torch.zeros(1, 30, dtype=torch.float64)})
    rows = torch.randn(5, 30, dtype=torch.float64)
    for round_ in range(1, 4):
        rows = method.mixed(state, round_, {"w": rows})["w"]
    torch.manual_seed(0)
    start = torch.randn(5, 30, dtype=torch.float64)
    found = method.mixed(state, 9, {"w": start.clone()})["w"]
    torch.testing.assert_close(found.mean(0), start.mean(0), rtol=0, atol=1e-14)
    assert not torch.equal(found, start)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "dec_dpo", "schedule": "matching", "compression": ["int8"]}, r"^method.compression: neighbours must hear"),
        ({"name": "gradient_tracking", "node_dropout": 0.1, "compression": ["int8"]}, r"^method.compression: neighbours must hear"),
        ({"name": "async_gossip", "compression": ["int8"]}, r"^method.compression: .* allowed for async_gossip: none"),
    ],
)  # fmt: skip
def test_refused(settings: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        METHODS[settings["name"]].Settings(**settings).check(6)


def test_a_step_without_compression() -> None:
    with pytest.raises(ValidationError, match=r"consensus_step is 0.5; allowed without compression: 1"):
        METHODS["dec_dpo"].Settings(name="dec_dpo", consensus_step=0.5)
