"""Every chain: shapes, types, independence of agents, numbers that are not finite, and the contraction that it promises."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefmesh.compression import TopK, compress, contraction, layout_of, message_bytes, message_seeds
from prefmesh.compression.layout import Spec
from tests.compression.examples import CHAINS, SHAPES, error, flat, lone, rows

chains = st.sampled_from(sorted(CHAINS))
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


def seeds(agents: int, round_: int = 1) -> list[int]:
    return message_seeds(0, "test", round_, np.arange(agents))


@given(chains, SHAPES, st.integers(0, 3), st.integers(0, 99), dtypes)
def test_shapes_types_and_what_goes_in_are_kept(chain, shapes, agents, seed, dtype):
    x = rows(shapes, agents, seed, dtype)
    before = {name: tensor.clone() for name, tensor in x.items()}
    found = compress(x, CHAINS[chain], seeds(agents))
    assert list(found) == list(x)
    for name, tensor in x.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, dtype)
        assert found[name].isfinite().all()
        assert torch.equal(tensor, before[name])


@given(chains, SHAPES, st.integers(2, 6), st.integers(0, 99), st.booleans())
def test_an_agent_alone_sends_what_it_sends_among_others(chain, shapes, agents, seed, ties):
    """Seeds are of the agent and the round. (Small rows: sums over an agent's own are added up in one order.)"""
    x = rows(shapes, agents, seed, torch.float64, ties=ties)
    together = compress(x, CHAINS[chain], seeds(agents))
    for i in range(agents):
        alone = compress({k: t[i : i + 1] for k, t in x.items()}, CHAINS[chain], seeds(agents)[i : i + 1])
        for name, tensor in alone.items():
            # Matrix products of one and of several agents may round otherwise.
            assert torch.allclose(tensor[0], together[name][i], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chain", [c for c in CHAINS if not any(s.name == "low_rank" for s in CHAINS[c])])
def test_and_does_so_to_the_bit(chain):
    x = rows([(300,), (20, 30)], 4, 0)
    together = compress(x, CHAINS[chain], seeds(4))
    alone = compress({k: t[2:3] for k, t in x.items()}, CHAINS[chain], seeds(4)[2:3])
    assert all(torch.equal(alone[name], together[name][2:3]) for name in x)


@pytest.mark.parametrize("chain", CHAINS)
def test_the_same_seeds_give_the_same_and_another_round_another(chain):
    x = rows([(9, 8), (50,)], 2, 0)
    one, again, other = (compress(x, CHAINS[chain], seeds(2, round_)) for round_ in (1, 1, 2))
    assert torch.equal(flat(one), flat(again))
    draws = {stage.name for stage in CHAINS[chain]} - {"top_k", "sign"}
    assert torch.equal(flat(one), flat(other)) == (not draws)


def test_agents_with_equal_rows_draw_their_own():
    found = compress(lone(torch.linspace(-1, 1, 40), 2), CHAINS["int4"], seeds(2))["x"]
    assert not torch.equal(found[0], found[1])


@given(chains, SHAPES, st.integers(0, 99), st.sampled_from([np.nan, np.inf, -np.inf]), dtypes, st.data())
def test_what_is_not_finite_stays_visible_and_stays_with_its_agent(chain, shapes, seed, bad, dtype, data):
    x = rows(shapes, 3, seed, dtype)
    clean = compress(x, CHAINS[chain], seeds(3))
    name = data.draw(st.sampled_from(sorted(x)))
    x[name][1].view(-1)[data.draw(st.integers(0, x[name][1].numel() - 1))] = bad
    found = compress(x, CHAINS[chain], seeds(3))
    assert not flat(found)[1].isfinite().all()
    assert torch.equal(flat(found)[[0, 2]], flat(clean)[[0, 2]])


@given(chains, SHAPES)
def test_zero_stays_zero(chain, shapes):
    x = {name: torch.zeros_like(tensor) for name, tensor in rows(shapes, 2, 0).items()}
    assert not flat(compress(x, CHAINS[chain], seeds(2))).any()


def test_an_empty_chain_sends_all():
    x = rows([(3, 4), (5,)], 2, 0)
    assert torch.equal(flat(compress(x, (), seeds(2))), flat(x))
    assert message_bytes(layout_of(x), ()) == 4 * 17
    assert contraction(layout_of(x), ()) == 1


@settings(derandomize=True)  # a bound on a mean of draws: the same ones every time
@given(chains, SHAPES, st.integers(0, 10**6), st.booleans(), st.sampled_from([1, 5]))
def test_contraction(chain, shapes, seed, ties, power):
    """E||C(x) - x||^2 <= (1 - delta) ||x||^2, the mean of 200 draws within 5 of its standard errors. Powers: a few large entries."""
    draws = 200
    x = {
        name: (row**power).expand(draws, *row.shape[1:])
        for name, row in rows(shapes, 1, seed, torch.float64, ties=ties).items()
    }
    delta = contraction(layout_of(x), CHAINS[chain])
    if delta is None:
        return
    assert 0 < delta <= 1
    errors = error(x, compress(x, CHAINS[chain], message_seeds(seed, "test", 1, np.arange(draws))))
    norm = flat(x)[0].square().sum()
    # Scales in float32, and means that are nearly deterministic.
    slack = 5 * errors.std() / draws**0.5 + 1e-6 * norm
    assert errors.mean() <= (1 - delta) * norm + slack


def test_contraction_of_a_chain_by_hand():
    d, k, s = 1000, 100, 127
    layout = {"x": Spec((d,), torch.float32)}
    omega = min(k / (4 * s**2), k**0.5 / s)
    assert contraction(layout, CHAINS["largest in int8"]) == pytest.approx(k / d * (1 - omega))
    assert contraction(layout, (TopK(share=0.1), TopK(share=0.1))) == pytest.approx(0.01)
    # sqrt(d)/s and d/(4 s^2) are both above 1: nothing is promised.
    assert contraction(layout, CHAINS["int4"]) is None
    assert contraction(layout, CHAINS["random, unbiased"]) is None
    assert contraction({"x": Spec((9, 8), torch.float32)}, CHAINS["low rank"]) == 2 / 8
    assert contraction({"x": Spec((9, 8), torch.float32)}, CHAINS["factors in int8"]) is None
