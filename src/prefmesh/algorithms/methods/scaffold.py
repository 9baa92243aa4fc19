"""SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1): control variates take client drift out.

    local step along  grad f_i(theta) + c - c_i
    c_i <- the mean of the gradients that i saw in its E steps  (participants; for plain SGD this is option II)
    c   <- c + sum_{i in S_r} w_i (change of c_i),   so that c = sum_i w_i c_i always;      theta as FedDPO's

Compressed, c_i follows the mean gradient by differences, as an update does, and agents hear c likewise. Where all take full-batch steps, c_i -> grad f_i(theta*) and c -> 0: the limit is the optimum of f whatever E is.
"""

import numpy as np
import torch
from jaxtyping import Int

from prefmesh.algorithms.local_rule import Correction
from prefmesh.algorithms.methods.base import method
from prefmesh.algorithms.methods.server import Server
from prefmesh.algorithms.state import State, rows, take
from prefmesh.policies.base import Params


@method("scaffold")
class Scaffold(Server):
    """A server with a variate, and agents with one each; all in `memory`."""

    uses_gradients = True
    agents_remember = True

    def begin(self, row: Params) -> State:
        """All variates are 0."""
        state = super().begin(row)
        for name, tensor in row.items():
            state.memory[f"c/{name}"] = torch.zeros_like(tensor)
            state.memory[f"c_i/{name}"] = tensor.new_zeros(self.mesh.hosted, *tensor.shape[1:])
            if self.compression:
                state.memory[f"heard c/{name}"] = torch.zeros_like(tensor)
        return state

    def correction(
        self, state: State, round_: int, agents: Int[np.ndarray, " some"], start: Params
    ) -> Correction | None:
        """c - c_i."""
        own = rows({name: state.memory[f"c_i/{name}"] for name in start}, self.mesh.rows(agents))
        server = "heard c" if self.compression else "c"
        shift = {name: state.memory[f"{server}/{name}"] - own[name] for name in start}
        return lambda theta, gradient: {name: g + shift[name] for name, g in gradient.items()}

    def mix(self, state: State, round_: int, agents: Int[np.ndarray, " active"], end: Params) -> State:
        """The variates move on, as far as messages say; the model as the server says."""
        before = take({name: state.memory[f"c_i/{name}"] for name in end}, self.mesh.rows(agents))
        after = self.followed(state, round_, agents, state.gradients, "c_i")
        change = {name: after[name] - before[name] for name in end}
        weights = torch.from_numpy(self.population.weights[agents])
        for name, moved in self.mesh.weighted_sum(weights, change).items():
            state.memory[f"c/{name}"] = state.memory[f"c/{name}"] + moved
        if self.compression:
            self.broadcast(state, round_, {name: state.memory[f"c/{name}"] for name in end}, "heard c")
        return super().mix(state, round_, agents, end)

    def bytes_sent(self, round_: int, *, model_bytes: int, data_bytes: int) -> int:
        """A variate beside every model, both ways."""
        return 2 * super().bytes_sent(round_, model_bytes=model_bytes, data_bytes=data_bytes)
