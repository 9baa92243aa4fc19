"""Fair resource allocation (q-FFL: Li et al. 2020, arXiv 1905.10497, eq. 2 and algorithm 2, q-FedAvg): larger losses count more.

    min over theta of  sum_i w_i f_i(theta)^{q+1} / (q + 1)

    Delta_i = local_E(theta^r) - theta^r                     (the paper's Delta w_i is -L Delta_i)
    h_i     = F_i^q L + q F_i^{q-1} L^2 ||Delta_i||^2        (L, the smoothness of f_i: 1/lr)
    theta^{r+1} = theta^r + sum_{i in S_r} w_i F_i^q L Delta_i / sum_{i in S_r} w_i h_i

For q = 0 all h_i are L, and it is the w-weighted mean of the participants' updates. As q grows, it nears `group_robust`'s aim, in
shorter steps. L Delta_i stands for a gradient, as it is for sgd; AdamW's updates are of no gradient's length.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from prefmesh.algorithms.methods.base import method
from prefmesh.algorithms.methods.by_loss import ByLoss
from prefmesh.algorithms.methods.server import ServerSettings
from prefmesh.algorithms.state import State
from prefmesh.errors import InputError
from prefmesh.policies.base import Params

LEAST = 1e-10
"""Nats: F_i^{q-1} has no bound at 0."""


class QFedAvgSettings(ServerSettings):
    """How fair."""

    q: float = Field(default=1.0, ge=0, le=1000)
    """The power of a loss that its update counts by; 0 is `fed_dpo`."""
    lipschitz: float | None = Field(default=None, ge=0)
    """L; none: 1/lr, for `sgd`. 0 keeps the weights F_i^q and leaves the steps as long as updates are."""

    @model_validator(mode="after")
    def _used(self) -> "QFedAvgSettings":
        if not self.q and self.lipschitz is not None:
            raise ValueError(f"lipschitz {self.lipschitz:g} has no meaning for q 0; allowed: none")
        return self


@method("q_fed_avg")
class QFedAvg(ByLoss):
    """A server that steps the shorter, the more its agents' losses would change."""

    Settings = QFedAvgSettings
    settings: QFedAvgSettings

    numbers = 2

    def tell(
        self, losses: Float[Tensor, " some"], end: Params, start: Params, lr: float
    ) -> Float[Tensor, "some numbers"]:
        """F_i, and L ||Delta_i||^2 over all tensors."""
        parts = [(end[name] - start[name]).flatten(1).double().square().sum(1) for name in end]
        lipschitz = 1 / lr if self.settings.lipschitz is None else self.settings.lipschitz
        return torch.stack([losses, lipschitz * torch.stack(parts).sum(0)], dim=1)

    def weigh(
        self, state: State, acting: Int[np.ndarray, " active"], told: Float[np.ndarray, "active numbers"]
    ) -> Float[np.ndarray, " active"]:
        """w_i F_i^q L / sum_j w_j h_j."""
        losses, moved = told.T
        if (losses < 0).any():
            i = int(losses.argmin())
            raise InputError(
                f"method.name: q_fed_avg, but agent {acting[i]}'s loss is {losses[i]:.3g}; allowed: an objective whose losses are at "
                "least 0"
            )
        q, losses = self.settings.q, np.maximum(losses, LEAST)
        # Only ratios of F_i^q count: of the largest, none overflows.
        counts = self.population.weights[acting] * (losses / losses.max()) ** q
        return counts / float(counts @ (1 + q * moved / losses))
