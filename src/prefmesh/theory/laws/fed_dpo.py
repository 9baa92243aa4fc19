"""FedDPO's stationary law: where the server's model settles, and how it scatters there (docs/theory, section 5.3)."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.linalg import solve_discrete_lyapunov

from prefmesh.theory.laws.fixed_points import fed_dpo_fixed_point
from prefmesh.theory.laws.local_steps import fixed_noise, scattered_noise, take
from prefmesh.theory.laws.lyapunov import self_consistent
from prefmesh.theory.problem import LogLinearProblem, Vector, check_batch_size


@dataclass(frozen=True, kw_only=True)
class FedDPOLaw:
    """The server's model in the long run: `fixed_point` = theta* + `bias`, `covariance` (d, d) around it.

    Losses in nats above f(theta*): `bias_loss` of the fixed point, `excess_loss` in expectation (5.7).
    """

    fixed_point: Vector
    bias: Vector
    covariance: Float[np.ndarray, "dim dim"]
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
    agents = problem.num_agents
    s = agents if participation is None else participation
    if not isinstance(s, int | np.integer) or not 1 <= s <= agents:
        raise ValueError(f"participation: found {s!r}; allowed: 1 to {agents}, the number of agents, or None")
    check_batch_size(batch_size)
    theta = fed_dpo_fixed_point(problem, lr, local_steps)
    steps = take(problem, np.tile(theta, (agents, 1)), lr, local_steps)
    each = steps.jacobian
    mean = each.mean(0)
    apart = each - mean
    gamma = (agents - s) / (s * max(agents - 1, 1))

    def stationary(noise: np.ndarray) -> np.ndarray:
        return solve_discrete_lyapunov(mean, noise)

    def scattered(p: np.ndarray) -> np.ndarray:
        noise = gamma * (apart @ p @ apart.swapaxes(1, 2)).mean(0)
        if batch_size is not None and hessian_noise:
            start = np.broadcast_to(p, each.shape)
            noise = noise + scattered_noise(problem, steps, batch_size, start).mean(0) / s
        return stationary(noise)

    deltas = steps.update - steps.update.mean(0)
    noise = gamma * deltas.T @ deltas / agents
    if batch_size is not None:
        noise = noise + fixed_noise(problem, steps, batch_size, hessian_noise).mean(0) / s
    covariance = self_consistent(stationary(noise), scattered)
    best = problem.optimum()
    bias_loss = problem.loss(theta) - problem.loss(best)
    return FedDPOLaw(
        fixed_point=theta,
        bias=theta - best,
        covariance=covariance,
        bias_loss=bias_loss,
        excess_loss=bias_loss + float(np.trace(problem.hessian(theta) @ covariance)) / 2,
    )
