"""E local steps of every agent: where they lead, their Jacobian, and the noise that minibatches add on the way.

M_i(theta) = theta - lr grad f_i(theta),    M_i^E its E-fold,    K_i = prod_e (I - lr hess f_i(theta_{i,e}))
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from prefmesh.theory.laws.smoothed import Smoothed
from prefmesh.theory.problem import LogLinearProblem, Matrices, Rows

Spread = Float[np.ndarray, "steps agents dim dim"]
"""Covariance of every agent's parameters where each local step starts."""


@dataclass(frozen=True, kw_only=True)
class LocalSteps:
    """E steps with full shards: `points[e]` is where step e starts, `contraction[e]` is I - lr hess f_i there.

    `at[e]` is the problem that step e sees: the given one, or its mean over a scatter.
    """

    problem: LogLinearProblem
    lr: float
    points: Float[np.ndarray, "steps agents dim"]
    contraction: Spread
    at: Sequence[LogLinearProblem | Smoothed]
    update: Rows
    """M_i^E(theta_i) - theta_i, summed step by step, so that a small one is not lost in theta's rounding."""

    @cached_property
    def jacobian(self) -> Matrices:
        """K_i, the Jacobian of M_i^E: the later factors stand on the left."""
        k = self.contraction[0]
        for factor in self.contraction[1:]:
            k = factor @ k
        return k

    @cached_property
    def noise(self) -> Spread:
        """Covariance that a minibatch of one pair adds in each step: lr^2 C_i."""
        pairs = zip(self.at, self.points, strict=True)
        return self.lr**2 * np.array([at.gradient_covariances(theta) for at, theta in pairs])


def take(
    problem: LogLinearProblem, start: Rows, lr: float, local_steps: int, spread: Spread | None = None
) -> LocalSteps:
    """The steps of all agents from `start` (N, d); with `spread`, steps of the means over that scatter."""
    identity = np.eye(problem.dim)
    points, contraction, landscapes = [], [], []
    update = np.zeros_like(start)
    for e in range(local_steps):
        here = start + update
        at = problem if spread is None else Smoothed(problem, spread[e])
        points.append(here)
        contraction.append(identity - lr * at.agent_hessians(here))
        landscapes.append(at)
        update = update - lr * at.agent_gradients(here)
    return LocalSteps(
        problem=problem,
        lr=lr,
        points=np.array(points),
        contraction=np.array(contraction),
        at=landscapes,
        update=update,
    )


def fixed_noise(steps: LocalSteps, batch_size: float | int, hessian_noise: bool) -> Matrices:
    """Covariance that minibatches add over E steps from a start that is fixed (docs/theory, eq. (5.7) with X_0 = 0).

    C_i / b in every step, carried through the later ones, and E[dH X dH] / b of what has gathered by then.
    """
    y = np.zeros_like(steps.contraction[0])
    for e, d in enumerate(steps.contraction):
        source = steps.noise[e]
        if hessian_noise and e > 0:
            source = source + steps.lr**2 * steps.problem.hessian_noise(steps.points[e], y)
        y = d @ y @ d.swapaxes(1, 2) + source / batch_size
    return y


def scattered_noise(steps: LocalSteps, batch_size: float | int, start: Matrices) -> Matrices:
    """What the minibatches' Hessians add because the start scatters: linear in its covariances (docs/theory, eq. (5.7))."""
    x = carried = start
    for theta, d in zip(steps.points, steps.contraction, strict=True):
        source = steps.lr**2 * steps.problem.hessian_noise(theta, x)
        x = d @ x @ d.swapaxes(1, 2) + source / batch_size
        carried = d @ carried @ d.swapaxes(1, 2)
    return x - carried


def scatter_along(steps: LocalSteps, batch_size: float | int, start: Matrices) -> Spread:
    """Covariances where each step starts, from those before the first one."""
    found = [start]
    for d, source in zip(steps.contraction[:-1], steps.noise[:-1], strict=True):
        found.append(d @ found[-1] @ d.swapaxes(1, 2) + source / batch_size)
    return np.array(found)


def check_steps(lr: float, local_steps: int) -> None:
    """Raises `ValueError`."""
    if not (np.isfinite(lr) and lr > 0):
        raise ValueError(f"lr: found {lr}; allowed: a finite number above 0")
    if not isinstance(local_steps, int | np.integer) or local_steps < 1:
        raise ValueError(f"local_steps: found {local_steps!r}; allowed: a whole number from 1")
