"""DecDPO (arXiv 2605.20696; decentralized SGD, Lian et al. 2017): E local steps, then gossip with neighbours.

    Theta^{r+1} = W (Theta^r + N diag(w) (local_E(Theta^r) - Theta^r))

W doubly stochastic, from a graph. With equal weights this is W local_E(Theta); unequal ones scale each agent's update
by N w_i, so that the average model follows sum_i w_i Delta_i exactly as FedDPO's server does.
"""

import numpy as np
import torch
from jaxtyping import Int

from prefmesh.algorithms.consensus import Weighted
from prefmesh.algorithms.methods.base import method
from prefmesh.algorithms.methods.gossip import Varying, VaryingSettings
from prefmesh.algorithms.state import State
from prefmesh.policies.base import Params


class DecDPOSettings(VaryingSettings):
    """A graph, and which of its links are there in a round."""


@method("dec_dpo")
class DecDPO(Varying):
    """Local steps, then W."""

    Settings = DecDPOSettings

    @property
    def averages(self) -> bool:
        """Unless updates are weighted before."""
        return not self.compression and bool((self.update_scale == 1).all())

    def mix(self, state: State, round_: int, agents: Int[np.ndarray, " active"], end: Params) -> State:
        """W Theta, where each agent's update is first scaled by N w_i."""
        reached = self._reached(state, agents, end)
        del end
        state.theta = {}  # before there is a third stack of rows
        state.theta = self.mixed(state, round_, reached)
        return state

    def _reached(self, state: State, agents: Int[np.ndarray, " active"], end: Params) -> Params:
        return self.filled(state, agents, self.weighted(state, agents, end))

    def meant(
        self, state: State, round_: int, agents: Int[np.ndarray, " active"], end: Params
    ) -> Weighted | None:
        """The mean, which W keeps; where it is more than that, nothing is said."""
        if self.compression:
            return None
        weights = torch.full((self.mesh.hosted,), 1 / self.agents, dtype=torch.float64)
        return weights, self._reached(state, agents, dict(end))
