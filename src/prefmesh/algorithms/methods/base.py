"""A method: which agents act in a round, where they start, and how what they found is mixed.

    Theta  <-  mix_r( local_r( Theta ) )

The local rule is shared (`local_rule.py`); a method says the rest. A new one is a file with a `Method` under
`@method("name")` and its settings.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from scipy.sparse import csr_array

from prefmesh.algorithms.consensus import Weighted
from prefmesh.algorithms.local_rule import Correction, Practice, Steps
from prefmesh.algorithms.state import State, rows, take
from prefmesh.compression import Chain, follow, layout_of, message_bytes, message_seeds
from prefmesh.errors import InputError
from prefmesh.mesh import Mesh
from prefmesh.policies.base import Params
from prefmesh.settings import Settings


class MethodSettings(Settings):
    """Common to all methods: R rounds of E local steps."""

    name: str
    """Which method."""
    rounds: int = Field(default=40, ge=1)
    """R."""
    local_steps: int = Field(default=1, ge=1)
    """E, an agent's optimiser steps in a round."""

    def check(self, agents: int) -> None:
        """Raise `InputError` for what does not fit this number of agents (more participants than agents, ...)."""

    def suited(self, *, beta: float, language: bool) -> "MethodSettings":
        """With numbers for what was left to the kind of policy: a language model, or log-linear features; `beta` is DPO's."""
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class Population:
    """Who takes part: each shard's weight w_i in the global objective (they add up to 1), and the run's seed."""

    weights: Float[np.ndarray, " shards"]
    seed: int

    @property
    def shards(self) -> int:
        """How many users' (or user groups') shards there are: N."""
        return len(self.weights)


