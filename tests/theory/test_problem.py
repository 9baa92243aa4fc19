"""The log-linear problem: derivatives by finite differences, constants by brute force, the optimum, and bad input."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefmesh.randomness import generator
from prefmesh.theory.problem import LogLinearProblem, NoOptimum, shared_pairs


def drawn(
    seed: int = 0, sizes: tuple[int, ...] = (30, 45, 20), dim: int = 3, beta: float = 0.8
) -> LogLinearProblem:
    """Noisy users with tastes of their own."""
    random = generator(seed, "test problem")
    shards = []
    for n in sizes:
        x = random.normal(size=(n, dim))
        flip = random.random(n) > 1 / (1 + np.exp(-0.5 * x @ random.normal(size=dim)))
        shards.append(np.where(flip[:, None], -x, x))
    return LogLinearProblem(shards, beta)


@given(st.integers(0, 50))
def test_derivatives(seed: int) -> None:
    problem = drawn(seed)
    random = generator(seed, "test point")
    theta = random.normal(size=3)
    eye, eps = np.eye(3), 1e-6
    slope = [(problem.loss(theta + eps * e) - problem.loss(theta - eps * e)) / (2 * eps) for e in eye]
    np.testing.assert_allclose(problem.gradient(theta), slope, atol=1e-8)
    bend = [
        (problem.agent_gradients(theta + eps * e) - problem.agent_gradients(theta - eps * e)) / (2 * eps)
        for e in eye
    ]
    np.testing.assert_allclose(problem.agent_hessians(theta), np.stack(bend, axis=2), atol=1e-8)
    np.testing.assert_allclose(problem.hessian(theta), problem.agent_hessians(theta).mean(0), rtol=1e-12)
    # Every agent at a point of its own.
    own = random.normal(size=(3, 3))
    np.testing.assert_allclose(
        problem.agent_gradients(own), [problem.agent_gradients(own[i])[i] for i in range(3)], rtol=1e-12
    )


def test_values_by_hand() -> None:
    """Two agents of one and two pairs in one dimension, beta 2."""
    problem = LogLinearProblem([np.array([[1.0]]), np.array([[-1.0], [3.0]])], beta=2.0)
    losses = [np.log1p(np.exp(-2 * 0.5)), (np.log1p(np.exp(2 * 0.5)) + np.log1p(np.exp(-6 * 0.5))) / 2]
    assert problem.loss(np.array([0.5])) == pytest.approx(np.mean(losses), rel=1e-14)
    # beta^2 / 4 E[x^2]: 1 for the first agent, (1 + 9) / 2 for the second.
    assert problem.smoothness() == pytest.approx(5.0, rel=1e-14)


def test_noise_is_that_of_single_pairs() -> None:
    problem = drawn()
    theta = np.array([0.3, -0.2, 0.5])
    covariances, noises = [], []
    p = np.diag([1.0, 2.0, 3.0]) + 0.1
    for shard in problem.delta_features:
        one = [LogLinearProblem([pair[None]], problem.beta) for pair in shard]
        gradients = np.array([single.gradient(theta) for single in one])
        covariances.append(np.cov(gradients.T, bias=True))
        hessians = np.array([single.hessian(theta) for single in one])
        off = hessians - hessians.mean(0)
        noises.append((off @ p @ off).mean(0))
    np.testing.assert_allclose(problem.gradient_covariances(theta), covariances, atol=1e-14)
    np.testing.assert_allclose(problem.hessian_noise(theta, np.stack([p] * 3)), noises, atol=1e-14)
    traces = [float(np.trace(c)) for c in covariances]
    assert problem.gradient_noise(theta, 4) == pytest.approx(max(traces) / 4, rel=1e-12)
    assert problem.gradient_noise(theta, None) == 0
    gradients = problem.agent_gradients(theta)
    spread = [float(((g - gradients.mean(0)) ** 2).sum()) for g in gradients]
    assert problem.heterogeneity(theta) == pytest.approx(float(np.mean(spread)), rel=1e-12)


@given(st.integers(0, 30), st.sampled_from([0.05, 0.8, 5.0]))
def test_the_optimum(seed: int, beta: float) -> None:
    problem = drawn(seed, beta=beta)
    optimum = problem.optimum()
    assert np.linalg.norm(problem.gradient(optimum)) <= 1e-12
    assert problem.strong_convexity(optimum) > 0
    assert (problem.price_of_consensus() >= -1e-12).all()
    np.testing.assert_allclose(problem.grad_norm_sq(optimum[None])[0], 0, atol=1e-24)


def test_a_feature_that_never_differs_stays_at_zero() -> None:
    problem = drawn()
    wider = LogLinearProblem([np.pad(shard, ((0, 0), (0, 1))) for shard in problem.delta_features], 0.8)
    np.testing.assert_allclose(wider.optimum(), [*problem.optimum(), 0.0], atol=1e-9)


def test_users_on_the_same_pairs() -> None:
    x = drawn().delta_features[0]
    answered = x * np.where(np.arange(len(x)) % 3, 1.0, -1.0)[:, None]
    assert shared_pairs(LogLinearProblem([x, answered[::-1]], 1.0))
    assert not shared_pairs(drawn())
    both = LogLinearProblem([x, answered], 1.0)
    hessians = both.agent_hessians(np.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(hessians[0], hessians[1], rtol=1e-12)


ONE = np.array([[1.0, 2.0]])


@pytest.mark.parametrize(
    ("features", "beta", "message"),
    [
        ([], 1.0, r"delta_features: found no agent"),
        ([ONE, np.ones((2, 3))], 1.0, r"delta_features\[1\]: found width 3; allowed: 2"),
        ([np.ones(3)], 1.0, r"delta_features\[0\]: found shape \(3,\)"),
        ([np.ones((0, 3))], 1.0, r"delta_features\[0\]: found shape \(0, 3\)"),
        ([ONE, np.array([[1.0, 1.0], [np.nan, 0.0]])], 1.0, r"delta_features\[1\]: row 1 is not finite"),
        ([ONE], 0.0, r"beta: found 0.0"),
        ([ONE], -1.0, r"beta: found -1.0"),
        ([ONE], float("inf"), r"beta: found inf"),
    ],
)
def test_what_is_no_problem(features, beta, message) -> None:
    with pytest.raises(ValueError, match=message):
        LogLinearProblem(features, beta)


def test_separable_pairs_have_no_optimum() -> None:
    with pytest.raises(NoOptimum, match=r"delta_features: the 2 pairs are separable"):
        LogLinearProblem([np.array([[1.0, 0.0], [1.0, 0.5]])], 1.0).optimum()
    # Together they contradict each other; alone each agent's answers do not.
    torn = LogLinearProblem([np.array([[1.0]]), np.array([[-1.0]])], 1.0)
    np.testing.assert_allclose(torn.optimum(), [0.0], atol=1e-12)
    with pytest.raises(NoOptimum, match=r"delta_features\[0\]"):
        torn.agent_optima()


def test_shapes_of_theta() -> None:
    with pytest.raises(ValueError, match=r"theta: found shape \(2,\); allowed: \(3,\) or \(3, 3\)"):
        drawn().loss(np.zeros(2))
    with pytest.raises(ValueError, match=r"batch_size: found 0"):
        drawn().gradient_noise(np.zeros(3), 0)


def test_price_by_chance_is_the_mean_price_where_nobody_disagrees() -> None:
    """400 draws of one taste's answers, unequal shards; the law is of first order in 1/n."""
    rng = np.random.default_rng(0)
    sizes, taste = (150, 250, 450), np.array([0.8, -0.4, 0.2])
    prices, chance = [], np.zeros(3)
    for _ in range(400):
        shards = []
        for n in sizes:
            x = rng.normal(size=(n, 3))
            wrong = x @ taste + rng.logistic(size=n) < 0
            shards.append(np.where(wrong[:, None], -x, x))
        problem = LogLinearProblem(shards, 1.0)
        prices.append(problem.price_of_consensus())
        chance = problem.price_by_chance()
    ratio = np.mean(prices, 0) / chance  # standard error 0.04 each
    np.testing.assert_allclose(ratio, 1, atol=0.13)
    assert ratio.mean() == pytest.approx(1, abs=0.08)
    assert chance == pytest.approx(1.5 * (1 / 3 / np.array(sizes) + sum(1 / n for n in sizes) / 9))
