"""Asynchronous pairwise gossip (AD-PSGD: Lian et al. 2018, arXiv 1710.06952, algorithm 1).

Nobody waits for all: in a round `wakes` agents, drawn anew, take E local steps, while each averages with a neighbour of its own.

    Theta <- W_r Theta + (for those awake) N w_i (local_E(theta_i) - theta_i),      W_r averages the pairs

What an agent adds was found before it averaged, as when both happen at a time.
"""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int
from pydantic import Field
from scipy.sparse import csr_array

from prefmesh.algorithms.methods.base import Population, method
from prefmesh.algorithms.methods.gossip import Gossip, GossipSettings
from prefmesh.algorithms.state import State, rows
from prefmesh.errors import InputError
from prefmesh.policies.base import Params
from prefmesh.randomness import generator
from prefmesh.topology import schedules


class AsyncGossipSettings(GossipSettings):
    """`wakes`: how many agents, with a partner each, act in a round; N rounds with one are as much work as one with all."""

    wakes: int = Field(default=1, ge=1)

    def check(self, agents: int) -> None:
        """An undirected graph with room for the pairs."""
        super().check(agents)
        schedules.refuse_directed(self.mixing_matrix(agents, seed=0).graph, "method.name: async_gossip")
        if 2 * self.wakes > max(2, agents):
            raise InputError(
                f"method.wakes: {self.wakes}, each with a partner, of {agents} agents; allowed: 1 to {max(1, agents // 2)}"
            )
        if self.compression:
            raise InputError(
                "method.compression: neighbours must hear every difference; allowed for async_gossip: none"
            )
        if self.weights != GossipSettings.model_fields["weights"].default:
            raise InputError(f"method.weights: {self.weights}, but pairs average; allowed: no weights")


@method("async_gossip")
class AsyncGossip(Gossip):
    """A few agents a round."""

    Settings = AsyncGossipSettings

    def __init__(self, settings: AsyncGossipSettings, population: Population):
        super().__init__(settings, population)
        self._round = lru_cache(maxsize=4)(self._draw)

    def _draw(self, round_: int) -> tuple[Int[np.ndarray, " awake"], csr_array]:
        """Who wakes, and whom they average with: in random order, each takes a free neighbour, or none is left."""
        random = generator(self.population.seed, "wakes", round_)
        free, pairs, awake = np.ones(self.agents, dtype=bool), [], []
        for i in random.permutation(self.agents).tolist():
            if len(awake) == self.settings.wakes:
                break
            if not free[i]:
                continue
            free[i] = False
            awake.append(i)
            near = [j for j in sorted(self.mixing.graph[i]) if free[j]]
            if near:
                j = int(random.choice(near))
                free[j] = False
                pairs.append((i, j))
        return np.sort(np.array(awake)), schedules.averaging(self.agents, pairs)

    def participants(self, round_: int) -> Int[np.ndarray, " active"]:
        """Who wakes."""
        return self._round(round_)[0]

    def matrix(self, round_: int) -> csr_array:
        """W_r."""
        return self._round(round_)[1]

    def mix(self, state: State, round_: int, agents: Int[np.ndarray, " active"], end: Params) -> State:
        """Average, then add what was found."""
        start = rows(state.theta, self.mesh.rows(agents))
        reached = self.weighted(state, agents, end)
        update = {name: tensor - start[name] for name, tensor in reached.items()}
        place = torch.from_numpy(self.mesh.rows(agents))
        mixed = self.mesh.mix(self.matrix(round_), dict(state.theta))
        state.theta = {
            name: tensor.index_add_(0, place.to(tensor.device), update[name])
            for name, tensor in mixed.items()
        }
        return state
