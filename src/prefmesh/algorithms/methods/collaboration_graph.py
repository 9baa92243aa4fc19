"""Personal policies by gossip, whose weights are learned with them (collaboration graphs: Zantedeschi et al. 2020, arXiv 1901.08460; here
with distances of models and weights on a simplex, as pFedGraph has them under a server: Ye et al. 2023).

    D_ij <- mean over the rounds of  ||end_i - end_j||^2 / (mean over i's neighbours of the same)
    w_i  <- argmin of  ||w - W_i||^2 + 2 sharpness mean_k(W_ik) sum_j w_j D_ij     over  w_ii = W_ii,  w >= 0,  sum_j w_j = 1
    theta_i <- sum_j w_ij end_j

j over i's neighbours. The minimum is the projection of W_i - sharpness mean(W_i) D_i onto a simplex. Where all are equally far apart,
w_i is W_i and this is DecDPO; who is further away than others counts less and in the end not at all, and so drifts further away.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from scipy.sparse import csr_array

from prefmesh.algorithms.methods.base import method
from prefmesh.algorithms.methods.gossip import Gossip, GossipSettings
from prefmesh.algorithms.state import State
from prefmesh.errors import InputError
from prefmesh.mesh.products import mix
from prefmesh.policies.base import Params
from prefmesh.topology.settings import GraphSettings


class CollaborationGraphSettings(GossipSettings):
    """Who may collaborate, and how much it matters how far apart they are."""

    graph: GraphSettings = Field(default_factory=lambda: GraphSettings(name="complete"))
    """Who may collaborate; the weights on its links are learned."""
    sharpness: float = Field(default=2.0, ge=0)
    """How much weight distance takes away; 0 is DecDPO, with each agent's own policy as the result."""

    def check(self, agents: int) -> None:
        """The graph exists; models are sent whole."""
        super().check(agents)
        if self.compression:
            raise InputError(
                "method.compression: distances are of whole models; allowed for collaboration_graph: none"
            )


@method("collaboration_graph")
class CollaborationGraph(Gossip):
    """Agents with weights of their own, which follow from D in `memory` (hosted, most neighbours)."""

    Settings = CollaborationGraphSettings
    settings: CollaborationGraphSettings
    one_policy = False
    in_turn = False

    def begin(self, row: Params) -> State:
        """Nothing is known of distances."""
        state = super().begin(row)
        most = int(np.diff(self.mixing.matrix.indptr).max())
        state.memory["distance"] = torch.zeros(self.mesh.hosted, most, dtype=torch.float64)
        return state

    def mix(self, state: State, round_: int, agents: Int[np.ndarray, " active"], end: Params) -> State:
        """Of what neighbours send both the distances and the average are taken."""
        reached = self.weighted(state, agents, end)
        columns, heard = self.mesh.needed(self.mixing.matrix, reached)
        block = csr_array(self.mixing.matrix[self.mesh.first : self.mesh.last][:, columns])
        known = state.memory["distance"].cpu().numpy().copy()
        weights = block.data.copy()
        for i in range(self.mesh.hosted):
            entries = slice(block.indptr[i], block.indptr[i + 1])
            near = block.indices[entries]
            others = columns[near] != self.mesh.first + i
            found = _distances({name: tensor[i] for name, tensor in reached.items()}, heard, near)
            count = int(others.sum())
            if not count or not found[others].sum():
                continue
            kept = known[i, : len(near)]
            kept += (found / found[others].mean() - kept) / round_
            given = block.data[entries][others]
            weights[entries.start + np.flatnonzero(others)] = onto_simplex(
                given - self.settings.sharpness * given.mean() * kept[others], float(given.sum())
            )
        state.memory["distance"] = torch.from_numpy(known).to(state.memory["distance"].device)
        learned = csr_array((weights, block.indices, block.indptr), shape=block.shape)
        state.theta = {name: mix(learned, tensor) for name, tensor in heard.items()}
        return state


def _distances(own: Params, heard: Params, near: Int[np.ndarray, " near"]) -> Float[np.ndarray, " near"]:
    """||own - heard_j||^2 over all tensors."""
    place = torch.from_numpy(near.astype(np.int64))
    total = torch.zeros(len(near), dtype=torch.float64)
    for name, tensor in own.items():
        apart = heard[name][place.to(tensor.device)] - tensor
        total += apart.flatten(1).square().sum(1, dtype=torch.float64).cpu()
    return total.numpy()


def onto_simplex(point: Float[np.ndarray, " n"], total: float) -> Float[np.ndarray, " n"]:
    """The nearest point with entries of at least 0 that add up to `total` (Duchi et al. 2008, figure 1)."""
    falling = np.sort(point)[::-1]
    excess = (np.cumsum(falling) - total) / np.arange(1, len(point) + 1)
    shift = excess[np.flatnonzero(falling > excess)[-1]]
    return np.maximum(point - shift, 0)
