"""The constants of the theory at a model, on any policy: gradient noise sigma^2 and heterogeneity zeta^2.

(docs/theory, 02-constants.md; estimation: landscape.md, eq. (L.2) to (L.4). Curvature is in `curvature.py`.)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from prefmesh.algorithms.gradients import Problem, loss_and_gradient
from prefmesh.algorithms.similarity import Matrix, inner_products
from prefmesh.policies.base import Params
from prefmesh.policies.log_linear import FeaturePairs
from prefmesh.theory.problem import LogLinearProblem, NoOptimum, check_batch_size

Numbers = Float[np.ndarray, " agents"]

GRADIENT_BYTES = 2**27
"""How many numbers of single draws' gradients may exist at a time."""
PAIRS_PER_DRAW = 4
"""Where agents do not share a pass, a pass of one pair would cost more in calls than in work."""


@dataclass(frozen=True, kw_only=True)
class GradientMoments:
    """First and second moments of agents' gradients at one model, from some or all of each agent's pairs.

    `inner`: <g_i, g_j> of the measured mean gradients. `variance`: the trace of the sample covariance of the gradient of
    one pair (n - 1 in the denominator). `measured` of an agent's `held` pairs, drawn without replacement, were looked at.
    `ghosts`: <e_i, e_j> of half the differences between the means of two halves of what was looked at: as large as the
    means' own errors, and otherwise nothing. `across`: <g_i, e_j>. `weights` w_i add up to 1. `losses`: f_i over the
    measured pairs, in nats.
    """

    inner: Matrix
    ghosts: Matrix
    across: Matrix
    variance: Numbers
    measured: Int[np.ndarray, " agents"]
    held: Int[np.ndarray, " agents"]
    weights: Numbers
    losses: Numbers

    @property
    def exact(self) -> bool:
        """Whether every pair was looked at."""
        return bool((self.measured == self.held).all())

    @property
    def unseen(self) -> Numbers:
        """The share of an agent's pairs that was not looked at: a mean over all of them has no error."""
        return 1 - self.measured / self.held

    @property
    def unbiased(self) -> Matrix:
        """Estimates of <grad f_i, grad f_j>, each without bias.

        A mean over a part of the pairs is longer than the mean over all, by variance (1/measured - 1/held) in square; what
        is left is the average, over all ways to split the part into two halves, of the halves' inner product.
        """
        return self.inner - np.diag(self.chance * self.unseen)

    @property
    def chance(self) -> Numbers:
        """What chance adds to an agent's squared length if its pairs are taken for a sample of what its users would say."""
        return self.variance / self.measured

    @property
    def loss(self) -> float:
        """f = sum_i w_i f_i over the measured pairs."""
        return float(self.weights @ self.losses)

    def gradient_noises(self, batch_size: int | None) -> Numbers:
        """sigma_i^2 = trace(C_i) / b of a minibatch of b pairs drawn with replacement; 0 for full batches (None)."""
        check_batch_size(batch_size)
        if batch_size is None:
            return np.zeros(len(self.held))
        return self.variance * (self.held - 1) / self.held / batch_size

    def gradient_noise(self, batch_size: int | None) -> float:
        """sigma^2, the largest over agents."""
        return float(self.gradient_noises(batch_size).max())

    def heterogeneity(self) -> float:
        """zeta^2 = sum_i w_i ||grad f_i - grad f||^2. An estimate from a part of the pairs may be negative."""
        return float((self._spread * self.unbiased).sum())

    def heterogeneity_error(self) -> float:
        """The standard error of `heterogeneity`; 0 where all pairs were looked at."""
        return self._error(self._spread)

    def grad_norm_sq(self) -> float:
        """||grad f||^2. An estimate from a part of the pairs may be negative."""
        return float(self.weights @ self.unbiased @ self.weights)

    @property
    def _spread(self) -> Matrix:
        """P with zeta^2 = sum_ij P_ij <grad f_i, grad f_j>."""
        return np.diag(self.weights) - np.outer(self.weights, self.weights)

    def _error(self, form: Matrix) -> float:
        """Of sum_ij P_ij <g_i, g_j>, g_i = grad f_i + e_i: the variances of 2 <(P grad)_i, e_i> and of P_ij <e_i, e_j>."""
        agents = len(form)
        among = np.square(self.ghosts)
        # E <e_i, e'_i>^2 of two independent errors of one agent: as between agents, whose noise is alike.
        others = among.sum(1) - np.diag(among)
        np.fill_diagonal(among, others / (agents - 1) if agents > 1 else among.diagonal().copy())
        errors = np.square(form) * among
        tilted = np.square(np.diag(form @ self.across)) - errors.sum(1)
        along = max(float(tilted @ self.unseen), 0.0)
        return float(np.sqrt(4 * along + 2 * (errors * np.outer(self.unseen, self.unseen)).sum()))


