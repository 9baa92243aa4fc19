"""Losses that look at each answer's log-ratio by itself, r = beta log(pi/pi_ref), not only at their difference."""

import torch.nn.functional as F

from prefmesh.objectives.log_probs import PairLogProbs, PairLoss
from prefmesh.objectives.registry import loss
from prefmesh.objectives.settings import ObjectiveSettings


@loss("nca_pair", needs=("likelihoods",))
def nca_pair(log_probs: PairLogProbs, settings: ObjectiveSettings) -> PairLoss:
    """NCA with two answers (Chen et al. 2024, arXiv 2402.05369): what is chosen against noise drawn from both alike.

    -log sigmoid(r_w) - (log sigmoid(-r_w) + log sigmoid(-r_l)) / 2.
    """
    chosen, rejected = settings.beta * log_probs.chosen_logratio, settings.beta * log_probs.rejected_logratio
    return -F.logsigmoid(chosen) - (F.logsigmoid(-chosen) + F.logsigmoid(-rejected)) / 2


@loss("bco_pair", needs=("likelihoods",))
def bco_pair(log_probs: PairLogProbs, settings: ObjectiveSettings) -> PairLoss:
    """BCO's classifier (Jung et al. 2024, arXiv 2404.04656): -log sigmoid(r_w) - log sigmoid(-r_l).

    Without the paper's shift delta, a running mean of rewards: TRL's has none any more.
    """
    chosen, rejected = settings.beta * log_probs.chosen_logratio, settings.beta * log_probs.rejected_logratio
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


@loss("sppo_hard", needs=("likelihoods",))
def sppo_hard(log_probs: PairLogProbs, settings: ObjectiveSettings) -> PairLoss:
    """SPPO (Wu et al. 2024, eq. 4.7) where the chosen answer wins for certain: log-ratios of 1/(2 beta) and -1/(2 beta)."""
    aim = 1 / (2 * settings.beta)
    return (log_probs.chosen_logratio - aim).square() + (log_probs.rejected_logratio + aim).square()


@loss("apo_zero", needs=("likelihoods",))
def apo_zero(log_probs: PairLogProbs, settings: ObjectiveSettings) -> PairLoss:
    """APO-zero (D'Oosterlinck et al. 2024, eq. 7), for chosen answers that are better than the policy's own.

    1 - sigmoid(r_w) + sigmoid(r_l): the one rises, the other falls.
    """
    chosen, rejected = settings.beta * log_probs.chosen_logratio, settings.beta * log_probs.rejected_logratio
    return (-chosen).sigmoid() + rejected.sigmoid()


@loss("apo_down", needs=("likelihoods",))
def apo_down(log_probs: PairLogProbs, settings: ObjectiveSettings) -> PairLoss:
    """APO-down (D'Oosterlinck et al. 2024, eq. 8), for chosen answers that are worse than the policy's own.

    sigmoid(r_w) + 1 - sigmoid(r_w - r_l): both fall, the rejected one further.
    """
    chosen, margin = settings.beta * log_probs.chosen_logratio, settings.beta * log_probs.margin
    return chosen.sigmoid() + (-margin).sigmoid()
