"""Cosines that chance is taken out of, and groups of agents, against planted ones."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist, squareform

from prefmesh.algorithms.similarity import (
    attenuation,
    cosines,
    find_groups,
    inner_products,
    mean_silhouette,
)
from prefmesh.preferences.town.users import simplex


def planted(
    agents: int, groups: int, *, noise: float, dimensions: int = 60, common: float = 0.5, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Inner products, chance and ghosts of unit vectors: a common part and the group's; `noise` is chance's squared length."""
    random = np.random.default_rng(seed)
    true = np.zeros((agents, dimensions))
    own = np.arange(agents) % groups
    true[:, : groups - 1] = np.sqrt(1 - common**2) * simplex(groups)[own]
    true[:, groups - 1] = common
    errors, ghosts = random.standard_normal((2, agents, dimensions)) * np.sqrt(noise / dimensions)
    seen = true + errors
    return seen @ seen.T, np.full(agents, noise), ghosts @ ghosts.T, own


def test_inner_products_are_those_of_all_tensors_together() -> None:
    random = torch.Generator().manual_seed(0)
    gradients = {"a": torch.randn(3, 4, 5, generator=random), "b": torch.randn(3, 2, generator=random)}
    flat = torch.cat([tensor.flatten(1) for tensor in gradients.values()], dim=1).double().numpy()
    np.testing.assert_allclose(inner_products(gradients), flat @ flat.T, rtol=1e-12)


def test_cosines_without_chance() -> None:
    vectors = np.array([[2.0, 0.0], [0.0, 0.5], [-3.0, 3.0]])
    half = np.sqrt(0.5)
    expected = [[1, 0, -half], [0, 1, half], [-half, half, 1]]
    np.testing.assert_allclose(cosines(vectors @ vectors.T, np.zeros(3)), expected, atol=1e-15)


def test_chance_shortens_cosines_and_is_taken_out() -> None:
    """Averaged over 400 draws: measured cosines are too small by the attenuation, corrected ones are right to first order
    (they divide by estimated lengths)."""
    right, measured, shown = [], [], []
    for seed in range(400):
        inner, chance, _, _ = planted(4, 2, noise=0.25, seed=seed)
        right.append(cosines(inner, chance)[0, 1:3])
        measured.append(inner[0, 2] / np.sqrt(inner[0, 0] * inner[2, 2]))
        shown.append(attenuation(inner, chance)[0, 2])
    # Two groups at angle pi in the personal part: 0.25 - 0.75 between them, 1 within.
    np.testing.assert_allclose(np.mean(right, axis=0), [-0.5, 1.0], atol=0.02)
    assert np.mean(measured) == pytest.approx(0.8, abs=0.01)  # 1 / (1 + noise)
    assert np.mean(shown) == pytest.approx(0.8, abs=0.01)


def test_an_agent_that_is_all_noise_is_not_told() -> None:
    inner = np.diag([1.0, 1.0, 1.0, 1.0]) + 0.2
    chance = np.array([0.1, 0.1, 0.1, 1.15])  # of 1.2
    found = cosines(inner, chance)
    assert np.isnan(found[3]).all()
    assert np.isnan(found[:, 3]).all()
    assert np.isfinite(found[:3, :3]).all()
    groups = find_groups(inner, chance, np.diag(chance), np.random.default_rng(0))
    assert groups.label.tolist() == [0, 0, 0, -1]
    assert groups.count == 1
    assert groups.order.tolist() == [0, 1, 2, 3]


def test_silhouette_by_hand() -> None:
    """Points 0, 1 and 10 on a line, the last one alone: (10 - 1)/10, (9 - 1)/9 and 0."""
    distance = squareform(pdist([[0.0], [1.0], [10.0]]))
    label = np.array([0, 0, 1])
    assert mean_silhouette(distance, label) == pytest.approx((0.9 + 8 / 9 + 0) / 3)
    assert mean_silhouette(distance, label, blur=18.0) == pytest.approx((9 / 28 + 8 / 27 + 0) / 3)


@pytest.mark.parametrize(("agents", "groups"), [(8, 2), (9, 3), (12, 4)])
@pytest.mark.parametrize("noise", [0.02, 0.5])
def test_planted_groups_are_found(agents: int, groups: int, noise: float) -> None:
    inner, chance, ghosts, own = planted(agents, groups, noise=noise)
    found = find_groups(inner, chance, ghosts, np.random.default_rng(0))
    assert found.label.tolist() == own.tolist()
    assert found.p_value <= 0.05
    assert (np.diff(own[found.order]) >= 0).all()


def test_where_there_are_no_groups_none_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Agents all over a sphere, agents of one taste, and agents along a line: at most the 5 % of a test of 5 %, and luck."""
    monkeypatch.setattr("prefmesh.algorithms.similarity.REFERENCE_DRAWS", 99)
    wrong = 0
    for seed in range(8):
        random = np.random.default_rng(seed)
        sphere = random.standard_normal((8, 5))
        line = np.outer(random.standard_normal(8), np.eye(5)[0]) + 3 * np.eye(5)[1]
        for true in (sphere, line, np.tile(np.eye(5)[0], (8, 1))):
            true = np.hstack([true / np.linalg.norm(true, axis=1, keepdims=True), np.zeros((8, 35))])
            errors, ghosts = random.standard_normal((2, 8, 40)) * np.sqrt(0.3 / 40)
            seen = true + errors
            found = find_groups(seen @ seen.T, np.full(8, 0.3), ghosts @ ghosts.T, random)
            wrong += found.count > 1
    # Binomial(24, 0.05) is above 4 once in 170 times.
    assert wrong <= 4


@pytest.mark.parametrize("agents", [1, 2])
def test_too_few_to_look_for_groups(agents: int) -> None:
    found = find_groups(
        np.eye(agents), np.zeros(agents), np.zeros((agents, agents)), np.random.default_rng(0)
    )
    assert found.count == 1
    assert np.isnan(found.silhouette)
