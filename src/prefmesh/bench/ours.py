"""prefmesh's own rounds, timed."""

import time
from dataclasses import dataclass, replace

import numpy as np

from prefmesh.algorithms.local_rule import local_steps
from prefmesh.algorithms.optimizers import initial_state, learning_rate
from prefmesh.algorithms.rounds import Learner
from prefmesh.algorithms.state import copies
from prefmesh.bench.machine import synchronize
from prefmesh.experiment import Experiment


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """Of each round: seconds and the mean loss of its steps."""

    seconds: list[float]
    losses: list[float]


class Rounds:
    """All agents, as a run does it: local steps and mixing."""

    def __init__(self, experiment: Experiment, *, agents_per_pass: int | None = None):
        learner = experiment.learner
        self.learner = replace(learner, agents_per_pass=agents_per_pass or learner.agents_per_pass)
        self.state = self.learner.begin(experiment.start)

    def rounds(self, first: int, count: int) -> Timed:
        """Go on with rounds `first` and so on."""
        seconds, losses = [], []
        for round_ in range(first, first + count):
            started = time.perf_counter()
            self.state, measures = self.learner.round(self.state, round_)
            synchronize(self.learner.problem.policy.device)
            seconds.append(time.perf_counter() - started)
            losses.append(measures["loss"])
        return Timed(seconds=seconds, losses=losses)


class FirstAgent:
    """The first agent's local steps, without mixing: what a trainer that knows one data set does."""

    def __init__(self, experiment: Experiment):
        self.learner = experiment.learner
        self.theta = copies(experiment.start, 1)
        self.moments = initial_state(self.learner.optimizer, experiment.start, 1)

    def rounds(self, first: int, count: int) -> Timed:
        """Go on with the steps of rounds `first` and so on."""
        learner, seconds, losses = self.learner, [], []
        for round_ in range(first, first + count):
            started = time.perf_counter()
            rows, weights = batches(learner, round_, np.arange(1))
            lr = learning_rate(learner.optimizer, round_, learner.method.settings.rounds)
            self.theta, self.moments, stats = local_steps(
                learner.problem, learner.optimizer, lr, self.theta, self.moments, rows, weights
            )
            synchronize(learner.problem.policy.device)
            seconds.append(time.perf_counter() - started)
            losses.append(float(stats["loss"][0]))
        return Timed(seconds=seconds, losses=losses)


def batches(learner: Learner, round_: int, agents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and weights (agents, steps, batch) of a round where everybody has taken part in every one before."""
    steps = learner.method.settings.local_steps
    drawn = np.full(learner.method.population.shards, (round_ - 1) * steps)
    return learner.batches(round_, agents, drawn, steps)
