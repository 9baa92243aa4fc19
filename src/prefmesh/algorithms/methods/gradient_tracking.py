"""Gradient tracking with local steps (K-GT: Liu et al. 2023, arXiv 2301.01313, algorithm 1; for E = 1 ATC gradient tracking, DIGing:
Nedic et al. 2017; with a server's complete graph SCAFFOLD).

    local step along  N w_i grad f_i(theta) + c_i
    d_i   = N w_i (mean gradient that i saw in its E steps) + c_i
    Theta <- W local_E(Theta),      C <- W D - N diag(w) (mean gradients)

sum_i c_i = 0 always, and d_i follows the network's mean gradient: with full batches the limit is the optimum of f, all agents equal.
"""

import numpy as np
import torch
from jaxtyping import Int

from prefmesh.algorithms.local_rule import Correction
from prefmesh.algorithms.methods.base import method
from prefmesh.algorithms.methods.gossip import Varying, VaryingSettings
from prefmesh.algorithms.state import State, rows, spread
from prefmesh.policies.base import Params


class GradientTrackingSettings(VaryingSettings):
    """A graph, and which of its links are there in a round."""


@method("gradient_tracking")
class GradientTracking(Varying):
    """Agents with a correction each, in `memory`."""

    Settings = GradientTrackingSettings
    uses_gradients = True

    def begin(self, row: Params) -> State:
        """c = 0."""
        state = super().begin(row)
        for name, tensor in state.theta.items():
            state.memory[f"c/{name}"] = torch.zeros_like(tensor)
            if self.compression:
                state.memory[f"heard d/{name}"] = torch.zeros_like(tensor)
        return state

    def correction(
        self, state: State, round_: int, agents: Int[np.ndarray, " some"], start: Params
    ) -> Correction | None:
        """N w_i g + c_i."""
        scale = torch.from_numpy(self.update_scale[agents])
        own = rows({name: state.memory[f"c/{name}"] for name in start}, self.mesh.rows(agents))
        return lambda theta, gradient: {
            name: g * spread(scale, g) + own[name] for name, g in gradient.items()
        }

    def mix(self, state: State, round_: int, agents: Int[np.ndarray, " active"], end: Params) -> State:
        """W of the models and of what they followed."""
        place = torch.from_numpy(self.mesh.rows(agents))
        scale = torch.from_numpy(self.update_scale[agents])
        seen = {
            name: torch.zeros_like(state.memory[f"c/{name}"]).index_copy_(
                0, place.to(g.device), g * spread(scale, g)
            )
            for name, g in state.gradients.items()
        }
        followed = {name: state.memory[f"c/{name}"] + g for name, g in seen.items()}
        for name, mean in self.mixed(state, round_, followed, "heard d").items():
            state.memory[f"c/{name}"] = mean - seen[name]
        state.theta = self.mixed(state, round_, self.filled(state, agents, end))
        return state

    def bytes_sent(self, round_: int, *, model_bytes: int, data_bytes: int) -> int:
        """A direction beside every model."""
        return 2 * super().bytes_sent(round_, model_bytes=model_bytes, data_bytes=data_bytes)
