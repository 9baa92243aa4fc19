"""A server that averages: what FedDPO and its relatives share.

    Delta_i = local_E(theta^r) - theta^r,      Delta = (1/S) sum_{i in S_r} N w_i Delta_i,      theta^{r+1} = step(theta^r, Delta)

S of N agents uniformly without replacement, so with the factor N w_i the expected update is sum_i w_i Delta_i whoever
is drawn (scheme II of Li et al. 2020).

With `compression` C, both ways send differences to what the other end knows already (EF21-BC: Fatkhullin et al. 2021, arXiv 2110.03294):

    participants:  g_i <- g_i + C(Delta_i - g_i);      Delta = sum_i w_i g_i over all agents, the others' g_i as they were
    server:        h <- h + C(theta - h);              agents start from h
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field

from prefmesh.algorithms.consensus import Weighted
from prefmesh.algorithms.methods.base import Method, MethodSettings
from prefmesh.algorithms.state import State, share, spread, take
from prefmesh.compression import ChainSettings, follow, message_seeds
from prefmesh.errors import InputError
from prefmesh.mesh import FactoredMesh
from prefmesh.policies.base import Params
from prefmesh.randomness import generator


class ParticipationSettings(MethodSettings):
    """Who takes part in a round."""

    participation: int | None = Field(default=None, ge=1)
    """S, the agents of a round, drawn anew; none: all."""

    def check(self, agents: int) -> None:
        """S <= N."""
        if self.participation is not None and self.participation > agents:
            raise InputError(
                f"method.participation: found {self.participation} participants; allowed: 1 to {agents}, the number of agents"
            )


class ServerSettings(ParticipationSettings):
    """Who takes part in a round, and how messages go."""

    compression: ChainSettings = ()
    """What updates and models are reduced to on their way, both ways: a list of stages, such as [{name: top_k, share: 0.01}, int8]."""


class Server(Method):
    """Theta is one row that all agents share."""

    Settings = ServerSettings
    one_row = True

    def begin(self, row: Params) -> State:
        """The server's model, shared; where messages are compressed, what each end knows of the other."""
        theta = {name: share(tensor.clone(), self.mesh.hosted) for name, tensor in row.items()}
        state = State.of(theta, shards=self.population.shards)
        if self.compression:
            for name, tensor in row.items():
                state.memory[f"update/{name}"] = tensor.new_zeros(self.mesh.hosted, *tensor.shape[1:])
                state.memory[f"updates/{name}"] = torch.zeros_like(tensor)
                state.memory[f"model/{name}"] = tensor.clone()
        return state

    def participants(self, round_: int) -> Int[np.ndarray, " active"]:
        """S of N uniformly without replacement, in the order of the agents."""
        s = self.settings.participation
        if s is None or s == self.agents:
            return np.arange(self.agents)
        return np.sort(
            generator(self.population.seed, "participants", round_).choice(self.agents, s, replace=False)
        )

    def start(self, state: State, round_: int, agents: Int[np.ndarray, " some"]) -> Params:
        """At the server's model, as they heard it."""
        if not self.compression:
            return super().start(state, round_, agents)
        return {name: share(state.memory[f"model/{name}"], len(agents)) for name in state.theta}

    def mix(self, state: State, round_: int, agents: Int[np.ndarray, " active"], end: Params) -> State:
        """The server takes a step along the participants' weighted update, and sends where it leads to all."""
        start = self.start(state, round_, agents)
        acting = self._acting(round_, agents)
        if isinstance(self.mesh, FactoredMesh):
            shares = torch.from_numpy(self.shares(round_, agents, acting))
            row = {name: tensor[:1] for name, tensor in state.theta.items()}
            self._spread(state, self.mesh.moved(shares, row, end))
            return state
        updates = {name: end.pop(name).sub_(start.pop(name)) for name in list(end)}
        row = self.step(state, self.combined(state, round_, agents, acting, updates))
        self._spread(state, row)
        self.remember(state, self.broadcast(state, round_, row, "model") if self.compression else row)
        return state

    def _acting(self, round_: int, agents: Int[np.ndarray, " own"]) -> Int[np.ndarray, " active"]:
        """One process knows who answered; several know who was asked, and that all did."""
        return agents if self.mesh.group.size == 1 else self.participants(round_)

    def _spread(self, state: State, row: Params) -> None:
        for name, tensor in row.items():
            state.theta[name] = share(tensor, self.mesh.hosted)

    def meant(
        self, state: State, round_: int, agents: Int[np.ndarray, " active"], end: Params
    ) -> Weighted | None:
        """theta + Delta, where that is the server's step."""
        if not self.averages:
            return None
        acting = self._acting(round_, agents)
        rest = 1 - float(self.shares(round_, acting, acting).sum())
        weights = torch.from_numpy(np.append(rest, self.shares(round_, agents, acting)))
        return weights, {name: torch.cat([state.theta[name][:1], tensor]) for name, tensor in end.items()}

    def combined(
        self,
        state: State,
        round_: int,
        agents: Int[np.ndarray, " own"],
        acting: Int[np.ndarray, " active"],
        updates: Params,
    ) -> Params:
        """Delta (1, ...), of the `updates` (own, ...) of the participants hosted here, among all who act."""
        shares = self.shares(round_, agents, acting)
        if not self.compression:
            return self.mesh.weighted_sum(torch.from_numpy(shares), updates)
        return self._known(state, round_, agents, updates, shares * len(acting) / self.update_scale[agents])

    def _known(
        self,
        state: State,
        round_: int,
        agents: Int[np.ndarray, " own"],
        updates: Params,
        scale: Float[np.ndarray, " own"],
    ) -> Params:
        """What the server knows of everybody's updates, sum_i w_i g_i, after the participants' messages."""
        factor = torch.from_numpy(scale)
        target = {name: tensor * spread(factor, tensor) for name, tensor in updates.items()}
        before = {name: state.memory[f"update/{name}"] for name in target}
        before = take(before, self.mesh.rows(agents))
        after = self.followed(state, round_, agents, target, "update")
        change = {name: after[name] - before[name] for name in target}
        found = {}
        weights = torch.from_numpy(self.population.weights[agents])
        for name, moved in self.mesh.weighted_sum(weights, change).items():
            found[name] = state.memory[f"updates/{name}"] + moved
            state.memory[f"updates/{name}"] = found[name]
        return found

    def broadcast(self, state: State, round_: int, row: Params, purpose: str) -> Params:
        """What all hear of a row (1, ...) of the server's, which they knew as `memory` says under `purpose`."""
        known = {name: state.memory[f"{purpose}/{name}"] for name in row}
        seeds = message_seeds(self.population.seed, f"server's {purpose}", round_, np.arange(1))
        _, heard = follow(known, row, self.compression, seeds)
        state.memory |= {f"{purpose}/{name}": tensor for name, tensor in heard.items()}
        return heard

    def remember(self, state: State, row: Params) -> None:
        """After the server's step, `row` (1, ...) being what agents know of the model: nothing, unless said otherwise."""

    def shares(
        self, round_: int, agents: Int[np.ndarray, " own"], acting: Int[np.ndarray, " active"]
    ) -> Float[np.ndarray, " own"]:
        """What each of the participants hosted here counts, among all who act: N w_i / S."""
        return self.update_scale[agents] / len(acting)

    def step(self, state: State, update: Params) -> Params:
        """The server's next row (1, ...): theta + Delta, unless said otherwise."""
        return {name: state.theta[name][:1] + change for name, change in update.items()}

    def bytes_sent(self, round_: int, *, model_bytes: int, data_bytes: int) -> int:
        """Each participant fetches a model and sends an update; differences of models must be heard by all."""
        acting = self.participants(round_)
        down = np.arange(self.agents) if self.compression else acting
        return self.models_bytes(model_bytes, down) + self.models_bytes(model_bytes, acting)
