"""DecDPO's stationary law: the agents' consensus error and the average model's scatter (docs/theory, section 5.4)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.sparse import csr_array

from prefmesh.theory.laws.fixed_points import settle
from prefmesh.theory.laws.local_steps import (
    LocalSteps,
    check_steps,
    fixed_noise,
    scatter_along,
    scattered_noise,
)
from prefmesh.theory.laws.lyapunov import Covariances, Periodic, PhaseBlocks, Symmetric
from prefmesh.theory.laws.self_consistent import linear_fixed_point, repeated
from prefmesh.theory.laws.smoothed import Smoothed
from prefmesh.theory.problem import LogLinearProblem, Rows, check_batch_size
from prefmesh.theory.simulate import Matrix, period


@dataclass(frozen=True, kw_only=True)
class DecDPOLaw:
    """All agents in the long run, after mixing; with a period of matrices, the mean over its rounds.

    `bias` + `variance` = E[e], e = (1/N) sum_i ||theta_i - mean||^2: the part of the mean models and that of the noise.
    `fixed_point` (N, d) are the mean models after the period's last matrix. `average_covariance` (d, d) is that of the
    average model, and `excess_loss` its expected loss above f(theta*), in nats.
    """

    bias: float
    variance: float
    fixed_point: Rows
    average_covariance: Float[np.ndarray, "dim dim"]
    excess_loss: float

    @property
    def consensus_error(self) -> float:
        """E[e]."""
        return self.bias + self.variance


def dec_dpo_stationary(
    problem: LogLinearProblem,
    mixing_matrix: Matrix | Sequence[Matrix],
    lr: float,
    batch_size: int | None,
    local_steps: int = 1,
    hessian_noise: bool = True,
) -> DecDPOLaw:
    """The law of DecDPO with a mixing matrix, or a sequence of them used in turn (round r uses number r - 1).

    `batch_size` None: full shards, no variance. `hessian_noise`: with the random Hessian of the minibatch, which the law
    of first order in lr leaves out. Raises `ValueError` naming the argument: no mixing matrix, or an unstable `lr`.

    A symmetric W costs one eigendecomposition of size N d and a few products; others, and periods, some twenty products.
    """
    mixing = _checked(problem, mixing_matrix, lr, local_steps, batch_size)
    theta, phases = settle(problem, mixing, lr, local_steps)
    if batch_size is None:
        return _law(problem, theta, phases, None)
    solver = _solver(mixing, phases)

    def scattered(noise: PhaseBlocks) -> PhaseBlocks:
        pairs = zip(phases, solver.solve(noise).blocks, strict=True)
        return np.array([scattered_noise(steps, batch_size, block) for steps, block in pairs])

    noise = np.array([fixed_noise(steps, batch_size, hessian_noise) for steps in phases])
    if hessian_noise:
        noise = linear_fixed_point(noise, scattered)
    return _law(problem, theta, phases, solver.solve(noise))


def dec_dpo_gaussian(
    problem: LogLinearProblem,
    mixing_matrix: Matrix | Sequence[Matrix],
    lr: float,
    batch_size: int | None,
    local_steps: int = 1,
) -> DecDPOLaw:
    """The same by Gaussian closure: gradients, Hessians and noise are means over the scatter itself (5.21).

    Good to larger steps, at the price of an eigendecomposition per iteration. `bias` and `fixed_point` are those of the
    mean models, which the noise shifts along the loss's third derivative.
    """
    mixing = _checked(problem, mixing_matrix, lr, local_steps, batch_size)
    theta, phases = settle(problem, mixing, lr, local_steps)
    if batch_size is None:
        return _law(problem, theta, phases, None)
    found = None

    def next_spread(spread: np.ndarray) -> np.ndarray:
        nonlocal theta, phases, found
        theta, phases = settle(problem, mixing, lr, local_steps, spread, theta)
        noise = np.array([fixed_noise(steps, batch_size, False) for steps in phases])
        found = _solver(mixing, phases).solve(noise)
        pairs = zip(phases, found.blocks, strict=True)
        return np.array([scatter_along(steps, batch_size, block) for steps, block in pairs])

    repeated(next_spread, np.zeros((len(phases), *phases[0].contraction.shape)))
    return _law(problem, theta, phases, found, smoothed=True)


def _solver(mixing: Sequence[csr_array], phases: Sequence[LocalSteps]) -> Symmetric | Periodic:
    jacobians = [steps.jacobian for steps in phases]
    if Symmetric.suits(mixing, jacobians):
        return Symmetric(mixing[0], jacobians[0])
    return Periodic(mixing, jacobians)


def _law(
    problem: LogLinearProblem,
    theta: Rows,
    phases: Sequence[LocalSteps],
    found: Covariances | None,
    smoothed: bool = False,
) -> DecDPOLaw:
    """Means over the rounds of the period, each taken where the round starts."""
    starts = np.array([steps.points[0] for steps in phases])
    means = starts.mean(1)
    bias = float(np.square(starts - means[:, None]).sum(2).mean())
    average = np.zeros((len(phases), problem.dim, problem.dim)) if found is None else found.average
    variance = 0.0
    if found is not None:
        traces = np.trace(found.blocks, axis1=2, axis2=3).mean(1) - np.trace(average, axis1=1, axis2=2)
        variance = max(0.0, float(traces.mean()))  # a difference, which rounds where W = J
    losses = []
    for mean, p in zip(means, average, strict=True):
        if smoothed:
            every = np.tile(mean, (problem.num_agents, 1))
            losses.append(Smoothed(problem, np.tile(p, (problem.num_agents, 1, 1))).losses(every).mean())
        else:
            losses.append(problem.loss(mean) + np.trace(problem.hessian(mean) @ p) / 2)
    return DecDPOLaw(
        bias=bias,
        variance=variance,
        fixed_point=theta,
        average_covariance=average.mean(0),
        excess_loss=float(np.mean(losses)) - problem.loss(problem.optimum()),
    )


def _checked(
    problem: LogLinearProblem,
    mixing_matrix: Matrix | Sequence[Matrix],
    lr: float,
    local_steps: int,
    batch_size: int | None,
) -> tuple[csr_array, ...]:
    check_steps(lr, local_steps)
    check_batch_size(batch_size)
    return period(mixing_matrix, problem.num_agents)
