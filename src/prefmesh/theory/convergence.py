"""How fast a method comes to rest with full batches: seen in its rounds, and from the Jacobian of a round.

A round maps x, which is theta and all that the method remembers, to F(x). Near its limit, x^r - x* is about J^r (x^0 - x*) with
J = DF(x*), so distances fall by a factor each round, the largest modulus of J's eigenvalues. Not counted are eigenvalues 1 that belong
to what no round changes: for v with v^T J = v^T, v^T x keeps its value from the start (the sum of gradient tracking's corrections, which
is 0), so x^r - x* has no part there. Which these are is read off J; that they stay is seen in the rounds.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import linregress

from prefmesh.algorithms.state import State
from prefmesh.theory.problem import LogLinearProblem, Rows
from prefmesh.theory.simulate import Ensemble, Member

FIRST, LAST = 1e-4, 1e-11
"""Between these shares of the first distance a rate is fitted: above, the loss is not yet quadratic; below is rounding."""
AT_REST, AT_REST_ROUNDS = 1e-15, 20
ROUNDS = 20_000
STEP = 1e-5
"""Of central differences: their error is about STEP^2, and rounding's 1e-16 / STEP."""
KEPT = 1e-6
"""An eigenvalue nearer to 1 is taken for 1. A method that forgets so slowly needs millions of rounds."""

Vector = Float[np.ndarray, " size"]


