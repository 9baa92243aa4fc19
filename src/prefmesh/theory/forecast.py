"""Forecast: the expected loss of the average model, round by round, on a log-linear problem (docs/theory, eqs. 7.9 to 7.12).

A run of the method without noise (full shards, all participants), exact, plus the variance that minibatches and the sampling of
participants add to the average model, to first order. An estimate, not a bound.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from scipy.special import expit

from prefmesh.algorithms.methods import METHODS, Method, Population
from prefmesh.theory.problem import LogLinearProblem
from prefmesh.topology.build import build_mixing_matrix
from prefmesh.topology.mixing import MixingMatrix
from prefmesh.topology.settings import GraphSettings

MAX_STEPS = 20_000
"""Noise-free steps after which a target counts as out of reach."""
BEYOND = 4
"""A setting is given up after so many times the steps that noise-free descent needs at its step size."""

Curve = Float[np.ndarray, " points"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a plan decides: method, E, lr, batch (None: the full shard), and S (None: all) or the graph with its weights."""

    method: Literal["fed_dpo", "dec_dpo"]
    local_steps: int
    lr: float
    batch_size: int | None = None
    participation: int | None = None
    graph: str | None = None
    weights: str = "metropolis"

    def method_settings(self, rounds: int) -> dict[str, Any]:
        """The config's `method` section."""
        common: dict[str, Any] = {
            "name": self.method, "rounds": rounds, "local_steps": self.local_steps,
        }  # fmt: skip
        if self.method == "fed_dpo":
            return common | {"participation": self.participation}
        return common | {"graph": GraphSettings(name=self.graph or "ring"), "weights": self.weights}

    def build(self, agents: int, rounds: int, seed: int = 0) -> Method:
        """The registered method itself. Raises `InputError` for a graph that this number of agents does not have."""
        made = METHODS[self.method]
        return made(
            made.Settings(**self.method_settings(rounds)),
            Population(weights=np.full(agents, 1 / agents), seed=seed),
        )

    def mixing(self, agents: int, seed: int = 0) -> MixingMatrix:
        """W of `dec_dpo`. Raises `InputError` as `build` does."""
        return _mixing(self.graph or "ring", self.weights, agents, seed)

    def participants(self, agents: int) -> int:
        """S: how many take local steps in a round."""
        return self.participation or agents

    def __str__(self) -> str:
        place = (
            f"{self.graph}, {self.weights}"
            if self.method == "dec_dpo"
            else f"S = {self.participation or 'all'}"
        )
        return f"{self.method} ({place}), E = {self.local_steps}, lr = {self.lr:.4g}, batch = {self.batch_size or 'full'}"


@lru_cache(maxsize=64)
def _mixing(graph: str, weights: str, agents: int, seed: int) -> MixingMatrix:
    return build_mixing_matrix(graph, weights, agents, seed)


