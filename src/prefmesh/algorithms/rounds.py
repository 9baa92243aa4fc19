"""One round: participants start, take their local steps chunk by chunk, and are mixed."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prefmesh.algorithms import optimizers
from prefmesh.algorithms.gradients import Problem, mean_losses
from prefmesh.algorithms.local_rule import STATS, Correction, Practice, Steps, local_steps
from prefmesh.algorithms.methods.base import Method
from prefmesh.algorithms.sampling import Sampler
from prefmesh.algorithms.state import State, is_finite, joined, put, rows
from prefmesh.mesh import Mesh
from prefmesh.policies.base import Params

CONSENSUS_BLOCK = 2**20
"""Numbers that the consensus error is taken over at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Learner:
    """Everything that a round needs and that no round changes.

    `agents_per_pass`: how many agents share a forward pass; the result does not depend on it, beyond rounding.
    """

    problem: Problem
    method: Method
    optimizer: optimizers.OptimizerSettings
    sampler: Sampler
    agents_per_pass: int

    def begin(self, row: Params) -> State:
        """State before round 1; `row` (1, ...) is the policy that all agents start from."""
        state = self.method.begin(row)
        if self.optimizer.state == "keep":
            state.optimizer = optimizers.initial_state(self.optimizer, row, self.method.mesh.hosted)
        return state

    def round(self, state: State, round_: int, *, consensus: bool = True) -> tuple[State, dict[str, float]]:
        """The state after round `round_` (from 1), and its measures. The old state is used up.

        Where agents live in several processes, measures are means over participants hosted here (0 where there are none),
        but for the consensus errors, which are of all: they take a message from every process, and are left out without `consensus`.
        """
        method, mesh = self.method, self.method.mesh
        active = method.participants(round_)
        own = mesh.here(active)
        end = {name: tensor.new_empty(len(own), *tensor.shape[1:]) for name, tensor in state.theta.items()}
        stats, gradients = [], []
        # As few passes as there must be, of like size: a last one of few agents would not pay.
        passes = -(-len(own) // self.agents_per_pass)
        for here in np.array_split(np.arange(len(own)), passes) if passes else ():
            agents = own[here]
            start = method.start(state, round_, agents)
            # Steps are taken in place, in the rows that the participants will have reached.
            theta = {name: tensor[here[0] : here[-1] + 1].copy_(start[name]) for name, tensor in end.items()}
            del start
            found = self.local(state, round_, agents, theta)
            stats.append(found.stats)
            gradients.append(found.gradients)
        each = method.shards.shape[1]
        state.batches_drawn[method.shards[active].reshape(-1)] += np.repeat(method.steps[active], each)
        if method.uses_gradients:
            state.gradients = joined(gradients, end)
        measures = {
            key: float(torch.cat([part[key] for part in stats]).double().mean()) if stats else 0.0
            for key in STATS
        }
        measures["lr"] = self.lr(round_)
        if consensus:
            measures["consensus_error_before_mixing"] = self._consensus_error(end, round_, len(active))
        # A sum over agents would hide which parameters broke: look at the rows themselves, before they are mixed.
        measures["parameters_finite"] = is_finite(end)
        state = method.mix(state, round_, own, end)
        state.gradients = {}
        if consensus:
            measures["consensus_error"] = (
                0.0 if method.one_row else self._consensus_error(state.theta, round_, method.agents)
            )
        return state, measures

    def _consensus_error(self, theta: Params, round_: int, agents: int) -> float:
        """Of so many agents, those hosted here at `theta`; to what each takes for the average where neighbours stand in for it."""
        by_neighbours = self.method.neighbour_mixes is not None
        middle = self.method.gossip(theta, round_) if by_neighbours else None
        return consensus_error(theta, self.method.mesh, agents, middle)

    def lr(self, round_: int) -> float:
        """The step size in that round."""
        return optimizers.learning_rate(self.optimizer, round_, self.method.settings.rounds)

    def local(self, state: State, round_: int, agents: np.ndarray, theta: Params) -> Steps:
        """What agents that are hosted here do in a round: local steps in place in `theta` (some, ...) and in their moments."""
        method = self.method
        batches, weights = self.batches(round_, agents, state.batches_drawn, method.settings.local_steps)

        def learn(theta: Params, correction: Correction | None, purpose: str) -> Steps:
            moments, put_back = self._moments(state, agents, theta, purpose)
            found = local_steps(
                self.problem,
                self.optimizer,
                self.lr(round_),
                theta,
                moments,
                batches,
                weights,
                steps=method.steps[agents],
                correction=correction,
                keep_gradients=method.uses_gradients,
            )
            put_back()
            return found

        def losses(theta: Params) -> Float[Tensor, " some"]:
            return mean_losses(self.problem, theta, batches, weights)

        return method.local(state, round_, agents, theta, Practice(learn=learn, losses=losses))

    def _moments(
        self, state: State, agents: np.ndarray, theta: Params, purpose: str
    ) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """The moments of agents hosted here, and what to call when they were changed."""
        if self.optimizer.state != "keep":
            return optimizers.initial_state(self.optimizer, theta, len(agents)), lambda: None
        mine = self.method.mesh.rows(agents)
        if not purpose:
            kept = state.optimizer
        else:
            fresh = optimizers.initial_state(self.optimizer, theta, self.method.mesh.hosted)
            kept = {
                name: state.memory.setdefault(f"{purpose} {name}", tensor) for name, tensor in fresh.items()
            }
        moments = rows(kept, mine)
        return moments, lambda: put(kept, mine, moments)

    def batches(
        self, round_: int, agents: np.ndarray, drawn: np.ndarray, steps: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows and weights (agents, steps, shards each x batch): an agent's shards side by side, weighted by w_i.

        `drawn` (shards,): batches that were drawn from each shard before.
        """
        shards = self.method.shards[agents]
        flat = shards.reshape(-1)
        rows, within = self.sampler.draw(round_, flat, drawn[flat], steps)
        share = self.method.population.weights[shards]
        share = share / share.sum(axis=1, keepdims=True)
        weights = within.reshape(*shards.shape, *within.shape[1:]) * share[:, :, None, None]

        def side_by_side(array: np.ndarray) -> np.ndarray:
            array = array.reshape(*shards.shape, *array.shape[-2:])
            return array.transpose(0, 2, 1, 3).reshape(len(agents), steps, -1)

        return side_by_side(rows), side_by_side(weights)


def consensus_error(
    theta: Params, mesh: Mesh | None = None, of: int | None = None, middle: Params | None = None
) -> float:
    """e = (1/N) sum_i ||theta_i - mean||^2, over all tensors; 0 where all agents share one row.

    `mesh`, `of`: where the rows of `of` agents live, those of this process being `theta`; none: all are here. `middle`: what each
    of these takes for the mean, (agents, ...).
    """
    elsewhere = mesh if mesh is not None and mesh.group.size > 1 else None
    if elsewhere and middle is None:
        middle = elsewhere.mean(theta, of or 0)
    total = 0.0
    for name, tensor in theta.items():
        agents = tensor.shape[0]
        if not elsewhere and (agents == 1 or tensor.stride(0) == 0):
            continue
        flat = tensor.reshape(agents, math.prod(tensor.shape[1:]))
        centre = None if middle is None else middle[name].reshape(-1, flat.shape[1])
        # Some columns at a time: what is taken on the way stays small.
        width = max(1, CONSENSUS_BLOCK // max(1, agents))
        for i, part in enumerate(flat.split(width, dim=1)):
            at = part.mean(0) if centre is None else centre[:, i * width : (i + 1) * width]
            total += float((part - at).square().sum(dtype=torch.float64))
    if elsewhere:
        total = float(elsewhere.group.total(np.array([total]))[0])
    return total / (of or next(iter(theta.values())).shape[0])
