"""A server that averages: what FedDPO and its relatives share.

    Delta_i = local_E(theta^r) - theta^r,      Delta = (1/S) sum_{i in S_r} N w_i Delta_i,      theta^{r+1} = step(theta^r, Delta)

S of N agents uniformly without replacement, so with the factor N w_i the expected update is sum_i w_i Delta_i whoever
is drawn (scheme II of Li et al. 2020).
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field

from prefmesh.algorithms.methods.base import Method, MethodSettings
from prefmesh.algorithms.state import State, share
from prefmesh.errors import InputError
from prefmesh.policies.base import Params
from prefmesh.randomness import generator


class ServerSettings(MethodSettings):
    """Who takes part in a round."""

    participation: int | None = Field(default=None, ge=1)
    """S, the agents of a round, drawn anew; none: all."""

    def check(self, agents: int) -> None:
        """S <= N."""
        if self.participation is not None and self.participation > agents:
            raise InputError(
                f"method.participation: found {self.participation} participants; allowed: 1 to {agents}, the number of agents"
            )


class Server(Method):
    """Theta is one row that all agents share."""

    Settings = ServerSettings
    one_row = True

    def begin(self, row: Params) -> State:
        """The server's model, shared."""
        theta = {name: share(tensor.clone(), self.mesh.hosted) for name, tensor in row.items()}
        return State.of(theta, shards=self.population.shards)

    def participants(self, round_: int) -> Int[np.ndarray, " active"]:
        """S of N uniformly without replacement, in the order of the agents."""
        s = self.settings.participation
        if s is None or s == self.agents:
            return np.arange(self.agents)
        return np.sort(
            generator(self.population.seed, "participants", round_).choice(self.agents, s, replace=False)
        )

    def mix(self, state: State, round_: int, agents: Int[np.ndarray, " active"], end: Params) -> State:
        """The server takes a step along the participants' weighted update, and sends where it leads to all."""
        start = self.start(state, round_, agents)
        # One process knows who answered; several know who was asked, and that all did.
        acting = agents if self.mesh.group.size == 1 else self.participants(round_)
        updates = {name: end.pop(name).sub_(start.pop(name)) for name in list(end)}
        weights = torch.from_numpy(self.shares(round_, agents, acting))
        update = self.mesh.weighted_sum(weights, updates)
        for name, row in self.step(state, update).items():
            state.theta[name] = share(row, self.mesh.hosted)
        return state

    def shares(
        self, round_: int, agents: Int[np.ndarray, " own"], acting: Int[np.ndarray, " active"]
    ) -> Float[np.ndarray, " own"]:
        """What each of the participants hosted here counts, among all who act: N w_i / S."""
        return self.update_scale[agents] / len(acting)

    def step(self, state: State, update: Params) -> Params:
        """The server's next row (1, ...): theta + Delta, unless said otherwise."""
        return {name: state.theta[name][:1] + change for name, change in update.items()}

    def bytes_sent(self, round_: int, *, model_bytes: int, data_bytes: int) -> int:
        """Each participant fetches a model and sends an update."""
        return 2 * model_bytes * len(self.participants(round_))
