"""A server that listens to losses: what `group_robust` and `q_fed_avg` share.

    F_i     = i's mean loss over its pairs of the round at theta^r, where it starts
    Delta   = sum_{i in S_r} a_i Delta_i,      the weights a_i from everybody's F_i

With `compression` C, Delta_i is i's message g_i <- g_i + C(Delta_i - g_i), which the server keeps for each agent, since weights change.
"""

from abc import abstractmethod
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmesh.algorithms.local_rule import Practice, Steps
from prefmesh.algorithms.methods.server import Server
from prefmesh.algorithms.state import State
from prefmesh.policies.base import Params

TOLD = "told"
"""In `State.memory`: what each agent hosted here told last, (hosted, numbers)."""


class ByLoss(Server):
    """Agents send their losses with their updates. A round costs a forward pass over its pairs more than `fed_dpo`'s."""

    agents_tell = True
    numbers: ClassVar[int] = 1
    """How many an agent tells."""

    def begin(self, row: Params) -> State:
        """Nothing was told yet."""
        state = super().begin(row)
        state.memory[TOLD] = torch.zeros(self.mesh.hosted, self.numbers, dtype=torch.float64)
        for name in row:
            state.memory.pop(f"updates/{name}", None)  # a sum with fixed weights, of `Server`
        return state

    def local(
        self, state: State, round_: int, agents: Int[np.ndarray, " some"], theta: Params, practice: Practice
    ) -> Steps:
        """E steps, and what the agent tells."""
        losses = practice.losses(theta)
        found = super().local(state, round_, agents, theta, practice)
        told, place = state.memory[TOLD], torch.from_numpy(self.mesh.rows(agents))
        new = self.tell(losses.double(), theta, self.start(state, round_, agents), practice.lr)
        told[place.to(told.device)] = new.to(told)
        return found

    def tell(
        self, losses: Float[Tensor, " some"], end: Params, start: Params, lr: float
    ) -> Float[Tensor, "some numbers"]:
        """Of agents that went from `start` (some, ...), where their losses were these, to `end`: their losses, unless said otherwise."""
        return losses[:, None]

    def combined(
        self,
        state: State,
        round_: int,
        agents: Int[np.ndarray, " own"],
        acting: Int[np.ndarray, " active"],
        updates: Params,
    ) -> Params:
        """sum_i a_i Delta_i, or of g_i."""
        told = state.memory[TOLD].cpu().numpy()[self.mesh.rows(agents)]
        weights = self.weigh(state, acting, self.mesh.group.gather(told))[np.isin(acting, agents)]
        if self.compression:
            updates = self.followed(state, round_, agents, updates, "update")
        return self.mesh.weighted_sum(torch.from_numpy(weights), updates)

    @abstractmethod
    def weigh(
        self, state: State, acting: Int[np.ndarray, " active"], told: Float[np.ndarray, "active numbers"]
    ) -> Float[np.ndarray, " active"]:
        """a_i of all participants, wherever they are hosted; the same in every process."""
