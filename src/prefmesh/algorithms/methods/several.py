"""A server with k models, which start where agents differ: what IFCA and FedSoft share.

The papers start k models at random. A preference-tuned policy starts at the reference, and k equal models would stay equal, so:

    rounds 1 .. warm_rounds:  those who take part in round 1 train apart, and nothing is mixed
    then:                     k groups by the directions of their updates, and theta_j starts at the mean of group j
"""

from abc import abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from prefmesh.algorithms.methods.clustered import refuse_no_rounds_left, sketched
from prefmesh.algorithms.methods.server import ParticipationSettings, Server
from prefmesh.algorithms.similarity import by_direction, inner_products
from prefmesh.algorithms.state import State, copies, put, share
from prefmesh.errors import InputError
from prefmesh.policies.base import Params
from prefmesh.randomness import derived_seed


class SeveralSettings(ParticipationSettings):
    """How many models, and how they begin."""

    clusters: int = Field(default=2, ge=1)
    """k, the server's models."""
    warm_rounds: int = Field(default=1, ge=1)
    """The first rounds, in which everybody trains apart; they tell where the k models start."""

    def check(self, agents: int) -> None:
        """There are participants for every model, and a round is left for them."""
        super().check(agents)
        acting = self.participation or agents
        if self.clusters > acting:
            raise InputError(
                f"method.clusters: found {self.clusters}; allowed: 1 to {acting}, the number of participants"
            )
        refuse_no_rounds_left(self.warm_rounds, self.rounds, 1)


class Several(Server):
    """The k models are in `memory`; Theta is what agents use."""

    one_policy = False
    one_row = False
    agents_remember = True
    in_turn = False

    def begin(self, row: Params) -> State:
        """All models equal."""
        state = State.of(copies(row, self.mesh.hosted), shards=self.population.shards)
        for name, tensor in row.items():
            state.memory[f"model/{name}"] = share(tensor, self.settings.clusters).clone()
        return state

    def models(self, state: State) -> Params:
        """The server's (k, ...): the tensors that are kept."""
        return {name: state.memory[f"model/{name}"] for name in state.theta}

    def of_each(self, state: State, agents: int, losses: Callable[[Params], Tensor]) -> Tensor:
        """`losses` of so many agents under each of the k models (k, some, ...)."""
        models = self.models(state)
        rows = (
            {name: share(t[j : j + 1], agents) for name, t in models.items()}
            for j in range(self.settings.clusters)
        )
        return torch.stack([losses(row) for row in rows])

    def participants(self, round_: int) -> Int[np.ndarray, " active"]:
        """S of N; while they train apart, the same ones."""
        return super().participants(1 if round_ <= self.settings.warm_rounds else round_)

    def mix(self, state: State, round_: int, agents: Int[np.ndarray, " active"], end: Params) -> State:
        """The server's models anew; apart, nothing."""
        if round_ < self.settings.warm_rounds:
            put(state.theta, self.mesh.rows(agents), end)
            return state
        return self.serve(state, round_, agents, end)

    @abstractmethod
    def serve(self, state: State, round_: int, agents: Int[np.ndarray, " own"], end: Params) -> State:
        """`mix` from the last warm round on, when models are still equal."""

    def fetched(self, round_: int) -> int:
        """How many models a participant needs: all k, to see which fits."""
        return self.settings.clusters

    def bytes_sent(self, round_: int, *, model_bytes: int, data_bytes: int) -> int:
        """Each participant fetches models and sends one; apart, it sends one in the end."""
        apart = self.settings.warm_rounds
        models = self.fetched(round_) + 1 if round_ > apart else int(round_ == apart)
        return models * model_bytes * len(self.participants(round_))

    def acting(self, agents: Int[np.ndarray, " own"]) -> Int[np.ndarray, " acting"]:
        """Who took part, wherever they are hosted."""
        return self.gathered(agents.astype(np.int64))

    def gathered(self, numbers: Int[np.ndarray, " own"]) -> Int[np.ndarray, " acting"]:
        """A whole number of each participant hosted here, of all of them."""
        return self.mesh.group.gather(numbers[:, None].astype(np.float64))[:, 0].astype(np.int64)

    def first_groups(self, update: Params) -> Int[np.ndarray, " acting"]:
        """Groups of all participants by the directions of their updates, of which these (own, ...) are hosted here."""
        sketches = sketched(update, derived_seed(self.population.seed, "sketch")).cpu().numpy()
        inner = inner_products({"sketch": torch.from_numpy(self.mesh.group.gather(sketches))})
        return by_direction(inner, self.settings.clusters)
