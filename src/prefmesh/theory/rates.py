"""Rates: bounds on the gradient norm of FedDPO and DecDPO with every constant explicit (docs/theory, sections 3 and 4).

For SGD with a constant step size on any smooth loss, convex or not, with equal weights 1/N. The constants, by keyword:

    smoothness     Lam, the largest over agents of a bound on ||hess f_i||
    delta          f(theta_0) - f*, in nats
    noise          sigma^2, the largest over agents of the trace of one minibatch gradient's covariance
    heterogeneity  zeta^2 = (1/N) sum_i ||grad f_i - grad f||^2, the largest over the region that the mean model visits
    lr, rounds, agents, local_steps, participation, staleness      eta, R, N, E, S (None: N), q_max
    rho            ||W - J||_2 of a doubly stochastic W

All of them raise `ValueError` for numbers that are none of these.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize_scalar
from scipy.special import expit

from prefmesh.theory.bounds import (
    Bound,
    Condition,
    DecDPOBound,
    FedDPOBound,
    LocalSteps,
    Setting,
    largest,
    positive,
    whole,
)
from prefmesh.theory.problem import LogLinearProblem, check_batch_size


def fed_dpo(
    *,
    smoothness: float,
    delta: float,
    noise: float,
    heterogeneity: float,
    lr: float,
    rounds: int,
    agents: int,
    local_steps: int = 1,
    participation: int | None = None,
    staleness: int = 0,
) -> FedDPOBound:
    """docs/theory, eq. (3.13)."""
    return FedDPO(
        smoothness=smoothness,
        delta=delta,
        noise=noise,
        heterogeneity=heterogeneity,
        agents=agents,
        local_steps=local_steps,
        participation=participation,
        staleness=staleness,
    ).bound(lr, rounds)


def dec_dpo(
    *,
    smoothness: float,
    delta: float,
    noise: float,
    heterogeneity: float,
    lr: float,
    rounds: int,
    agents: int,
    rho: float,
    local_steps: int = 1,
) -> DecDPOBound:
    """docs/theory, eqs. (4.8) and (4.10)."""
    return DecDPO(
        smoothness=smoothness,
        delta=delta,
        noise=noise,
        heterogeneity=heterogeneity,
        agents=agents,
        local_steps=local_steps,
        rho=rho,
    ).bound(lr, rounds)


@dataclass(frozen=True, kw_only=True)
class FedDPO(Setting):
    """N agents and a server; the symbols are those of docs/theory, section 3."""

    participation: int | None = None
    staleness: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.participation is not None:
            whole("participation", self.participation, 1, self.agents)
        whole("staleness", self.staleness, 0)

    def bound(self, lr: float, rounds: int) -> FedDPOBound:
        """Eq. (3.13)."""
        positive("lr", lr)
        whole("rounds", rounds, 1)
        return FedDPOBound(
            **self.terms(lr, rounds),
            consensus_error=0.0,
            lr=lr,
            largest_lr=self.largest_lr(),
            conditions=self.conditions(lr),
        )

    def conditions(self, lr: float) -> tuple[Condition, ...]:
        """Eq. (3.14)."""
        steps = Condition(name="eta Lam E", value=lr * self.smoothness * self.local_steps, limit=1.0)
        if not steps.holds:
            return (steps,)
        x, tau, k, a = self._absorbed(LocalSteps.of(self, lr))
        stale = Condition(name="eta Lam E + k tau (staleness)", value=x + k * tau, limit=1.0)
        return steps, stale, Condition(name="a (client drift)", value=a, limit=0.5)

    def parts(self, lr: float) -> tuple[float, dict[str, float]]:
        """Eq. (3.13)."""
        local = LocalSteps.of(self, lr)
        x, tau, k, a = self._absorbed(local)
        b = self._b(local)
        noise = local.noise * self.smoothness * lr * self.noise / self._participants
        sampling = x * self._gamma * (1 + b) * self.heterogeneity
        drift = k * self._m(self.local_steps > 1) * local.drift_noise
        drift += k * self._m(self.local_steps > 1) * self._m(True) * local.drift_gradient * self.heterogeneity
        terms = {
            "noise": noise,
            "sampling": sampling,
            "drift": drift,
            "staleness": k * tau * (noise + sampling),
        }
        unit = 2 / (lr * self.local_steps * (1 - a))
        return unit, {name: term / (1 - a) for name, term in terms.items()}

    @property
    def _participants(self) -> int:
        return self.agents if self.participation is None else self.participation

    @property
    def _gamma(self) -> float:
        """gamma_S, eq. (3.2)."""
        if self.agents == 1:
            return 0.0
        return (self.agents - self._participants) / (self._participants * (self.agents - 1))

    def _m(self, drifts: bool) -> int:
        """2 where a distance has a part from staleness and another one, else 1."""
        return 2 if drifts and self.staleness > 0 else 1

    def _b(self, local: LocalSteps) -> float:
        return local.c + local.x * self.staleness

    def _absorbed(self, local: LocalSteps) -> tuple[float, float, float, float]:
        """x, tau, k and a of eqs. (3.10) to (3.12)."""
        x, d, b = local.x, local.drift_gradient, self._b(local)
        w = x * self.staleness
        tau = self._m(self.local_steps > 1) * (1 + self._m(True) * d) * w * (1 + w)
        g = self._gamma * (x + x / b) if b > 0 else 0.0
        if tau * g >= 1:
            return x, tau, math.inf, math.inf
        k = (1 + g) / (1 - tau * g)
        return x, tau, k, k * self._m(self.local_steps > 1) * self._m(True) * d


@dataclass(frozen=True, kw_only=True)
class DecDPO(Setting):
    """N agents on a graph; the symbols are those of docs/theory, section 4."""

    rho: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.rho < 1:
            raise ValueError(f"rho: found {self.rho}; allowed: from 0 to below 1")

    def bound(self, lr: float, rounds: int) -> DecDPOBound:
        """Eqs. (4.8) and (4.10)."""
        positive("lr", lr)
        whole("rounds", rounds, 1)
        terms = self.terms(lr, rounds)
        return DecDPOBound(
            **terms,
            consensus_error=self._consensus_error(lr, sum(terms.values())) if self.holds(lr) else math.inf,
            lr=lr,
            largest_lr=self.largest_lr(),
            conditions=self.conditions(lr),
        )

    def conditions(self, lr: float) -> tuple[Condition, ...]:
        """Eq. (4.9)."""
        steps = Condition(name="eta Lam E", value=lr * self.smoothness * self.local_steps, limit=1.0)
        if not steps.holds:
            return (steps,)
        mu, a = self._absorbed(LocalSteps.of(self, lr))
        mixing = Condition(name="eta Lam E (1 + sqrt d) rho / (1 - rho) (mixing)", value=1 - mu, limit=0.5)
        return steps, mixing, Condition(name="a (client drift)", value=a, limit=0.5)

    def parts(self, lr: float) -> tuple[float, dict[str, float]]:
        """Eq. (4.10)."""
        local = LocalSteps.of(self, lr)
        mu, a = self._absorbed(local)
        root_d = math.sqrt(local.drift_gradient)
        noise, users = (1 + root_d) * self._alpha(local, lr), (1 + root_d) * self._users(local)
        own = math.sqrt(local.drift_noise + local.drift_gradient * self.heterogeneity)
        apart = noise + users
        terms = {
            "noise": local.noise * self.smoothness * lr * self.noise / self.agents,
            "consensus_noise": noise * ((1 + root_d) * apart + own) / mu**2,
            "consensus_heterogeneity": users * ((1 + root_d) * apart + own) / mu**2,
            "drift": own * (apart + own) / mu**2,
        }
        unit = 2 / (lr * self.local_steps * (1 - a))
        return unit, {name: term / (1 - a) for name, term in terms.items()}

    def _consensus_error(self, lr: float, grad_norm_sq: float) -> float:
        """Eq. (4.8)."""
        local = LocalSteps.of(self, lr)
        mu, _ = self._absorbed(local)
        own = math.sqrt(local.drift_noise + local.drift_gradient * (self.heterogeneity + grad_norm_sq))
        root = (self._alpha(local, lr) + self._users(local) + self._w(local) * own) / (mu * self.smoothness)
        return root**2

    def _w(self, local: LocalSteps) -> float:
        return local.x * self.rho / (1 - self.rho)

    def _alpha(self, local: LocalSteps, lr: float) -> float:
        """Lam times the root of the consensus error that noise alone causes, eq. (4.5)."""
        modes = (self.agents - 1) / self.agents * self.rho**2 / (1 - self.rho**2)
        return math.sqrt(modes * local.x * self.smoothness * lr * self.noise)

    def _users(self, local: LocalSteps) -> float:
        """Lam times the root of the consensus error that heterogeneity alone causes, eq. (4.6)."""
        return self._w(local) * math.sqrt(self.heterogeneity)

    def _absorbed(self, local: LocalSteps) -> tuple[float, float]:
        """mu and a of eqs. (4.8) and (4.10)."""
        d = local.drift_gradient
        mu = 1 - self._w(local) * (1 + math.sqrt(d))
        if mu <= 0:
            return mu, math.inf
        return mu, (d + (math.sqrt(d) if self.rho > 0 else 0)) / mu**2


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """The fewest rounds for which the bound is at most eps, at step size `lr`; `rounds` and `bound` None where none suffice."""

    rounds: int | None
    lr: float
    bound: Bound | None
    message: str


def rounds_to(
    eps: float, method: Literal["fed_dpo", "dec_dpo"], *, lr: float | None = None, **setting: Any
) -> Rounds:
    """The smallest R with bound <= `eps`; `setting`: the other keywords of `fed_dpo` or `dec_dpo`.

    `lr` None: the step size that needs the fewest rounds, to leading order the closed form of eq. (3.16).
    """
    positive("eps", eps)
    known = {"fed_dpo": FedDPO, "dec_dpo": DecDPO}
    if method not in known:
        raise ValueError(f"method: found {method!r}; allowed: fed_dpo, dec_dpo")
    made: Setting = known[method](**setting)
    largest_lr = made.largest_lr()
    if lr is None:
        # (eps - floor) / u is concave in the step size, and positive up to where the floor reaches eps.
        most = largest(lambda step: made.floor(step) <= eps, largest_lr)
        found = minimize_scalar(
            lambda step: (made.floor(step) - eps) / made.parts(step)[0],
            bounds=(0, most),
            method="bounded",
            options={"xatol": 1e-9 * most},
        )
        lr = max(float(found.x), most, key=lambda step: (eps - made.floor(step)) / made.parts(step)[0])
    positive("lr", lr)
    if not made.holds(lr):
        return Rounds(rounds=None, lr=lr, bound=None, message=made.bound(lr, 1).message)
    floor, unit = made.floor(lr), made.parts(lr)[0] * made.delta
    if floor > eps or (floor == eps and unit > 0):
        message = f"impossible: at lr {lr:.4g} the bound stays above {floor:.4g} in any number of rounds, eps is {eps:.4g}"
        return Rounds(rounds=None, lr=lr, bound=None, message=message)
    rounds = max(1, math.ceil(unit / (eps - floor))) if unit > 0 else 1
    while made.bound(lr, rounds).total > eps:  # the quotient was rounded
        rounds += 1
    return Rounds(
        rounds=rounds, lr=lr, bound=made.bound(lr, rounds), message=f"{rounds} rounds at lr {lr:.4g}"
    )


def constants(
    problem: LogLinearProblem, *, region: Float[np.ndarray, "points dim"], batch_size: int | None
) -> dict[str, Any]:
    """`smoothness`, `delta`, `noise`, `heterogeneity` and `agents` of a problem, as keywords for the bounds.

    `region`: the models visited, the first one first (`trajectory.average`); noise and heterogeneity are the largest there
    (docs/theory, eq. (2.6)). Raises `NoOptimum` where f* is not reached.
    """
    noise, gradients = np.zeros(len(region)), []
    for (
        shard
    ) in problem.delta_features:  # all points at once: grad f_i, and the trace of one pair's covariance
        pull = problem.beta * expit(-problem.beta * region @ shard.T)
        gradients.append(-pull @ shard / len(shard))
        trace = (pull**2 @ np.square(shard).sum(1)) / len(shard) - np.square(gradients[-1]).sum(1)
        noise = np.maximum(noise, trace)
    check_batch_size(batch_size)
    apart = np.stack(gradients) - np.mean(gradients, axis=0)
    return {
        "smoothness": problem.smoothness(),
        "delta": max(0.0, problem.loss(region[0]) - problem.loss(problem.optimum())),
        "noise": 0.0 if batch_size is None else float(noise.max() / batch_size),
        "heterogeneity": float(np.square(apart).sum(2).mean(0).max()),
        "agents": problem.num_agents,
    }


def require_sgd(optimizer: str) -> None:
    """Raises `ValueError` for any other optimizer: nothing here is proved for it."""
    if optimizer != "sgd":
        raise ValueError(
            f"optimizer: found {optimizer!r}; no statement for it, the bounds and laws are about plain SGD with a constant "
            "step size; allowed: sgd"
        )
