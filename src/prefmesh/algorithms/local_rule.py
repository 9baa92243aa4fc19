"""The local rule: E optimiser steps of every agent on its own pairs. State in, state out."""

import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from prefmesh.algorithms import optimizers
from prefmesh.algorithms.gradients import Problem, loss_and_gradient
from prefmesh.objectives import PairLogProbs, rounding
from prefmesh.policies.base import Params

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


def local_steps(
    problem: Problem,
    settings: optimizers.OptimizerSettings,
    lr: float,
    theta: Params,
    optimizer: dict[str, Tensor],
    rows: Int[ndarray, "agents steps batch"],
    weights: Float[ndarray, "agents steps batch"],
) -> tuple[Params, dict[str, Tensor], Stats]:
    """theta_i <- theta_i - lr direction_i, once per batch of `rows`; each batch's weights sum to 1."""
    collected = []
    for step in range(rows.shape[1]):
        w = torch.as_tensor(weights[:, step], dtype=problem.reference.dtype, device=problem.reference.device)
        losses, gradient, log_probs = loss_and_gradient(problem, theta, rows[:, step], w)
        theta, optimizer = optimizers.apply(settings, lr, theta, gradient, optimizer)
        eps = rounding(problem.policy.dtype)
        collected.append(_step_stats(losses, log_probs, w, problem.objective.beta, eps))
    stats = {key: torch.stack([step[key] for step in collected]).mean(0) for key in collected[0]}
    return theta, optimizer, stats


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
