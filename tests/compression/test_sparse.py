"""Few entries of many: the largest, or any."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefmesh.compression import RandomK, TopK, compress, message_seeds
from prefmesh.compression.sparse import kept, largest
from tests.compression.examples import error, flat, lone, rows

SEEDS = message_seeds(0, "test", 1, np.arange(4000))


@given(st.integers(1, 60), st.data(), st.integers(0, 10**6), st.booleans())
def test_top_k_keeps_exactly_the_largest(d, data, seed, ties):
    """By a stable sort: of equal ones the first."""
    k = data.draw(st.integers(1, d))
    x = flat(rows([(d,)], 3, seed, ties=ties))
    found = largest(x, k).numpy()
    for row, mask in zip(x.numpy(), found, strict=True):
        order = np.argsort(-np.abs(row), kind="stable")
        assert set(np.flatnonzero(mask)) == set(order[:k].tolist())


def test_top_k_by_hand_over_all_tensors():
    x = {"a": torch.tensor([[[1.0, -5.0], [0.0, 2.0]]]), "b": torch.tensor([[-3.0, 0.5]])}
    found = compress(x, (TopK(share=0.5),), SEEDS[:1])  # 3 of 6
    assert found["a"].tolist() == [[[0, -5], [0, 2]]]
    assert found["b"].tolist() == [[-3, 0]]


@given(st.integers(1, 50), st.data(), st.integers(0, 10**6))
def test_top_k_contracts_every_time(d, data, seed):
    k = data.draw(st.integers(1, d))
    x = {"x": flat(rows([(d,)], 2, seed)) ** 3}
    stage = TopK(share=k / d)
    left = error(x, compress(x, (stage,), SEEDS[:2]))
    delta = kept(stage.share, d) / d
    assert (left <= (1 - delta) * flat(x).square().sum(1) * (1 + 1e-12)).all()


def test_top_k_says_that_something_is_not_finite():
    x = {"x": torch.tensor([[1.0, torch.nan, -torch.inf, 3.0]])}
    found = compress(x, (TopK(share=0.5),), SEEDS[:1])["x"]
    assert np.array_equal(found.numpy(), [[0, np.nan, -np.inf, 0]], equal_nan=True)


@pytest.mark.parametrize(
    ("share", "of", "k"), [(0.07, 100, 7), (0.07, 101, 8), (1e-9, 5, 1), (1.0, 5, 5), (0.3, 1, 1)]
)
def test_shares_are_rounded_up(share, of, k):
    assert kept(share, of) == k


def test_random_k_keeps_k_as_they_are_each_equally_often():
    d, k, draws = 20, 5, len(SEEDS)
    x = torch.arange(1.0, d + 1)
    found = compress(lone(x, draws), (RandomK(share=k / d),), SEEDS)["x"]
    there = found != 0
    assert (there.sum(1) == k).all()
    assert torch.equal(found, torch.where(there, x, 0))
    p = k / d
    assert ((there.double().mean(0) - p).abs() <= 5 * (p * (1 - p) / draws) ** 0.5).all()


def test_unbiased_random_k():
    d, k, draws = 20, 5, len(SEEDS)
    x = torch.linspace(-1, 2, d, dtype=torch.float64)
    stage = RandomK(share=k / d, unbiased=True)
    found = compress(lone(x, draws), (stage,), SEEDS)["x"]
    # Each entry is d/k x_i with probability k/d: its variance is (d/k - 1) x_i^2.
    spread = ((d / k - 1) * x.square() / draws).sqrt()
    assert ((found.mean(0) - x).abs() <= 5 * spread + 1e-12).all()
    errors = (found - x).square().sum(1)
    assert errors.mean() == pytest.approx(
        (d / k - 1) * float(x.square().sum()), abs=float(5 * errors.std() / draws**0.5)
    )


def test_the_first_of_a_large_vector_are_no_likelier():
    """Positions of a large vector are drawn by another of the library's algorithms: their mean is (d - 1)/2."""
    d, k = 200_000, 20
    found = compress(lone(torch.ones(d), 50), (RandomK(share=k / d),), SEEDS[:50])["x"]
    places = found.nonzero()[:, 1].double()
    assert len(places) == 50 * k
    assert places.mean() == pytest.approx((d - 1) / 2, abs=5 * d / (12 * len(places)) ** 0.5)
