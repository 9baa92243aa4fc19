"""Forecast: the expected loss of the average model, round by round, on a log-linear problem (docs/theory, eqs. 7.9 to 7.13).

Noise-free descent of the pooled loss at this step size, exact, plus what distribution over agents adds to it to first order:
minibatch noise, sampling of participants, client drift and the drift that a graph's disagreement causes. An estimate, not a bound.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
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
"""How many times further than noise-free descent needs to its target a curve goes on, for noisy settings."""

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


@lru_cache(maxsize=64)
def _modes(graph: str, weights: str, agents: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and modes of W - J."""
    return np.linalg.eigh(_mixing(graph, weights, agents, 0).matrix.toarray() - 1 / agents)


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


@dataclass(frozen=True, kw_only=True)
class _Descent:
    """Noise-free descent: losses and gradients at every step from 0."""

    losses: Curve
    gradients: Float[np.ndarray, "points dim"]


class Forecast:
    """Of the loss under any setting; `target` is the loss in nats that is to be reached from `theta0` (zero).

    Raises `ValueError` where noise-free descent does not reach the target.
    """

    def __init__(self, problem: LogLinearProblem, target: float, theta0: np.ndarray | None = None):
        self.problem, self.target, self._pooled = problem, target, Pooled(problem)
        self.start = np.zeros(problem.dim) if theta0 is None else np.asarray(theta0, dtype=np.float64)
        self.largest_curvature = float(np.linalg.eigvalsh(problem.hessian(np.zeros(problem.dim)))[-1])
        self._descents: dict[float, _Descent | None] = {}
        self._kept_updates: dict[tuple[float, int], np.ndarray] = {}
        start = problem.loss(self.start)
        if not target < start:
            raise ValueError(
                f"target_loss: found {target:.6g}; allowed: below {start:.6g}, the loss at the start"
            )
        descent, self.at_target = self._descend(1 / self.largest_curvature)
        if descent is None:
            raise ValueError(
                f"target_loss: found {target:.6g}; {MAX_STEPS:,} noise-free steps do not reach it, they end at "
                f"{problem.loss(self.at_target):.6g}; allowed: above the loss's least value"
            )

    def expected_loss(self, setting: Setting) -> Curve | None:
        """E f(mean model) after every round (from 0), eq. (7.13); None where descent at this step size does not reach the target."""
        descent = self.descent(setting.lr)
        if descent is None:
            return None
        e, n = setting.local_steps, self.problem.num_agents
        every = descent.losses[::e], descent.gradients[::e]
        r = np.arange(len(every[0]))[:, None]
        h, basis = self._spectrum
        c = (1 - setting.lr * h) ** e
        if (np.abs(c) >= 1 + 1e-9).any():
            return None
        drift = _geometric(c, r) * (self._push(setting) @ basis)
        variance = _geometric(c**2, r) * self._noise(setting, setting.participants(n))
        shift = ((every[1] @ basis) * drift).sum(1)
        return every[0] + shift + (h * (drift**2 + variance)).sum(1) / 2

    def rounds(self, setting: Setting) -> int | None:
        """The first round whose expected loss is at most the target; None where none is foreseen."""
        losses = self.expected_loss(setting)
        if losses is None or not (losses <= self.target).any():
            return None
        return int((losses <= self.target).argmax())

    def descent(self, lr: float) -> _Descent | None:
        """Kept for every step size that was asked for."""
        if lr not in self._descents:
            self._descents[lr] = self._descend(lr)[0]
        return self._descents[lr]

    # ---- inside: everything below is taken at the point where noise-free descent reaches the target

    def _descend(self, lr: float) -> tuple[_Descent | None, np.ndarray]:
        theta, reached = self.start, None
        last = theta
        losses, gradients = [], []
        most = MAX_STEPS
        while len(losses) <= most:
            loss, gradient = self._pooled.loss_and_gradient(theta)
            losses.append(loss)
            gradients.append(gradient)
            if reached is None and losses[-1] <= self.target:
                reached, last = len(losses), theta
                most = min(MAX_STEPS, BEYOND * reached + 32)
            theta = theta - lr * gradients[-1]
        if reached is None:
            return None, theta
        return _Descent(losses=np.array(losses), gradients=np.array(gradients)), last

    @cached_property
    def _spectrum(self) -> tuple[np.ndarray, np.ndarray]:
        """Curvatures of the mean Hessian, and their directions as columns."""
        h, basis = np.linalg.eigh(self.problem.hessian(self.at_target))
        return h.clip(min=0), basis

    @cached_property
    def _curvatures(self) -> tuple[np.ndarray, np.ndarray]:
        """(N, d), (N, d, d): the same of every agent's own Hessian."""
        h, bases = np.linalg.eigh(self.problem.agent_hessians(self.at_target))
        return h.clip(min=0), bases

    @cached_property
    def _pair_noise(self) -> np.ndarray:
        """Variance of one pair's gradient along each direction, mean over agents."""
        _, basis = self._spectrum
        covariance = self.problem.gradient_covariances(self.at_target).mean(0)
        return np.einsum("dm,de,em->m", basis, covariance, basis)

    @cached_property
    def _gradients(self) -> np.ndarray:
        return self.problem.agent_gradients(self.at_target)

    def _updates(self, lr: float, local_steps: int) -> np.ndarray:
        """u_i = lr sum_{e<E} (I - lr H_i)^e g_i (N, d): what agent i's local steps add, with the sign turned (eq. 7.10)."""
        if (lr, local_steps) not in self._kept_updates:
            h, bases = self._curvatures
            along = np.einsum("ndm,nd->nm", bases, self._gradients) * lr * _geometric(1 - lr * h, local_steps)
            self._kept_updates[lr, local_steps] = np.einsum("ndm,nm->nd", bases, along)
        return self._kept_updates[lr, local_steps]

    def _push(self, setting: Setting) -> np.ndarray:
        """How far a round moves the mean model beyond E steps on the pooled loss (d,), eq. (7.11)."""
        lr, e = setting.lr, setting.local_steps
        h, basis = self._spectrum
        updates = self._updates(lr, e)
        pooled = basis @ (lr * _geometric(1 - lr * h, e) * (basis.T @ self._gradients.mean(0)))
        push = pooled - updates.mean(0)
        if setting.method == "dec_dpo":
            own, bases = self._curvatures
            apart = self._disagreement(setting, updates)
            along = np.einsum("ndm,nd->nm", bases, apart) * (1 - (1 - lr * own) ** e)
            push = push - np.einsum("ndm,nm->nd", bases, along).mean(0)
        return push

    def _disagreement(self, setting: Setting, updates: np.ndarray) -> np.ndarray:
        """theta_i - mean (N, d) in the stationary state: what mixing leaves of different updates (eq. 6.4)."""
        h, basis = self._spectrum
        values, modes = _modes(setting.graph or "ring", setting.weights, self.problem.num_agents)
        kept = (1 - setting.lr * h) ** setting.local_steps
        response = values[:, None] / (1 - values[:, None] * kept)
        return -(modes @ (response * (modes.T @ updates @ basis))) @ basis.T

    def _noise(self, setting: Setting, s: int) -> np.ndarray:
        """Variance that a round adds to the mean model along each direction: minibatches and sampling (eq. 7.12)."""
        lr, e, n = setting.lr, setting.local_steps, self.problem.num_agents
        h, basis = self._spectrum
        found = np.zeros(self.problem.dim)
        if setting.batch_size is not None:
            found += lr**2 * _geometric((1 - lr * h) ** 2, e) * self._pair_noise / (s * setting.batch_size)
        if s < n:
            updates = self._updates(lr, e) @ basis
            found += (n - s) / (s * (n - 1)) * updates.var(axis=0)
        return found


def _geometric(ratio: np.ndarray, terms: np.ndarray | int) -> np.ndarray:
    """sum_{k < terms} ratio^k, also where the ratio is one."""
    near = np.abs(1 - ratio) < 1e-12
    safe = np.where(near, 0.5, ratio)
    return np.where(near, terms, (1 - safe**terms) / (1 - safe))
