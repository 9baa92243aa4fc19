"""What a policy earns for an answer when its distance to the reference is an f-divergence.

f-DPO (Wang et al. 2024, arXiv 2309.16240): the implicit reward is beta f'(u) with u = pi(y|x) / pi_ref(y|x), up to a
constant per prompt that cancels between the two answers only. DPO's own is f'(u) = log u, up to such a constant.
"""

import math

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from prefmesh.objectives.log_probs import PairLogProbs
from prefmesh.objectives.settings import ObjectiveSettings

Scores = Float[Tensor, "agents pairs"]

MOST = 80.0
"""Nats: exponents are cut there, as TRL's are in float32, so that e^x stays finite."""


def scores(log_probs: PairLogProbs, settings: ObjectiveSettings) -> tuple[Scores, Scores]:
    """f'(u) of the chosen and of the rejected answers, in nats."""
    return (
        score(log_probs.chosen_logratio, settings),
        score(log_probs.rejected_logratio, settings),
    )


def difference(log_probs: PairLogProbs, settings: ObjectiveSettings) -> Scores:
    """f'(u_w) - f'(u_l), which for `reverse_kl` is h."""
    chosen, rejected = scores(log_probs, settings)
    return chosen - rejected


def score(logratio: Scores, settings: ObjectiveSettings) -> Scores:
    """f'(u) of log u (Wang et al. 2024, table 1)."""
    if settings.f_divergence_type == "js_divergence":
        return math.log(2) + F.logsigmoid(logratio)  # log(2u / (1 + u))
    alpha = {"reverse_kl": 1.0, "forward_kl": 0.0}.get(
        settings.f_divergence_type, settings.f_alpha_divergence_coef
    )
    if alpha == 1:
        return logratio
    return ((alpha - 1) * logratio).clamp(max=MOST).expm1() / (alpha - 1)  # (u^(alpha - 1) - 1) / (alpha - 1)
