"""The log-linear problem: DPO as logistic regression of N agents, where every constant of the theory is computable.

    f_i(theta) = (1/n_i) sum_j log(1 + exp(-beta x_ij^T theta)),   f = (1/N) sum_i f_i,   x = phi(chosen) - phi(rejected)

(docs/theory, eqs. (1.3) and (1.4).) Everything is numpy float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.optimize import linprog
from scipy.special import expit

Vector = Float[np.ndarray, " dim"]
Rows = Float[np.ndarray, "agents dim"]
Matrices = Float[np.ndarray, "agents dim dim"]

NEWTON_STEPS = 200
GRADIENT_TOLERANCE = 1e-12


class NoOptimum(ValueError):
    """The pairs can be ranked without a mistake: the loss falls for ever along some direction."""


@dataclass(frozen=True, kw_only=True)
class _Padded:
    """All agents' pairs side by side; places that an agent does not fill hold x = 0 with weight 0."""

    x: Float[np.ndarray, "agents pairs dim"]
    weight: Float[np.ndarray, "agents pairs"]


class LogLinearProblem:
    """`delta_features`: per agent (n_i, d), phi(chosen) - phi(rejected). Raises `ValueError` for what is not a problem."""

    def __init__(self, delta_features: Sequence[np.ndarray], beta: float):
        if not (np.isfinite(beta) and beta > 0):
            raise ValueError(f"beta: found {beta}; allowed: a finite number above 0")
        shards = [np.asarray(shard, dtype=np.float64) for shard in delta_features]
        if not shards:
            raise ValueError(
                "delta_features: found no agent; allowed: one (n_i, d) array per agent, at least one"
            )
        for i, shard in enumerate(shards):
            if shard.ndim != 2 or 0 in shard.shape:
                raise ValueError(
                    f"delta_features[{i}]: found shape {shard.shape}; allowed: (n_i, d), n_i and d >= 1"
                )
            if shard.shape[1] != shards[0].shape[1]:
                raise ValueError(
                    f"delta_features[{i}]: found width {shard.shape[1]}; allowed: {shards[0].shape[1]}, that of agent 0"
                )
            if not np.isfinite(shard).all():
                row = int((~np.isfinite(shard)).any(axis=1).argmax())
                raise ValueError(f"delta_features[{i}]: row {row} is not finite; allowed: finite numbers")
        self.delta_features = shards
        self.beta = float(beta)
        longest = max(len(shard) for shard in shards)
        x = np.zeros((len(shards), longest, shards[0].shape[1]))
        weight = np.zeros((len(shards), longest))
        for i, shard in enumerate(shards):
            x[i, : len(shard)], weight[i, : len(shard)] = shard, 1 / len(shard)
        self._all = _Padded(x=x, weight=weight)
        self._optimum: Vector | None = None

    @property
    def num_agents(self) -> int:
        """N."""
        return len(self.delta_features)

    @property
    def dim(self) -> int:
        """d."""
        return self._all.x.shape[2]

    # ---- values and derivatives; `theta` is (d,), or (N, d) where every agent has its own

    def agent_losses(self, theta: np.ndarray) -> Float[np.ndarray, " agents"]:
        """f_i at theta, in nats (docs/theory, eq. (1.1))."""
        return (self._all.weight * np.logaddexp(0, -self._z(theta))).sum(1)

    def loss(self, theta: Vector) -> float:
        """f(theta), in nats."""
        return float(self.agent_losses(theta).mean())

    def agent_gradients(self, theta: np.ndarray) -> Rows:
        """grad f_i = -beta E_i[sigmoid(-beta h) x]."""
        return np.einsum("np,npd->nd", self._pull(theta), self._all.x)

    def gradient(self, theta: Vector) -> Vector:
        """grad f (d,)."""
        return self.agent_gradients(theta).mean(0)

    def grad_norm_sq(self, thetas: Float[np.ndarray, "points dim"]) -> Float[np.ndarray, " points"]:
        """||grad f||^2 at many points."""
        pooled = self._all.x.reshape(-1, self.dim)
        weight = self._all.weight.reshape(-1) / self.num_agents
        found = np.empty(len(thetas))
        size = max(1, 2**22 // len(pooled))
        for start in range(0, len(thetas), size):
            part = thetas[start : start + size]
            gradient = (-self.beta * weight * expit(-self.beta * part @ pooled.T)) @ pooled
            found[start : start + size] = np.square(gradient).sum(1)
        return found

    def agent_hessians(self, theta: np.ndarray) -> Matrices:
        """hess f_i = beta^2 E_i[s (1 - s) x x^T]."""
        return self._second_moments(self._all.weight * self._curvature(theta))

    def hessian(self, theta: Vector) -> Float[np.ndarray, "dim dim"]:
        """hess f (d, d)."""
        return self.agent_hessians(theta).mean(0)

    def gradient_covariances(self, theta: np.ndarray) -> Matrices:
        """C_i: the covariance of the gradient of one pair of agent i, drawn uniformly; a minibatch of b has C_i / b."""
        pull = self.beta * expit(-self._z(theta))
        mean = self.agent_gradients(theta)
        second = self._second_moments(self._all.weight * pull**2)
        return second - mean[:, :, None] * mean[:, None, :]

    def hessian_noise(self, theta: np.ndarray, p: Matrices) -> Matrices:
        """E[dH P_i dH], dH being the deviation of one pair's Hessian from agent i's mean; a minibatch of b has 1/b of it."""
        quadratic = np.einsum("npd,nde,npe->np", self._all.x, p, self._all.x, optimize=True)
        second = self._second_moments(self._all.weight * self._curvature(theta) ** 2 * quadratic)
        h = self.agent_hessians(theta)
        return second - h @ p @ h

    # ---- the optimum

    def optimum(self) -> Vector:
        """theta* with ||grad f|| <= 1e-12 (1e-12 beta max ||x|| where features are large). Raises `NoOptimum`."""
        if self._optimum is None:
            self._refuse_separable(self._all)
            self._optimum = _newton(self, np.zeros(self.dim))
        return self._optimum.copy()

    def agent_optima(self) -> Rows:
        """theta_i* of every agent alone. Raises `NoOptimum` that names the first agent whose pairs are separable."""
        found = []
        for i, shard in enumerate(self.delta_features):
            try:
                found.append(LogLinearProblem([shard], self.beta).optimum())
            except NoOptimum as error:
                raise NoOptimum(f"delta_features[{i}]: {error}") from None
        return np.array(found)

    def price_of_consensus(self) -> Float[np.ndarray, " agents"]:
        """f_i(theta*) - f_i(theta_i*) >= 0, in nats: what agent i loses by sharing one policy (docs/theory, eq. (1.11))."""
        return self.agent_losses(self.optimum()) - self.agent_losses(self.agent_optima())

    def price_by_chance(self) -> Float[np.ndarray, " agents"]:
        """What `price_of_consensus` would be on average if all agents' pairs came of one taste (docs/theory, eq. (1.12)).

        An agent's own optimum also fits the accidents of its own pairs; the fewer there are, the more. Nats.
        """
        each = np.array([len(shard) for shard in self.delta_features])
        n = len(each)
        directions = int(np.linalg.matrix_rank(np.concatenate(self.delta_features)))
        return directions / 2 * ((1 - 2 / n) / each + (1 / each).sum() / n**2)

    # ---- constants (docs/theory, section 2)

    def smoothness(self) -> float:
        """Lam = max_i (beta^2 / 4) lambda_max(E_i[x x^T]), eq. (2.1)."""
        second = self._second_moments(self._all.weight)
        return float(self.beta**2 / 4 * np.linalg.eigvalsh(second)[:, -1].max())

    def strong_convexity(self, theta: Vector) -> float:
        """lambda_min of hess f at theta."""
        return float(np.linalg.eigvalsh(self.hessian(theta))[0])

    def gradient_noise(self, theta: np.ndarray, batch_size: int | None) -> float:
        """sigma^2 = max_i trace(C_i) / b, minibatches drawn with replacement; 0 for full batches (None). Eq. (2.2)."""
        if batch_size is None:
            return 0.0
        check_batch_size(batch_size)
        return float(np.trace(self.gradient_covariances(theta), axis1=1, axis2=2).max() / batch_size)

    def heterogeneity(self, theta: Vector) -> float:
        """zeta^2 = (1/N) sum_i ||grad f_i - grad f||^2 at theta, eq. (2.3)."""
        gradients = self.agent_gradients(theta)
        return float(np.square(gradients - gradients.mean(0)).sum(1).mean())

    # ---- inside

    def _z(self, theta: np.ndarray) -> Float[np.ndarray, "agents pairs"]:
        theta = np.asarray(theta, dtype=np.float64)
        if theta.shape not in ((self.dim,), (self.num_agents, self.dim)):
            raise ValueError(
                f"theta: found shape {theta.shape}; allowed: ({self.dim},) or ({self.num_agents}, {self.dim})"
            )
        if theta.ndim == 1:
            return self.beta * (self._all.x @ theta)
        return self.beta * np.einsum("npd,nd->np", self._all.x, theta)

    def _pull(self, theta: np.ndarray) -> Float[np.ndarray, "agents pairs"]:
        return -self.beta * self._all.weight * expit(-self._z(theta))

    def _curvature(self, theta: np.ndarray) -> Float[np.ndarray, "agents pairs"]:
        s = expit(self._z(theta))
        return self.beta**2 * s * (1 - s)

    def _second_moments(self, weight: Float[np.ndarray, "agents pairs"]) -> Matrices:
        """sum_j weight_ij x_ij x_ij^T."""
        return (self._all.x * weight[:, :, None]).swapaxes(1, 2) @ self._all.x

    def _refuse_separable(self, every: _Padded) -> None:
        """A direction along which no pair is ranked wrongly, and some rightly, has no finite optimum."""
        x = every.x[every.weight > 0]
        x = x / np.abs(x).max(axis=1, keepdims=True).clip(min=np.finfo(float).tiny)
        found = linprog(-x.sum(0), A_ub=-x, b_ub=np.zeros(len(x)), bounds=(-1, 1), method="highs")
        if found.fun is not None and -found.fun > 1e-7 * len(x):
            raise NoOptimum(
                f"delta_features: the {len(x)} pairs are separable (some theta ranks none of them wrongly), so the loss has "
                "no finite optimum; allowed: pairs that contradict each other, or more of them than dimensions"
            )


def check_batch_size(batch_size: int | None) -> None:
    """Raises `ValueError`."""
    if batch_size is not None and (not isinstance(batch_size, int | np.integer) or batch_size < 1):
        raise ValueError(
            f"batch_size: found {batch_size!r}; allowed: a whole number from 1, or None for the full shard"
        )


def shared_pairs(problem: LogLinearProblem) -> bool:
    """Whether all agents judge the same pairs, whatever they answered: they then share one Hessian at every theta."""

    def unanswered(shard: np.ndarray) -> np.ndarray:
        first = shard[np.arange(len(shard)), (shard != 0).argmax(axis=1)]
        rows = shard * np.where(first < 0, -1.0, 1.0)[:, None]
        return rows[np.lexsort(rows.T)]

    shards = [unanswered(shard) for shard in problem.delta_features]
    return all(np.array_equal(shard, shards[0]) for shard in shards)


def _newton(problem: LogLinearProblem, theta: Vector) -> Vector:
    """Newton with a halving line search; flat directions (features that never differ) are left at 0."""
    size = problem.beta * max(1.0, float(np.abs(problem._all.x).max()))
    for _ in range(NEWTON_STEPS):
        gradient = problem.gradient(theta)
        norm = np.linalg.norm(gradient)
        if norm <= 1e-15 * size:
            break
        step = np.linalg.lstsq(problem.hessian(theta), gradient, rcond=1e-14)[0]
        moved = theta - step
        # Near the optimum the loss is flat to rounding: there the gradient decides.
        if np.linalg.norm(problem.gradient(moved)) > norm / 2:
            loss, fall, length = problem.loss(theta), gradient @ step, 1.0
            while length > 1e-8 and problem.loss(theta - length * step) > loss - 1e-4 * length * fall:
                length /= 2
            if length <= 1e-8:
                break
            moved = theta - length * step
        theta = moved
    norm = np.linalg.norm(problem.gradient(theta))
    if norm > GRADIENT_TOLERANCE * max(1.0, size):
        raise NoOptimum(
            f"delta_features: Newton's method stopped at a gradient of {norm:.3g}; the pairs are nearly separable"
        )
    return theta
