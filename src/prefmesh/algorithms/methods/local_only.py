"""Local-only DPO: every agent alone on its own pairs, the floor that collaboration has to beat."""

import numpy as np
from jaxtyping import Int

from prefmesh.algorithms.methods.base import Method, MethodSettings, method
from prefmesh.algorithms.state import State, copies
from prefmesh.policies.base import Params


class LocalOnlySettings(MethodSettings):
    """No further settings."""


@method("local_only")
class LocalOnly(Method):
    """N agents, the identity as mixing rule."""

    Settings = LocalOnlySettings
    one_policy = False

    @property
    def averages(self) -> bool:
        """Nothing is done with them."""
        return True

    def begin(self, row: Params) -> State:
        """Every agent's own copy of the same row."""
        return State.of(copies(row, self.mesh.hosted), shards=self.population.shards)

    def mix(self, state: State, round_: int, agents: Int[np.ndarray, " active"], end: Params) -> State:
        """Nothing to mix."""
        state.theta = end
        return state

    def bytes_sent(self, round_: int, *, model_bytes: int, data_bytes: int) -> int:
        """Nothing leaves an agent."""
        return 0
