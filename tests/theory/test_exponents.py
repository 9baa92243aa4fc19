"""Exponents: the fit on known powers, the leading order of client drift, and every claim."""

import numpy as np
import pytest

from prefmesh.theory import exponents, families
from prefmesh.theory.exponents import EXPONENTS, fit
from prefmesh.theory.laws import fed_dpo_fixed_point

NOISY = {"noise_floor_against_participation", "noise_floor_against_lr", "staleness_against_age"} | {
    "rounds_against_eps_with_noise"
}


def test_the_fit_finds_a_power():
    x = np.array([1.0, 2, 4, 8])
    exact = fit("x", "powers", 3.0, x, np.array([5 * x**3]))
    assert exact.fitted == pytest.approx(3)
    assert exact.interval == pytest.approx((3, 3))
    assert exact.agrees
    assert not fit("x", "powers", 2.8, x, np.array([x**3])).agrees


def test_the_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    x = np.array([1.0, 2, 4, 8])
    found = [fit("x", "", 1.0, x, x * random.gamma(20, 1 / 20, size=(8, 4))) for _ in range(400)]
    covered = np.mean([e.interval[0] <= 1 <= e.interval[1] for e in found])
    assert 0.91 <= covered <= 0.98  # 95 %, within three standard errors and the jackknife's own bias


def test_families_are_what_they_say():
    one = families.one_user(3)
    assert one.heterogeneity(one.optimum()) == pytest.approx(0, abs=1e-25)
    shared = [families.shared_pairs(spread) for spread in (0.5, 1.0)]
    assert shared[0].optimum() == pytest.approx(shared[1].optimum(), abs=1e-12)
    hessians = shared[1].agent_hessians(shared[1].optimum())
    assert hessians == pytest.approx(np.broadcast_to(hessians[0], hessians.shape))
    own = [families.own_pairs(spread) for spread in (0.1, 0.2)]
    for problem in own:
        assert problem.optimum() == pytest.approx(0, abs=1e-12)
    for few, more in (shared, own):
        assert more.heterogeneity(more.optimum()) == pytest.approx(4 * few.heterogeneity(few.optimum()))


def test_drift_on_own_pairs_to_leading_order():
    """docs/theory, eq. (3.18)."""
    problem, steps = families.own_pairs(0.5), 5
    lr, optimum = 1e-4, problem.optimum()
    pushed = (problem.agent_hessians(optimum) @ problem.agent_gradients(optimum)[:, :, None]).mean(0)[:, 0]
    predicted = np.linalg.solve(problem.hessian(optimum), lr * (steps - 1) / 2 * pushed)
    assert fed_dpo_fixed_point(problem, lr, steps) - optimum == pytest.approx(predicted, rel=5e-3)


def test_drift_on_shared_pairs_to_leading_order():
    """docs/theory, eq. (3.19), the third derivative by central differences."""
    problem, steps = families.shared_pairs(1.0), 5
    lr, optimum = 1e-3, problem.optimum()
    third = np.zeros(problem.dim)
    for b in problem.agent_gradients(optimum):
        h = 1e-3 * b / np.linalg.norm(b)
        slope = (problem.hessian(optimum + h) - problem.hessian(optimum - h)) / 2e-3
        third += slope @ b * np.linalg.norm(b) / problem.num_agents
    gradient = -(lr**2) * (steps - 1) * (2 * steps - 1) / 12 * third
    predicted = np.linalg.solve(problem.hessian(optimum), gradient)
    assert fed_dpo_fixed_point(problem, lr, steps) - optimum == pytest.approx(predicted, rel=5e-3)


@pytest.mark.parametrize(
    "exponent",
    [pytest.param(e, marks=[pytest.mark.slow] * (e.__name__ in NOISY), id=e.__name__) for e in EXPONENTS],
)
def test_every_claim(exponent):
    found = exponent(quick=False)
    assert found.agrees, (found.claimed, found.fitted, found.interval)
    low, high = found.interval
    assert low <= found.fitted <= high
    assert high - low < 0.2
    assert found.measured.shape[1] == len(found.against)
    assert exponents.TOLERANCE == 0.1
