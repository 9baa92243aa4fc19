"""The DPO family: pure functions from log-probabilities to a loss per pair.

Everything is a sum over completion tokens, in nats, except where a loss says that it normalises by length.
With the margin (Rafailov et al. 2023, eq. 7)

    h = [log pi(y_w|x) - log pi_ref(y_w|x)] - [log pi(y_l|x) - log pi_ref(y_l|x)]

DPO's loss is -log sigmoid(beta h). A new loss is one function under `@loss("name")`.
"""

from prefmesh.objectives import batches, margins, ratios
from prefmesh.objectives.log_probs import PairLogProbs, PairLoss, rounding
from prefmesh.objectives.objective import pair_loss
from prefmesh.objectives.registry import LOSSES, TRAITS, Loss, Traits, loss, traits
from prefmesh.objectives.settings import ObjectiveSettings

__all__ = [
    "LOSSES",
    "TRAITS",
    "Loss",
    "ObjectiveSettings",
    "PairLogProbs",
    "PairLoss",
    "Traits",
    "batches",
    "loss",
    "margins",
    "pair_loss",
    "ratios",
    "rounding",
    "traits",
]
