"""Losses on lines and on a plane through the average model and two agents' own (docs/theory/landscape.md)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from prefmesh.algorithms.gradients import Problem, global_loss_and_gradient, inner
from prefmesh.algorithms.similarity import inner_products
from prefmesh.algorithms.state import take
from prefmesh.measure import score
from prefmesh.policies.base import Params, average
from prefmesh.policies.log_linear import LogLinearPolicy
from prefmesh.randomness import generator

PAIRS = 64
"""Of all agents together that a loss is taken over, with a language model; the same at every place."""
SIDE = 13
"""Places along each side of the plane."""
LINE = 19
"""Places along a line: the models themselves are among them."""

Points = Float[np.ndarray, " points"]


@dataclass(frozen=True, kw_only=True)
class Line:
    """Losses along theta = mean + t (theta_i - mean): t = 0 is the average model, t = 1 agent i's own."""

    agent: int
    t: Points
    loss: Points
    own: Points


@dataclass(frozen=True, kw_only=True)
class Plane:
    """f on the plane spanned by two orthonormal directions from the average model, which is at the origin.

    `loss[r, c]` is at (x[c], y[r]), both distances between parameters. `places`: where the two agents are. `collinear`:
    the two agents and the average lie on a line, and the second direction is that of f's steepest descent.
    """

    x: Points
    y: Points
    loss: Float[np.ndarray, "points points"]
    places: Float[np.ndarray, "2 2"]
    collinear: bool


@dataclass(frozen=True, kw_only=True)
class Slices:
    """`agents`: the two that are furthest apart. Losses in nats over `pairs` pairs. None where all agents are at one place."""

    agents: tuple[int, int]
    pairs: int
    plane: Plane | None
    lines: tuple[Line, ...]


def take_slices(
    problem: Problem,
    models: Params,
    shards: Sequence[Int[np.ndarray, "_"]],
    weights: Float[np.ndarray, " agents"],
    *,
    seed: int,
) -> Slices:
    """Slices through the average of `models` (agents, ...) and the two of them that are furthest apart."""
    agents = len(shards)
    log_linear = isinstance(problem.policy, LogLinearPolicy)
    each = None if log_linear else max(4, PAIRS // agents)
    random = generator(seed, "slice pairs")
    rows = [s if each is None or len(s) <= each else random.choice(s, each, replace=False) for s in shards]
    share = np.concatenate([np.full(len(r), w / len(r)) for r, w in zip(rows, weights, strict=True)])
    every = np.concatenate(rows)
    mean = average(models)
    apart = {name: tensor - mean[name] for name, tensor in models.items()}
    gram = inner_products(apart)
    squared = np.diag(gram)
    distance = squared[:, None] + squared[None, :] - 2 * gram
    a, b = sorted(np.unravel_index(int(distance.argmax()), distance.shape)) if agents > 1 else (0, 0)
    a, b = int(a), int(b)
    if not distance[a, b] > 0:
        return Slices(agents=(a, b), pairs=len(every), plane=None, lines=())
    steps = [take(apart, np.array([i])) for i in (a, b)]
    lines = []
    for i, step in zip((a, b), steps, strict=True):
        # An agent's own loss needs more of its pairs than its share of the global one.
        own = shards[i] if log_linear else random.permutation(shards[i])[: PAIRS // 2]
        lines.append(_line(problem, mean, step, i, every, share, own))
    return Slices(
        agents=(a, b),
        pairs=len(every),
        plane=_plane(problem, mean, steps, every, share),
        lines=tuple(lines),
    )


def _at(mean: Params, *moves: tuple[float, Params]) -> Params:
    """mean + sum of coefficient x direction."""
    return {name: tensor + sum(c * step[name] for c, step in moves) for name, tensor in mean.items()}


def _line(
    problem: Problem,
    mean: Params,
    step: Params,
    agent: int,
    every: Int[np.ndarray, " pairs"],
    share: Float[np.ndarray, " pairs"],
    own: Int[np.ndarray, " own"],
) -> Line:
    t = np.linspace(-1, 2, LINE)
    loss, own_loss = np.empty(LINE), np.empty(LINE)
    for k in range(LINE):
        here = _at(mean, (float(t[k]), step))
        loss[k] = share @ score(problem, here, every).loss
        own_loss[k] = score(problem, here, own).loss.mean()
    return Line(agent=agent, t=t, loss=loss, own=own_loss)


def _plane(
    problem: Problem,
    mean: Params,
    steps: list[Params],
    every: Int[np.ndarray, " pairs"],
    share: Float[np.ndarray, " pairs"],
) -> Plane:
    """Gram and Schmidt on the agents' steps."""
    first, second = steps
    along = inner(first, first) ** 0.5 or inner(second, second) ** 0.5
    if inner(first, first) == 0:
        first, second = second, first
    e1 = {name: tensor / along for name, tensor in first.items()}
    # Two agents lie opposite each other around their average: then there is no plane of theirs.
    off = inner(second, e1)
    rest = {name: tensor - off * e1[name] for name, tensor in second.items()}
    height = inner(rest, rest) ** 0.5
    collinear = height < 1e-3 * along
    if collinear:
        _, gradient = global_loss_and_gradient(problem, mean, every, share)
        off = inner(gradient, e1)
        rest = {name: off * e1[name] - tensor for name, tensor in gradient.items()}
        height = inner(rest, rest) ** 0.5
    e2 = {name: tensor / max(height, 1e-30) for name, tensor in rest.items()}
    places = np.array([[inner(step, e1), inner(step, e2)] for step in steps])
    # A square around the three, with room beside them.
    corners = np.vstack([places, [[0.0, 0.0]]])
    centre, half = (corners.max(0) + corners.min(0)) / 2, 0.85 * float(np.ptp(corners, axis=0).max())
    x, y = (np.linspace(c - half, c + half, SIDE) for c in centre)
    loss = np.array(
        [
            [share @ score(problem, _at(mean, (float(u), e1), (float(v), e2)), every).loss for u in x]
            for v in y
        ]
    )
    return Plane(x=x, y=y, loss=loss, places=places, collinear=collinear)
