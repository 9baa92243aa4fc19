"""No server: agents mix with their neighbours. What DecDPO and its relatives share."""

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from pydantic import Field, model_validator
from scipy.sparse import csr_array

from prefmesh.algorithms.methods.base import Method, MethodSettings, Population
from prefmesh.algorithms.state import State, copies, rows, spread
from prefmesh.compression import ChainSettings
from prefmesh.errors import InputError
from prefmesh.policies.base import Params
from prefmesh.randomness import generator
from prefmesh.topology import schedules
from prefmesh.topology.build import build_mixing_matrix
from prefmesh.topology.mixing import MixingMatrix
from prefmesh.topology.settings import GraphSettings


class GossipSettings(MethodSettings):
    """Who talks to whom, and how much they take of each other."""

    graph: GraphSettings = Field(default_factory=lambda: GraphSettings(name="ring"))
    """A graph's name, or a mapping of a name and its options."""
    weights: str = "metropolis"
    """How the mixing matrix W is made from the graph."""

    compression: ChainSettings = ()
    """What messages are reduced to: a list of stages, such as [{name: top_k, share: 0.01}, int8]."""
    consensus_step: float = Field(default=1.0, gt=0, le=1)
    """gamma, how far agents go towards what they hear where messages are compressed; the coarser they are, the smaller it must be."""

    @model_validator(mode="after")
    def _step_is_used(self) -> "GossipSettings":
        if self.consensus_step != 1 and not self.compression:
            raise ValueError(f"consensus_step is {self.consensus_step:g}; allowed without compression: 1")
        return self

    def check(self, agents: int) -> None:
        """The graph exists for this many agents, is connected, and W contracts."""
        self.mixing_matrix(agents, seed=0)

    def mixing_matrix(self, agents: int, seed: int) -> MixingMatrix:
        """W (agents, agents)."""
        return build_mixing_matrix(self.graph, self.weights, agents=agents, seed=seed)


class Gossip(Method):
    """N agents, each with a model of its own; the policy that is evaluated and saved first is their average."""

    Settings = GossipSettings

    def __init__(self, settings: GossipSettings, population: Population):
        super().__init__(settings, population)
        self.mixing = settings.mixing_matrix(self.agents, population.seed)

    def matrix(self, round_: int) -> csr_array:
        """W of round `round_` (from 1)."""
        return self.mixing.matrix

    def begin(self, row: Params) -> State:
        """All agents start equal, each with its own copy."""
        state = State.of(copies(row, self.mesh.hosted), shards=self.population.shards)
        if self.compression:  # all know where all begin
            state.memory = {f"heard/{name}": tensor.clone() for name, tensor in state.theta.items()}
        return state

    def mixed(self, state: State, round_: int, rows: Params, purpose: str = "heard") -> Params:
        """W of rows of all agents hosted here, which are used up. Compressed, by what neighbours hear (CHOCO-Gossip: Koloskova et al.
        2019, arXiv 1902.00340, algorithm 1):

            H <- H + C(X - H),      X <- X + gamma (W - I) H

        which keeps the mean of X whatever C loses. `purpose`: under which H is kept.
        """
        w = self.matrix(round_)
        if not self.compression:
            return self.mesh.mix(w, rows)
        everybody = np.arange(self.mesh.first, self.mesh.last)
        heard = self.followed(state, round_, everybody, rows, purpose)
        gamma = self.settings.consensus_step
        moved = self.mesh.mix(w, dict(heard))
        return {name: x + gamma * (moved[name] - heard[name]) for name, x in rows.items()}

    def weighted(self, state: State, agents: Int[np.ndarray, " active"], end: Params) -> Params:
        """theta_i + N w_i (end_i - theta_i): so that the mean of all models moves as a server's would. Uses `end` up."""
        scale = torch.from_numpy(self.update_scale[agents])
        if not bool((scale == 1).all()):
            start = rows(state.theta, self.mesh.rows(agents))
            for name, reached in end.items():
                end[name] = start[name] + spread(scale, reached) * (reached - start[name])
        return end

    def bytes_sent(self, round_: int, *, model_bytes: int, data_bytes: int) -> int:
        """Its sender's model over every directed edge."""
        receivers, senders = self.matrix(round_).nonzero()
        return self.models_bytes(model_bytes, senders[senders != receivers])


