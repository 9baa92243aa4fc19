"""One policy for the worst off (agnostic federated learning: Mohri et al. 2019, arXiv 1902.00146; group DRO: Sagawa et al. 2020,
arXiv 1911.08731, algorithm 1; with local steps and participation: DRFA, Deng et al. 2020, arXiv 2102.12660).

    min over theta of  max over q of  sum_i q_i f_i(theta),      q_i >= 0, sum_i q_i = 1

    log q_i <- log q_i + eta_q v_i,    then normalised;      v_i = (N - 1)/(S - 1) (F_i - mean of F over S_r), 0 for others
    theta^{r+1} = theta^r + (N/S) sum_{i in S_r} q_i Delta_i

q begins at w. E v_i = F_i - mean of F over all agents, which differs from F_i by what is lost in normalising, and for a given q the
update is unbiased, too (q's own step depends on the draw: a bias of the order of eta_q). Where all take part this is Sagawa's step: q_i <- q_i exp(eta_q F_i).
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field

from prefmesh.algorithms.methods.base import method
from prefmesh.algorithms.methods.by_loss import ByLoss
from prefmesh.algorithms.methods.server import ServerSettings
from prefmesh.algorithms.state import State
from prefmesh.errors import InputError
from prefmesh.policies.base import Params


class GroupRobustSettings(ServerSettings):
    """How fast the worst off gain weight."""

    robust_step_size: float = Field(default=0.1, ge=0)
    """eta_q, per round and nat; 0 leaves agents' weights as `objective.weights` says."""

    def check(self, agents: int) -> None:
        """Two losses can be compared."""
        super().check(agents)
        if self.participation == 1 and agents > 1:
            raise InputError(
                f"method.participation: found 1 participant, with whose loss none is compared; allowed: 2 to {agents}"
            )


@method("group_robust")
class GroupRobust(ByLoss):
    """A server with a weight for every agent: `memory` holds log q (agents,)."""

    Settings = GroupRobustSettings
    settings: GroupRobustSettings

    def begin(self, row: Params) -> State:
        """q = w."""
        state = super().begin(row)
        state.memory["log_q"] = torch.from_numpy(np.log(self.population.weights))
        return state

    def weigh(
        self, state: State, acting: Int[np.ndarray, " active"], told: Float[np.ndarray, "active numbers"]
    ) -> Float[np.ndarray, " active"]:
        """N q_i / S, after q's step."""
        losses = told[:, 0]
        log_q = state.memory["log_q"].cpu().numpy().copy()
        compared = (self.agents - 1) / max(1, len(acting) - 1)
        log_q[acting] += self.settings.robust_step_size * compared * (losses - losses.mean())
        log_q -= np.logaddexp.reduce(log_q)
        state.memory["log_q"] = torch.from_numpy(log_q).to(state.memory["log_q"].device)
        return self.agents / len(acting) * np.exp(log_q[acting])