def gradient_moments(
    problem: Problem,
    row: Params,
    shards: Sequence[Int[np.ndarray, "_"]],
    weights: Numbers,
    *,
    pairs: int | None,
    random: np.random.Generator,
    step: Callable[[int], None] = lambda agent: None,
) -> GradientMoments:
    """Moments at a model `row` (1, ...); `shards[i]` are the rows of agent i.

    `pairs`: how many of each agent's pairs to look at, drawn without replacement; none: all of them. `step` is told of each
    agent that is done. Raises `ValueError` for fewer than 2 pairs, which have no variance.
    """
    if pairs is not None and pairs < 2:
        raise ValueError(f"pairs: found {pairs}; allowed: at least 2, or None for all")
    agents = len(shards)
    means, ghosts = ({name: t.new_empty(agents, *t.shape[1:]) for name, t in row.items()} for _ in range(2))
    variance, losses = np.zeros(agents), np.empty(agents)
    measured = np.empty(agents, dtype=np.int64)
    for i, shard in enumerate(shards):
        count = len(shard) if pairs is None else min(pairs, len(shard))
        each = 1 if problem.policy.stacks or count == len(shard) else min(PAIRS_PER_DRAW, max(1, count // 2))
        count -= count % each
        found = _moments(problem, row, random.choice(shard, count, replace=False).reshape(-1, each))
        for name in row:
            means[name][i], ghosts[name][i] = found.mean[name], found.ghost[name]
        # Draws of `each` pairs vary 1/each as much as single pairs do.
        variance[i], losses[i], measured[i] = each * found.variance, found.loss, count
        step(i)
    gram = inner_products({name: torch.cat([means[name], ghosts[name]]) for name in row})
    return GradientMoments(
        inner=gram[:agents, :agents],
        ghosts=gram[agents:, agents:],
        across=gram[:agents, agents:],
        variance=variance,
        measured=measured,
        held=np.array([len(shard) for shard in shards]),
        weights=weights,
        losses=losses,
    )


@dataclass(frozen=True, kw_only=True)
class _Draws:
    """Of one agent's draws: mean gradient and ghost (without agent axis), trace of the sample covariance, mean loss."""

    mean: Params
    ghost: Params
    variance: float
    loss: float


def _moments(problem: Problem, row: Params, draws: Int[np.ndarray, "draws pairs"]) -> _Draws:
    """Each draw is an "agent" of the stacked pass, all with the same parameters, so that its gradient is a row of its own."""
    count, each = draws.shape
    size = sum(tensor.numel() * tensor.element_size() for tensor in row.values())
    tokens = each * int(problem.data.cost[draws].max())
    chunk = max(1, min(GRADIENT_BYTES // size, problem.policy.tokens_per_pass // tokens))
    sums, turns = (
        {name: torch.zeros_like(t[0], dtype=torch.float64) for name, t in row.items()} for _ in range(2)
    )
    sign = torch.ones(count, dtype=torch.float64)
    sign[1::2] = -1
    sign[count - count % 2 :] = 0  # an odd one belongs to no half
    squares = loss = 0.0
    for first in range(0, count, chunk):
        here = draws[first : first + chunk]
        same = {name: tensor.expand(len(here), *tensor.shape[1:]) for name, tensor in row.items()}
        w = torch.full(here.shape, 1 / each, dtype=problem.reference.dtype, device=problem.reference.device)
        lost, gradient, _ = loss_and_gradient(problem, same, here, w, alone=True)
        loss += float(lost.double().sum())
        for name, tensor in gradient.items():
            tensor = tensor.double()
            squares += float(tensor.square().sum())
            sums[name] += tensor.sum(0)
            turns[name] += torch.tensordot(sign[first : first + len(here)].to(tensor.device), tensor, dims=1)
    mean, ghost = ({name: t / count for name, t in part.items()} for part in (sums, turns))
    around = squares - count * float(sum(tensor.square().sum() for tensor in mean.values()))
    return _Draws(mean=mean, ghost=ghost, variance=max(around, 0.0) / max(count - 1, 1), loss=loss / count)


class NotLogLinear(ValueError):
    """Why a problem has no twin whose optimum can be computed."""


def as_log_linear(
    problem: Problem, shards: Sequence[Int[np.ndarray, "_"]], weights: Numbers
) -> LogLinearProblem:
    """The same problem in closed form. Raises `NotLogLinear` with the reason where there is none."""
    if not isinstance(problem.data, FeaturePairs):
        raise NotLogLinear("the policy is no log-linear one")
    if not problem.objective.plain_dpo:
        raise NotLogLinear("the loss is not plain DPO (sigmoid alone, without label smoothing)")
    if not np.allclose(weights, 1 / len(shards), rtol=1e-12, atol=0):
        raise NotLogLinear("agents do not weigh the same (objective.weights)")
    delta = (problem.data.chosen.double() - problem.data.rejected.double()).cpu().numpy()
    return LogLinearProblem([delta[shard] for shard in shards], problem.objective.beta)


def price_of_consensus(
    problem: Problem, shards: Sequence[Int[np.ndarray, "_"]], weights: Numbers
) -> tuple[LogLinearProblem | None, Numbers | None, str]:
    """The closed form, every agent's price in nats (docs/theory, eq. (1.11)), and, where one is missing, why."""
    try:
        exact = as_log_linear(problem, shards, weights)
    except NotLogLinear as reason:
        return None, None, str(reason)
    try:
        return exact, exact.price_of_consensus(), ""
    except NoOptimum as reason:
        return exact, None, str(reason)
