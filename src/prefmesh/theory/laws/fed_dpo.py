"""FedDPO's stationary law: where the server's model settles, and how it scatters there (docs/theory, section 5.3)."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.linalg import solve_discrete_lyapunov

from prefmesh.theory.laws.fixed_points import settle_server
from prefmesh.theory.laws.local_steps import (
    LocalSteps,
    check_steps,
    fixed_noise,
    scatter_along,
    scattered_noise,
)
from prefmesh.theory.laws.self_consistent import linear_fixed_point, repeated
from prefmesh.theory.laws.smoothed import Smoothed
from prefmesh.theory.problem import LogLinearProblem, Vector, check_batch_size

Covariance = Float[np.ndarray, "dim dim"]


@dataclass(frozen=True, kw_only=True)
class FedDPOLaw:
    """The server's model in the long run: around `fixed_point` = theta* + `bias` with `covariance`.

    Losses in nats above f(theta*): `bias_loss` of the fixed point, `excess_loss` in expectation (5.10).
    """

    fixed_point: Vector
    bias: Vector
    covariance: Covariance
    bias_loss: float
    excess_loss: float


def fed_dpo_stationary(
    problem: LogLinearProblem,
    lr: float,
    local_steps: int,
    participation: int | None,
    batch_size: int | None,
    hessian_noise: bool = True,
) -> FedDPOLaw:
    """The law of FedDPO with S = `participation` of N agents (None: all), and minibatches (None: full shards).

    Minibatch noise is carried through the later local steps; participants are drawn without replacement, whose noise is
    gamma_S = (N - S) / (S (N - 1)) times the covariance of the agents' updates, the scatter of their Jacobians included.
    `hessian_noise`: with the random Hessian of the minibatch. Without staleness. Raises `ValueError` naming the argument.
    """
    s, batch = _checked(problem, lr, local_steps, participation, batch_size)
    theta, steps = settle_server(problem, lr, local_steps)

    def scattered(p: Covariance) -> Covariance:
        noise = _sampled(steps, s, p)
        if hessian_noise and np.isfinite(batch):
            start = np.broadcast_to(p, steps.jacobian.shape)
            noise = noise + scattered_noise(steps, batch, start).mean(0) / s
        return solve_discrete_lyapunov(steps.jacobian.mean(0), noise)

    noise = _drawn(steps, s) + fixed_noise(steps, batch, hessian_noise).mean(0) / s
    covariance = linear_fixed_point(solve_discrete_lyapunov(steps.jacobian.mean(0), noise), scattered)
    excess = problem.loss(theta) + float(np.trace(problem.hessian(theta) @ covariance)) / 2
    return _law(problem, theta, covariance, excess)


def fed_dpo_gaussian(
    problem: LogLinearProblem,
    lr: float,
    local_steps: int,
    participation: int | None,
    batch_size: int | None,
) -> FedDPOLaw:
    """The same by Gaussian closure: gradients, Hessians and noise are means over the scatter itself (5.21).

    So `fixed_point` is the mean that the noise shifts along the loss's third derivative. Good to larger steps.
    """
    s, batch = _checked(problem, lr, local_steps, participation, batch_size)
    found = settle_server(problem, lr, local_steps)

    def next_spread(spread: np.ndarray) -> np.ndarray:
        nonlocal found
        found = settle_server(problem, lr, local_steps, spread, found[0])
        steps = found[1]
        p = spread[0, 0]
        noise = _drawn(steps, s) + _sampled(steps, s, p) + fixed_noise(steps, batch, False).mean(0) / s
        p = solve_discrete_lyapunov(steps.jacobian.mean(0), noise)
        return scatter_along(steps, batch, np.broadcast_to(p, steps.jacobian.shape).copy())

    spread = repeated(next_spread, np.zeros_like(found[1].contraction))
    mean = np.tile(found[0], (problem.num_agents, 1))
    excess = float(Smoothed(problem, spread[0]).losses(mean).mean())
    return _law(problem, found[0], spread[0, 0], excess)


def _drawn(steps: LocalSteps, s: int) -> Covariance:
    """gamma_S times the covariance of the agents' updates at the fixed point."""
    apart = steps.update - steps.update.mean(0)
    return _gamma(steps, s) * apart.T @ apart / len(apart)


def _sampled(steps: LocalSteps, s: int, p: Covariance) -> Covariance:
    """gamma_S times the covariance of K_i x over the agents, x of covariance `p`."""
    apart = steps.jacobian - steps.jacobian.mean(0)
    return _gamma(steps, s) * (apart @ p @ apart.swapaxes(1, 2)).mean(0)


def _gamma(steps: LocalSteps, s: int) -> float:
    """(N - S) / (S (N - 1)), what is left of a covariance in the mean of S drawn without replacement."""
    agents = len(steps.update)
    return (agents - s) / (s * max(agents - 1, 1))


def _law(problem: LogLinearProblem, theta: Vector, covariance: Covariance, loss: float) -> FedDPOLaw:
    best = problem.optimum()
    least = problem.loss(best)
    return FedDPOLaw(
        fixed_point=theta,
        bias=theta - best,
        covariance=covariance,
        bias_loss=problem.loss(theta) - least,
        excess_loss=loss - least,
    )


def _checked(
    problem: LogLinearProblem,
    lr: float,
    local_steps: int,
    participation: int | None,
    batch_size: int | None,
) -> tuple[int, float]:
    """S and b, the latter infinite for full shards."""
    check_steps(lr, local_steps)
    check_batch_size(batch_size)
    agents = problem.num_agents
    s = agents if participation is None else participation
    if not isinstance(s, int | np.integer) or not 1 <= s <= agents:
        raise ValueError(f"participation: found {s!r}; allowed: 1 to {agents}, the number of agents, or None")
    return int(s), float(batch_size or np.inf)
