"""Stochastic rounding, and signs."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefmesh.compression import Int4, Int8, Sign, compress, layout_of, message_seeds
from tests.compression.examples import error, flat, lone, rows

SEEDS = message_seeds(0, "test", 1, np.arange(3000))


@pytest.mark.parametrize("stage", [Int8(), Int4()])
@given(x=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=12))
def test_entries_are_rounded_to_a_neighbouring_level(stage, x):
    row = torch.tensor([x], dtype=torch.float32)
    found = compress({"x": row}, (stage,), SEEDS[:1])["x"].double()
    step = row.abs().max().double() / stage.levels
    # Below float32's normal numbers a level itself is rounded, by 2^-150 at most.
    least = stage.levels * 2.0**-150
    assert ((found - row).abs() <= step * (1 + 1e-5) + least).all()
    top = row.abs() == row.abs().max()
    assert torch.allclose(found[top], row[top].double(), rtol=1e-6, atol=least)


@pytest.mark.parametrize("stage", [Int8(), Int4()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unbiased(stage, dtype):
    x = torch.from_numpy(np.random.default_rng(1).standard_normal(30)).to(dtype)
    found = compress(lone(x, len(SEEDS)), (stage,), SEEDS)["x"].double()
    step = x.abs().max().double() / stage.levels
    y = x.double().abs() / step
    p = y - y.floor()
    spread = step * (p * (1 - p) / len(SEEDS)).sqrt()
    # And what float32 rounds.
    assert ((found.mean(0) - x).abs() <= 5 * spread + 1e-6 * x.abs().max()).all()
    errors = (found - x).square().sum(1)
    expected = float((step.square() * p * (1 - p)).sum())
    assert errors.mean() == pytest.approx(expected, abs=float(5 * errors.std() / len(SEEDS) ** 0.5), rel=1e-4)


@pytest.mark.parametrize("stage", [Int8(), Int4()])
@pytest.mark.parametrize("d", [1, 3, 100, 20_000])
def test_variance_bound(stage, d):
    """On the worst kind of vector: one large entry, the others half a level."""
    x = torch.full((d,), 0.5 / stage.levels, dtype=torch.float64)
    x[0] = 1
    params = lone(x, 40)
    omega = stage.variance(layout_of(params))
    assert omega == min(d / (4 * stage.levels**2), d**0.5 / stage.levels)
    errors = error(params, compress(params, (stage,), SEEDS[:40]))
    assert errors.mean() <= omega * x.square().sum() + 1e-12
    assert stage.contraction(layout_of(params)) == (1 - omega if omega < 1 else None)


@pytest.mark.parametrize("size", [1e-300, 1e-44, 3e38])
def test_scales_at_the_ends_of_float32(size):
    """A scale is rounded up, so that no code is beyond the last level."""
    x = {"x": torch.tensor([[size, -size / 2, 0]], dtype=torch.float64)}
    found = compress(x, (Int8(),), SEEDS[:1])["x"][0]
    step = max(size, float(np.nextafter(np.float32(0), np.float32(1)))) / 127
    assert ((found - x["x"][0]).abs() <= step * (1 + 1e-6)).all()
    assert found[2] == 0


def test_a_scale_of_each_tensor_and_agent():
    x = {"a": torch.tensor([[127.0, 1], [1270, 10]]), "b": torch.tensor([[0.127], [0]])}
    found = compress(x, (Int8(),), SEEDS[:2])
    assert all(torch.allclose(found[name], x[name], rtol=1e-6) for name in x)


@given(st.integers(1, 40), st.integers(0, 10**6), st.booleans())
def test_sign_leaves_out_what_its_lemma_says(d, seed, ties):
    """||C(x) - x||^2 = ||x||^2 - ||x||_1^2 / d, zero entries or not, which is at most (1 - 1/d) ||x||^2."""
    x = rows([(d,)], 3, seed, torch.float64, ties=ties)
    squares, absolute = flat(x).square().sum(1), flat(x).abs().sum(1)
    found = error(x, compress(x, (Sign(),), SEEDS[:3]))
    assert torch.allclose(found, squares - absolute**2 / d, rtol=1e-6, atol=1e-6 * float(squares.max()))
    assert (found <= (1 - Sign().contraction(layout_of(x))) * squares * (1 + 1e-6) + 1e-12).all()


def test_sign_by_hand():
    x = {"a": torch.tensor([[1.0, -2, 0, 5]]), "b": torch.tensor([[-4.0]])}
    found = compress(x, (Sign(),), SEEDS[:1])
    assert found["a"].tolist() == [[2, -2, 2, 2]]
    assert found["b"].tolist() == [[-4]]