class RoundMap:
    """A round with full batches as a map of vectors, by the algorithm that trains. For methods whose rounds are all alike.

    The vector: theta of all agents (or the one row that they share), then the optimiser's moments and the method's memory.
    """

    def __init__(
        self,
        problem: LogLinearProblem,
        name: str,
        settings: dict[str, Any],
        *,
        lr: float,
        local_steps: int = 1,
        momentum: float = 0.0,
    ):
        self.agents = problem.num_agents
        self._learner = Ensemble(
            [Member(problem, name, settings)], lr, rounds=ROUNDS, local_steps=local_steps, momentum=momentum
        ).learner
        self._row = {"theta": torch.zeros(1, problem.dim, dtype=torch.float64)}
        self._flat = self._learner.begin(self._row).tensors()
        self._numbers = [key for key, tensor in self._flat.items() if tensor.is_floating_point()]
        assert self._numbers[0] == "theta/theta"

    def start(self) -> Vector:
        """All agents at 0."""
        return self._packed(self._flat)

    def theta(self, x: Vector) -> Rows:
        """All agents' parameters (agents, dim)."""
        rows = x[: self._flat["theta/theta"].numel()].reshape(-1, self._row["theta"].shape[1])
        return np.broadcast_to(rows, (self.agents, rows.shape[1]))

    def __call__(self, x: Vector, round_: int = 1) -> Vector:
        """F(x)."""
        sizes = [self._flat[key].numel() for key in self._numbers]
        parts = np.split(x, np.cumsum(sizes)[:-1])
        numbers = {
            key: torch.from_numpy(part.copy()).view_as(self._flat[key])
            for key, part in zip(self._numbers, parts, strict=True)
        }
        counts = {key: t.clone() for key, t in self._flat.items() if key not in numbers}
        state = State.from_tensors(numbers | counts, self.agents, like=self._row)
        state, _ = self._learner.round(state, round_, consensus=False)
        return self._packed(state.tensors())

    def jacobian(self, x: Vector) -> Float[np.ndarray, "size size"]:
        """DF(x), by central differences."""
        steps = STEP * np.eye(len(x))
        return np.stack([(self(x + h) - self(x - h)) / (2 * STEP) for h in steps], axis=1)

    def _packed(self, flat: dict[str, torch.Tensor]) -> Vector:
        return np.concatenate([flat[key].reshape(-1).numpy() for key in self._numbers])


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What J says of a method's way to its limit.

    `rate`: -log of the largest modulus of J's eigenvalues. `over_the_window`: the slope that J^k (x - x*) has over the rounds in which
    the method's own was fitted, which smaller eigenvalues still bend. `kept`: how many numbers no round changes, and `kept_moved` the
    most that any of them was seen to.
    """

    rate: float
    over_the_window: float
    kept: int
    kept_moved: float


@dataclass(frozen=True, kw_only=True)
class Convergence:
    """A method's way to its limit, from all agents at 0.

    Distances are sqrt((1/N) sum_i ||theta_i - .||^2), at the start and after every round. `rate`: nats a round by which those to the
    limit fall, with its standard error. `predicted` is None where a round has no Jacobian.
    """

    limit: Rows
    to_limit: Float[np.ndarray, " points"]
    to_optimum: Float[np.ndarray, " points"]
    rate: float
    rate_error: float
    predicted: Predicted | None


def converge(problem: LogLinearProblem, way: RoundMap, *, smooth: bool = True) -> Convergence:
    """Rounds until nothing moves, the rate that was seen, and the one that J has. `smooth`: whether there is a J.

    Raises `ValueError` where rounds do not come to rest.
    """
    visited, still = [way.start()], 0
    while still < AT_REST_ROUNDS:
        if len(visited) > ROUNDS:
            raise ValueError(f"lr: the method did not come to rest in {ROUNDS} rounds; try another one")
        x = way(visited[-1], len(visited))
        if not np.isfinite(x).all():
            raise ValueError("lr: the parameters stopped being finite; try a smaller one")
        still = still + 1 if np.abs(x - visited[-1]).max() <= AT_REST * max(1.0, np.abs(x).max()) else 0
        visited.append(x)
    path = np.array([way.theta(x) for x in visited])

    def apart(end: np.ndarray) -> Float[np.ndarray, " points"]:
        return np.sqrt(np.square(path - end).sum(2).mean(1))

    to_limit = apart(path[-1])
    first, last = window(to_limit)
    rate, error = slope(to_limit[first:last])
    predicted = None
    if smooth:
        jacobian = way.jacobian(visited[-1])
        asymptotic, invariants = predicted_rate(jacobian)
        ahead, linear = visited[first] - visited[-1], []
        for _ in range(first, last):
            linear.append(float(np.linalg.norm(way.theta(ahead))))
            ahead = jacobian @ ahead
        predicted = Predicted(
            rate=asymptotic,
            over_the_window=slope(np.array(linear))[0],
            kept=invariants.shape[1],
            kept_moved=float(np.abs((np.array(visited) - visited[0]) @ invariants).max(initial=0.0)),
        )
    return Convergence(
        limit=path[-1],
        to_limit=to_limit,
        to_optimum=apart(problem.optimum()),
        rate=rate,
        rate_error=error,
        predicted=predicted,
    )


def window(distance: Float[np.ndarray, " points"]) -> tuple[int, int]:
    """Between which rounds a rate is fitted. Raises `ValueError` where these are fewer than three."""
    shares = distance / distance[0]
    first, last = (int((shares < share).argmax()) for share in (FIRST, LAST))
    if last - first < 3:
        raise ValueError("lr: the method rests before a rate can be seen; allowed: a smaller one")
    return first, last


def slope(distance: Float[np.ndarray, " points"]) -> tuple[float, float]:
    """Nats a round, by least squares in the logarithm, and its standard error."""
    line = linregress(np.arange(len(distance)), np.log(distance))
    return -float(line.slope), float(line.stderr)


def predicted_rate(jacobian: Float[np.ndarray, "size size"]) -> tuple[float, Float[np.ndarray, "size kept"]]:
    """-log of the largest modulus of eigenvalues, but for those of 1 that are kept, and what is kept (orthonormal columns v).

    Raises `ValueError` where another one is not below 1; so, too, where there are more eigenvalues 1 than v.
    """
    left, singular, _ = np.linalg.svd(jacobian - np.eye(len(jacobian)))
    invariants = left[:, singular < KEPT]
    values = np.linalg.eigvals(jacobian)
    others = values[np.argsort(np.abs(values - 1))][invariants.shape[1] :]
    largest = float(np.abs(others).max())
    if largest >= 1 - KEPT:
        raise ValueError(f"lr: an eigenvalue of a round has modulus {largest:.9g}; allowed: below 1")
    return -float(np.log(largest)), invariants
