"""FedDPO on some tensors, and everybody's own for the others (FedPer: Arivazhagan et al. 2019, arXiv 1912.00818, algorithms 1 and 2).

    participants:  (theta_i, v_i) <- local_E((theta^r, v_i), i)
    server:        theta^{r+1} <- FedDPO's of the theta_i;      v_i stays at agent i

`personal: ["*.11.*"]` is FedPer with a last layer of one's own. `personal: ["*.lora_B"]` is FedSA-LoRA (Guo et al. 2024, arXiv 2410.01463):
factors A are shared, B are not. Only what is shared is sent, and counted.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase

import numpy as np
from jaxtyping import Int
from pydantic import Field

from prefmesh.algorithms.methods.base import Method, method
from prefmesh.algorithms.methods.server import Server, ServerSettings
from prefmesh.algorithms.state import State, copies, put
from prefmesh.errors import InputError
from prefmesh.policies.base import Params


class FedPerSettings(ServerSettings):
    """Which tensors are everybody's own."""

    personal: list[str] = Field(default=["*.lora_B"], min_length=1)
    """Shell patterns of names of tensors that no agent shares, such as ["*.lora_B"], or ["*.11.*"] for one layer."""


@method("fed_per")
class FedPer(Server):
    """A server of some tensors; the others are rows of Theta of their own."""

    Settings = FedPerSettings
    settings: FedPerSettings
    one_policy = False
    one_row = False
    agents_remember = True
    in_turn = False

    def is_personal(self, name: str) -> bool:
        """Whether a tensor of that name stays where it is."""
        return any(fnmatchcase(name, pattern) for pattern in self.settings.personal)

    def shared(self, params: Params) -> Params:
        """What the server sees."""
        return {name: tensor for name, tensor in params.items() if not self.is_personal(name)}

    def begin(self, row: Params) -> State:
        """All start equal. Raises `InputError` where a pattern is of no tensor, or all tensors are personal."""
        self._refuse(row)
        state = super().begin(self.shared(row))
        own = copies(
            {name: tensor for name, tensor in row.items() if self.is_personal(name)}, self.mesh.hosted
        )
        state.theta = {name: {**state.theta, **own}[name] for name in row}
        return state

    def _refuse(self, names: Iterable[str]) -> None:
        names = list(names)
        for pattern in self.settings.personal:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise InputError(
                    f"method.personal: {pattern!r} is the name of none of the policy's {len(names)} tensor(s) ({names[0]}, ...); allowed: "
                    "shell patterns of their names, such as *.lora_B"
                )
        if all(map(self.is_personal, names)):
            raise InputError(
                f"method.personal: {', '.join(self.settings.personal)}: all of the policy's {len(names)} tensor(s); allowed: patterns that "
                "leave some to share, or method.name: local_only, which shares none"
            )

    def start(self, state: State, round_: int, agents: Int[np.ndarray, " some"]) -> Params:
        """At the server's tensors and their own."""
        served = State.of(self.shared(state.theta), shards=self.population.shards)
        served.memory = state.memory
        return Method.start(self, state, round_, agents) | super().start(served, round_, agents)

    def mix(self, state: State, round_: int, agents: Int[np.ndarray, " active"], end: Params) -> State:
        """The server's step for what is shared."""
        own = {name: end.pop(name) for name in list(end) if self.is_personal(name)}
        state = super().mix(state, round_, agents, end)
        put({name: state.theta[name] for name in own}, self.mesh.rows(agents), own)
        return state

    def message_bytes(self, row: Params) -> int:
        """Of what is shared."""
        return super().message_bytes(self.shared(row))
