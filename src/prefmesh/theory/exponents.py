"""Exponents: how errors grow with S, eta, E, zeta, q_max and eps, fitted in log-log from exact fixed points and simulations.

Every function names the family of problems on which its claim stands (docs/theory, section 3.7), and returns claimed
slope, fitted slope and its 95 % interval. `EXPONENTS` lists them all. `quick` draws a third of the seeds; what is
exact costs a second either way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import linregress, t

from prefmesh.theory import families, rates, simulate
from prefmesh.theory.laws import fed_dpo_fixed_point
from prefmesh.theory.problem import LogLinearProblem
from prefmesh.topology.build import build_mixing_matrix

TOLERANCE = 0.1


@dataclass(frozen=True, kw_only=True)
class Exponent:
    """`measured` (seeds, points) against `against` (points,): a power law with exponent `claimed`, and the fitted one."""

    name: str
    problems: str
    against: Float[np.ndarray, " points"]
    measured: Float[np.ndarray, "seeds points"]
    claimed: float | int
    fitted: float
    interval: tuple[float, float]

    @property
    def agrees(self) -> bool:
        """Whether the fitted exponent is within 0.1 of the claimed one."""
        return abs(self.fitted - self.claimed) <= TOLERANCE


def fit(
    name: str,
    problems: str,
    claimed: float | int,
    against: Float[np.ndarray, " points"],
    measured: Float[np.ndarray, "seeds points"],
) -> Exponent:
    """The least-squares slope of the mean over seeds, in log-log.

    The 95 % interval is that of the slope over seeds; of one seed, that of the regression, which is how far from a
    straight line the points lie.
    """
    x = np.log(against)
    line = linregress(x, np.log(measured.mean(0)))
    if len(measured) == 1:
        half = t.ppf(0.975, len(x) - 2) * line.stderr
    else:
        # What leaving one seed out does to the slope (jackknife): the mean is taken before the logarithm.
        k = len(measured)
        slopes = [linregress(x, np.log(np.delete(measured, i, 0).mean(0))).slope for i in range(k)]
        half = t.ppf(0.975, k - 1) * np.sqrt((k - 1) * np.var(slopes))
    return Exponent(
        name=name,
        problems=problems,
        against=against,
        measured=measured,
        claimed=claimed,
        fitted=float(line.slope),
        interval=(float(line.slope - half), float(line.slope + half)),
    )


# ---- client drift: how far the fixed point of FedDPO is from theta*, exactly

OWN = "own pairs (Hessians differ), full batches, S = N, eta Lam E << 1"
SHARED = "shared pairs (one Hessian), full batches, S = N, eta Lam E << 1"


def drift_against_lr_on_own_pairs(*, quick: bool = True, seed: int = 0) -> Exponent:
    """Eq. (3.18): 1."""
    problem = families.own_pairs(0.5, seed=seed)
    lrs = np.geomspace(0.002, 0.02, 5) / problem.smoothness()
    return fit("drift against eta", OWN, 1.0, lrs, _drifts([(problem, lr, 4) for lr in lrs]))


def drift_against_lr_on_shared_pairs(*, quick: bool = True, seed: int = 0) -> Exponent:
    """Eq. (3.19): 2."""
    problem = families.shared_pairs(1.0, seed=seed)
    lrs = np.geomspace(0.002, 0.02, 5) / problem.smoothness()
    return fit("drift against eta", SHARED, 2.0, lrs, _drifts([(problem, lr, 4) for lr in lrs]))


def drift_against_local_steps_on_own_pairs(*, quick: bool = True, seed: int = 0) -> Exponent:
    """Eq. (3.18): 1 in E - 1."""
    problem = families.own_pairs(0.5, seed=seed)
    steps, lr = np.array([2, 3, 5, 9, 17]), 0.002 / problem.smoothness()
    measured = _drifts([(problem, lr, int(local_steps)) for local_steps in steps])
    return fit("drift against E - 1", OWN, 1.0, steps - 1.0, measured)


def drift_against_local_steps_on_shared_pairs(*, quick: bool = True, seed: int = 0) -> Exponent:
    """Eq. (3.19): 1 in (E - 1)(2E - 1), so 2 in E once E is large."""
    problem = families.shared_pairs(1.0, seed=seed)
    steps, lr = np.array([2, 3, 5, 9, 17]), 0.002 / problem.smoothness()
    measured = _drifts([(problem, lr, int(local_steps)) for local_steps in steps])
    against = (steps - 1.0) * (2 * steps - 1)
    return fit("drift against (E - 1)(2E - 1)", SHARED, 1.0, against, measured)


def drift_against_heterogeneity_on_own_pairs(*, quick: bool = True, seed: int = 0) -> Exponent:
    """Eq. (3.18): 1 in zeta, with the Hessians kept."""
    problems = [families.own_pairs(spread, seed=seed) for spread in (1 / 32, 1 / 16, 1 / 8, 1 / 4)]
    return _drift_against_heterogeneity(OWN, 1.0, problems)


def drift_against_heterogeneity_on_shared_pairs(*, quick: bool = True, seed: int = 0) -> Exponent:
    """Eq. (3.19): 2 in zeta."""
    problems = [families.shared_pairs(spread, seed=seed) for spread in (0.125, 0.25, 0.5, 1.0)]
    return _drift_against_heterogeneity(SHARED, 2.0, problems)


def _drift_against_heterogeneity(
    family: str, claimed: float, problems: Sequence[LogLinearProblem]
) -> Exponent:
    zeta = np.sqrt([problem.heterogeneity(problem.optimum()) for problem in problems])
    measured = _drifts([(problem, 0.005 / problem.smoothness(), 4) for problem in problems])
    return fit("drift against zeta", family, claimed, zeta, measured)


def _drifts(points: Sequence[tuple[LogLinearProblem, float, int]]) -> Float[np.ndarray, "seeds points"]:
    """||theta_fixed - theta*|| for each problem, step size and E."""
    return np.array([[np.linalg.norm(fed_dpo_fixed_point(*point) - point[0].optimum()) for point in points]])


# ---- what remains of noise

ONE_USER = "one user's pairs at all agents (zeta = 0), minibatches, E = 1, eta Lam << 1"


def noise_floor_against_participation(*, quick: bool = True, seed: int = 0) -> Exponent:
    """Eq. (3.13), noise: -1 in S."""
    agents, participation = 16, [1, 2, 4, 8, 16]
    problem = families.one_user(agents, seed=seed)
    seeds = 4 if quick else 12
    settings = [{"participation": s} for s in participation]
    measured = _floor(problem, 0.04 / problem.smoothness(), settings, seeds, 2500, batch_size=4)
    return fit("noise floor against S", ONE_USER, -1.0, np.array(participation, dtype=float), measured)


def noise_floor_against_lr(*, quick: bool = True, seed: int = 0) -> Exponent:
    """Eq. (3.13), noise: 1 in eta."""
    problem = families.one_user(2, seed=seed)
    share = np.array([0.02, 0.04, 0.08])
    seeds = 8 if quick else 24
    measured = [
        _floor(
            problem,
            part / problem.smoothness(),
            [{}],
            seeds,
            int((60 if quick else 120) / part),
            batch_size=4,
        )[:, 0]
        for part in share
    ]
    return fit("noise floor against eta", ONE_USER, 1.0, share / problem.smoothness(), np.stack(measured, 1))


def staleness_against_age(*, quick: bool = True, seed: int = 0) -> Exponent:
    """Eq. (3.13), staleness: 1 in q_max; the excess over the floor without staleness, the same minibatches in all runs."""
    problem = families.one_user(2, seed=seed)
    ages, seeds = [0, 1, 2, 4, 8], 8 if quick else 24
    floors = [
        _floor(
            problem,
            0.02 / problem.smoothness(),
            [{"staleness": age, "staleness_schedule": "max"}],
            seeds,
            2000 if quick else 5000,
            batch_size=8,
        )[:, 0]
        for age in ages
    ]
    excess = np.stack(floors[1:], 1) - floors[0][:, None]
    return fit(
        "staleness against q_max",
        ONE_USER + ", eta Lam q_max << 1",
        1.0,
        np.array(ages[1:], dtype=float),
        excess,
    )


def _floor(
    problem: LogLinearProblem,
    lr: float,
    settings: Sequence[dict[str, Any]],
    seeds: int,
    rounds: int,
    *,
    batch_size: int,
) -> Float[np.ndarray, "seeds settings"]:
    """The mean of ||grad f||^2 over rounds, started at theta* and burnt in for a tenth of them; FedDPO with E = 1."""
    members = [
        simulate.Member(problem, "fed_dpo", own, seed=seed) for seed in range(seeds) for own in settings
    ]
    ensemble = simulate.Ensemble(members, lr, rounds=rounds, batch_size=batch_size)
    visited = np.array([theta[ensemble.agents[:-1]] for theta in ensemble.run(problem.optimum())])
    visited = visited[rounds // 10 :].swapaxes(0, 1)
    squares = problem.grad_norm_sq(visited.reshape(-1, problem.dim)).reshape(len(members), -1).mean(1)
    return squares.reshape(seeds, len(settings))


def consensus_error_against_lr(*, quick: bool = True, seed: int = 0) -> Exponent:
    """Eq. (4.8): 2 in eta."""
    problem = families.own_pairs(0.5, agents=8, seed=seed)
    w = build_mixing_matrix("ring", "metropolis", problem.num_agents, seed=0).matrix
    lrs = np.geomspace(0.001, 0.01, 4) / problem.smoothness()
    found = [
        simulate.dec_dpo(problem, w, lr, 200, theta0=problem.optimum()).consensus_error[-1] for lr in lrs
    ]
    family = "own pairs on a ring of 8, full batches, eta Lam << 1 - rho"
    return fit("consensus error against eta", family, 2.0, lrs, np.array([found]))


# ---- rounds to reach eps, in the sense of the bounds: the mean over rounds of the squared gradient norm


def rounds_against_eps_without_noise(*, quick: bool = True, seed: int = 0) -> Exponent:
    """Eq. (3.17): 1 in 1/eps at a constant step size."""
    problem = families.one_user(2, seed=seed)
    eps = np.geomspace(1e-3, 1e-4, 4)
    run = simulate.fed_dpo(problem, 1 / problem.smoothness(), 1000)
    family = "one user's pairs, full batches; the mean over rounds (the last iterate needs log(1/eps))"
    found = np.array([[float(_rounds_until(run.grad_norm_sq, e)) for e in eps]])
    return fit("rounds against 1/eps", family, 1.0, 1 / eps, found)


def rounds_against_eps_with_noise(*, quick: bool = True, seed: int = 0) -> Exponent:
    """Eq. (3.17): 2 in 1/eps, the step size being the one that the bound asks for at each eps."""
    problem = families.one_user(2, seed=seed)
    # Well below the squared gradient norm at the start (0.046): 0.04 is reached almost at once, and its slope is another.
    eps = np.array([0.01, 0.005, 0.003])
    seeds = 4 if quick else 12
    found = rates.constants(
        problem, region=np.array([np.zeros(problem.dim), problem.optimum()]), batch_size=2
    )
    measured = []
    for e in eps:
        asked = rates.rounds_to(float(e), "fed_dpo", **found)
        assert asked.rounds is not None
        members = [simulate.Member(problem, "fed_dpo", seed=s) for s in range(seeds)]
        ensemble = simulate.Ensemble(members, asked.lr, rounds=asked.rounds, batch_size=2)
        sums, needed = np.zeros(seeds), np.zeros(seeds)
        for r, theta in enumerate(ensemble.run(), start=1):
            sums += problem.grad_norm_sq(theta[ensemble.agents[:-1]])
            needed[(needed == 0) & (sums <= e * r)] = r
            if needed.all():
                break
        assert needed.all(), "the bound's own number of rounds was not enough"
        measured.append(needed)
    family = "one user's pairs, minibatches, eta chosen for eps; the mean over rounds"
    return fit("rounds against 1/eps", family, 2, 1 / eps, np.array(measured).T)


def _rounds_until(squares: Float[np.ndarray, " rounds"], eps: float) -> int:
    """The smallest R with (1/R) sum over the first R of them <= eps."""
    mean = np.cumsum(squares) / np.arange(1, len(squares) + 1)
    assert mean.min() <= eps
    return int((mean <= eps).argmax()) + 1


EXPONENTS: tuple[Callable[..., Exponent], ...] = (
    drift_against_lr_on_own_pairs,
    drift_against_lr_on_shared_pairs,
    drift_against_local_steps_on_own_pairs,
    drift_against_local_steps_on_shared_pairs,
    drift_against_heterogeneity_on_own_pairs,
    drift_against_heterogeneity_on_shared_pairs,
    noise_floor_against_participation,
    noise_floor_against_lr,
    staleness_against_age,
    consensus_error_against_lr,
    rounds_against_eps_without_noise,
    rounds_against_eps_with_noise,
)
