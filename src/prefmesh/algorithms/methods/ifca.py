"""IFCA (Ghosh et al. 2020, arXiv 2006.04088, algorithm 1, model averaging): k models, and everybody takes the one that fits best.

    participants:  c_i <- the j whose theta_j has the least loss on the pairs of i's round
                   Delta_i <- local_E(theta_{c_i}, i) - theta_{c_i}
    server:        theta_j <- theta_j + (sum of w_i Delta_i over c_i = j) / (sum of w_i over c_i = j);      where nobody chose j, it stays

With the start of `several.py` it is k-means with a start from data. From there on groups are chosen by loss alone. k = 1 is FedDPO after
the warm rounds.
"""

import numpy as np
import torch
from jaxtyping import Int

from prefmesh.algorithms.local_rule import Practice, Steps
from prefmesh.algorithms.methods.base import method
from prefmesh.algorithms.methods.several import Several, SeveralSettings
from prefmesh.algorithms.state import State, take
from prefmesh.policies.base import Params


class IFCASettings(SeveralSettings):
    """How many models, and how they begin."""


@method("ifca")
class IFCA(Several):
    """Everybody's choice (0 before the first) is in `memory`; Theta is what agents chose."""

    Settings = IFCASettings
    settings: IFCASettings

    def begin(self, row: Params) -> State:
        """Nobody chose yet."""
        state = super().begin(row)
        state.memory["group"] = torch.zeros(self.agents, dtype=torch.int64)
        return state

    def local(
        self, state: State, round_: int, agents: Int[np.ndarray, " some"], theta: Params, practice: Practice
    ) -> Steps:
        """First the choice, which is where the steps start."""
        if round_ > self.settings.warm_rounds:
            chosen = self.of_each(state, len(agents), practice.losses).argmin(0).cpu()
            state.memory["group"][torch.from_numpy(agents)] = chosen.to(state.memory["group"].device)
            for name, tensor in take(self.models(state), chosen.numpy()).items():
                theta[name].copy_(tensor)
        return practice.learn(theta, None, "")

    def serve(self, state: State, round_: int, agents: Int[np.ndarray, " own"], end: Params) -> State:
        """Each model's mean update."""
        models, group = self.models(state), self.groups(state).copy()
        start = take(models, group[agents])
        update = {name: end.pop(name).sub_(start.pop(name)) for name in list(end)}
        acting = self.acting(agents)
        first = round_ == self.settings.warm_rounds
        group[acting] = self.first_groups(update) if first else self.gathered(group[agents])
        weights = self.population.weights
        for j in np.unique(group[acting]):
            mine = np.flatnonzero(group[agents] == j)
            share_ = weights[agents[mine]] / weights[acting[group[acting] == j]].sum()
            for name, moved in self.mesh.weighted_sum(torch.from_numpy(share_), take(update, mine)).items():
                models[name][j] += moved[0]
        state.memory["group"].copy_(torch.from_numpy(group))
        state.theta = take(models, group[self.mesh.first : self.mesh.last])
        return state

    def groups(self, state: State) -> Int[np.ndarray, " agents"]:
        """As chosen last."""
        return state.memory["group"].cpu().numpy()
