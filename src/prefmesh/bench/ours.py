"""prefmesh's own rounds, as contestants."""

from dataclasses import replace

import numpy as np

from prefmesh.algorithms.local_rule import local_steps
from prefmesh.algorithms.optimizers import initial_state, learning_rate
from prefmesh.algorithms.rounds import Learner
from prefmesh.algorithms.state import copies
from prefmesh.bench.contest import Contestant, RoundByRound, Timed
from prefmesh.experiment import Experiment
from prefmesh.threads import threads


class Rounds(RoundByRound):
    """All agents, as a run does it: local steps and mixing. Processes that share them begin a turn together, and end each round together."""

    def __init__(self, experiment: Experiment, *, agents_per_pass: int | None = None):
        learner = experiment.learner
        self.device = learner.problem.policy.device
        self.learner = replace(learner, agents_per_pass=agents_per_pass or learner.agents_per_pass)
        self.state = self.learner.begin(experiment.start)
        self.group = learner.method.mesh.group

    def rounds(self, first: int, count: int) -> Timed:
        """Go on with rounds `first` and so on, once all processes are there: they do nothing while process 0 does a rival's."""
        self.group.total(np.zeros(1))
        return super().rounds(first, count)

    def round(self, round_: int) -> float:
        """Go on with a round."""
        method = self.learner.method
        # As a run does it, several processes do not ask each other how far they are apart.
        self.state, measures = self.learner.round(self.state, round_, consensus=self.group.size == 1)
        own = len(method.mesh.here(method.participants(round_)))
        loss, count = self.group.total(np.array([own * measures["loss"], own]))
        return float(loss / count)


class AllThreads:
    """A contestant of one process, with the threads of all. Elsewhere (`contestant` none) its rounds are no work."""

    def __init__(self, contestant: Contestant | None, threads: int):
        self.contestant, self.threads = contestant, threads

    def rounds(self, first: int, count: int) -> Timed:
        """The contestant's."""
        if self.contestant is None:
            return Timed(seconds=[0.0] * count, losses=[0.0] * count)
        with threads(self.threads):
            return self.contestant.rounds(first, count)


class FirstAgent(RoundByRound):
    """The first agent's local steps, without mixing: what a trainer that knows one data set does."""

    def __init__(self, experiment: Experiment):
        self.learner = experiment.learner
        self.device = self.learner.problem.policy.device
        self.theta = copies(experiment.start, 1)
        self.moments = initial_state(self.learner.optimizer, experiment.start, 1)

    def round(self, round_: int) -> float:
        """Go on with a round's steps."""
        learner = self.learner
        rows, weights = batches(learner, round_, np.arange(1))
        lr = learning_rate(learner.optimizer, round_, learner.method.settings.rounds)
        found = local_steps(learner.problem, learner.optimizer, lr, self.theta, self.moments, rows, weights)
        return float(found.stats["loss"][0])


def batches(learner: Learner, round_: int, agents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and weights (agents, steps, batch) of a round where everybody has taken part in every one before."""
    steps = learner.method.settings.local_steps
    drawn = np.full(learner.method.population.shards, (round_ - 1) * steps)
    return learner.batches(round_, agents, drawn, steps)