class Method(ABC):
    """One way of learning together; holds settings and constants, while all that changes is in `State`.

    A process may host some of the agents only. Agents are then still numbered as all are; Theta has the rows of those that
    are hosted here, and `mesh` is what crosses agents.
    """

    Settings: ClassVar[type[MethodSettings]]
    one_policy: ClassVar[bool] = True
    """Whether the result is one policy for all (the average model), or each agent's own."""
    one_row: ClassVar[bool] = False
    """Whether all agents hold the same row of Theta between rounds, as under a server."""

    uses_gradients: ClassVar[bool] = False
    """Whether `mix` reads `State.gradients`, the means of what participants saw in their local steps."""
    agents_remember: ClassVar[bool] = False
    """Whether an agent's round depends on more than its own pairs and moments and the model that it starts from."""
    agents_tell: ClassVar[bool] = False
    """Whether agents send numbers of their own beside their updates, such as losses, which `local` leaves in `State.memory`."""
    beside: ClassVar[tuple[str, ...]] = ()
    """What agents train beside the model that is mixed, E steps a round each; names, under which moments are kept in `memory`."""

    in_turn: ClassVar[bool] = True
    """Whether a round may train some of the parameters only, as `policy.lora.mixing: alternate` does."""

    mesh: Mesh
    """Where agents live: all of them here, unless it is replaced before the first round."""
    neighbour_mixes: int | None = None
    """How often neighbours mix to stand in for an average over all; none: that average itself."""

    def __init__(self, settings: Any, population: Population):
        self.settings = settings
        self.population = population
        self.mesh = Mesh.of(self.agents)

    @property
    def shards(self) -> Int[np.ndarray, "agents shards_each"]:
        """Which shards each agent trains on: its own one, unless said otherwise."""
        return np.arange(self.population.shards)[:, None]

    @property
    def agents(self) -> int:
        """How many agents train, here or elsewhere: rows of Theta in all processes."""
        return len(self.shards)

    @property
    def averages(self) -> bool:
        """Whether models are averaged, and no more is done with them: then `policy.lora.mixing` may be `product`, and under a
        server of `one_row` `residual`."""
        return False

    @property
    def turns(self) -> int:
        """Into how many parts parameters fall that move in different steps of a round, each with a step count of its own."""
        return 1

    @property
    def update_scale(self) -> Float[np.ndarray, " agents"]:
        """N w_i: an agent's update times this, averaged plainly over agents, is the w-weighted average of updates."""
        return self.population.weights * self.population.shards

    @property
    def compression(self) -> Chain:
        """What messages are reduced to; empty: they go as they are."""
        return getattr(self.settings, "compression", ())

    def message_bytes(self, row: Params) -> int:
        """Bytes of one model that is sent, as coded."""
        return message_bytes(layout_of(row), self.compression)

    def models_bytes(self, model_bytes: int, agents: Int[np.ndarray, " some"]) -> int:
        """Bytes of a model of each of these agents, a whole one having `model_bytes`: an adapter is as large as its rank."""
        ranks = self.mesh.ranks
        if ranks is None:
            return model_bytes * len(agents)
        return model_bytes * int(ranks.of[agents].sum()) // ranks.most

    def followed(
        self, state: State, round_: int, agents: Int[np.ndarray, " some"], target: Params, purpose: str
    ) -> Params:
        """What others hear of `target` (some, ...), rows of agents hosted here: they knew what is kept in `memory` under `purpose`, and
        are sent the difference, compressed (see `compression.follow`). It is kept for the next time."""
        place = torch.from_numpy(self.mesh.rows(agents))
        known = {name: state.memory[f"{purpose}/{name}"] for name in target}
        seeds = message_seeds(self.population.seed, purpose, round_, agents)
        _, heard = follow(take(known, self.mesh.rows(agents)), target, self.compression, seeds)
        for name, tensor in known.items():
            tensor.index_copy_(0, place.to(tensor.device), heard[name])
        return heard

    @property
    def steps(self) -> Int[np.ndarray, " agents"]:
        """How many local steps each agent takes in a round: E, unless said otherwise; at most E."""
        return np.full(self.agents, self.settings.local_steps)

    def correction(
        self, state: State, round_: int, agents: Int[np.ndarray, " some"], start: Params
    ) -> Correction | None:
        """What these agents, hosted here, follow in their local steps instead of their gradients; none: these. `start`: where they
        begin, which local steps overwrite."""
        return None

    def matrix(self, round_: int) -> csr_array | None:
        """W of round `round_` (from 1); none: agents have no neighbours."""
        return None

    def gossip(self, rows: Params, round_: int) -> Params:
        """The rows (hosted, ...) of agents hosted here after k mixes, with k `neighbour_mixes`: of this round's neighbours and of those to
        come. The larger k, the nearer to their average."""
        for k in range(self.neighbour_mixes or 0):
            w = self.matrix(max(1, round_) + k)
            assert w is not None
            rows = self.mesh.mix(w, dict(rows))
        return rows

    @abstractmethod
    def begin(self, row: Params) -> State:
        """State before round 1, all agents at `row` (1, ...); optimiser state is added by the loop."""

    def participants(self, round_: int) -> Int[np.ndarray, " active"]:
        """Who acts in round `round_` (from 1): everyone, unless said otherwise."""
        return np.arange(self.agents)

    def start(self, state: State, round_: int, agents: Int[np.ndarray, " some"]) -> Params:
        """Where these agents, hosted here, begin: at their rows of Theta, unless said otherwise. Not to be written to."""
        return rows(state.theta, self.mesh.rows(agents))

    def local(
        self, state: State, round_: int, agents: Int[np.ndarray, " some"], theta: Params, practice: Practice
    ) -> Steps:
        """What these agents, hosted here, do with their pairs: E steps in place in `theta` (some, ...), from where they start."""
        return practice.learn(theta, self.correction(state, round_, agents, theta), "")

    @abstractmethod
    def mix(self, state: State, round_: int, agents: Int[np.ndarray, " active"], end: Params) -> State:
        """The state after the round, `end` being the rows that the participants hosted here reached. It may be used up."""

    def policies(self, state: State) -> Params:
        """What the agents hosted here use (hosted, ...): their rows of Theta, unless they train a policy beside it."""
        return state.theta

    def meant(
        self, state: State, round_: int, agents: Int[np.ndarray, " active"], end: Params
    ) -> Weighted | None:
        """What mixing is to leave as the network's mean: a weighted sum of models, of which these are hosted here. None: it is not one.

        `end` as in `mix`, not to be used up. Only such mixing can be of products (`policy.lora.mixing`).
        """
        return None

    def groups(self, state: State) -> Int[np.ndarray, " agents"] | None:
        """Which agents share a policy, where the method found groups: a number for each."""
        return None

    @abstractmethod
    def bytes_sent(self, round_: int, *, model_bytes: int, data_bytes: int) -> int:
        """Bytes that a deployment, a process for each agent, would send in this round; `data_bytes`: of all training pairs."""


METHODS: dict[str, type[Method]] = {}


M = TypeVar("M", bound=type[Method])


def method(name: str) -> Callable[[M], M]:
    """Register a method under its name in the config. Raises `InputError` for a name that is taken."""

    def register(cls: M) -> M:
        if name in METHODS:
            raise InputError(f"method: the name {name!r} is taken")
        METHODS[name] = cls
        return cls

    return register
