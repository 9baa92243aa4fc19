"""What a plan needs to know of a problem: its constants, what they guarantee, and a rough extrapolation where no law is exact.

On a log-linear problem the constants are exact. For any other policy they are measured from gradients of sampled pairs at the
start, and `Extrapolation` supposes that the loss keeps falling as it does there: a guide for choosing, not a prediction.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from prefmesh.algorithms.gradients import global_loss_and_gradient, inner
from prefmesh.experiment import Experiment
from prefmesh.policies.base import Params
from prefmesh.randomness import generator
from prefmesh.theory.forecast import Setting
from prefmesh.theory.problem import LogLinearProblem, NoOptimum

PAIRS = 8
"""Pairs of each agent whose gradients are taken, one by one."""
POWER_STEPS = 5


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
    """At the start, from up to eight pairs of every agent; smoothness by power iteration on differences of gradients.

    sigma^2 and zeta^2 are free of the sample's own noise; smoothness is the curvature of the sampled loss along the direction
    found after five steps, so an estimate from below.
    """
    problem, row = experiment.learner.problem, experiment.start
    random = generator(experiment.config.seed, "plan constants")
    rows = [
        random.choice(agent.train, min(PAIRS, len(agent.train)), replace=False)
        for agent in experiment.division.agents
    ]
    means, losses, noise = [], [], []
    for own in rows:
        each = [global_loss_and_gradient(problem, row, own[k : k + 1], np.ones(1)) for k in range(len(own))]
        mean = {name: sum(gradient[name] for _, gradient in each) / len(own) for name in row}
        spread = sum(inner(gradient, gradient) for _, gradient in each) / len(own) - inner(mean, mean)
        noise.append(spread * len(own) / max(1, len(own) - 1))
        losses.append(np.mean([loss for loss, _ in each]))
        means.append(mean)
    agents = len(rows)
    pooled = {name: sum(mean[name] for mean in means) / agents for name in row}
    own_noise = float(np.mean([s / len(own) for s, own in zip(noise, rows, strict=True)]))
    norm, apart = (
        inner(pooled, pooled),
        float(np.mean([inner(m, m) for m in means])) - inner(pooled, pooled),
    )
    return Constants(
        smoothness=_curvature(experiment, np.concatenate(rows), row, pooled),
        noise=float(max(noise)),
        heterogeneity=max(0.0, apart - own_noise * (1 - 1 / agents)),
        delta=float(np.mean(losses)),
        strong_convexity=None,
        gradient_norm_sq=max(norm - own_noise / agents, 0.01 * norm),
        loss=float(np.mean(losses)),
        exact=False,
    )


def _curvature(experiment: Experiment, rows: np.ndarray, row: Params, direction: Params) -> float:
    """||H v|| after some steps of power iteration, H v = (grad f(theta + eps v) - grad f(theta)) / eps."""
    problem, weights = experiment.learner.problem, np.full(len(rows), 1 / len(rows))
    here = global_loss_and_gradient(problem, row, rows, weights)[1]
    found = 0.0
    for _ in range(POWER_STEPS):
        length = inner(direction, direction) ** 0.5
        if length == 0:
            break
        eps = 1e-3 * max(1.0, inner(row, row) ** 0.5) / length
        there = {name: row[name] + eps * direction[name] for name in row}
        moved = global_loss_and_gradient(problem, there, rows, weights)[1]
        direction = {name: (moved[name] - here[name]) / eps for name in row}
        found = inner(direction, direction) ** 0.5 / length
    return found


@dataclass(frozen=True, kw_only=True)
class Guaranteed:
    """What the bounds of sections 3 and 4 promise of a setting: the mean of E||grad f||^2 over its rounds, at most.

    `bound` is None, and `why` says so, where no theorem applies.
    """

    bound: float | None
    why: str


def guaranteed(constants: Constants, setting: Setting, rounds: int, agents: int) -> Guaranteed:
    """docs/theory, sections 3 (FedDPO) and 4 (DecDPO, E = 1)."""
    if not constants.exact:
        return Guaranteed(bound=None, why="constants measured on a sample bound nothing")
    lam, zeta, eta, e = constants.smoothness, constants.heterogeneity, setting.lr, setting.local_steps
    sigma = constants.noise / setting.batch_size if setting.batch_size else 0.0
    if setting.method == "fed_dpo":
        limit, s = 1 / (8 * lam * e), setting.participants(agents)
        sampling = (agents - s) / (s * (agents - 1)) if agents > 1 else 0.0
        bound = (
            8 / 3 * (constants.delta / (eta * e * rounds) + lam * eta * sigma / s)
            + 16 / 3 * lam * eta * e * sampling * zeta
            + 6.4 * lam**2 * eta**2 * (e - 1) * (sigma + 3 * e * zeta)
        )
    elif e > 1:
        return Guaranteed(bound=None, why="the bound on DecDPO here is for one local step")
    else:
        rho = setting.mixing(agents).rho
        gap = 1 - rho**2
        limit = min(1 / lam, gap / (4 * lam * rho * (1 + rho**2) ** 0.5) if rho > 0 else np.inf)
        error = 8 / 3 * rho**2 * eta**2 * (sigma / gap + 4 * zeta / gap**2)
        bound = 2 * constants.delta / (eta * rounds) + lam * eta * sigma / agents + lam**2 * error
    if eta > limit:
        return Guaranteed(
            bound=None, why=f"lr is above {limit:.4g}, up to which the bound holds: nothing is guaranteed"
        )
    return Guaranteed(
        bound=float(bound), why=f"lr is at most {limit:.4g}; the mean of ||grad f||^2 over the rounds"
    )


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
