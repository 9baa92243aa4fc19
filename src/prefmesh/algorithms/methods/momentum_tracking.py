"""Momentum tracking (Takezawa et al. 2022, arXiv 2209.15505, algorithm 1): heterogeneity does not grow with momentum.

With U_i = theta_i - local_1(theta_i), which for `sgd` with momentum is lr times the momentum,

    Theta <- W (Theta - U + C),      C <- W (C - U) + U,      C = 0 at first

(C is lr times the paper's c: `optimizer.lr` should be constant). Without momentum this is gradient tracking.
"""

import numpy as np
import torch
from jaxtyping import Int

from prefmesh.algorithms.methods.base import method
from prefmesh.algorithms.methods.gossip import Gossip, GossipSettings
from prefmesh.algorithms.state import State
from prefmesh.errors import InputError
from prefmesh.policies.base import Params


class MomentumTrackingSettings(GossipSettings):
    """A graph; one local step a round."""

    def check(self, agents: int) -> None:
        """E = 1."""
        super().check(agents)
        if self.local_steps != 1:
            raise InputError(
                f"method.local_steps: {self.local_steps}; allowed for momentum_tracking: 1 (gradient_tracking takes more)"
            )


@method("momentum_tracking")
class MomentumTracking(Gossip):
    """Agents with C in `memory`."""

    Settings = MomentumTrackingSettings

    def begin(self, row: Params) -> State:
        """C = 0."""
        state = super().begin(row)
        for name, tensor in state.theta.items():
            state.memory[f"c/{name}"] = torch.zeros_like(tensor)
            if self.compression:
                state.memory[f"heard c/{name}"] = torch.zeros_like(tensor)
        return state

    def mix(self, state: State, round_: int, agents: Int[np.ndarray, " active"], end: Params) -> State:
        """Both products."""
        reached = self.weighted(state, agents, end)
        update = {name: state.theta[name] - tensor for name, tensor in reached.items()}
        c = {name: state.memory[f"c/{name}"] for name in update}
        state.theta = self.mixed(state, round_, {name: reached[name] + c[name] for name in update})
        found = self.mixed(state, round_, {name: c[name] - update[name] for name in update}, "heard c")
        for name, mean in found.items():
            state.memory[f"c/{name}"] = mean + update[name]
        return state

    def bytes_sent(self, round_: int, *, model_bytes: int, data_bytes: int) -> int:
        """A correction beside every model."""
        return 2 * super().bytes_sent(round_, model_bytes=model_bytes, data_bytes=data_bytes)
