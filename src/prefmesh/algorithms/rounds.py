"""One round: participants start, take their local steps chunk by chunk, and are mixed."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prefmesh.algorithms import optimizers
from prefmesh.algorithms.consensus import Weighted, consensus_error, mixing_error
from prefmesh.algorithms.gradients import Problem, pair_losses
from prefmesh.algorithms.local_rule import STATS, Correction, Practice, Steps, local_steps
from prefmesh.algorithms.methods.base import Method
from prefmesh.algorithms.sampling import Sampler
from prefmesh.algorithms.state import State, is_finite, joined, put, rows, without
from prefmesh.mesh import cut
from prefmesh.policies.base import Params


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
            row = without(row, self.problem.policy.residuals(row))
            state.optimizer = self._fresh(row)
            for turn in range(1, max(self.problem.policy.turns, self.method.turns)):
                if "steps" in state.optimizer:
                    state.optimizer[f"steps/{turn}"] = torch.zeros_like(state.optimizer["steps"])
            for purpose in self.method.beside:
                state.memory |= {f"{purpose} {name}": tensor for name, tensor in self._fresh(row).items()}
        return state

    def _fresh(self, row: Params) -> dict[str, Tensor]:
        return optimizers.initial_state(self.optimizer, row, self.method.mesh.hosted)

    def round(
        self, state: State, round_: int, *, consensus: bool = True, evaluated: bool = True
    ) -> tuple[State, dict[str, float]]:
        """The state after round `round_` (from 1), and its measures. The old state is used up.

        Where agents live in several processes, measures are means over participants hosted here (0 where there are none),
        but for the consensus errors, which are of all: they take a message from every process, and are left out without `consensus`.
        LoRA's mixing error takes copies of all rows, and is left out unless an evaluation follows (`evaluated`).
        """
        method, mesh = self.method, self.method.mesh
        active = method.participants(round_)
        own = mesh.here(active)
        names, trained = list(state.theta), self.problem.policy.trained(state.theta, round_)
        resting, residuals = without(state.theta, trained), self.problem.policy.residuals(state.theta)
        end = {name: tensor.new_empty(len(own), *tensor.shape[1:]) for name, tensor in trained.items()}
        stats, gradients = [], []
        # As few passes as there must be, of like size: a last one of few agents would not pay.
        passes = -(-len(own) // self.agents_per_pass)
        for here in np.array_split(np.arange(len(own)), passes) if passes else ():
            agents = own[here]
            start = dict(mesh.kept(method.start(state, round_, agents), agents))
            # Steps are taken in place, in the rows that the participants will have reached.
            theta = {
                name: tensor[here[0] : here[-1] + 1].copy_(start.pop(name)) for name, tensor in end.items()
            }
            found = self.local(state, round_, agents, theta, start)
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
        still = rows(without(resting, residuals), mesh.rows(own))
        if consensus:
            measures["consensus_error_before_mixing"] = self._consensus_error(
                end | still, round_, len(active)
            )
        # A sum over agents would hide which parameters broke: look at the rows themselves, before they are mixed.
        measures["parameters_finite"] = is_finite(end)
        meant = self._meant(state, round_, own, end | still) if evaluated else None
        # Mixing frees rows as it goes: nobody else may hold them. What it leaves over is added to the residuals.
        state.theta = trained | residuals
        del trained
        state = method.mix(state, round_, own, end)
        mixed = resting | state.theta
        state.theta = {name: mixed[name] for name in names}
        state.gradients = {}
        if meant is not None:
            measures["lora/mixing_error"] = mixing_error(meant, self._left(state))
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

    def _meant(self, state: State, round_: int, agents: np.ndarray, end: Params) -> Weighted | None:
        """Copies of the factors whose products mixing is to average; none where it does more, or there are none."""
        # Whole layers would have to travel between processes, which never do.
        alone = self.method.mesh.group.size == 1
        known = alone and self.problem.policy.factors(end)
        meant = self.method.meant(state, round_, agents, end) if known else None
        if meant is None:
            return None
        weights, models = meant
        policy = self.problem.policy
        factors = {name: tensor.clone() for name, tensor in policy.factors(models).items()}
        return weights, factors | policy.residuals(state.theta)

    def _left(self, state: State) -> Weighted:
        """The models after mixing, each with its share of the network's mean: under a server, the only one."""
        method, policy = self.method, self.problem.policy
        if not method.one_row:
            return torch.full((method.mesh.hosted,), 1 / method.agents, dtype=torch.float64), policy.factors(
                state.theta
            )
        row = {name: tensor[:1] for name, tensor in state.theta.items()}
        return torch.ones(1, dtype=torch.float64), policy.factors(row)

    def lr(self, round_: int) -> float:
        """The step size in that round."""
        return optimizers.learning_rate(self.optimizer, round_, self.method.settings.rounds)

    def local(
        self, state: State, round_: int, agents: np.ndarray, theta: Params, resting: Params | None = None
    ) -> Steps:
        """What agents that are hosted here do in a round: local steps in place in `theta` (some, ...) and in their moments.

        `resting` (some, ...): parameters that this round does not train.
        """
        method, untrained = self.method, resting or {}
        batches, weights = self.batches(round_, agents, state.batches_drawn, method.settings.local_steps)

        def learn(
            theta: Params,
            correction: Correction | None,
            purpose: str,
            at: Callable[[Params], Params] | None = None,
            part: slice = slice(None),
            resting: Params | None = None,
            turn: int = 0,
        ) -> Steps:
            # A method that takes turns within a round has a policy that takes none over rounds (`Method.in_turn`).
            turn = turn or (round_ - 1) % self.problem.policy.turns
            moments, put_back = self._moments(state, agents, theta, purpose, turn)
            found = local_steps(
                self.problem,
                self.optimizer,
                self.lr(round_),
                theta,
                moments,
                batches[:, part],
                weights[:, part],
                steps=np.array([len(range(*part.indices(n))) for n in method.steps[agents].tolist()]),
                correction=self._within_ranks(agents, correction),
                at=at,
                keep_gradients=method.uses_gradients,
                resting=untrained | (resting or {}),
            )
            put_back()
            return found

        reference = self.problem.reference
        w = torch.as_tensor(weights, dtype=reference.dtype, device=reference.device)

        def losses(theta: Params) -> Float[Tensor, "some steps batch"]:
            return pair_losses(self.problem, theta | untrained, batches, w)

        practice = Practice(learn=learn, pair_losses=losses, weights=w, lr=self.lr(round_))
        return method.local(state, round_, agents, theta, practice)

    def _within_ranks(self, agents: np.ndarray, correction: Correction | None) -> Correction | None:
        """Where A is frozen, B has a gradient beyond an agent's rank, too: nobody follows it."""
        ranks = self.method.mesh.ranks
        if ranks is None:
            return correction

        def within(theta: Params, gradient: Params) -> Params:
            return cut(correction(theta, gradient) if correction else gradient, ranks.of[agents])

        return within

    def _moments(
        self, state: State, agents: np.ndarray, theta: Params, purpose: str, turn: int
    ) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """The moments of agents hosted here, and what to call when they were changed."""
        if self.optimizer.state != "keep":
            return optimizers.initial_state(self.optimizer, theta, len(agents)), lambda: None
        fresh = optimizers.initial_state(self.optimizer, theta, 0)  # of nobody: its names are asked for
        mine = self.method.mesh.rows(agents)
        kept = state.memory if purpose else state.optimizer
        # Steps are counted apart for parameters that take turns.
        names = {
            name: f"{purpose} {name}" if purpose else f"{name}/{turn}" if turn and name == "steps" else name
            for name in fresh
        }
        moments = {name: kept[key] for name, key in names.items()}
        mine_of = rows(moments, mine)
        return mine_of, lambda: put(moments, mine, mine_of)

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
