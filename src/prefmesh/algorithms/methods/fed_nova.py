"""Unequal numbers of local steps, and FedNova's cure (Wang et al. 2020, arXiv 2007.07481, section 4).

Slow devices take E_i < E steps. FedDPO's mean of updates then minimises sum_i w_i E_i f_i instead of f. FedNova averages updates per
step, and takes as many of these as the average agent does:

    theta^{r+1} = theta^r + tau (1/S) sum_{i in S_r} N w_i Delta_i / E_i,      tau = (1/S) sum_{i in S_r} N w_i E_i

(for plain SGD: ||a_i||_1 = E_i).
"""

import numpy as np
from jaxtyping import Float, Int
from pydantic import Field

from prefmesh.algorithms.methods.base import method
from prefmesh.algorithms.methods.server import Server, ServerSettings
from prefmesh.errors import InputError
from prefmesh.randomness import generator


class FedNovaSettings(ServerSettings):
    """`least_local_steps`: each agent's E_i is drawn once, uniformly from this to `local_steps`. `normalise`: `false` averages the
    updates as they are, which is FedDPO with slow devices."""

    least_local_steps: int = Field(default=1, ge=1)
    normalise: bool = True

    def check(self, agents: int) -> None:
        """least_local_steps <= E."""
        super().check(agents)
        if self.least_local_steps > self.local_steps:
            raise InputError(
                f"method.least_local_steps: found {self.least_local_steps}; allowed: 1 to {self.local_steps}, method.local_steps"
            )


@method("fed_nova")
class FedNova(Server):
    """A server, and agents that take E_i steps."""

    Settings = FedNovaSettings
    settings: FedNovaSettings

    @property
    def steps(self) -> Int[np.ndarray, " agents"]:
        """E_i."""
        of = self.settings
        return generator(self.population.seed, "local steps").integers(
            of.least_local_steps, of.local_steps + 1, self.agents
        )

    def shares(
        self, round_: int, agents: Int[np.ndarray, " own"], acting: Int[np.ndarray, " active"]
    ) -> Float[np.ndarray, " own"]:
        """tau N w_i / (S E_i)."""
        plain = super().shares(round_, agents, acting)
        if not self.settings.normalise:
            return plain
        tau = float(self.update_scale[acting] @ self.steps[acting]) / len(acting)
        return tau * plain / self.steps[agents]
