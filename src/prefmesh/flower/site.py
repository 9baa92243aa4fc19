"""What a site does between two messages: one agent's local rule on its own pairs, and its part of an evaluation.

A site's process may be a new one for every message. What lasts lies on its disk: encoded pairs' reference log-probabilities in the
cache, optimiser moments and the place in its own data in checkpoints of its own.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int

from prefmesh import checkpoint
from prefmesh.algorithms import optimizers
from prefmesh.algorithms.state import State
from prefmesh.config import ExperimentConfig
from prefmesh.errors import InputError
from prefmesh.experiment import Experiment, Share, assembled, method_of, read_share
from prefmesh.measure import HeldOut
from prefmesh.mesh import Group
from prefmesh.policies.base import Params
from prefmesh.preferences.census import Census, Told


def _nothing(stage: str) -> None:
    """A site does not tell how its preparing goes on."""


class _Site(Group):
    """One of several that cannot talk to each other."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size


@dataclass(frozen=True, kw_only=True)
class Part:
    """A site's part of an evaluation: of f and its gradient once or twice (see `contributions`), and its held-out pairs."""

    contributions: list[tuple[float, Params]]
    held_out: HeldOut


@dataclass(frozen=True, kw_only=True)
class Site:
    """One agent of an experiment, which knows of the others only how many pairs they have."""

    experiment: Experiment
    agent: int
    memory: Path

    @classmethod
    def open(
        cls,
        config: ExperimentConfig,
        share: Share,
        agent: int,
        sizes: Int[np.ndarray, " agents"],
        memory: Path,
    ) -> "Site":
        """`share`: what it holds, one agent's. `sizes`: everybody's training pairs. `memory`: a directory for what it keeps.

        Raises `InputError` where its data are not those that it told of.
        """
        own = len(share.division.agents[0].train)
        if sizes[agent] != own:
            raise InputError(
                f"this site: found {own} training pairs, but it told of {sizes[agent]} when the run began; allowed: the same data"
            )
        known = replace(share, census=replace(share.census, sizes=sizes))
        group = _Site(agent, len(sizes))
        method = method_of(config, known.census, [1] * len(sizes), group)
        experiment = assembled(config, known, method, 0, _nothing, 1)
        return cls(experiment=experiment, agent=agent, memory=memory)

    def train(self, round_: int, after: int, start: Params) -> tuple[Params, dict[str, float]]:
        """E local steps from `start` (1, ...): the parameters that it reached, and its measures.

        `after`: the last round before in which its answer was taken (0: none). What it keeps of that round is where it goes on.
        """
        experiment, learner = self.experiment, self.experiment.learner
        state, found = self._recall(after)
        theta = {name: tensor.clone() for name, tensor in start.items()}
        stats = learner.local(state, round_, np.array([self.agent]), theta).stats
        state.batches_drawn[self.agent] += learner.method.steps[self.agent]
        checkpoint.save(
            self.memory,
            state.tensors(),
            round_=round_,
            config=experiment.config.hash(),
            log_bytes={},
            bytes_sent_total=0,
            seconds=0.0,
            # A server that goes on from its last checkpoint asks for rounds again.
            keep=experiment.config.runtime.checkpoint_every + 2,
        )
        measures = {name: float(values[0]) for name, values in stats.items()}
        return theta, measures | {"remembered": float(found)}

    def evaluate(self, round_: int, row: Params) -> Part:
        """Its part of f, of its gradient at `row` (1, ...), and its held-out pairs under it."""
        evaluator = self.experiment.evaluator
        held_out = evaluator.score(row, evaluator.held)
        return Part(contributions=evaluator.contributions(row, round_), held_out=held_out)

    def _recall(self, after: int) -> tuple[State, bool]:
        """Its state after that round, and whether that is what it found: without it, it begins with fresh moments."""
        experiment, agents = self.experiment, len(self.experiment.census.sizes)
        kept = checkpoint.load(self.memory, config=experiment.config.hash(), at_most=after) if after else None
        if kept is not None and kept[0].round == after:
            return State.from_tensors(kept[1], 1, like={}), True
        state = State.of({}, shards=agents)
        if experiment.learner.optimizer.state == "keep":
            state.optimizer = optimizers.initial_state(experiment.learner.optimizer, experiment.start, 1)
        return state, after == 0


def share_of(config: ExperimentConfig, site: int | None, data: str | None) -> Share:
    """What a site holds: its own file (`data`), else that agent of the config's own preferences (a simulation).

    Raises `InputError` where neither is given, or there is no such agent.
    """
    if data is not None:
        preferences = config.preferences.model_copy(update={"source": data, "agents": 1, "town": None})
        return read_share(config.model_copy(update={"preferences": preferences}), 0, _nothing)
    if site is None:
        raise InputError("node config: neither data nor partition-id; allowed: data='/path/to/pairs.jsonl'")
    whole = read_share(config, 0, _nothing)
    if site >= len(whole.division.agents):
        raise InputError(
            f"partition-id: {site}, but the config has {len(whole.division.agents)} agents; allowed: as many nodes as agents"
        )
    return whole.part(site, site + 1)


def told(share: Share) -> Told:
    """All that a site says of its pairs."""
    return Census.of(share.pairs, share.division).told()


def own_place(root: Path, run: str, agent: int) -> Path:
    """Where a site keeps what lasts of a run."""
    return root / "flower" / run / f"agent_{agent:04d}"
