"""The configured objective: a sum of losses."""

from prefmesh.objectives.log_probs import PairLogProbs, PairLoss
from prefmesh.objectives.registry import LOSSES
from prefmesh.objectives.settings import ObjectiveSettings


def pair_loss(log_probs: PairLogProbs, settings: ObjectiveSettings, *, alone: bool = False) -> PairLoss:
    """The loss of each pair under the configured objective, sum_k loss_weights_k loss_k.

    A row is a batch, which some losses sort or average over. `alone`: every pair is a batch of its own, so that its loss
    depends neither on how many are scored in a pass nor on who holds the others: what evaluation does.
    """
    seen = log_probs.apart() if alone else log_probs
    (first, weight), *others = settings.losses
    total = LOSSES[first](seen, settings)
    total = total if weight == 1 else weight * total
    for name, weight in others:
        total = total + weight * LOSSES[name](seen, settings)
    return total.reshape(log_probs.chosen.shape)
