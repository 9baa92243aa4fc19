"""FedSoft (Ruan and Joe-Wong 2022, arXiv 2112.06053, algorithm 1): k models, and everybody's policy is held to its own mixture of them.

    participants:  u_ij <- the share of i's pairs on which theta_j has the least loss, at least sigma          (in every tau-th round)
                   v_i  <- E steps along  grad f_i(v_i) + lambda (v_i - sum_j u_ij theta_j)
    server:        theta_j <- (sum of u_ij w_i v_i) / (sum of u_ij w_i)

Agents use v_i, which goes on from where it was. lambda (v - sum_j u_ij theta_j) is the gradient of the paper's lambda/2 sum_j u_ij
||v - theta_j||^2: the server, which knows u_i, need send no more than the mixture in rounds that do not estimate it. With all agents and
while u stays, a round lowers (with small steps)

    sum_i w_i [ f_i(v_i) + lambda/2 sum_j u_ij ||v_i - theta_j||^2 ],

first in v, then in theta; k = 1 is pFedMe's objective (Dinh et al. 2020, arXiv 2006.08848). lambda = 0 is everybody alone. With SGD,
lr lambda must stay below 2.

Other than in the paper,
- the k models start as `several.py` says, at u_ij = 1 in one's own group;
- u is estimated by participants, on the pairs of the round (the paper: by everybody, on all own pairs); before one's first estimate it is 1/k;
- what was raised to sigma is scaled so that sum_j u_ij = 1;
- of S < N participants, theta_j goes a part of the way to their mean: min(1, N/S (sum of u_ij w_i over S_r) / (sum of u_ij w_i over all)),
  so that it stays where nobody is its own (the paper draws participants for each j, with probabilities u_ij w_i, and averages them plainly).

Where people err, or agree on much, a pair tells little of who made it: shares come near 1/k, and models near each other, the more so
the larger lambda is. With `mixtures: likelihood`, u_i is the one that makes i's pairs most likely (as in FedEM: Marfoq et al. 2021,
arXiv 2108.10252; the loss taken for a negative log-likelihood, which DPO's is):

    u_i    <-  argmax over the simplex of  sum_b log sum_j u_ij exp(-loss_b(theta_j)),      by EM:  u_ij <- mean_b r_bj
    r_bj    =  u_ij exp(-loss_b(theta_j)) / sum_l u_il exp(-loss_b(theta_l))
"""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from prefmesh.algorithms.gradients import mean_over_pairs
from prefmesh.algorithms.local_rule import Practice, Steps, held_to
from prefmesh.algorithms.methods.base import method
from prefmesh.algorithms.methods.held import HeldSettings
from prefmesh.algorithms.methods.several import Several, SeveralSettings
from prefmesh.algorithms.state import State, put, rows
from prefmesh.policies.base import Params

EM_STEPS = 100
"""From equal shares."""


class FedSoftSettings(HeldSettings, SeveralSettings):
    """How policies are held, and how mixtures are found."""

    estimate_every: int = Field(default=5, ge=1)
    """tau, the rounds from one estimate of the mixtures to the next: an estimate needs k models, the other rounds send one."""
    mixtures: Literal["pairs", "likelihood"] = "pairs"
    """How they are estimated: by on which pairs each model is the best, as in the paper, or as what makes all pairs most likely."""
    least_share: float = Field(default=1e-4, gt=0, lt=1)
    """sigma, the least that a model counts in anybody's mixture, before these add up to 1."""


@method("fed_soft")
class FedSoft(Several):
    """Theta is v; `memory` has the models, and u of agents hosted here (hosted, k)."""

    Settings = FedSoftSettings
    settings: FedSoftSettings
    agents_tell = True

    def begin(self, row: Params) -> State:
        """All equal, and held to all models alike."""
        state = super().begin(row)
        k = self.settings.clusters
        device = next(iter(row.values())).device
        state.memory["mixture"] = torch.full((self.mesh.hosted, k), 1 / k, dtype=torch.float64, device=device)
        return state

    def local(
        self, state: State, round_: int, agents: Int[np.ndarray, " some"], theta: Params, practice: Practice
    ) -> Steps:
        """Apart, as they like; then held to their mixtures."""
        if round_ <= self.settings.warm_rounds:
            return practice.learn(theta, None, "")
        models, kept, mine = self.models(state), {"u": state.memory["mixture"]}, self.mesh.rows(agents)
        if self._estimates(round_):
            put(kept, mine, {"u": self._estimated(state, len(agents), practice)})
        u = rows(kept, mine)["u"]
        mixture = {name: torch.tensordot(u.to(t), t, 1) for name, t in models.items()}
        return practice.learn(theta, held_to(mixture, self.settings.strength), "")

    def _estimates(self, round_: int) -> bool:
        since = round_ - self.settings.warm_rounds - 1
        return since >= 0 and since % self.settings.estimate_every == 0

    def _estimated(self, state: State, agents: int, practice: Practice) -> Float[Tensor, "some k"]:
        losses = self.of_each(state, agents, practice.pair_losses).double()
        estimate = best_shares if self.settings.mixtures == "pairs" else likeliest_shares
        return self._floored(estimate(losses, practice.weights))

    def _floored(self, shares: Float[Tensor, "some k"]) -> Float[Tensor, "some k"]:
        raised = shares.clamp(min=self.settings.least_share)
        return raised / raised.sum(1, keepdim=True)

    def serve(self, state: State, round_: int, agents: Int[np.ndarray, " own"], end: Params) -> State:
        """Each model goes to the mean of policies, by how much they are its."""
        models, kept, mine = self.models(state), {"u": state.memory["mixture"]}, self.mesh.rows(agents)
        acting, first = self.acting(agents), round_ == self.settings.warm_rounds
        own = np.isin(acting, agents)
        if first:
            label = self.first_groups({name: tensor - models[name][:1] for name, tensor in end.items()})
            one = torch.nn.functional.one_hot(torch.from_numpy(label[own]), self.settings.clusters)
            put(kept, mine, {"u": self._floored(one.to(kept["u"]))})
        counts = self.mesh.group.gather(kept["u"].cpu().numpy()) * self.population.weights[:, None]
        here, expected = counts[acting].sum(0), counts.sum(0) * len(acting) / self.agents
        steps = np.ones_like(here) if first else np.minimum(1, here / expected)
        for j, step in enumerate(steps):
            means = self.mesh.weighted_sum(torch.from_numpy(counts[acting[own], j] / here[j]), end)
            for name, mean in means.items():
                models[name][j].lerp_(mean[0], float(step))
        put(state.theta, mine, end)
        return state

    def fetched(self, round_: int) -> int:
        """One's mixture, or k models to find it."""
        return self.settings.clusters if self._estimates(round_) else 1


Losses = Float[Tensor, "k some steps batch"]
"""Of each model, on every pair of the round."""
Weights = Float[Tensor, "some steps batch"]


def best_shares(losses: Losses, weights: Weights) -> Float[Tensor, "some k"]:
    """On which share of an agent's pairs each of the models has the least loss."""
    models = torch.arange(len(losses), device=losses.device)
    best = losses.argmin(0) == models[:, None, None, None]
    return mean_over_pairs(best.double(), weights).T


def likeliest_shares(losses: Losses, weights: Weights) -> Float[Tensor, "some k"]:
    """Which mixture of the models makes an agent's pairs most likely."""
    u = losses.new_full(losses.shape[:2], 1 / len(losses))
    for _ in range(EM_STEPS):
        u = mean_over_pairs(torch.softmax(u.log()[:, :, None, None] - losses, dim=0), weights)
    return u.T
