"""FedProx (Li et al. 2020, arXiv 1812.06127, eq. 2): local steps are held to the server's model.

local step along  grad f_i(theta) + mu (theta - theta^r),      then FedDPO's average
"""

import numpy as np
from jaxtyping import Int
from pydantic import Field

from prefmesh.algorithms.local_rule import Correction, held_to
from prefmesh.algorithms.methods.base import method
from prefmesh.algorithms.methods.server import Server, ServerSettings
from prefmesh.algorithms.state import State
from prefmesh.policies.base import Params


class FedProxSettings(ServerSettings):
    """`mu`: how strongly; 0 is FedDPO without staleness."""

    mu: float = Field(default=0.01, ge=0)


@method("fed_prox")
class FedProx(Server):
    """A server, and agents that do not go far."""

    Settings = FedProxSettings
    settings: FedProxSettings

    @property
    def averages(self) -> bool:
        """Of where agents got to."""
        return not self.compression

    def correction(
        self, state: State, round_: int, agents: Int[np.ndarray, " some"], start: Params
    ) -> Correction | None:
        """mu (theta - theta^r)."""
        if not self.settings.mu:
            return None
        return held_to({name: tensor.clone() for name, tensor in start.items()}, self.settings.mu)
