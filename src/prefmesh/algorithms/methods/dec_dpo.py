"""DecDPO (arXiv 2605.20696; decentralized SGD, Lian et al. 2017): E local steps, then gossip with neighbours.

    Theta^{r+1} = W (Theta^r + N diag(w) (local_E(Theta^r) - Theta^r))

W doubly stochastic, from a graph. With equal weights this is W local_E(Theta); unequal ones scale each agent's update
by N w_i, so that the average model follows sum_i w_i Delta_i exactly as FedDPO's server does.
"""

import numpy as np
import torch
from jaxtyping import Int
from pydantic import Field
from scipy.sparse import csr_array

from prefmesh.algorithms.methods.base import Method, MethodSettings, Population, method
from prefmesh.algorithms.state import State, copies
from prefmesh.policies.base import Params
from prefmesh.topology.build import build_mixing_matrix
from prefmesh.topology.mixing import MixingMatrix
from prefmesh.topology.settings import GraphSettings


class DecDPOSettings(MethodSettings):
    """Who talks to whom, and how much they take of each other."""

    graph: GraphSettings = Field(default_factory=lambda: GraphSettings(name="ring"))
    """A graph's name, or a mapping of a name and its options."""
    weights: str = "metropolis"
    """How the mixing matrix W is made from the graph."""

    def check(self, agents: int) -> None:
        """The graph exists for this many agents, is connected, and W contracts."""
        self.mixing_matrix(agents, seed=0)

    def mixing_matrix(self, agents: int, seed: int) -> MixingMatrix:
        """W (agents, agents)."""
        return build_mixing_matrix(self.graph, self.weights, agents=agents, seed=seed)


@method("dec_dpo")
class DecDPO(Method):
    """N agents, each with a model of its own; the policy that is evaluated and saved first is their average."""

    Settings = DecDPOSettings
    settings: DecDPOSettings

    def __init__(self, settings: DecDPOSettings, population: Population):
        super().__init__(settings, population)
        self.mixing = settings.mixing_matrix(self.agents, population.seed)

    def matrix(self, round_: int) -> csr_array:
        """W of round `round_` (from 1)."""
        return self.mixing.matrix

    def begin(self, row: Params) -> State:
        """All agents start equal, each with its own copy."""
        return State.of(copies(row, self.mesh.hosted), shards=self.population.shards)

    def mix(self, state: State, round_: int, agents: Int[np.ndarray, " active"], end: Params) -> State:
        """W Theta, where each agent's update is first scaled by N w_i."""
        scale = torch.from_numpy(self.update_scale[agents])
        if not bool((scale == 1).all()):
            for name, rows in end.items():
                start = state.theta[name]
                factor = scale.to(rows).view(-1, *[1] * (rows.dim() - 1))
                end[name] = start + factor * (rows - start)
        state.theta = {}  # before there is a third stack of rows
        state.theta = self.mesh.mix(self.matrix(round_), end)
        return state

    def bytes_sent(self, round_: int, *, model_bytes: int, data_bytes: int) -> int:
        """One model over every directed edge."""
        return model_bytes * self.mixing.messages_per_round
