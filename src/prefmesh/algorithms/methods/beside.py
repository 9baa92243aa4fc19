"""Beside the model that is mixed, a server's or gossip's, everybody's own: what Ditto and APFL share."""

from abc import abstractmethod

import numpy as np
from jaxtyping import Int

from prefmesh.algorithms.local_rule import Practice, Steps
from prefmesh.algorithms.methods.base import Method
from prefmesh.algorithms.state import State, copies, put, rows
from prefmesh.policies.base import Params


class Beside(Method):
    """Participants train the mixed model and their own on the same pairs. Own models v_i are in `memory`, and never leave.

    Stands before the method that mixes, among a class's bases. The measures of a round are those of the mixed model in its local steps.
    """

    one_policy = False
    one_row = False
    agents_remember = True
    beside = ("own",)
    in_turn = False

    @property
    def averages(self) -> bool:
        """What is done with the mixed models would have to be done with own ones, too."""
        return False

    def begin(self, row: Params) -> State:
        """All own models start where the mixed one does."""
        state = super().begin(row)
        state.memory |= {
            f"own/{name}": tensor for name, tensor in copies(dict(row), self.mesh.hosted).items()
        }
        return state

    def own(self, state: State) -> Params:
        """v_i of all agents hosted here (hosted, ...): the tensors that are kept."""
        return {name: state.memory[f"own/{name}"] for name in state.theta}

    def local(
        self, state: State, round_: int, agents: Int[np.ndarray, " some"], theta: Params, practice: Practice
    ) -> Steps:
        """Both models' steps; v_i of those who sit out stays as it is."""
        kept, mine = self.own(state), self.mesh.rows(agents)
        own = rows(kept, mine)
        found = self.both(state, agents, theta, own, practice)
        put(kept, mine, own)
        return found

    @abstractmethod
    def both(
        self, state: State, agents: Int[np.ndarray, " some"], theta: Params, own: Params, practice: Practice
    ) -> Steps:
        """E steps in place of the mixed model, from `theta` (some, ...), and of `own`; what those of the mixed one left."""
