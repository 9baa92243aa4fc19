"""IFCA (Ghosh et al. 2020, arXiv 2006.04088, algorithm 1, model averaging): k models, and everybody takes the one that fits best.

    participants:  c_i <- the j whose theta_j has the least loss on the pairs of i's round
                   Delta_i <- local_E(theta_{c_i}, i) - theta_{c_i}
    server:        theta_j <- theta_j + (sum of w_i Delta_i over c_i = j) / (sum of w_i over c_i = j);      where nobody chose j, it stays

The paper starts k models at random. A preference-tuned policy starts at the reference, and k equal models would stay equal, so:

    rounds 1 .. warm_rounds:  those who take part in round 1 train apart, and nothing is mixed
    then:                     k groups by the directions of their updates, and theta_j starts at the mean of group j

which is k-means with a start from data. From there on groups are chosen by loss alone.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field

from prefmesh.algorithms.local_rule import Practice, Steps
from prefmesh.algorithms.methods.base import method
from prefmesh.algorithms.methods.clustered import sketched
from prefmesh.algorithms.methods.server import ParticipationSettings, Server
from prefmesh.algorithms.similarity import by_direction, inner_products
from prefmesh.algorithms.state import State, copies, put, share, take
from prefmesh.errors import InputError
from prefmesh.policies.base import Params
from prefmesh.randomness import derived_seed


class IFCASettings(ParticipationSettings):
    """How many models, and how they begin."""

    clusters: int = Field(default=2, ge=1)
    """k, the models; 1 is FedDPO after the warm rounds."""
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
        if self.warm_rounds >= self.rounds:
            raise InputError(
                f"method.warm_rounds: found {self.warm_rounds} of {self.rounds} rounds; allowed: 1 to {self.rounds - 1}"
            )


@method("ifca")
class IFCA(Server):
    """A server with k models and everybody's choice (0 before the first), both in `memory`; Theta is what agents chose."""

    Settings = IFCASettings
    settings: IFCASettings
    one_policy = False
    one_row = False
    agents_remember = True
    in_turn = False

    def begin(self, row: Params) -> State:
        """All models equal."""
        state = State.of(copies(row, self.mesh.hosted), shards=self.population.shards)
        for name, tensor in row.items():
            state.memory[f"model/{name}"] = share(tensor, self.settings.clusters).clone()
        state.memory["group"] = torch.zeros(self.agents, dtype=torch.int64)
        return state

    def participants(self, round_: int) -> Int[np.ndarray, " active"]:
        """S of N; while they train apart, the same ones."""
        return super().participants(1 if round_ <= self.settings.warm_rounds else round_)

    def local(
        self, state: State, round_: int, agents: Int[np.ndarray, " some"], theta: Params, practice: Practice
    ) -> Steps:
        """First the choice, which is where the steps start."""
        if round_ > self.settings.warm_rounds:
            models = self._models(state)
            losses = [
                practice.losses({name: share(t[j : j + 1], len(agents)) for name, t in models.items()})
                for j in range(self.settings.clusters)
            ]
            chosen = torch.stack(losses).argmin(0).cpu()
            state.memory["group"][torch.from_numpy(agents)] = chosen.to(state.memory["group"].device)
            for name, tensor in take(models, chosen.numpy()).items():
                theta[name].copy_(tensor)
        return practice.learn(theta, None, "")

    def mix(self, state: State, round_: int, agents: Int[np.ndarray, " active"], end: Params) -> State:
        """Each model's mean update; apart, nothing."""
        if round_ < self.settings.warm_rounds:
            put(state.theta, self.mesh.rows(agents), end)
            return state
        models, group = self._models(state), self.groups(state).copy()
        start = take(models, group[agents])
        update = {name: end.pop(name).sub_(start.pop(name)) for name in list(end)}
        everybody = self.mesh.group.gather
        acting = everybody(agents[:, None].astype(np.float64))[:, 0].astype(np.int64)
        if round_ == self.settings.warm_rounds:
            group[acting] = self._first(everybody(self._sketches(update)))
        else:
            group[acting] = everybody(group[agents][:, None].astype(np.float64))[:, 0].astype(np.int64)
        weights = self.population.weights
        for j in np.unique(group[acting]):
            mine = np.flatnonzero(group[agents] == j)
            share_ = weights[agents[mine]] / weights[acting[group[acting] == j]].sum()
            for name, moved in self.mesh.weighted_sum(torch.from_numpy(share_), take(update, mine)).items():
                models[name][j] += moved[0]
        state.memory["group"].copy_(torch.from_numpy(group))
        state.theta = take(models, group[self.mesh.first : self.mesh.last])
        return state

    def _models(self, state: State) -> Params:
        return {name: state.memory[f"model/{name}"] for name in state.theta}

    def _sketches(self, update: Params) -> Float[np.ndarray, "own numbers"]:
        return sketched(update, derived_seed(self.population.seed, "sketch")).cpu().numpy()

    def _first(self, sketches: Float[np.ndarray, "acting numbers"]) -> Int[np.ndarray, " acting"]:
        return by_direction(inner_products({"sketch": torch.from_numpy(sketches)}), self.settings.clusters)

    def groups(self, state: State) -> Int[np.ndarray, " agents"]:
        """As chosen last."""
        return state.memory["group"].cpu().numpy()

    def bytes_sent(self, round_: int, *, model_bytes: int, data_bytes: int) -> int:
        """Each participant fetches k models and sends an update; apart, it sends one in the end."""
        apart = self.settings.warm_rounds
        models = self.settings.clusters + 1 if round_ > apart else int(round_ == apart)
        return models * model_bytes * len(self.participants(round_))
