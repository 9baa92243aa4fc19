"""FedDPO (arXiv 2605.20696; FedAvg's scheme, McMahan et al. 2017): E local steps, averaged by a server.

    Delta_i   = local_E(theta^{r - q_i}) - theta^{r - q_i}
    theta^{r+1} = theta^r + (1/S) sum_{i in S_r} N w_i Delta_i

Agents start from a model that is q_i <= q_max rounds old and their *update* is applied to the current one. Without staleness and
with equal weights this is the mean of the participants' models.
"""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from pydantic import Field

from prefmesh.algorithms.methods.base import method
from prefmesh.algorithms.methods.server import Server, ServerSettings
from prefmesh.algorithms.state import State
from prefmesh.policies.base import Params
from prefmesh.randomness import generator


class FedDPOSettings(ServerSettings):
    """`staleness`: q_max in rounds.

    `staleness_schedule`: each participant's q_i is drawn uniformly from 0..q_max in every round (`uniform`), or is
    always q_max (`max`); in the first rounds never older than the first model.
    """

    staleness: int = Field(default=0, ge=0)
    staleness_schedule: Literal["uniform", "max"] = "uniform"


class Stale(Server):
    """A server whose agents may start from models of earlier rounds; `memory` holds the last `depth`, newest first."""

    @property
    def depth(self) -> int:
        """How many server models are kept: those of the last rounds, this one among them."""
        raise NotImplementedError

    def ages(self, round_: int) -> Int[np.ndarray, " agents"]:
        """q_i of every agent in this round, in rounds: less than `depth`."""
        raise NotImplementedError

    def begin(self, row: Params) -> State:
        """The server's model, shared, and as many times in the memory."""
        state = super().begin(row)
        if self.depth > 1:
            state.memory |= {
                f"server/{name}": tensor.repeat(self.depth, *[1] * (tensor.dim() - 1))
                for name, tensor in row.items()
            }
        return state

    def start(self, state: State, round_: int, agents: Int[np.ndarray, " some"]) -> Params:
        """theta^{r - q_i}."""
        if self.depth == 1:
            return super().start(state, round_, agents)
        age = torch.from_numpy(self.ages(round_)[agents])
        return {
            name: state.memory[f"server/{name}"][age.to(tensor.device)]
            for name, tensor in state.theta.items()
        }

    def remember(self, state: State, row: Params) -> None:
        """The newest model, instead of the oldest."""
        if self.depth > 1:
            for name, server in row.items():
                past = state.memory[f"server/{name}"]
                state.memory[f"server/{name}"] = torch.cat([server, past[:-1]])


@method("fed_dpo")
class FedDPO(Stale):
    """A server, and agents as stale as they may be."""

    Settings = FedDPOSettings
    settings: FedDPOSettings

    @property
    def averages(self) -> bool:
        """Without staleness; updates of older models are added."""
        return self.depth == 1 and not self.compression

    @property
    def depth(self) -> int:
        """q_max + 1."""
        return self.settings.staleness + 1

    def ages(self, round_: int) -> Int[np.ndarray, " agents"]:
        """0..q_max, and at most as old as the first model."""
        q_max = self.settings.staleness
        if self.settings.staleness_schedule == "max":
            drawn = np.full(self.agents, q_max)
        else:
            drawn = generator(self.population.seed, "staleness", round_).integers(0, q_max + 1, self.agents)
        return np.minimum(drawn, round_ - 1)
