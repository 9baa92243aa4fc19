"""FedDPO on some tensors, and everybody's own for the others (FedPer: Arivazhagan et al. 2019, arXiv 1912.00818, algorithms 1 and 2).

    participants:  (theta_i, v_i) <- local_E((theta^r, v_i), i)
    server:        theta^{r+1} <- FedDPO's of the theta_i;      v_i stays at agent i

`personal: ["*.11.*"]` is FedPer with a last layer of one's own. `personal: ["*.lora_B"]` is FedSA-LoRA (Guo et al. 2024, arXiv 2410.01463):
factors A are shared, B are not. Only what is shared is sent, and counted. `personal_steps: k` is FedRep (Collins et al. 2021, arXiv
2102.07078, algorithm 1): v_i moves in the first k of the E steps and theta_i in the others, each while the other rests, instead of both in
all. `dec_per` is the same without a server: what is shared is mixed as DecDPO's.
"""

from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np
from jaxtyping import Int
from pydantic import Field

from prefmesh.algorithms.consensus import Weighted
from prefmesh.algorithms.local_rule import Practice, Steps
from prefmesh.algorithms.methods.base import Method, MethodSettings, method
from prefmesh.algorithms.methods.dec_dpo import DecDPO, DecDPOSettings
from prefmesh.algorithms.methods.server import Server, ServerSettings
from prefmesh.algorithms.state import State, copies, put, rows
from prefmesh.errors import InputError
from prefmesh.policies.base import Params


class SharedSettings(MethodSettings):
    """Which tensors are everybody's own."""

    personal: list[str] = Field(default=["*.lora_B"], min_length=1)
    """Shell patterns of names of tensors that no agent shares, such as ["*.lora_B"], or ["*.11.*"] for one layer."""
    personal_steps: int = Field(default=0, ge=0)
    """In how many of a round's steps, the first ones, these alone move, and what is shared in the others alone (FedRep); 0: all move in all."""

    def check(self, agents: int) -> None:
        """Steps of what is shared are left."""
        super().check(agents)
        if self.personal_steps >= self.local_steps:
            raise InputError(
                f"method.personal_steps: found {self.personal_steps} of {self.local_steps} local steps; allowed: 0 to {self.local_steps - 1}, "
                "so that one is left for what is shared"
            )


class Shared(Method):
    """Some tensors are mixed; the others are rows of Theta of their own. Stands before the method that mixes, among a class's bases."""

    settings: SharedSettings
    one_policy = False
    one_row = False
    agents_remember = True
    in_turn = False

    @property
    def averages(self) -> bool:
        """Not whole models."""
        return False

    @property
    def turns(self) -> int:
        """What is shared, and what is not."""
        return 2 if self.settings.personal_steps else 1

    def is_personal(self, name: str) -> bool:
        """Whether a tensor of that name stays where it is."""
        return any(fnmatchcase(name, pattern) for pattern in self.settings.personal)

    def shared(self, params: Params) -> Params:
        """What is mixed."""
        return {name: tensor for name, tensor in params.items() if not self.is_personal(name)}

    def own(self, params: Params) -> Params:
        """What stays."""
        return {name: tensor for name, tensor in params.items() if self.is_personal(name)}

    def begin(self, row: Params) -> State:
        """All start equal. Raises `InputError` where a pattern is of no tensor, or all tensors are personal."""
        self._refuse(row)
        state = super().begin(self.shared(row))
        own = copies(self.own(row), self.mesh.hosted)
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
        """At what they share and at what is their own."""
        served = State.of(self.shared(state.theta), shards=self.population.shards)
        served.memory = state.memory
        return rows(self.own(state.theta), self.mesh.rows(agents)) | super().start(served, round_, agents)

    def local(
        self, state: State, round_: int, agents: Int[np.ndarray, " some"], theta: Params, practice: Practice
    ) -> Steps:
        """All at once, or what is one's own first."""
        first = self.settings.personal_steps
        if not first:
            return super().local(state, round_, agents, theta, practice)
        own, shared = self.own(theta), self.shared(theta)
        before = practice.learn(own, None, "", part=slice(first), resting=shared, turn=1)
        after = practice.learn(shared, None, "", part=slice(first, None), resting=own)
        share = first / self.settings.local_steps
        stats = {key: share * before.stats[key] + (1 - share) * mean for key, mean in after.stats.items()}
        return replace(after, theta=theta, stats=stats)

    def mix(self, state: State, round_: int, agents: Int[np.ndarray, " active"], end: Params) -> State:
        """What is shared is mixed; who acted keeps what it reached of its own."""
        own = {name: end.pop(name) for name in self.own(end)}
        names, kept = list(state.theta), self.own(state.theta)
        state.theta = self.shared(state.theta)
        state = super().mix(state, round_, agents, end)
        put(kept, self.mesh.rows(agents), own)
        state.theta = {name: {**state.theta, **kept}[name] for name in names}
        return state

    def meant(
        self, state: State, round_: int, agents: Int[np.ndarray, " active"], end: Params
    ) -> Weighted | None:
        """No average of whole models."""
        return None

    def message_bytes(self, row: Params) -> int:
        """Of what is shared."""
        return super().message_bytes(self.shared(row))


class FedPerSettings(SharedSettings, ServerSettings):
    """Which tensors are everybody's own, and who takes part."""


@method("fed_per")
class FedPer(Shared, Server):
    """Shared through a server."""

    Settings = FedPerSettings


class DecPerSettings(SharedSettings, DecDPOSettings):
    """Which tensors are everybody's own, and who talks to whom."""


@method("dec_per")
class DecPer(Shared, DecDPO):
    """Shared with neighbours."""

    Settings = DecPerSettings
