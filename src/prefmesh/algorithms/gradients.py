"""Losses and gradients of stacked agents."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmesh.algorithms.state import without
from prefmesh.objectives import ObjectiveSettings, PairLogProbs, pair_loss
from prefmesh.policies.base import EncodedPairs, Params, Policy, Rows, passes


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A policy, its encoded pairs with their reference log-probabilities, and the loss on them.

    `reference` is (pairs, 2): nats of the chosen and of the rejected completion under the frozen reference.
    """

    policy: Policy
    data: EncodedPairs
    reference: Float[Tensor, "pairs 2"]
    objective: ObjectiveSettings

    def log_probs(self, params: Params, rows: Rows) -> PairLogProbs:
        """Policy and reference log-probabilities of `rows`, differentiable in `params`."""
        chosen, rejected = self.policy.log_probs(params, self.data, rows)
        reference = self.reference[torch.as_tensor(rows, device=self.reference.device)]
        tokens = torch.as_tensor(self.data.completion_tokens[rows], device=chosen.device)
        return PairLogProbs(
            chosen=chosen,
            rejected=rejected,
            ref_chosen=reference[..., 0],
            ref_rejected=reference[..., 1],
            chosen_tokens=tokens[..., 0],
            rejected_tokens=tokens[..., 1],
        )


def loss_and_gradient(
    problem: Problem,
    params: Params,
    rows: Rows,
    weights: Float[Tensor, "agents pairs"],
    *,
    alone: bool = False,
    resting: Params | None = None,
) -> tuple[Float[Tensor, " agents"], Params, PairLogProbs]:
    """Each agent's weighted loss sum_b weights_b loss_b, its gradient, and the (detached) log-probabilities.

    An agent's pairs are a batch; `alone`: each is one of its own (see `pair_loss`). `resting`: parameters that are not
    differentiated. The sum over agents is differentiated once:
    agents share no parameter, so its gradient in row i is agent i's own.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in params.items()}
    log_probs = replace(problem.log_probs(leaves | (resting or {}), rows), weights=weights)
    losses = (pair_loss(log_probs, problem.objective, alone=alone) * weights).sum(1)
    gradient = torch.autograd.grad(losses.sum(), list(leaves.values()))
    return losses.detach(), dict(zip(leaves, gradient, strict=True)), log_probs.detached()


@torch.no_grad()
def pair_losses(
    problem: Problem,
    params: Params,
    rows: Int[np.ndarray, "agents steps batch"],
    weights: Float[Tensor, "agents steps batch"],
) -> Float[Tensor, "agents steps batch"]:
    """The loss of each pair at its agent's row of `params`; the pairs of a step are a batch, whose weights sum to 1."""
    found = []
    for step in range(rows.shape[1]):
        log_probs = replace(problem.log_probs(params, rows[:, step]), weights=weights[:, step])
        found.append(pair_loss(log_probs, problem.objective))
    return torch.stack(found, dim=1)


def mean_over_pairs(
    values: Float[Tensor, "*models agents steps batch"], weights: Float[Tensor, "agents steps batch"]
) -> Float[Tensor, "*models agents"]:
    """Each agent's mean of a number for each of its pairs; the weights of a step's pairs sum to 1."""
    each = [(values[..., step, :] * weights[:, step]).sum(-1) for step in range(weights.shape[1])]
    return sum(each[1:], each[0]) / len(each)


def global_loss_and_gradient(
    problem: Problem, row: Params, rows: Int[np.ndarray, " pairs"], weights: Float[np.ndarray, " pairs"]
) -> tuple[float, Params]:
    """sum_j weights_j loss_j over many pairs at one model `row` (1, ...), and its gradient, by all but residuals; cut into passes.

    Each pair is a batch of its own: what f is does not depend on the passes.
    """
    still = problem.policy.residuals(row)
    row = without(row, still)
    total, gradient = 0.0, {name: torch.zeros_like(tensor) for name, tensor in row.items()}
    dtype = problem.reference.dtype
    for part in passes(problem.data, rows, problem.policy.tokens_per_pass):
        w = torch.as_tensor(weights[part][None], dtype=dtype, device=problem.reference.device)
        loss, piece, _ = loss_and_gradient(problem, row, rows[part][None], w, alone=True, resting=still)
        total += float(loss)
        for name, tensor in piece.items():
            gradient[name] += tensor
    return total, gradient


def inner(a: Params, b: Params) -> float:
    """The inner product of two gradients, over all tensors, summed in float64."""
    return float(sum((a[name].double() * b[name].double()).sum() for name in a))


def contributions(
    problem: Problem,
    row: Params,
    rows: Int[np.ndarray, " pairs"],
    weights: Float[np.ndarray, " all"],
    *,
    sample: int | None,
    random: np.random.Generator,
    before: int = 0,
) -> list[tuple[float, Params]]:
    """What these pairs add to f = sum_j weights_j loss_j and to its gradient, at the model `row`; the weights add up to 1.

    `rows` are those of the pairs `before`, `before` + 1, ... of all. `sample` none: over all pairs. Else twice over as many pairs,
    drawn with replacement by everybody alike.
    """
    if sample is None:
        return [global_loss_and_gradient(problem, row, rows, weights[before : before + len(rows)])]
    halves = []
    for _ in range(2):
        place = random.choice(len(weights), sample, p=weights) - before
        own = place[(place >= 0) & (place < len(rows))]
        halves.append(global_loss_and_gradient(problem, row, rows[own], np.full(len(own), 1 / sample)))
    return halves


def norm_sq(parts: list[tuple[float, Params]]) -> tuple[float, float]:
    """||grad f||^2 and f, of everybody's `contributions` added up.

    Of two draws, the inner product of their gradients, each an unbiased estimate of grad f: unbiased, and possibly negative. (The
    squared norm of one draw's gradient would carry that draw's noise as a floor.)
    """
    losses, gradients = zip(*parts, strict=True)
    return inner(gradients[0], gradients[-1]), sum(losses) / len(losses)
