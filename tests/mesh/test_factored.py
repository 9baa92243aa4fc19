"""Averages of products: exact where the rank allows, the best approximation where it does not, factors in a known gauge."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from prefmesh.mesh import FactoredMesh, factor_pairs
from prefmesh.mesh.factored import ROW_NORM, average

IN, OUT, R = 9, 7, 3


def factors(agents: int, rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    shape = {"generator": random, "dtype": torch.float64}
    return torch.randn(agents, rank, IN, **shape), torch.randn(agents, OUT, rank, **shape)  # type: ignore[arg-type]


def test_exact_where_the_rank_allows() -> None:
    """Three agents of rank one: their average has rank three."""
    a, b = factors(3, 1)
    own = factors(1, R, seed=1)[0]
    w = torch.tensor([[0.5, 0.2, 0.3]], dtype=torch.float64)
    mixed_a, mixed_b = average(w, a[None], b[None], own)
    wanted = 0.5 * b[0] @ a[0] + 0.2 * b[1] @ a[1] + 0.3 * b[2] @ a[2]
    torch.testing.assert_close(mixed_b[0] @ mixed_a[0], wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(mixed_a[0] @ mixed_a[0].T, torch.eye(R, dtype=torch.float64) / 3)
    # In float32, to what the issue asks for.
    mixed_a, mixed_b = average(w.float(), a[None].float(), b[None].float(), own.float())
    found = mixed_b[0] @ mixed_a[0]
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_else_nothing_of_that_rank_is_nearer() -> None:
    a, b = factors(4, R)
    w = torch.full((1, 4), 0.25, dtype=torch.float64)
    mixed_a, mixed_b = average(w, a[None], b[None], a[:1])
    wanted = torch.einsum("kor,kri->oi", b, a) / 4
    lost = float((mixed_b[0] @ mixed_a[0] - wanted).norm())
    values = np.linalg.svd(wanted.numpy(), compute_uv=False)
    assert lost == pytest.approx(np.sqrt((values[R:] ** 2).sum()), rel=1e-10)
    assert lost > 0.1


def test_ones_own_model_stays_and_so_do_its_factors() -> None:
    """With A's rows orthogonal and of that norm, nothing turns: moments go on in their directions."""
    a = torch.linalg.qr(factors(1, R)[0].mT).Q.mT * ROW_NORM
    b = factors(1, R)[1]
    w = torch.ones(1, 1, dtype=torch.float64)
    mixed_a, mixed_b = average(w, a[None], b[None], a)
    torch.testing.assert_close(mixed_a, a, rtol=0, atol=1e-12)
    torch.testing.assert_close(mixed_b, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_what_has_learned_nothing_can(rank) -> None:
    """B's columns of a product of less than full rank are zero, A's rows there are not, and lie in the agent's own."""
    a, b = factors(2, R)
    b[:, :, rank:] = 0
    a[1, :rank], b[1] = a[0, :rank], b[0]
    w = torch.full((1, 2), 0.5, dtype=torch.float64)
    mixed_a, mixed_b = average(w, a[None], b[None], a[:1])
    wanted = b[0] @ a[0]
    torch.testing.assert_close(mixed_b[0] @ mixed_a[0], wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(mixed_a[0] @ mixed_a[0].T, torch.eye(R, dtype=torch.float64) / 3)
    spanned = torch.linalg.lstsq(a[0].T, mixed_a[0].T).solution
    torch.testing.assert_close(a[0].T @ spanned, mixed_a[0].T, rtol=0, atol=1e-10)


def test_every_agent_its_neighbours() -> None:
    """Agents with one, two and three terms; a tensor that is no factor is averaged as it is."""
    a, b = factors(3, R)
    bias = torch.arange(6.0, dtype=torch.float64).view(3, 2)
    w = np.array([[1, 0, 0], [0.5, 0.5, 0], [0.25, 0.25, 0.5]])
    theta = {"x.lora_A": a.clone(), "x.lora_B": b.clone(), "bias": bias.clone()}
    mixed = FactoredMesh.of(3).mix(csr_array(w), theta)
    torch.testing.assert_close(mixed["bias"], torch.from_numpy(w) @ bias)
    dense = b @ a
    for i in range(3):
        u, s, v = torch.linalg.svd(torch.einsum("k,koi->oi", torch.from_numpy(w[i]), dense))
        best = u[:, :R] @ torch.diag(s[:R]) @ v[:R]
        torch.testing.assert_close(mixed["x.lora_B"][i] @ mixed["x.lora_A"][i], best, rtol=0, atol=1e-10)


def test_pairs_need_both() -> None:
    assert factor_pairs(["x.lora_A", "x.lora_B", "y.lora_B", "w"]) == [("x.lora_A", "x.lora_B")]


def test_what_diverged_stays_seen() -> None:
    a, b = factors(2, R)
    b[1, 0, 0] = torch.inf
    mixed_a, mixed_b = average(torch.full((1, 2), 0.5, dtype=torch.float64), a[None], b[None], a[:1])
    assert mixed_a.shape == (1, R, IN)
    assert mixed_b.shape == (1, OUT, R)
    assert not torch.isfinite(mixed_b).any()
