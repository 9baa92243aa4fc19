"""Ditto (Li et al. 2021, arXiv 2012.04221, algorithm 1): FedDPO, and beside it everybody's own model, held to the server's.

    theta as FedDPO's;      participants:  v_i <- E steps along  grad f_i(v_i) + lambda (v_i - theta^r)

theta^r is where i starts the round. Agents use v_i, which minimises f_i(v) + lambda/2 ||v - theta||^2 (eq. 1): lambda = 0 is everybody
alone, and a large one the server's policy. With SGD, lr lambda must stay below 2.

`dec_ditto` is the same without a server: theta_i is DecDPO's, agent i's own estimate of the common model.
"""

import numpy as np
from jaxtyping import Int

from prefmesh.algorithms.local_rule import Practice, Steps, held_to
from prefmesh.algorithms.methods.base import method
from prefmesh.algorithms.methods.beside import Beside
from prefmesh.algorithms.methods.dec_dpo import DecDPO, DecDPOSettings
from prefmesh.algorithms.methods.held import HeldSettings
from prefmesh.algorithms.methods.server import Server, ServerSettings
from prefmesh.algorithms.state import State
from prefmesh.policies.base import Params


class Held(Beside):
    """Own models that do not go far from the one that is mixed."""

    settings: HeldSettings

    def both(
        self, state: State, agents: Int[np.ndarray, " some"], theta: Params, own: Params, practice: Practice
    ) -> Steps:
        """v_i first, while theta is where it started."""
        practice.learn(own, held_to(theta, self.settings.strength), "own")
        return practice.learn(theta, None, "")

    def policies(self, state: State) -> Params:
        """v_i."""
        return self.own(state)


class DittoSettings(HeldSettings, ServerSettings):
    """How strongly own models are held, and who takes part."""


@method("ditto")
class Ditto(Held, Server):
    """Held to a server's model."""

    Settings = DittoSettings


class DecDittoSettings(HeldSettings, DecDPOSettings):
    """How strongly own models are held, and who talks to whom."""


@method("dec_ditto")
class DecDitto(Held, DecDPO):
    """Held to what neighbours agree on."""

    Settings = DecDittoSettings
