"""DecDPO's stationary law: the agents' consensus error and the average model's scatter (docs/theory, section 5.4)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from prefmesh.theory.laws.fixed_points import settle
from prefmesh.theory.laws.local_steps import check_steps, fixed_noise, scattered_noise
from prefmesh.theory.laws.lyapunov import Periodic, Symmetric, self_consistent
from prefmesh.theory.problem import LogLinearProblem, Rows, check_batch_size
from prefmesh.theory.simulate import Matrix, period


@dataclass(frozen=True, kw_only=True)
class DecDPOLaw:
    """All agents in the long run, after mixing; with a period of matrices, the mean over its rounds.

    `bias` + `variance` = E[e], e = (1/N) sum_i ||theta_i - mean||^2: the part of the fixed point (exact) and that of the
    noise. `fixed_point` (N, d) is the one after the period's last matrix. `average_covariance` (d, d) is that of the mean
    model, and `excess_loss` its expected loss above f(theta*), in nats.
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

    A symmetric W costs one eigendecomposition of size N d and a few products; others some ten products of that size for
    every matrix of the period and iteration.
    """
    check_steps(lr, local_steps)
    check_batch_size(batch_size)
    mixing = period(mixing_matrix, problem.num_agents)
    theta, phases = settle(problem, mixing, lr, local_steps)
    starts = np.array([steps.points[0] for steps in phases])
    means = starts.mean(1)
    bias = float(np.square(starts - means[:, None]).sum(2).mean())
    hessian = np.array([problem.hessian(mean) for mean in means])
    bias_loss = float(np.mean([problem.loss(mean) for mean in means])) - problem.loss(problem.optimum())
    average = np.zeros_like(hessian)
    variance = 0.0
    if batch_size is not None:
        jacobians = [steps.jacobian for steps in phases]
        suits = Symmetric.suits(mixing, jacobians)
        solver = Symmetric(mixing[0], jacobians[0]) if suits else Periodic(mixing, jacobians)
        fixed = np.array([fixed_noise(problem, steps, batch_size, hessian_noise) for steps in phases])

        def scattered(noise: np.ndarray) -> np.ndarray:
            blocks = solver.solve(noise).blocks
            pairs = zip(phases, blocks, strict=True)
            return np.array([scattered_noise(problem, steps, batch_size, block) for steps, block in pairs])

        noise = self_consistent(fixed, scattered) if hessian_noise else fixed
        found = solver.solve(noise)
        average = found.average
        scatter = np.trace(found.blocks, axis1=2, axis2=3).mean(1) - np.trace(average, axis1=1, axis2=2)
        variance = float(scatter.mean())
    return DecDPOLaw(
        bias=bias,
        variance=variance,
        fixed_point=theta,
        average_covariance=average.mean(0),
        excess_loss=bias_loss + float(np.einsum("kab,kba->k", hessian, average).mean()) / 2,
    )
