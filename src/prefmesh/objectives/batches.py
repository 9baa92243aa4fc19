"""Losses of a whole batch, shared out to its pairs so that sum_b weights_b loss_b is the batch's loss.

The batch is an agent's own; with `centralized` it is that of all shards together. Pairs of weight 0 take no part. Outside
of training steps every pair is a batch of its own (`pair_loss(..., alone=True)`): there `aot` and `aot_unpaired` are
`sigmoid`, and `sft` is a mean over the pair's own tokens.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from prefmesh.objectives.log_probs import PairLogProbs, PairLoss
from prefmesh.objectives.margins import smoothed
from prefmesh.objectives.registry import loss
from prefmesh.objectives.settings import ObjectiveSettings

Values = Float[Tensor, "agents pairs"]


@loss("sft", needs=("lengths", "likelihoods"))
def sft(log_probs: PairLogProbs, settings: ObjectiveSettings) -> PairLoss:
    """The chosen answers' negative log-likelihood per token, all tokens of a batch alike; it knows no reference.

    A pair's part is -log pi(y_w|x) over the batch's mean length, sum_b weights_b |y_w,b|.
    """
    tokens = (log_probs.shares * log_probs.chosen_tokens).sum(1, keepdim=True)
    return -log_probs.chosen / tokens.clamp(min=1)


@loss("aot", uses=("label_smoothing",))
def aot(log_probs: PairLogProbs, settings: ObjectiveSettings) -> PairLoss:
    """AOT, paired (Melnyk et al. 2024, arXiv 2406.05882): the policy's margins shall dominate the reference's in a batch.

    DPO's loss between log pi(y_w|x)/pi(y_l|x) and log pi_ref(y_w|x)/pi_ref(y_l|x), each sorted within the batch.
    """
    own, reference = log_probs.chosen - log_probs.rejected, log_probs.ref_chosen - log_probs.ref_rejected
    return transported(own, reference, log_probs.shares, _logistic(settings))


@loss("aot_unpaired", uses=("label_smoothing",), needs=("likelihoods",))
def aot_unpaired(log_probs: PairLogProbs, settings: ObjectiveSettings) -> PairLoss:
    """AOT, unpaired (Melnyk et al. 2024): the chosen answers' log-ratios shall dominate the rejected ones' in a batch.

    DPO's loss between log pi/pi_ref of the chosen and of the rejected answers, each sorted within the batch.
    """
    chosen, rejected = log_probs.chosen_logratio, log_probs.rejected_logratio
    return transported(chosen, rejected, log_probs.shares, _logistic(settings))


def _logistic(settings: ObjectiveSettings) -> Callable[[Tensor], Tensor]:
    return lambda gap: smoothed(settings.beta * gap, settings.label_smoothing)


def transported(a: Values, b: Values, shares: Values, cost: Callable[[Tensor], Tensor]) -> Values:
    """int_0^1 cost(A(t) - B(t)) dt, A and B the quantile functions of `a` and `b`: each pair's mean over its stretch of A.

    Optimal transport on a line. Where all shares are alike it is cost(a_(k) - b_(k)), the k-th smallest of each. Unlike
    shares cut [0, 1] where either quantile function steps; a share of 0 has no stretch, and the loss 0.
    """
    by_a, by_b = a.detach().argsort(1), b.detach().argsort(1)
    shares = shares.double()  # short stretches are differences of their ends
    ends_a, ends_b = shares.gather(1, by_a).cumsum(1), shares.gather(1, by_b).cumsum(1)
    ends = torch.cat([ends_a, ends_b], dim=1).sort(1).values
    lengths = ends.diff(dim=1, prepend=torch.zeros_like(ends[:, :1]))
    middles, last = ends - lengths / 2, a.shape[1] - 1
    # Rounding may leave the last end of one a little before that of the other.
    i = by_a.gather(1, torch.searchsorted(ends_a, middles).clamp(max=last))
    j = by_b.gather(1, torch.searchsorted(ends_b, middles).clamp(max=last))
    parts = cost(a.gather(1, i) - b.gather(1, j)) * lengths
    whole = torch.zeros_like(shares).scatter_add(1, i, parts)
    return torch.where(shares > 0, whole / shares.clamp(min=torch.finfo(shares.dtype).tiny), 0.0).to(a.dtype)
