"""APFL (Deng et al. 2020, arXiv 2003.13461, algorithm 1): everybody's policy is a mixture of its own model and the server's.

    vbar_i = alpha_i v_i + (1 - alpha_i) w_i;      participants, in each of their E steps:
        v_i <- optimizer(v_i, alpha_i grad f_i(vbar_i)),      w_i <- optimizer(w_i, grad f_i(w_i)),      both on the same batch
    w_i starts the round at theta^r; theta as FedDPO's

so the mixture follows w_i step by step (which costs E copies of w_i in a pass). Agents use alpha_i v_i + (1 - alpha_i) theta. alpha = 0 is
FedDPO, alpha = 1 everybody alone. With `alpha_lr`, alpha_i learns too (the paper's adaptive rule), once a round, with the first step:

    alpha_i <- alpha_i - alpha_lr <v_i - w_i, grad f_i(vbar_i)>,      cut to 0 .. 1

`dec_apfl` is the same without a server: w_i starts at theta_i, and is mixed as DecDPO's.
"""

import numpy as np
import torch
from jaxtyping import Int
from pydantic import Field

from prefmesh.algorithms.local_rule import Practice, Steps
from prefmesh.algorithms.methods.base import MethodSettings, method
from prefmesh.algorithms.methods.beside import Beside
from prefmesh.algorithms.methods.dec_dpo import DecDPO, DecDPOSettings
from prefmesh.algorithms.methods.server import Server, ServerSettings
from prefmesh.algorithms.state import State, put, rows, spread
from prefmesh.policies.base import Params


class InterpolatedSettings(MethodSettings):
    """What of a policy is an agent's own."""

    alpha: float | None = Field(default=None, ge=0, le=1)
    """The own model's share of the mixture, at first. None: 0.1 for language models, 0.25 for log-linear policies."""
    alpha_lr: float = Field(default=0.0, ge=0)
    """The step size of each agent's alpha, which has a step a round; 0: alpha stays."""

    def suited(self, *, beta: float, language: bool) -> MethodSettings:
        """Both were found on towns, of which one has opposed groups and one a single taste (docs/log.md)."""
        if self.alpha is not None:
            return self
        return self.model_copy(update={"alpha": 0.1 if language else 0.25})


class Interpolated(Beside):
    """Own models, and how much each agent takes of them (`memory`: alpha)."""

    settings: InterpolatedSettings

    def begin(self, row: Params) -> State:
        """All take alpha of their own."""
        state = super().begin(row)
        device = next(iter(row.values())).device
        assert self.settings.alpha is not None
        state.memory["alpha"] = torch.full(
            (self.mesh.hosted,), self.settings.alpha, dtype=torch.float64, device=device
        )
        return state

    def both(
        self, state: State, agents: Int[np.ndarray, " some"], theta: Params, own: Params, practice: Practice
    ) -> Steps:
        """w_i first, whose way is kept; then v_i along it."""
        kept, mine = {"alpha": state.memory["alpha"]}, self.mesh.rows(agents)
        alpha = rows(kept, mine)["alpha"].clone()
        way: list[Params] = []

        def remembered(w: Params, gradient: Params) -> Params:
            way.append({name: tensor.clone() for name, tensor in w.items()})
            return gradient

        found = practice.learn(theta, remembered, "")
        steps = iter(way)

        def mixed(v: Params) -> Params:
            return _mixture(alpha, v, next(steps))

        first = True

        def scaled(v: Params, gradient: Params) -> Params:
            nonlocal first
            along = {name: g * spread(alpha, g) for name, g in gradient.items()}
            if first and self.settings.alpha_lr:
                slope = sum(
                    ((v[name] - way[0][name]).double() * g.double()).flatten(1).sum(1)
                    for name, g in gradient.items()
                )
                alpha.sub_(self.settings.alpha_lr * slope).clamp_(0, 1)
            first = False
            return along

        practice.learn(own, scaled, "own", at=mixed)
        put(kept, mine, {"alpha": alpha})
        return found

    def policies(self, state: State) -> Params:
        """alpha_i v_i + (1 - alpha_i) theta, as agents heard it."""
        everybody = np.arange(self.mesh.first, self.mesh.last)
        common = self.start(state, self.settings.rounds, everybody)
        return _mixture(state.memory["alpha"], self.own(state), common)


class APFLSettings(InterpolatedSettings, ServerSettings):
    """What of a policy is an agent's own, and who takes part."""


@method("apfl")
class APFL(Interpolated, Server):
    """The rest is a server's."""

    Settings = APFLSettings


class DecAPFLSettings(InterpolatedSettings, DecDPOSettings):
    """What of a policy is an agent's own, and who talks to whom."""


@method("dec_apfl")
class DecAPFL(Interpolated, DecDPO):
    """The rest is what neighbours agree on."""

    Settings = DecAPFLSettings


def _mixture(alpha: torch.Tensor, own: Params, common: Params) -> Params:
    return {name: w + spread(alpha, w) * (own[name] - w) for name, w in common.items()}
