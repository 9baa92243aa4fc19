"""Losses of the difference between the two answers' scores: h, or what an f-divergence makes of it."""

import math

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from prefmesh.objectives.divergences import difference, scores
from prefmesh.objectives.log_probs import PairLogProbs, PairLoss
from prefmesh.objectives.registry import loss
from prefmesh.objectives.settings import ObjectiveSettings


@loss("sigmoid", uses=("label_smoothing", "f_divergence_type"))
def sigmoid(log_probs: PairLogProbs, settings: ObjectiveSettings) -> PairLoss:
    """DPO (Rafailov et al. 2023, eq. 7); with label smoothing, conservative DPO (Mitchell 2023, eq. 3)."""
    return smoothed(settings.beta * difference(log_probs, settings), settings.label_smoothing)


@loss("robust", uses=("label_smoothing", "f_divergence_type"))
def robust(log_probs: PairLogProbs, settings: ObjectiveSettings) -> PairLoss:
    """Unbiased under answers flipped with probability eps (Chowdhury et al. 2024, eq. 12)."""
    z = settings.beta * difference(log_probs, settings)
    eps = settings.label_smoothing
    return (-(1 - eps) * F.logsigmoid(z) + eps * F.logsigmoid(-z)) / (1 - 2 * eps)


@loss("hinge", uses=("f_divergence_type",))
def hinge(log_probs: PairLogProbs, settings: ObjectiveSettings) -> PairLoss:
    """SLiC's hinge on the margin (Zhao et al. 2023; Liu et al. 2024)."""
    return (1 - settings.beta * difference(log_probs, settings)).relu()


@loss("ipo", uses=("f_divergence_type",), needs=("lengths",))
def ipo(log_probs: PairLogProbs, settings: ObjectiveSettings) -> PairLoss:
    """IPO (Azar et al. 2024, eq. 17), log-ratios per completion token as in TRL; beta is the paper's tau."""
    return (per_token(log_probs, settings) - 1 / (2 * settings.beta)).square()


@loss("sigmoid_norm", uses=("f_divergence_type",), needs=("lengths",))
def sigmoid_norm(log_probs: PairLogProbs, settings: ObjectiveSettings) -> PairLoss:
    """DPO on log-ratios per completion token: the length-normalised DPO of Tülu 3 (Lambert et al. 2024)."""
    return -F.logsigmoid(settings.beta * per_token(log_probs, settings))


@loss("exo_pair", uses=("label_smoothing", "f_divergence_type"))
def exo_pair(log_probs: PairLogProbs, settings: ObjectiveSettings) -> PairLoss:
    """EXO for pairs (Ji et al. 2024, eq. 16): KL(q || p), q = (sigmoid(beta h), sigmoid(-beta h)), p = (1 - eps, eps)."""
    z = settings.beta * difference(log_probs, settings)
    eps = settings.label_smoothing
    won = z.sigmoid() * (F.logsigmoid(z) - math.log1p(-eps))
    lost = (-z).sigmoid() * (F.logsigmoid(-z) - math.log(eps))
    return won + lost


@loss("discopop", uses=("discopop_tau", "f_divergence_type"))
def discopop(log_probs: PairLogProbs, settings: ObjectiveSettings) -> PairLoss:
    """DiscoPOP (Lu et al. 2024, eq. 5): (1 - m) (-log sigmoid(beta h)) + m exp(-beta h), m = sigmoid(beta h / tau).

    The second term is taken as one exponential: for very negative h, m is 0 and exp(-beta h) infinite.
    """
    z = settings.beta * difference(log_probs, settings)
    mixed = z / settings.discopop_tau
    return -(-mixed).sigmoid() * F.logsigmoid(z) + (F.logsigmoid(mixed) - z).exp()


def smoothed(z: Float[Tensor, "agents _"], eps: float) -> Float[Tensor, "agents _"]:
    """-(1 - eps) log sigmoid(z) - eps log sigmoid(-z)."""
    if eps == 0:
        return -F.logsigmoid(z)
    return -(1 - eps) * F.logsigmoid(z) - eps * F.logsigmoid(-z)


def per_token(log_probs: PairLogProbs, settings: ObjectiveSettings) -> PairLoss:
    """The difference of the scores, each divided by its completion's tokens."""
    chosen, rejected = scores(log_probs, settings)
    return (
        chosen / log_probs.chosen_tokens.clamp(min=1)
        - rejected / log_probs.rejected_tokens.clamp(min=1)
    )  # fmt: skip