class Pooled:
    """The global loss with all agents' pairs in one matrix: what is asked for often is cheap."""

    def __init__(self, problem: LogLinearProblem):
        sizes = np.array([len(shard) for shard in problem.delta_features])
        self._x = np.concatenate(problem.delta_features) * problem.beta
        self._weight = np.repeat(1 / (sizes * problem.num_agents), sizes)

    def losses(self, points: Float[np.ndarray, "points dim"]) -> Curve:
        """f at many points."""
        return self._weight @ np.logaddexp(0, -self._x @ points.T)

    def loss_and_gradient(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        """f and grad f at one."""
        z = self._x @ theta
        return float(self._weight @ np.logaddexp(0, -z)), -(self._weight * expit(-z)) @ self._x


class Forecast:
    """Of the loss under any setting; `target` is the loss in nats that is to be reached from `theta0` (zero).

    Raises `ValueError` where noise-free descent does not reach the target.
    """

    def __init__(self, problem: LogLinearProblem, target: float, theta0: np.ndarray | None = None):
        self.problem, self.target, self.pooled = problem, target, Pooled(problem)
        self.start = np.zeros(problem.dim) if theta0 is None else np.asarray(theta0, dtype=np.float64)
        self.largest_curvature = float(np.linalg.eigvalsh(problem.hessian(np.zeros(problem.dim)))[-1])
        self._noise_free: dict[tuple[float, int, str | None, str], _NoiseFree] = {}
        self._locals: dict[tuple[float, int], _Local] = {}
        start = problem.loss(self.start)
        if not target < start:
            raise ValueError(
                f"target_loss: found {target:.6g}; allowed: below {start:.6g}, the loss at the start"
            )
        self.at_target, self._steps = self._descend()

    def expected_loss(self, setting: Setting, rounds: int) -> Curve:
        """E f(mean model) after 0 .. `rounds` rounds, eq. (7.12)."""
        run = self._run(setting)
        return np.array([run.loss(r) + self._excess(setting, r) for r in range(rounds + 1)])

    def rounds(self, setting: Setting) -> int | None:
        """The first round whose expected loss is at most the target.

        None where the noise-free run stops falling above it, or falls too slowly: noise only grows from there.
        """
        run = self._run(setting)
        steps = BEYOND * self._steps / (setting.lr * self.largest_curvature)
        for r in range(1, 8 + ceil(min(steps, MAX_STEPS) / setting.local_steps)):
            if run.loss(r) + self._excess(setting, r) <= self.target:
                return r
            if run.loss(r) >= run.loss(r - 1):
                return None
        return None

    def _descend(self) -> tuple[np.ndarray, int]:
        """Where noise-free descent with steps of 1 / L reaches the target, and after how many."""
        theta = self.start
        for step in range(MAX_STEPS):
            loss, gradient = self.pooled.loss_and_gradient(theta)
            if loss <= self.target:
                return theta, step
            theta = theta - gradient / self.largest_curvature
        raise ValueError(
            f"target_loss: found {self.target:.6g}; {MAX_STEPS:,} noise-free steps do not reach it, they end at "
            f"{self.pooled.loss_and_gradient(theta)[0]:.6g}; allowed: above the loss's least value"
        )

    def _run(self, setting: Setting) -> "_NoiseFree":
        key = setting.lr, setting.local_steps, setting.graph, setting.weights
        if key not in self._noise_free:
            n = self.problem.num_agents
            mixing = (
                setting.mixing(n).matrix.toarray() if setting.method == "dec_dpo" else np.full((n, n), 1 / n)
            )
            self._noise_free[key] = _NoiseFree(self, mixing, setting.lr, setting.local_steps)
        return self._noise_free[key]

    def local(self, lr: float, local_steps: int) -> "_Local":
        """What E local steps do to models near the target; kept."""
        if (lr, local_steps) not in self._locals:
            self._locals[lr, local_steps] = _Local(self.problem, self.at_target, lr, local_steps)
        return self._locals[lr, local_steps]

    def noise(self, setting: Setting) -> Float[np.ndarray, " dim"]:
        """Variance that a round adds to the mean model, along `local(...).basis`: minibatches and sampling (eq. 7.11)."""
        n, local = self.problem.num_agents, self.local(setting.lr, setting.local_steps)
        s = setting.participants(n)
        found = np.zeros(self.problem.dim)
        if setting.batch_size is not None:
            found += local.noise / (s * setting.batch_size)
        if s < n:
            found += (n - s) / (s * (n - 1)) * local.updates.var(axis=0)
        return found

    def _excess(self, setting: Setting, r: int) -> float:
        """(1/2) trace(H V(r))."""
        local = self.local(setting.lr, setting.local_steps)
        return float(local.curvature @ (_geometric(local.kept**2, r) * self.noise(setting)) / 2)


class _NoiseFree:
    """A run with full shards and all participants, as far as it was asked for."""

    def __init__(self, forecast: Forecast, mixing: np.ndarray, lr: float, local_steps: int):
        self.problem, self.pooled = forecast.problem, forecast.pooled
        self.mixing, self.lr, self.local_steps = mixing, lr, local_steps
        self.theta = np.tile(forecast.start, (self.problem.num_agents, 1))
        self.losses = [self.pooled.losses(self.theta[:1])[0]]

    def loss(self, r: int) -> float:
        """Of the average model after round r."""
        while len(self.losses) <= r:
            for _ in range(self.local_steps):
                self.theta = self.theta - self.lr * self.problem.agent_gradients(self.theta)
            self.theta = self.mixing @ self.theta
            self.losses.append(self.pooled.losses(self.theta.mean(0)[None])[0])
        return float(self.losses[r])


class _Local:
    """E local steps of every agent from one point, with what the noise of single pairs adds on the way.

    `kept` (d,) and `basis` (d, d): eigenvalues and directions of the mean over agents of d theta_end / d theta_start. Along
    these: `updates` (N, d), what the steps move; `noise` (d,), variance of the end for one pair a step, mean over agents;
    `curvature` (d,), of the pooled loss.
    """

    def __init__(self, problem: LogLinearProblem, point: np.ndarray, lr: float, local_steps: int):
        n, dim = problem.num_agents, problem.dim
        theta = np.tile(point, (n, 1))
        kept, noise = np.tile(np.eye(dim), (n, 1, 1)), np.zeros((n, dim, dim))
        for _ in range(local_steps):
            step = np.eye(dim) - lr * problem.agent_hessians(theta)
            kept = step @ kept
            noise = step @ noise @ step + lr**2 * problem.gradient_covariances(theta)
            theta = theta - lr * problem.agent_gradients(theta)
        mean = kept.mean(0)
        self.kept, self.basis = np.linalg.eigh((mean + mean.T) / 2)
        self.updates = (theta - point) @ self.basis
        self.noise = _along(self.basis, noise.mean(0))
        self.curvature = _along(self.basis, problem.hessian(point))


def _along(basis: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return np.einsum("dm,de,em->m", basis, matrix, basis)


def _geometric(ratio: np.ndarray, terms: int) -> np.ndarray:
    """sum_{k < terms} ratio^k, also where the ratio is one."""
    near = np.abs(1 - ratio) < 1e-12
    safe = np.where(near, 0.5, ratio)
    return np.where(near, terms, (1 - safe**terms) / (1 - safe))
