"""Centralized DPO: all pairs in one place, the yardstick of every other method.

A step draws a batch from *every* shard and weighs their means by w_i, as FedDPO with E = 1 and S = N does over agents.
"""

import numpy as np
from jaxtyping import Int

from prefmesh.algorithms.methods.base import Method, MethodSettings, method
from prefmesh.algorithms.state import State
from prefmesh.policies.base import Params


class CentralizedSettings(MethodSettings):
    """No further settings. Each of the E steps sees N batches."""


@method("centralized")
class Centralized(Method):
    """One agent, the identity as mixing rule."""

    Settings = CentralizedSettings

    @property
    def averages(self) -> bool:
        """There is one."""
        return True

    @property
    def shards(self) -> Int[np.ndarray, "1 shards"]:
        """One agent that holds them all."""
        return np.arange(self.population.shards)[None, :]

    def begin(self, row: Params) -> State:
        """Theta is one row."""
        return State.of({name: tensor.clone() for name, tensor in row.items()}, shards=self.population.shards)

    def mix(self, state: State, round_: int, agents: Int[np.ndarray, " active"], end: Params) -> State:
        """Nothing to mix."""
        state.theta = end
        return state

    def bytes_sent(self, round_: int, *, model_bytes: int, data_bytes: int) -> int:
        """The preferences themselves travel once, before the first round; the model does not."""
        return data_bytes if round_ == 1 else 0
