"""A policy for each group of agents whose gradients agree (clustered federated learning: Sattler et al. 2020, arXiv 1910.01991).

    rounds 1 .. warm_rounds:  FedDPO with all;  a_i, b_i <- sums of i's mean gradients of odd and of even rounds
    then:                     groups by the directions of a_i + b_i
    from there on:            theta_i <- theta_i + (sum of w_j Delta_j over i's group) / (sum of w_j over i's group)

Gradients are compared as count sketches (Charikar et al. 2002) of `SKETCH` numbers, which keep inner products. a_i - b_i is chance
alone, so the groups that stand out from it are found by `similarity.find_groups` where `clusters` is `auto`; where none do, all stay
together.
"""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from scipy.sparse import csr_array
from torch import Tensor

from prefmesh.algorithms.methods.base import Method, MethodSettings, method
from prefmesh.algorithms.similarity import by_direction, find_groups, inner_products
from prefmesh.algorithms.state import State, copies
from prefmesh.compression.layout import rowwise
from prefmesh.errors import InputError
from prefmesh.policies.base import Params
from prefmesh.randomness import derived_seed, generator

SKETCH = 4096


def refuse_no_rounds_left(warm_rounds: int, rounds: int, least: int) -> None:
    """Raise `InputError` where groups would be found after the last round; `least`: warm rounds that finding them takes."""
    if warm_rounds >= rounds:
        raise InputError(
            f"method.warm_rounds: found {warm_rounds} of {rounds} rounds; allowed: {least} to {rounds - 1}"
        )


class ClusteredSettings(MethodSettings):
    """When groups are looked for, and how many."""

    clusters: int | Literal["auto"] = "auto"
    """How many groups; `auto`: as many as stand out from chance, maybe one."""
    warm_rounds: int = Field(default=6, ge=2)
    """Rounds with one policy for all, whose gradients tell the groups."""

    def check(self, agents: int) -> None:
        """Groups fit the agents, and a round is left for them."""
        if self.clusters != "auto" and not 2 <= self.clusters <= agents:
            raise InputError(
                f"method.clusters: found {self.clusters}; allowed: auto, or 2 to {agents}, the number of agents"
            )
        refuse_no_rounds_left(self.warm_rounds, self.rounds, 2)


@method("clustered")
class Clustered(Method):
    """A server with a model for each group; `memory` holds sketches, then each agent's group."""

    Settings = ClusteredSettings
    one_policy = False
    uses_gradients = True
    in_turn = False

    def begin(self, row: Params) -> State:
        """One model for all."""
        state = State.of(copies(row, self.mesh.hosted), shards=self.population.shards)
        for half in ("odd", "even"):
            state.memory[f"sketch {half}"] = torch.zeros_like(sketched(state.theta, 0))
        state.memory["group"] = torch.zeros(self.agents, dtype=torch.int64)
        return state

    def mix(self, state: State, round_: int, agents: Int[np.ndarray, " active"], end: Params) -> State:
        """The mean update of one's group."""
        if round_ <= self.settings.warm_rounds:
            half = state.memory[f"sketch {'odd' if round_ % 2 else 'even'}"]
            half += sketched(state.gradients, derived_seed(self.population.seed, "sketch"))
        group = self.groups(state)
        update = {name: tensor - state.theta[name] for name, tensor in end.items()}
        moved = self.mesh.mix(self._means(group), update)
        state.theta = {name: tensor + moved[name] for name, tensor in state.theta.items()}
        if round_ == self.settings.warm_rounds:
            found = self._groups(state)
            state.memory = {"group": torch.from_numpy(found).to(state.memory["group"].device)}
        return state

    def _means(self, group: Int[np.ndarray, " agents"]) -> csr_array:
        """Row i: w_j over the group's, for those of i's group."""
        weights = np.where(group[:, None] == group[None, :], self.population.weights, 0.0)
        return csr_array(weights / weights.sum(1, keepdims=True))

    def _groups(self, state: State) -> Int[np.ndarray, " agents"]:
        everybody = self.mesh.group.gather
        odd, even = (everybody(state.memory[f"sketch {half}"].cpu().numpy()) for half in ("odd", "even"))
        inner = _inner(odd + even)
        if self.settings.clusters == "auto":
            ghosts = _inner(odd - even)
            found = find_groups(
                inner, np.diag(ghosts).copy(), ghosts, generator(self.population.seed, "groups")
            )
            return np.maximum(found.label, 0)
        return by_direction(inner, self.settings.clusters)

    def groups(self, state: State) -> Int[np.ndarray, " agents"]:
        """As found; all 0 before."""
        return state.memory["group"].cpu().numpy()

    def bytes_sent(self, round_: int, *, model_bytes: int, data_bytes: int) -> int:
        """Each agent fetches a model and sends an update; at the end of the warm rounds two sketches, or two gradients that are no
        longer."""
        sketches = 2 * min(8 * SKETCH, model_bytes) if round_ == self.settings.warm_rounds else 0
        return (2 * model_bytes + sketches) * self.agents


def sketched(gradients: Params, seed: int) -> Float[Tensor, "agents numbers"]:
    """Count sketches: every entry is added to one of `SKETCH` numbers, with a sign, both by chance but the same for all agents.

    Gradients that are no longer stay as they are.
    """
    random = torch.Generator().manual_seed(seed)
    agents = next(iter(gradients.values())).shape[0]
    vectors = [rowwise(tensor) for tensor in gradients.values()]
    if sum(flat.shape[1] for flat in vectors) <= SKETCH:
        return torch.cat(vectors, dim=1).double()
    found = next(iter(gradients.values())).new_zeros(agents, SKETCH, dtype=torch.float64)
    for flat in vectors:
        place = torch.randint(SKETCH, (flat.shape[1],), generator=random)
        sign = 2.0 * torch.randint(2, (flat.shape[1],), generator=random) - 1
        found.index_add_(1, place.to(flat.device), flat.double() * sign.to(flat.device))
    return found


def _inner(sketches: Float[np.ndarray, "agents sketch"]) -> Float[np.ndarray, "agents agents"]:
    return inner_products({"sketch": torch.from_numpy(sketches)})
