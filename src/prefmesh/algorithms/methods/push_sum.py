"""Stochastic gradient push (Assran et al. 2019, arXiv 1811.10792, algorithm 1): gossip where links go one way.

A sender knows whom it sends to, not what they take from others: A is column-stochastic, a_ij = 1 / (1 + out-degree of j), and its
repeated products lean towards some agents. A weight that travels along takes that out:

    X <- A (X + N diag(w) (local_E(Theta) - Theta)),      v <- A v (v = 1 at first),      theta_i = x_i / v_i
"""

import numpy as np
import torch
from jaxtyping import Int
from pydantic import Field
from scipy.sparse import csr_array, diags_array, eye_array

from prefmesh.algorithms.methods.base import Method, MethodSettings, Population, method
from prefmesh.algorithms.state import State, copies, spread
from prefmesh.policies.base import Params
from prefmesh.randomness import generator
from prefmesh.topology.registry import build_graph
from prefmesh.topology.settings import GraphSettings
from prefmesh.topology.weights import adjacency

WEIGHT = "push_sum_weight"


class PushSumSettings(MethodSettings):
    """Who sends to whom; links may go one way."""

    graph: GraphSettings = Field(default_factory=lambda: GraphSettings(name="exponential"))
    """A graph's name, or a mapping of a name and its options; {name: erdos_renyi, directed: true} is of one-way links."""

    def check(self, agents: int) -> None:
        """The graph exists for this many agents, and there is a way from each to each."""
        self.pushes(agents, seed=0)

    def pushes(self, agents: int, seed: int) -> csr_array:
        """A (agents, agents): columns sum to one."""
        rng = generator(seed, "topology")
        graph = build_graph(self.graph.name, agents, self.graph.options, rng, where="method.graph")
        sent = adjacency(graph).T + eye_array(agents)
        return csr_array(sent @ diags_array(1 / sent.sum(axis=0)))


@method("push_sum")
class PushSum(Method):
    """Agents with a weight each, in `memory`; theta is what they train and show, x / v."""

    Settings = PushSumSettings

    def __init__(self, settings: PushSumSettings, population: Population):
        super().__init__(settings, population)
        self.pushes = settings.pushes(self.agents, population.seed)

    def matrix(self, round_: int) -> csr_array:
        """A."""
        return self.pushes

    def begin(self, row: Params) -> State:
        """All agents start equal, with weight 1."""
        state = State.of(copies(row, self.mesh.hosted), shards=self.population.shards)
        like = next(iter(row.values()))
        state.memory = {WEIGHT: like.new_ones(self.mesh.hosted, 1)}
        return state

    def mix(self, state: State, round_: int, agents: Int[np.ndarray, " active"], end: Params) -> State:
        """Push x and v, divide."""
        v, scale = state.memory[WEIGHT][:, 0], torch.from_numpy(self.update_scale[agents])
        x = {
            name: spread(v, theta) * theta + spread(scale, theta) * (end[name] - theta)
            for name, theta in state.theta.items()
        }
        found = self.mesh.mix(self.pushes, {WEIGHT: state.memory[WEIGHT]} | x)
        state.memory[WEIGHT] = found.pop(WEIGHT)
        share = state.memory[WEIGHT][:, 0]
        state.theta = {name: tensor / spread(share, tensor) for name, tensor in found.items()}
        return state

    def bytes_sent(self, round_: int, *, model_bytes: int, data_bytes: int) -> int:
        """One model over every link; the weight is a number."""
        return model_bytes * int(self.pushes.nnz - self.agents)
