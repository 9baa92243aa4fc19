"""Matrices as products of thin ones."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from prefmesh.compression import LowRank, compress, layout_of, message_seeds
from prefmesh.compression.message import reduce
from prefmesh.compression.seeds import normal, stage_seeds
from tests.compression.examples import error, flat, lone, rows

SEEDS = message_seeds(0, "test", 1, np.arange(2000))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(rank=st.integers(1, 3), of=st.integers(0, 3), seed=st.integers(0, 10**6))
@example(rank=3, of=3, seed=6853)  # a start that is nearly blind to one of the three directions
def test_exact_on_matrices_of_that_rank_or_less(dtype, rank, of, seed):
    """But for rounding, of which a column of M Q_0 holds the more, the shorter the part of it that is new."""
    random = np.random.default_rng(seed)
    x = torch.from_numpy(random.standard_normal((3, 10, of)) @ random.standard_normal((3, of, 12)))
    start = torch.from_numpy(normal(stage_seeds(SEEDS[:3], 0), 12 * rank)).double().reshape(3, 12, rank)
    new = torch.linalg.qr(x @ start).R.diagonal(dim1=1, dim2=2).abs().sort(1, descending=True).values
    length = torch.linalg.matrix_norm(x) * torch.linalg.matrix_norm(start)
    x = x.to(dtype)
    found = compress({"x": x}, (LowRank(rank=rank),), SEEDS[:3])["x"]
    if of == 0:
        assert not found.any()
    elif of <= rank:
        rounding = 10 * torch.finfo(dtype).eps * (length / new[:, of - 1]).max()
        assert (found - x).norm() <= rounding * x.norm()
    else:
        assert (found - x).norm() > 1e-3 * x.norm()


@given(rank=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_no_better_than_the_best_and_a_projection(rank, seed):
    """Eckart and Young: at least the squares of the singular values beyond r. ||C(M) - M||^2 = ||M||^2 - ||C(M)||^2."""
    x = rows([(9, 11)], 2, seed, torch.float64)
    found = compress(x, (LowRank(rank=rank),), SEEDS[:2])
    left = error(x, found)
    beyond = torch.linalg.svdvals(x["layer.0"])[:, rank:].square().sum(1)
    assert (left >= beyond * (1 - 1e-9)).all()
    assert torch.allclose(left, flat(x).square().sum(1) - flat(found).square().sum(1))


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("spectrum", ["flat", "falling"])
def test_contraction_where_it_is_tight_and_where_not(rank, spectrum):
    """Equal singular values: a random projection on r of 10 directions keeps r/10 of the squares, and no power helps."""
    x = torch.eye(10, 14, dtype=torch.float64)
    if spectrum == "falling":
        x = x * 0.5 ** torch.arange(10)[:, None]
    params = lone(x, len(SEEDS))
    errors = error(params, compress(params, (LowRank(rank=rank),), SEEDS)) / x.square().sum()
    delta = LowRank(rank=rank).contraction(layout_of(params))
    assert delta == rank / 10
    spread = float(5 * errors.std() / len(SEEDS) ** 0.5) + 1e-12
    if spectrum == "flat":
        assert errors.mean() == pytest.approx(1 - delta, abs=spread)
    else:
        assert errors.mean() < 1 - 2 * delta


def test_what_goes_whole():
    x = rows([(), (7,), (2, 2), (1, 9), (9, 8), (3, 5, 6)], 2, 0)
    sent = reduce(x, (LowRank(rank=1),), SEEDS[:2]).values
    assert {name: tuple(tensor.shape[1:]) for name, tensor in sent.items()} == {
        "layer.0": (),
        "layer.1": (7,),
        "layer.2": (2, 2),  # four numbers instead of four
        "layer.3": (1, 9),
        "layer.4/left": (9, 1),
        "layer.4/right": (8, 1),
        "layer.5/left": (3, 1),
        "layer.5/right": (30, 1),
    }
    assert sent["layer.2"] is x["layer.2"]
    assert LowRank(rank=8).contraction(layout_of(x)) == 1


def test_factors_are_of_one_length():
    sent = reduce(rows([(9, 8)], 2, 0), (LowRank(rank=2),), SEEDS[:2]).values
    left, right = (sent[f"layer.0/{side}"].norm(dim=1) for side in ("left", "right"))
    assert torch.allclose(left, right, rtol=1e-5)
