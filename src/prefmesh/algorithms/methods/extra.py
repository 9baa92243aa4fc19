"""EXTRA (Shi et al. 2015, arXiv 1404.6264, algorithm 1), with W~ = (I + W)/2.

    U     = N diag(w) (local_E(Theta) - Theta)
    Theta^{r+1} = Theta^r + W Theta^r + U^r - Z^{r-1},      Z^r = W~ Theta^r + U^r,      Z before the first round: Theta^0

For E = 1 and full batches (U = -lr N w_i grad f_i) this is Theta^{r+1} = (I + W) Theta^r - W~ Theta^{r-1} - lr (grad^r - grad^{r-1}).
Models are sent as they were before the local steps: a deployment sends while it computes.
"""

import numpy as np
from jaxtyping import Int

from prefmesh.algorithms.methods.base import method
from prefmesh.algorithms.methods.exact_diffusion import Lazy
from prefmesh.algorithms.state import State
from prefmesh.policies.base import Params


@method("extra")
class Extra(Lazy):
    """Agents with Z in `memory`."""

    def begin(self, row: Params) -> State:
        """Z = Theta."""
        state = super().begin(row)
        state.memory |= {f"z/{name}": tensor.clone() for name, tensor in state.theta.items()}
        return state

    def mix(self, state: State, round_: int, agents: Int[np.ndarray, " active"], end: Params) -> State:
        """The recursion."""
        reached = self.weighted(state, agents, end)
        mixed = self.mixed(state, round_, dict(state.theta))
        for name, theta in state.theta.items():
            update = reached[name] - theta
            old = state.memory[f"z/{name}"]
            state.memory[f"z/{name}"] = 0.5 * (theta + mixed[name]) + update
            state.theta[name] = theta + mixed[name] + update - old
        return state
