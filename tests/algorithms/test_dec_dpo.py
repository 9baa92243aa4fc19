"""DecDPO: mixing keeps the mean and contracts disagreement; the average model follows the weighted updates."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefmesh.algorithms.consensus import consensus_error
from prefmesh.algorithms.methods import METHODS, Population
from prefmesh.algorithms.methods.dec_dpo import DecDPOSettings
from prefmesh.errors import InputError
from prefmesh.mesh.products import mix
from tests import problems
from tests.strategies import mixing_matrices

SIZES = (9, 4, 6, 5, 8)


@given(mixing_matrices(most=12), st.integers(0, 10**6))
def test_mixing_keeps_the_mean_and_contracts(mixing, seed) -> None:
    """e after <= rho^2 e before: rho = ||W - J||_2."""
    rows = torch.from_numpy(np.random.default_rng(seed).normal(size=(mixing.agents, 3, 2)))
    mixed = mix(mixing.matrix, rows)
    assert torch.allclose(mixed.mean(0), rows.mean(0), atol=1e-12)
    before, after = consensus_error({"a": rows}), consensus_error({"a": mixed})
    assert after <= mixing.rho**2 * before * (1 + 1e-9) + 1e-20


def test_consensus_error_by_hand() -> None:
    """Rows 0, 2, 4 around 2: (4 + 0 + 4) / 3; a second tensor adds its own; shared rows have none."""
    a = torch.tensor([[0.0], [2.0], [4.0]])
    assert consensus_error({"a": a}) == pytest.approx(8 / 3)
    assert consensus_error({"a": a, "b": 2 * a}) == pytest.approx(8 / 3 + 32 / 3)
    assert consensus_error({"a": torch.ones(1, 2).expand(5, 2)}) == 0
    assert consensus_error({"a": torch.ones(1, 2)}) == 0


@pytest.mark.parametrize("graph", ["ring", "path", "star", "exponential"])
def test_one_round_by_hand(graph) -> None:
    """W local(Theta), row by row, with numpy's gradients and a dense W."""
    on = problems.problem("log_linear", sum(SIZES))
    method = {
        "name": "dec_dpo",
        "graph": graph,
        "weights": "uniform" if graph == "exponential" else "metropolis",
    }
    learner = problems.learner(on, SIZES, method, {"name": "sgd", "lr": 0.5, "batch_size": "full"})
    x, beta = (on.data.chosen - on.data.rejected).numpy(), on.objective.beta
    theta, w = np.zeros((5, problems.DIM)), learner.method.mixing.matrix.toarray()  # type: ignore[attr-defined]
    state = learner.begin(on.policy.initial(0))
    for round_ in (1, 2, 3):
        state, measures = learner.round(state, round_)
        for i, shard in enumerate(problems.shards(SIZES)):
            h = x[shard] @ theta[i]
            theta[i] -= 0.5 * np.mean(-beta / (1 + np.exp(beta * h))[:, None] * x[shard], axis=0)
        before = np.mean(((theta - theta.mean(0)) ** 2).sum(1))
        theta = w @ theta
        after = np.mean(((theta - theta.mean(0)) ** 2).sum(1))
        assert state.theta["theta"].numpy() == pytest.approx(theta, rel=1e-10)
        assert measures["consensus_error_before_mixing"] == pytest.approx(before, rel=1e-9)
        assert measures["consensus_error"] == pytest.approx(after, rel=1e-9)
        assert 0 < after < before


@pytest.mark.parametrize("graph", ["ring", "path", "star", "complete"])
def test_the_average_follows_the_weighted_updates(graph) -> None:
    """From a common start, whatever the graph, the first average is FedDPO's, weights by size included."""
    on = problems.problem("log_linear", sum(SIZES))
    optimizer = {"name": "sgd", "lr": 0.5, "batch_size": 2}
    averages = []
    for method in ({"name": "dec_dpo", "graph": graph}, {"name": "fed_dpo"}):
        learner = problems.learner(on, SIZES, method | {"local_steps": 3}, optimizer, weights="by_size")
        averages.append(problems.go(learner, rounds=1)[1][0])
    assert problems.apart(*averages) < 1e-12


def test_better_connected_is_closer() -> None:
    on = problems.problem("log_linear", 64)
    errors = []
    for graph in ("path", "ring", "hypercube", "complete"):
        learner = problems.learner(
            on,
            (8,) * 8,
            {"name": "dec_dpo", "graph": graph, "local_steps": 2, "rounds": 15},
            {"name": "sgd", "lr": 0.5},
        )
        errors.append(problems.go(learner)[2][-1]["consensus_error"])
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-25


def test_bytes_are_one_model_over_every_link_and_back() -> None:
    def sent(graph: str, name: str = "dec_dpo") -> int:
        settings = {"name": name} | ({"graph": graph} if name == "dec_dpo" else {})
        made = METHODS[name](
            METHODS[name].Settings(**settings), Population(weights=np.full(5, 1 / 5), seed=0)
        )
        return made.bytes_sent(2, model_bytes=100, data_bytes=10**9)

    assert sent("ring") == 100 * 10
    assert sent("path") == sent("star") == 100 * 8
    assert sent("complete") == 100 * 20
    assert sent("", "local_only") == sent("", "centralized") == 0


def test_centralizing_sends_the_data_once() -> None:
    made = METHODS["centralized"](
        METHODS["centralized"].Settings(name="centralized"), Population(weights=np.full(5, 1 / 5), seed=0)
    )
    assert [made.bytes_sent(round_, model_bytes=100, data_bytes=777) for round_ in (1, 2, 3)] == [777, 0, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"graph": "rnig"}, r"method\.graph: unknown name 'rnig'; did you mean 'ring'"),
        ({"weights": "metropolsi"}, r"method\.weights: unknown name"),
        ({"graph": "hypercube"}, r"method\.graph"),
    ],
)
def test_refused_before_anything_is_loaded(settings, message) -> None:
    with pytest.raises(InputError, match=message):
        DecDPOSettings(name="dec_dpo", **settings).check(5)
