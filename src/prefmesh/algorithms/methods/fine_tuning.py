"""FedDPO, and then everybody alone: the simplest personal policies (Wang et al. 2019, arXiv 1910.10252; Yu et al. 2020, arXiv
2002.04758).

The last `personal_rounds` of the R rounds are `local_only`'s, from the server's model.
"""

import numpy as np
from jaxtyping import Int
from pydantic import Field

from prefmesh.algorithms.consensus import Weighted
from prefmesh.algorithms.methods.base import method
from prefmesh.algorithms.methods.server import Server, ServerSettings
from prefmesh.algorithms.state import State
from prefmesh.errors import InputError
from prefmesh.policies.base import Params


class FineTuningSettings(ServerSettings):
    """How long together, how long alone."""

    personal_rounds: int = Field(default=5, ge=1)
    """The last rounds, in which everybody learns alone."""

    def check(self, agents: int) -> None:
        """A round together is left."""
        super().check(agents)
        if self.personal_rounds >= self.rounds:
            raise InputError(
                f"method.personal_rounds: found {self.personal_rounds} of {self.rounds} rounds; allowed: 1 to {self.rounds - 1}, so that "
                "one together is left (local_only is all alone)"
            )


@method("fine_tuning")
class FineTuning(Server):
    """A server, which leaves in the end; the result is everyone's own policy."""

    Settings = FineTuningSettings
    one_policy = False
    one_row = False

    @property
    def averages(self) -> bool:
        """As long as there is a server."""
        return not self.compression

    def _together(self, round_: int) -> bool:
        return round_ <= self.settings.rounds - self.settings.personal_rounds

    def participants(self, round_: int) -> Int[np.ndarray, " active"]:
        """As of a server; alone, all."""
        return super().participants(round_) if self._together(round_) else np.arange(self.agents)

    def start(self, state: State, round_: int, agents: Int[np.ndarray, " some"]) -> Params:
        """Alone, everyone at its own row; at first at what it heard of the server's."""
        last = self.settings.rounds - self.settings.personal_rounds
        if self._together(round_) or (self.compression and round_ == last + 1):
            return super().start(state, round_, agents)
        return super(Server, self).start(state, round_, agents)

    def mix(self, state: State, round_: int, agents: Int[np.ndarray, " active"], end: Params) -> State:
        """The server's step; alone, nothing."""
        if self._together(round_):
            return super().mix(state, round_, agents, end)
        state.theta = end
        return state

    def meant(
        self, state: State, round_: int, agents: Int[np.ndarray, " active"], end: Params
    ) -> Weighted | None:
        """Together, the server's."""
        return super().meant(state, round_, agents, end) if self._together(round_) else None

    def bytes_sent(self, round_: int, *, model_bytes: int, data_bytes: int) -> int:
        """Alone, nothing leaves an agent."""
        if not self._together(round_):
            return 0
        return super().bytes_sent(round_, model_bytes=model_bytes, data_bytes=data_bytes)
