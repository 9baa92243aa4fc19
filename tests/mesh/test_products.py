"""Products across the rows of one process: W Theta by three kernels, and a server's weighted sum."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from prefmesh.mesh.products import mix, weighted_sum
from prefmesh.topology.build import build_mixing_matrix
from tests.strategies import mixing_matrices


@given(mixing_matrices(most=12), st.sampled_from([(), (3,), (2, 3)]), st.integers(0, 10**6))
def test_mixing_is_the_matrix_product(mixing, shape, seed) -> None:
    rows = np.random.default_rng(seed).normal(size=(mixing.agents, *shape))
    expected = np.tensordot(mixing.matrix.toarray(), rows, axes=1)
    found = mix(mixing.matrix, torch.from_numpy(rows))
    assert found.shape == rows.shape
    assert found.numpy() == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-14), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("graph", ["complete", "ring"])
def test_precisions_are_kept(graph, dtype, tolerance) -> None:
    matrix = build_mixing_matrix(graph, "metropolis", agents=6, seed=0).matrix
    rows = torch.linspace(-1, 1, 24, dtype=torch.float64).view(6, 4)
    found = mix(matrix, rows.to(getattr(torch, dtype)))
    assert found.dtype == getattr(torch, dtype)
    assert torch.allclose(found.double(), torch.from_numpy(matrix.toarray()) @ rows, atol=tolerance)


def test_a_shared_row_stays_what_it_is() -> None:
    """An expanded view, stride 0: mixing equal rows changes nothing."""
    matrix = build_mixing_matrix("ring", "metropolis", agents=5, seed=0).matrix
    rows = torch.tensor([[1.0, 2.0]]).expand(5, 2)
    assert torch.allclose(mix(matrix, rows), rows)


def test_what_goes_in_is_not_changed() -> None:
    matrix = build_mixing_matrix("path", "metropolis", agents=4, seed=0).matrix
    rows = torch.arange(8.0).view(4, 2)
    mix(matrix, rows)
    assert rows.flatten().tolist() == list(range(8))


def test_a_directed_matrix_takes_from_where_it_says() -> None:
    """Row i takes column j: agent 0 takes all of agent 1, 1 of 2, 2 of 0."""
    matrix = sparse.csr_array(np.roll(np.eye(3), 1, axis=1))
    assert mix(matrix, torch.tensor([[0.0], [1.0], [2.0]])).flatten().tolist() == [1, 2, 0]


def test_weighted_sum_by_hand() -> None:
    rows = torch.tensor([[[1.0, 2.0]], [[10.0, 20.0]]])
    found = weighted_sum(torch.tensor([0.25, 2.0], dtype=torch.float64), rows)
    assert found.shape == (1, 1, 2)
    assert found.dtype == torch.float32
    assert found.flatten().tolist() == [20.25, 40.5]