class VaryingSettings(GossipSettings):
    """A graph whose links are not all used in every round."""

    schedule: Literal["static", "one_peer", "matching"] = "static"
    """`static`: all links; `one_peer`: on the exponential graph, an agent's links in turn, one a round; `matching`: random pairs."""
    link_dropout: float = Field(default=0.0, ge=0, lt=1)
    """The chance that a link is lost for a round."""
    node_dropout: float = Field(default=0.0, ge=0, lt=1)
    """The chance that an agent is down for a round: it neither trains nor talks."""

    def mixing_matrix(self, agents: int, seed: int) -> MixingMatrix:
        """W of the whole graph; of `one_peer`, the mean over a period."""
        weights = "uniform" if self.schedule == "one_peer" else self.weights
        return build_mixing_matrix(self.graph, weights, agents=agents, seed=seed)

    def check(self, agents: int) -> None:
        """The schedule fits the graph."""
        if self.compression and (self.schedule != "static" or self.link_dropout or self.node_dropout):
            raise InputError(
                "method.compression: neighbours must hear every difference; allowed: schedule: static, without drop-out"
            )
        if self.schedule != "static" and self.weights != GossipSettings.model_fields["weights"].default:
            raise InputError(
                f"method.weights: {self.weights}, but pairs average with schedule: {self.schedule}; allowed: no weights"
            )
        if self.schedule == "one_peer" and self.graph.name != "exponential":
            raise InputError(
                f"method.schedule: one_peer, but graph is {self.graph}; allowed: the graph exponential"
            )
        graph = self.mixing_matrix(agents, seed=0).graph
        if self.schedule == "matching":
            schedules.refuse_directed(graph, "method.schedule: matching")
        if self.link_dropout or self.node_dropout:
            schedules.refuse_directed(graph, "method.link_dropout, node_dropout")


class Varying(Gossip):
    """Gossip over links that come and go."""

    Settings = VaryingSettings

    def __init__(self, settings: VaryingSettings, population: Population):
        super().__init__(settings, population)
        self._matrix = lru_cache(maxsize=4)(self._draw)

    def matrix(self, round_: int) -> csr_array:
        """W of round `round_` (from 1); the same object each time in a round."""
        of: VaryingSettings = self.settings
        if of.schedule == "static" and not (of.link_dropout or of.node_dropout):
            return self.mixing.matrix
        return self._matrix(round_)

    def participants(self, round_: int) -> Int[np.ndarray, " active"]:
        """Who is up."""
        return np.flatnonzero(~self._down(round_))

    def _down(self, round_: int) -> np.ndarray:
        chance = self.settings.node_dropout
        if not chance:
            return np.zeros(self.agents, dtype=bool)
        down = generator(self.population.seed, "nodes down", round_).random(self.agents) < chance
        return down if not down.all() else np.arange(self.agents) > 0  # somebody is always up

    def _draw(self, round_: int) -> csr_array:
        of, seed = self.settings, self.population.seed
        if of.schedule == "one_peer":
            return schedules.one_peer_exponential(self.agents, round_)
        w = self.mixing.matrix
        if of.schedule == "matching":
            w = schedules.random_matching(self.mixing.graph, generator(seed, "matching", round_))
        if not (of.link_dropout or of.node_dropout):
            return w
        links = (w.nnz - np.count_nonzero(w.diagonal())) // 2
        lost = generator(seed, "links lost", round_).random(links) < of.link_dropout
        return schedules.without(w, lost, self._down(round_))

    def filled(self, state: State, agents: Int[np.ndarray, " active"], end: Params) -> Params:
        """Rows of all agents hosted here: `end` of those who acted, the others where they were."""
        if len(agents) == self.mesh.hosted:
            return end
        place = torch.from_numpy(self.mesh.rows(agents))
        return {
            name: tensor.index_copy(0, place.to(tensor.device), end[name])
            for name, tensor in state.theta.items()
        }
