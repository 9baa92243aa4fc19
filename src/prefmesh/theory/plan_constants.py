"""What a plan needs to know of a problem: its constants, what they guarantee, and a rough extrapolation where no law is exact.

On a log-linear problem the constants are exact. For any other policy they are measured from gradients of sampled pairs at the
start, and `Extrapolation` supposes that the loss keeps falling as it does there: a guide for choosing, not a prediction.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from prefmesh.experiment import Experiment
from prefmesh.randomness import generator
from prefmesh.theory import rates
from prefmesh.theory.constants import gradient_moments
from prefmesh.theory.curvature import hessian_ends
from prefmesh.theory.forecast import Setting
from prefmesh.theory.problem import LogLinearProblem, NoOptimum

PAIRS = 8
"""Pairs of each agent whose gradients are taken, one by one."""
PRODUCTS = 10
"""Products with the Hessian, at most."""


@dataclass(frozen=True, kw_only=True)
class Constants:
    """`noise` is sigma^2 of a single pair, `delta` f(theta_0) - f* (f* >= 0 where it is not known), the rest as in section 2.

    `gradient_norm_sq` and `loss` are those of the start. `exact`: computed, and not measured on a sample.
    """

    smoothness: float
    noise: float
    heterogeneity: float
    delta: float
    strong_convexity: float | None
    gradient_norm_sq: float
    loss: float
    exact: bool


def of_log_linear(problem: LogLinearProblem, points: Float[np.ndarray, "points dim"]) -> Constants:
    """Exact ones; noise and heterogeneity are the largest at `points`, those that descent visits from the first on."""
    start = problem.loss(points[0])
    try:
        optimum = problem.optimum()
        delta, convexity = start - problem.loss(optimum), problem.strong_convexity(optimum)
    except NoOptimum:
        delta, convexity = start, None
    return Constants(
        smoothness=problem.smoothness(),
        noise=max(problem.gradient_noise(theta, 1) for theta in points),
        heterogeneity=max(problem.heterogeneity(theta) for theta in points),
        delta=delta,
        strong_convexity=convexity,
        gradient_norm_sq=float(problem.grad_norm_sq(points[:1])[0]),
        loss=start,
        exact=True,
    )


def measured(experiment: Experiment) -> Constants:
    """At the start, from up to eight pairs of every agent (docs/theory/landscape.md).

    sigma^2 and zeta^2 are free of the sample's own noise; smoothness is the norm of the sampled loss's Hessian.
    """
    problem, row, seed = experiment.learner.problem, experiment.start, experiment.config.seed
    shards, weights = (
        [agent.train for agent in experiment.division.agents],
        experiment.method.population.weights,
    )
    random = generator(seed, "plan constants")
    moments = gradient_moments(problem, row, shards, weights, pairs=PAIRS, random=random)
    sampled = [random.choice(shard, min(PAIRS, len(shard)), replace=False) for shard in shards]
    share = np.concatenate(
        [np.full(len(rows), w / len(rows)) for rows, w in zip(sampled, weights, strict=True)]
    )
    ends = hessian_ends(
        problem, row, np.concatenate(sampled), share, random=random, tolerance=0.1, most_products=PRODUCTS
    )
    norm = float(weights @ moments.inner @ weights)
    return Constants(
        smoothness=ends.size,
        noise=moments.gradient_noise(1),
        heterogeneity=max(0.0, moments.heterogeneity()),
        delta=moments.loss,
        strong_convexity=None,
        gradient_norm_sq=max(moments.grad_norm_sq(), 0.01 * norm),
        loss=moments.loss,
        exact=False,
    )


@dataclass(frozen=True, kw_only=True)
class Guaranteed:
    """What the bounds of sections 3 and 4 promise of a setting: the mean of E||grad f||^2 over its rounds, at most.

    `bound` is None, and `why` says so, where no theorem applies.
    """

    bound: float | None
    why: str


def guaranteed(constants: Constants, setting: Setting, rounds: int, agents: int) -> Guaranteed:
    """docs/theory, eq. (3.13) for FedDPO and (4.10) for DecDPO."""
    if not constants.exact:
        return Guaranteed(bound=None, why="constants measured on a sample bound nothing")
    known = {
        "smoothness": constants.smoothness,
        "delta": constants.delta,
        "noise": constants.noise / setting.batch_size if setting.batch_size else 0.0,
        "heterogeneity": constants.heterogeneity,
    }
    run = {"lr": setting.lr, "rounds": rounds, "agents": agents, "local_steps": setting.local_steps}
    if setting.method == "fed_dpo":
        found = rates.fed_dpo(**known, **run, participation=setting.participants(agents))  # type: ignore[arg-type]
    else:
        found = rates.dec_dpo(**known, **run, rho=setting.mixing(agents).rho)  # type: ignore[arg-type]
    if not found.holds:
        return Guaranteed(bound=None, why=f"nothing is guaranteed: {found.message}")
    return Guaranteed(bound=found.total, why="the mean of ||grad f||^2 over the rounds is at most this")


class Extrapolation:
    """Rounds to a target if the loss kept falling as at the start (docs/theory, eq. 7.14): not a prediction.

    Supposes ||grad f||^2 >= 2 mu f with mu taken from the start, that is, that descent could go on to a loss of zero.
    """

    def __init__(self, constants: Constants, target: float, agents: int):
        if not 0 < target < constants.loss:
            raise ValueError(
                f"target_loss: found {target:.6g}; allowed: between 0 and {constants.loss:.6g}, the loss at the start"
            )
        self.constants, self.target, self.agents = constants, target, agents
        self.mu = constants.gradient_norm_sq / (2 * constants.loss)

    def rounds(self, setting: Setting) -> int | None:
        """The first round that is foreseen at or below the target; None where noise, sampling or drift keep it above."""
        known, n = self.constants, self.agents
        eta, e, s = setting.lr, setting.local_steps, setting.participants(n)
        lam, zeta = known.smoothness, known.heterogeneity
        rate = 2 * self.mu * eta * (1 - eta * lam / 2)
        if not 0 < rate < 1:
            return None
        sigma = known.noise / setting.batch_size if setting.batch_size else 0.0
        rho = setting.mixing(n).rho if setting.method == "dec_dpo" else 0.0
        sampling = (n - s) / (s * (n - 1)) if n > 1 else 0.0
        apart = eta**2 * zeta * ((e - 1) ** 2 / 3 + (rho * e / (1 - rho)) ** 2)
        floor = (
            lam * eta**2 * sigma / (2 * s * rate)
            + lam * (eta * e) ** 2 * sampling * zeta / (2 * (1 - (1 - rate) ** e))
            + lam**2 * eta * apart / (2 * rate)
        )
        if floor >= self.target:
            return None
        steps = np.log((known.loss - floor) / (self.target - floor)) / -np.log1p(-rate)
        return max(1, int(np.ceil(steps / e)))
