"""Ditto (Li et al. 2021, arXiv 2012.04221, algorithm 1): FedDPO, and beside it everybody's own model, held to the server's.

    theta as FedDPO's;      participants:  v_i <- E steps along  grad f_i(v_i) + lambda (v_i - theta^r)

theta^r is where i starts the round. Agents use v_i, which minimises f_i(v) + lambda/2 ||v - theta||^2 (eq. 1): lambda = 0 is everybody
alone, and a large one the server's policy. With SGD, lr lambda must stay below 2.
"""

import numpy as np
from jaxtyping import Int
from pydantic import Field

from prefmesh.algorithms.local_rule import Practice, Steps, held_to
from prefmesh.algorithms.methods.base import method
from prefmesh.algorithms.methods.beside import Beside
from prefmesh.algorithms.methods.server import ServerSettings
from prefmesh.algorithms.state import State
from prefmesh.policies.base import Params


class DittoSettings(ServerSettings):
    """`proximity`: lambda, how strongly own models are held to the server's; 0 is everybody alone."""

    proximity: float = Field(default=0.05, ge=0)


@method("ditto")
class Ditto(Beside):
    """A server, and own models that do not go far from it."""

    Settings = DittoSettings
    settings: DittoSettings

    def both(
        self, state: State, agents: Int[np.ndarray, " some"], theta: Params, own: Params, practice: Practice
    ) -> Steps:
        """v_i first, while theta is where it started."""
        practice.learn(own, held_to(theta, self.settings.proximity), "own")
        return practice.learn(theta, None, "")

    def policies(self, state: State) -> Params:
        """v_i."""
        return self.own(state)
