"""FedDPO (arXiv 2605.20696; FedAvg's scheme, McMahan et al. 2017): E local steps, averaged by a server.

    Delta_i   = local_E(theta^{r - q_i}) - theta^{r - q_i}
    theta^{r+1} = theta^r + (1/S) sum_{i in S_r} N w_i Delta_i

S of N agents uniformly without replacement, so with the factor N w_i the expected update is sum_i w_i Delta_i whoever
is drawn (scheme II of Li et al. 2020). Agents start from a model that is q_i <= q_max rounds old and their *update* is
applied to the current one. Without staleness and with equal weights this is the mean of the participants' models.
"""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from pydantic import Field

from prefmesh.algorithms.methods.base import Method, MethodSettings, method
from prefmesh.algorithms.state import State, share
from prefmesh.errors import InputError
from prefmesh.policies.base import Params
from prefmesh.randomness import generator


class FedDPOSettings(MethodSettings):
    """`participation`: S (none: all). `staleness`: q_max in rounds.

    `staleness_schedule`: each participant's q_i is drawn uniformly from 0..q_max in every round (`uniform`), or is
    always q_max (`max`); in the first rounds never older than the first model.
    """

    participation: int | None = Field(default=None, ge=1)
    staleness: int = Field(default=0, ge=0)
    staleness_schedule: Literal["uniform", "max"] = "uniform"

    def check(self, agents: int) -> None:
        """S <= N."""
        if self.participation is not None and self.participation > agents:
            raise InputError(
                f"method.participation: found {self.participation} participants; allowed: 1 to {agents}, the number of agents"
            )


@method("fed_dpo")
class FedDPO(Method):
    """Theta is one row that all agents share; `memory` holds the last q_max + 1 server models, newest first."""

    Settings = FedDPOSettings
    settings: FedDPOSettings
    one_row = True

    def begin(self, row: Params) -> State:
        """The server's model, shared."""
        theta = {name: share(tensor.clone(), self.mesh.hosted) for name, tensor in row.items()}
        state = State.of(theta, shards=self.population.shards)
        if self.settings.staleness:
            depth = self.settings.staleness + 1
            state.memory = {
                f"server/{name}": tensor.repeat(depth, *[1] * (tensor.dim() - 1))
                for name, tensor in row.items()
            }
        return state

    def participants(self, round_: int) -> Int[np.ndarray, " active"]:
        """S of N uniformly without replacement, in the order of the agents."""
        s = self.settings.participation
        if s is None or s == self.agents:
            return np.arange(self.agents)
        return np.sort(
            generator(self.population.seed, "participants", round_).choice(self.agents, s, replace=False)
        )

    def ages(self, round_: int) -> Int[np.ndarray, " agents"]:
        """q_i of every agent in this round, in rounds: 0..q_max, and at most as old as the first model."""
        q_max = self.settings.staleness
        if self.settings.staleness_schedule == "max":
            drawn = np.full(self.agents, q_max)
        else:
            drawn = generator(self.population.seed, "staleness", round_).integers(0, q_max + 1, self.agents)
        return np.minimum(drawn, round_ - 1)

    def start(self, state: State, round_: int, agents: Int[np.ndarray, " some"]) -> Params:
        """theta^{r - q_i}."""
        if not self.settings.staleness:
            return super().start(state, round_, agents)
        age = torch.from_numpy(self.ages(round_)[agents])
        return {
            name: state.memory[f"server/{name}"][age.to(tensor.device)]
            for name, tensor in state.theta.items()
        }

    def mix(self, state: State, round_: int, agents: Int[np.ndarray, " active"], end: Params) -> State:
        """Apply the participants' mean weighted update to the current model, and send it to all."""
        start = self.start(state, round_, agents)
        # One process knows who answered; several know who was asked, and that all did.
        acting = len(agents) if self.mesh.group.size == 1 else len(self.participants(round_))
        weights = torch.from_numpy(self.update_scale[agents] / acting)
        updates = {name: end.pop(name).sub_(start.pop(name)) for name in list(end)}
        for name, update in self.mesh.weighted_sum(weights, updates).items():
            server = state.theta[name][:1] + update
            state.theta[name] = share(server, self.mesh.hosted)
            if self.settings.staleness:
                past = state.memory[f"server/{name}"]
                state.memory[f"server/{name}"] = torch.cat([server, past[:-1]])
        return state

    def bytes_sent(self, round_: int, *, model_bytes: int, data_bytes: int) -> int:
        """Each participant fetches a model and sends an update."""
        return 2 * model_bytes * len(self.participants(round_))
