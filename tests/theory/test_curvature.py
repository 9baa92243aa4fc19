"""Hessian-vector products against finite differences and closed forms; Lanczos against numpy's eigenvalues."""

import dataclasses

import numpy as np
import pytest
import torch

from prefmesh.algorithms.gradients import global_loss_and_gradient
from prefmesh.theory.curvature import (
    ends_of_spectrum,
    from_vector,
    hessian_ends,
    hessian_vector_product,
    to_vector,
)
from prefmesh.theory.problem import LogLinearProblem
from tests import problems

PAIRS = 6


def moved(kind: str, size: float = 0.05) -> tuple:
    """A problem, a model off the reference, all rows, and unequal weights that add up to 1."""
    on = problems.problem(kind, PAIRS, beta=0.5)
    made = torch.Generator().manual_seed(1)
    row = {
        name: tensor + size * torch.randn(tensor.shape, generator=made, dtype=tensor.dtype)
        for name, tensor in on.policy.initial(0).items()
    }
    weights = np.arange(1.0, PAIRS + 1) / np.arange(1.0, PAIRS + 1).sum()
    return on, row, np.arange(PAIRS), weights


def explicit_hessian(on, row, rows, weights) -> np.ndarray:
    x = (on.data.chosen - on.data.rejected).numpy()[rows]
    theta = to_vector(row)
    s = 1 / (1 + np.exp(-0.5 * x @ theta))
    return 0.25 * (x * (weights * s * (1 - s))[:, None]).T @ x


def test_vectors_and_back() -> None:
    _, row, _, _ = moved("lora")
    again = from_vector(to_vector(row), row)
    assert list(again) == list(row)
    assert problems.apart(again, row) == 0


@pytest.mark.parametrize("kind", ["lora", "full", "lora/llama"])
def test_products_are_differences_of_gradients(kind: str) -> None:
    """float64; through attention, its softmax, layer norms and the head. (Llama's own code works in float32 in places.)"""
    on, row, rows, weights = moved(kind)
    v = np.random.default_rng(0).standard_normal(len(to_vector(row)))
    v /= np.linalg.norm(v)
    found = hessian_vector_product(on, row, rows, weights, v)
    eps, close = (1e-2, 1e-3) if kind == "lora/llama" else (1e-5, 1e-6)

    def gradient(sign: float) -> np.ndarray:
        step = from_vector(sign * eps * v, row)
        here = {name: tensor + step[name] for name, tensor in row.items()}
        return to_vector(global_loss_and_gradient(on, here, rows, weights)[1])

    numeric = (gradient(1) - gradient(-1)) / (2 * eps)
    assert np.linalg.norm(found - numeric) < close * np.linalg.norm(numeric)


def test_products_of_the_log_linear_policy_are_exact() -> None:
    on, row, rows, weights = moved("log_linear")
    v = np.random.default_rng(0).standard_normal(problems.DIM)
    np.testing.assert_allclose(
        hessian_vector_product(on, row, rows, weights, v),
        explicit_hessian(on, row, rows, weights) @ v,
        rtol=1e-10,
    )


def test_a_piecewise_linear_loss_has_no_curvature() -> None:
    on = problems.problem("log_linear", PAIRS, loss_type="hinge", beta=0.5)
    row, rows = on.policy.initial(0), np.arange(PAIRS)
    v = np.ones(problems.DIM)
    assert (hessian_vector_product(on, row, rows, np.full(PAIRS, 1 / PAIRS), v) == 0).all()
    found = hessian_ends(
        on, row, rows, np.full(PAIRS, 1 / PAIRS), random=np.random.default_rng(0), tolerance=1e-6, most_products=9
    )  # fmt: skip
    assert found.size == 0


def test_passes_are_added_up() -> None:
    on, row, rows, weights = moved("lora")

    class Narrow:
        """The same policy with room for few tokens."""

        tokens_per_pass = 100

        def __getattr__(self, name):
            return getattr(on.policy, name)

    v = np.ones(len(to_vector(row)))
    narrow = dataclasses.replace(on, policy=Narrow())
    np.testing.assert_allclose(
        hessian_vector_product(narrow, row, rows, weights, v),
        hessian_vector_product(on, row, rows, weights, v),
        rtol=1e-9,
        atol=1e-12,
    )


@pytest.mark.parametrize("kind", ["log_linear", "lora"])
def test_ends_are_those_of_the_explicit_hessian(kind: str) -> None:
    on, row, rows, weights = moved(kind)
    if kind == "log_linear":
        hessian = explicit_hessian(on, row, rows, weights)
    else:
        # Some directions of a language model: its whole Hessian would be thousands of products.
        hessian = np.array(
            [hessian_vector_product(on, row, rows, weights, v)[:40] for v in np.eye(len(to_vector(row)))[:40]]
        )
        assert np.abs(hessian - hessian.T).max() < 1e-12 * np.abs(hessian).max()
    random = np.random.default_rng(3)
    values = np.linalg.eigvalsh(hessian)
    found = ends_of_spectrum(
        lambda v: hessian @ v,
        random.standard_normal(len(hessian)),
        tolerance=1e-10,
        most_products=len(hessian),
    )
    assert found.largest == pytest.approx(values[-1], rel=1e-8)
    assert found.smallest == pytest.approx(values[0], abs=1e-8 * values[-1])
    assert found.size == pytest.approx(np.abs(values).max(), rel=1e-8)
    assert np.linalg.norm(hessian @ found.vector) == pytest.approx(found.size, rel=1e-6)


def test_a_language_model_is_not_convex_and_both_ends_are_found() -> None:
    on, row, rows, weights = moved("lora")
    found = hessian_ends(
        on, row, rows, weights, random=np.random.default_rng(0), tolerance=0.02, most_products=40
    )
    assert found.smallest < 0 < found.largest
    assert found.products <= 40
    # Ritz pairs: the claimed eigenvector stretches as claimed, but for the claimed error.
    stretched = hessian_vector_product(on, row, rows, weights, found.vector)
    end = found.largest if found.largest > -found.smallest else found.smallest
    assert np.linalg.norm(stretched - end * found.vector) <= 1.01 * found.error + 1e-9


def test_stopped_early_it_bounds_from_inside_and_says_how_far() -> None:
    values = np.linspace(-1, 3, 200)
    found = ends_of_spectrum(lambda v: values * v, np.ones(200), tolerance=1e-12, most_products=8)
    assert found.products == 8
    assert -1 < found.smallest < found.largest < 3
    assert np.abs(values - found.largest).min() <= found.error
    assert found.error > 0


def test_a_start_at_an_eigenvector_of_another_agent_misleads_nobody() -> None:
    """Agent 1's eigenvector lies in the null space of agent 0."""
    shards = [np.array([[3.0, 0.0], [3.0, 0.0]]), np.array([[0.0, 1.0], [0.0, 1.0]])]
    from prefmesh.theory.simulate import _as_trained

    on = _as_trained(np.concatenate(shards), 1.0)
    row = on.policy.initial(0)
    found = hessian_ends(
        on, row, np.array([0, 1]), np.full(2, 0.5), random=np.random.default_rng(0), tolerance=1e-8,
        most_products=10, near=np.array([0.0, 1.0]),
    )  # fmt: skip
    assert found.size == pytest.approx(9 / 4)
    assert LogLinearProblem(shards, 1.0).smoothness() == pytest.approx(9 / 4)
