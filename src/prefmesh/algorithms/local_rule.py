"""The local rule: E optimiser steps of every agent on its own pairs. State in, state out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from prefmesh.algorithms import optimizers
from prefmesh.algorithms.gradients import Problem, loss_and_gradient, mean_over_pairs
from prefmesh.algorithms.state import put, spread, take
from prefmesh.objectives import PairLogProbs, rounding
from prefmesh.policies.base import Params

Correction = Callable[[Params, Params], Params]
"""From parameters (some, ...) and their gradients to what the optimiser is given."""

Stats = dict[str, Float[Tensor, " agents"]]
"""TRL's names; each agent's mean over its steps, before each step's update."""

STATS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What local steps left: parameters and moments, which were changed in place; measures; and, where they were asked for, each
    agent's mean gradient over its steps, before it was corrected and clipped."""

    theta: Params
    optimizer: dict[str, Tensor]
    stats: Stats
    gradients: Params


@runtime_checkable
class Learn(Protocol):
    """Local steps, in place in `theta`. Moments are kept per purpose: of what the method mixes (""), and of what it trains beside
    (`Method.beside`). `at`: from theta to where the gradient is taken; none: at theta. `part`: which of the round's steps; `resting`
    (some, ...): the model's other parameters, which stay as they are meanwhile; `turn`: whose step count (`Method.turns`)."""

    def __call__(
        self,
        theta: Params,
        correction: Correction | None,
        purpose: str,
        at: Callable[[Params], Params] | None = None,
        part: slice = slice(None),
        resting: Params | None = None,
        turn: int = 0,
    ) -> Steps: ...


@dataclass(frozen=True, kw_only=True)
class Practice:
    """What agents that share a pass can do with their own pairs of a round; of a method they ask no more than models (some, ...).

    `pair_losses(theta)`: the loss of each of the round's pairs, at its agent's row. `weights`: theirs, which sum to 1 in each
    batch. `lr`: the round's step size.
    """

    learn: Learn
    pair_losses: Callable[[Params], Float[Tensor, "some steps batch"]]
    weights: Float[Tensor, "some steps batch"]
    lr: float

    def losses(self, theta: Params) -> Float[Tensor, " some"]:
        """The mean loss over the round's pairs, of each agent at its row."""
        return mean_over_pairs(self.pair_losses(theta), self.weights)


def held_to(anchor: Params, strength: float) -> Correction:
    """Gradients of f(theta) + strength/2 ||theta - anchor||^2, of each agent's own f and anchor (some, ...)."""

    def held(theta: Params, gradient: Params) -> Params:
        return {name: g.add(theta[name] - anchor[name], alpha=strength) for name, g in gradient.items()}

    return held


def local_steps(
    problem: Problem,
    settings: optimizers.OptimizerSettings,
    lr: float,
    theta: Params,
    optimizer: dict[str, Tensor],
    rows: Int[ndarray, "agents steps batch"],
    weights: Float[ndarray, "agents steps batch"],
    *,
    steps: Int[ndarray, " agents"] | None = None,
    correction: Correction | None = None,
    at: Callable[[Params], Params] | None = None,
    keep_gradients: bool = False,
    resting: Params | None = None,
) -> Steps:
    """theta_i <- theta_i - lr direction_i, once per batch of `rows`; each batch's weights sum to 1.

    `steps`: how many of its batches each agent takes; none: all. `correction`: applied to every gradient. `at`: from theta to where
    the gradient is taken, and what is measured; none: at theta. `resting` (agents, ...): parameters that stay as they are.
    """
    counts = np.full(len(rows), rows.shape[1]) if steps is None else steps
    sums, seen = {}, {name: torch.zeros_like(tensor) for name, tensor in theta.items() if keep_gradients}
    for step in range(int(counts.max())):
        everybody = bool((counts > step).all())
        moving = np.arange(len(counts)) if everybody else np.flatnonzero(counts > step)
        own = theta if everybody else take(theta, moving)
        moments = optimizer if everybody else take(optimizer, moving)
        w = torch.as_tensor(
            weights[moving, step], dtype=problem.reference.dtype, device=problem.reference.device
        )
        still = take(resting, moving) if resting and not everybody else resting or {}
        assert everybody or at is None, "what is taken elsewhere is of all agents of a pass"
        point = own if at is None else at(own)
        losses, gradient, log_probs = loss_and_gradient(problem, point, rows[moving, step], w, resting=still)
        for name, total in seen.items():
            total.index_add_(0, torch.from_numpy(moving).to(total.device), gradient[name])
        if correction is not None:
            assert everybody, "corrections are of all agents of a pass"
            gradient = correction(own, gradient)
        own, moments = optimizers.apply(settings, lr, own, gradient, moments)
        if not everybody:
            put(theta, moving, own)
            put(optimizer, moving, moments)
        eps = rounding(problem.policy.dtype)
        for key, values in _step_stats(losses, log_probs, w, problem.objective.beta, eps).items():
            total = sums.setdefault(key, values.new_zeros(len(counts)))
            total.index_add_(0, torch.from_numpy(moving).to(total.device), values)
    taken = torch.from_numpy(counts)
    stats = {key: total / taken.to(total) for key, total in sums.items()}
    gradients = {name: total / spread(taken, total) for name, total in seen.items()}
    return Steps(theta=theta, optimizer=optimizer, stats=stats, gradients=gradients)


def _step_stats(
    losses: Float[Tensor, " agents"],
    log_probs: PairLogProbs,
    weights: Float[Tensor, "agents pairs"],
    beta: float,
    eps: float,
) -> Stats:
    per_pair = (
        beta * log_probs.chosen_logratio,
        beta * log_probs.rejected_logratio,
        log_probs.accuracy(eps),
        beta * log_probs.margin,
        log_probs.chosen,
        log_probs.rejected,
    )
    return dict(zip(STATS, (losses, *((value * weights).sum(1) for value in per_pair)), strict=True))
