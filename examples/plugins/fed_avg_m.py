"""A method: FedDPO whose server has momentum (FedAvgM: Hsu, Qi and Brown 2019, arXiv 1909.06335)."""

import numpy as np
import torch
from pydantic import Field

from prefmesh.algorithms.methods.base import Method, MethodSettings, method
from prefmesh.algorithms.state import State, share
from prefmesh.policies.base import Params


class FedAvgMSettings(MethodSettings):
    """`server_momentum`: mu; 0 is FedDPO with all agents."""

    server_momentum: float = Field(default=0.9, ge=0, lt=1)


@method("fed_avg_m")
class FedAvgM(Method):
    """v <- mu v + sum_i w_i Delta_i, theta <- theta + v."""

    Settings = FedAvgMSettings
    one_row = True

    def begin(self, row: Params) -> State:
        """All agents share the server's model; its momentum, kept in `memory`, goes into every checkpoint."""
        theta = {name: share(tensor.clone(), self.mesh.hosted) for name, tensor in row.items()}
        state = State.of(theta, shards=self.population.shards)
        state.memory = {f"momentum/{name}": torch.zeros_like(tensor) for name, tensor in row.items()}
        return state

    def mix(self, state: State, round_: int, agents: np.ndarray, end: Params) -> State:
        """The server's step; `end` holds the rows that local training reached of the agents hosted here."""
        weights = torch.from_numpy(self.population.weights[agents])
        updates = {name: end[name] - theta for name, theta in state.theta.items()}
        for name, update in self.mesh.weighted_sum(weights, updates).items():
            momentum = self.settings.server_momentum * state.memory[f"momentum/{name}"] + update
            state.memory[f"momentum/{name}"] = momentum
            state.theta[name] = share(state.theta[name][:1] + momentum, self.mesh.hosted)
        return state

    def bytes_sent(self, round_: int, *, model_bytes: int, data_bytes: int) -> int:
        """Each agent fetches a model and sends an update."""
        return 2 * model_bytes * self.agents
