"""Exact diffusion, also D^2 (Yuan et al. 2019, arXiv 1702.05122, algorithm 1; Tang et al. 2018, arXiv 1803.07068).

    Psi   = Theta + N diag(w) (local_E(Theta) - Theta)                          adapt
    Phi   = Psi + Theta - (Psi of the round before; at first Theta)             correct
    Theta <- (I + W)/2 Phi                                                      combine

One message a link, as DecDPO. For E = 1 and full batches the limit is the optimum of f; for E > 1 it is where the updates of all
agents cancel, which is FedDPO's limit, but with all agents equal.
"""

import numpy as np
from jaxtyping import Int
from scipy.sparse import csr_array, eye_array

from prefmesh.algorithms.methods.base import Population, method
from prefmesh.algorithms.methods.gossip import Gossip, GossipSettings
from prefmesh.algorithms.state import State
from prefmesh.errors import InputError
from prefmesh.policies.base import Params


class LazySettings(GossipSettings):
    """An undirected graph whose links are there in every round."""

    def check(self, agents: int) -> None:
        """W is symmetric."""
        super().check(agents)
        if not self.mixing_matrix(agents, seed=0).symmetric:
            raise InputError(
                f"method.graph: {self.graph}, whose W is not symmetric; allowed for {self.name}: an undirected graph"
            )


class Lazy(Gossip):
    """Gossip with (I + W)/2, whose eigenvalues are not negative."""

    Settings = LazySettings

    def __init__(self, settings: LazySettings, population: Population):
        super().__init__(settings, population)
        self.lazy = csr_array(0.5 * (eye_array(self.agents) + self.mixing.matrix))


@method("exact_diffusion")
class ExactDiffusion(Lazy):
    """Agents that remember where the round before took them."""

    def begin(self, row: Params) -> State:
        """Psi = Theta."""
        state = super().begin(row)
        state.memory |= {f"psi/{name}": tensor.clone() for name, tensor in state.theta.items()}
        return state

    def matrix(self, round_: int) -> csr_array:
        """(I + W)/2."""
        return self.lazy

    def mix(self, state: State, round_: int, agents: Int[np.ndarray, " active"], end: Params) -> State:
        """Correct, combine."""
        psi = self.weighted(state, agents, end)
        phi = {}
        for name, tensor in psi.items():
            phi[name] = tensor + state.theta[name] - state.memory[f"psi/{name}"]
            state.memory[f"psi/{name}"] = tensor
        state.theta = self.mixed(state, round_, phi)
        return state
