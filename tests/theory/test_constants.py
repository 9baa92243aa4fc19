"""Constants on any policy against the log-linear closed forms, and their estimates against what they estimate."""

import numpy as np
import pytest
import torch

from prefmesh.algorithms.gradients import loss_and_gradient
from prefmesh.theory.constants import (
    GradientMoments,
    NotLogLinear,
    as_log_linear,
    gradient_moments,
    price_of_consensus,
)
from prefmesh.theory.curvature import to_vector
from tests import problems

SIZES = [7, 12, 9]
UNIFORM = np.full(3, 1 / 3)
THETA = np.linspace(-1, 1, problems.DIM)


def measured(
    kind: str = "log_linear",
    *,
    pairs: int | None = None,
    weights: np.ndarray = UNIFORM,
    sizes: list[int] = SIZES,
    seed: int = 0,
) -> GradientMoments:
    on = problems.problem(kind, sum(sizes), beta=0.5)
    row = {"theta": torch.as_tensor(THETA[None])} if kind == "log_linear" else on.policy.initial(0)
    return gradient_moments(
        on, row, problems.shards(sizes), weights, pairs=pairs, random=np.random.default_rng(seed)
    )


def test_over_all_pairs_they_are_the_closed_forms() -> None:
    on = problems.problem("log_linear", sum(SIZES), beta=0.5)
    exact = as_log_linear(on, problems.shards(SIZES), UNIFORM)
    found = measured()
    assert found.exact
    assert found.heterogeneity() == pytest.approx(exact.heterogeneity(THETA), rel=1e-12)
    assert found.heterogeneity_error() == 0
    assert found.gradient_noise(4) == pytest.approx(exact.gradient_noise(THETA, 4), rel=1e-12)
    assert found.gradient_noise(None) == 0
    assert found.grad_norm_sq() == pytest.approx(np.square(exact.gradient(THETA)).sum(), rel=1e-12)
    assert found.loss == pytest.approx(exact.loss(THETA), rel=1e-12)
    gradients = exact.agent_gradients(THETA)
    np.testing.assert_allclose(found.unbiased, gradients @ gradients.T, rtol=1e-12, atol=1e-15)


def test_agents_count_by_their_weights() -> None:
    weights = np.array([0.5, 0.3, 0.2])
    on = problems.problem("log_linear", sum(SIZES), beta=0.5)
    gradients = as_log_linear(on, problems.shards(SIZES), UNIFORM).agent_gradients(THETA)
    around = gradients - weights @ gradients
    assert measured(weights=weights).heterogeneity() == pytest.approx(weights @ np.square(around).sum(1))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_language_models_by_single_pairs(kind: str) -> None:
    """Against one pair after the other."""
    on = problems.problem(kind, sum(SIZES), beta=0.5)
    found = measured(kind)
    one = torch.ones(1, 1, dtype=torch.float64)
    single = np.array(
        [
            to_vector(loss_and_gradient(on, on.policy.initial(0), np.array([[j]]), one)[1])
            for j in range(sum(SIZES))
        ]
    )
    shards = problems.shards(SIZES)
    means = np.array([single[shard].mean(0) for shard in shards])
    noise = max(single[shard].var(axis=0).sum() for shard in shards)
    assert found.gradient_noise(1) == pytest.approx(noise, rel=1e-9)
    np.testing.assert_allclose(found.inner, means @ means.T, rtol=1e-9)


def test_estimates_from_some_pairs_are_unbiased_and_know_their_error() -> None:
    """400 draws of 24 of 60 to 80 pairs: means within 4 standard errors, the claimed standard error within 40 %."""
    sizes = [60, 80, 70]
    exact = measured(sizes=sizes)
    found = [measured(pairs=24, sizes=sizes, seed=seed) for seed in range(400)]
    assert not found[0].exact
    assert found[0].measured.tolist() == [24, 24, 24]
    for values, truth in (
        ([m.heterogeneity() for m in found], exact.heterogeneity()),
        ([m.grad_norm_sq() for m in found], exact.grad_norm_sq()),
        ([m.gradient_noises(1)[1] for m in found], exact.gradient_noises(1)[1]),
        ([m.unbiased[0, 0] for m in found], exact.unbiased[0, 0]),
        ([m.loss for m in found], exact.loss),
    ):
        error = np.std(values) / np.sqrt(len(values))
        assert abs(np.mean(values) - truth) < 4 * error
    # Without the correction, the same draws are off by far.
    naive = np.mean([m.weights @ np.diag(m.inner) - m.weights @ m.inner @ m.weights for m in found])
    assert naive > 1.5 * exact.heterogeneity()
    claimed = np.sqrt(np.mean([m.heterogeneity_error() ** 2 for m in found]))
    assert 0.7 < claimed / np.std([m.heterogeneity() for m in found]) < 2


def test_draws_of_several_pairs_have_the_noise_of_single_ones() -> None:
    """A policy that does not stack takes pairs four at a time."""
    exact = measured("full").gradient_noises(1)[1]
    values = [measured("full", pairs=8, seed=seed).gradient_noises(1)[1] for seed in range(12)]
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values) - exact) < 4 * error
    assert error < 0.3 * exact


def test_an_agent_with_one_pair_has_no_noise() -> None:
    on = problems.problem("log_linear", 5, beta=0.5)
    found = gradient_moments(
        on, on.policy.initial(0), problems.shards([1, 4]), np.full(2, 0.5), pairs=None, random=np.random.default_rng(0)
    )  # fmt: skip
    assert found.gradient_noises(1)[0] == 0
    assert np.isfinite(found.heterogeneity())


def test_refused() -> None:
    with pytest.raises(ValueError, match="pairs: found 1; allowed: at least 2"):
        measured(pairs=1)
    with pytest.raises(ValueError, match="batch_size: found 0"):
        measured().gradient_noise(0)


def test_who_has_no_closed_form_says_why() -> None:
    shards = problems.shards(SIZES)
    total = sum(SIZES)
    for on, weights, why in (
        (problems.problem("lora", total, beta=0.5), UNIFORM, "no log-linear"),
        (problems.problem("log_linear", total, loss_type="hinge", beta=0.5), UNIFORM, "not plain DPO"),
        (problems.problem("log_linear", total, label_smoothing=0.1), UNIFORM, "not plain DPO"),
        (problems.problem("log_linear", total, beta=0.5), np.array([0.5, 0.3, 0.2]), "do not weigh the same"),
    ):
        with pytest.raises(NotLogLinear, match=why):
            as_log_linear(on, shards, weights)


def test_no_price_where_an_agent_alone_has_no_optimum() -> None:
    """Two pairs in five dimensions can always be ranked."""
    on = problems.problem("log_linear", 60, beta=0.5)
    exact, prices, why = price_of_consensus(on, problems.shards([30, 30]), np.full(2, 0.5))
    assert (exact is not None, why) == (True, "")
    assert (prices > 0).all()
    exact, prices, why = price_of_consensus(on, problems.shards([58, 2]), np.full(2, 0.5))
    assert exact is not None
    assert prices is None
    assert why.startswith("delta_features[1]")
