"""E local steps of every agent: where they lead, their Jacobian, and the noise that minibatches add on the way.

    M_i(theta) = theta - lr grad f_i(theta),    M_i^E its E-fold,    K_i = prod_e (I - lr hess f_i(theta_{i,e}))
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from prefmesh.theory.problem import LogLinearProblem, Matrices, Rows


@dataclass(frozen=True, kw_only=True)
class LocalSteps:
    """E steps with full shards: `points[e]` is where step e starts, `contraction[e]` is I - lr hess f_i there."""

    lr: float
    points: Float[np.ndarray, "steps agents dim"]
    contraction: Float[np.ndarray, "steps agents dim dim"]
    update: Rows
    """M_i^E(theta_i) - theta_i, summed step by step, so that a small one is not lost in theta's rounding."""

    @property
    def jacobian(self) -> Matrices:
        """K_i, the Jacobian of M_i^E: the later factors stand on the left."""
        k = self.contraction[0]
        for factor in self.contraction[1:]:
            k = factor @ k
        return k


def take(problem: LogLinearProblem, start: Rows, lr: float, local_steps: int) -> LocalSteps:
    """The steps of all agents from `start` (N, d)."""
    identity = np.eye(problem.dim)
    points, contraction = [], []
    update = np.zeros_like(start)
    for _ in range(local_steps):
        points.append(start + update)
        contraction.append(identity - lr * problem.agent_hessians(points[-1]))
        update = update - lr * problem.agent_gradients(points[-1])
    return LocalSteps(lr=lr, points=np.array(points), contraction=np.array(contraction), update=update)


def fixed_noise(problem: LogLinearProblem, steps: LocalSteps, batch_size: int, hessian_noise: bool) -> Matrices:
    """Covariance that minibatches add over E steps from a start that is fixed (docs/theory, eq. (5.8) with X_0 = 0).

    C_i / b in every step, carried through the later ones, and E[dH X dH] / b of what has gathered by then.
    """
    y = np.zeros_like(steps.contraction[0])
    for theta, d in zip(steps.points, steps.contraction, strict=True):
        source = problem.gradient_covariances(theta)
        if hessian_noise and y.any():
            source = source + problem.hessian_noise(theta, y)
        y = d @ y @ d.swapaxes(1, 2) + steps.lr**2 / batch_size * source
    return y


def scattered_noise(
    problem: LogLinearProblem, steps: LocalSteps, batch_size: int, start: Matrices
) -> Matrices:
    """What the minibatches' Hessians add because the start scatters: linear in its covariances (docs/theory, eq. (5.8))."""
    x, carried = start, start
    for theta, d in zip(steps.points, steps.contraction, strict=True):
        source = problem.hessian_noise(theta, x)
        x = d @ x @ d.swapaxes(1, 2) + steps.lr**2 / batch_size * source
        carried = d @ carried @ d.swapaxes(1, 2)
    return x - carried


def check_steps(lr: float, local_steps: int) -> None:
    """Raises `ValueError`."""
    if not (np.isfinite(lr) and lr > 0):
        raise ValueError(f"lr: found {lr}; allowed: a finite number above 0")
    if not isinstance(local_steps, int | np.integer) or local_steps < 1:
        raise ValueError(f"local_steps: found {local_steps!r}; allowed: a whole number from 1")
