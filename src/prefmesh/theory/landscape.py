"""The landscape of an experiment: the theory's constants over the region that its own run visits (docs/theory/landscape.md)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from prefmesh.algorithms.consensus import consensus_error
from prefmesh.algorithms.gradients import Problem
from prefmesh.algorithms.methods import METHODS
from prefmesh.algorithms.rounds import Learner
from prefmesh.algorithms.sampling import Sampler
from prefmesh.algorithms.similarity import Groups, Matrix, attenuation, cosines, find_groups
from prefmesh.algorithms.state import State
from prefmesh.config import ExperimentConfig
from prefmesh.errors import Diverged
from prefmesh.experiment import Experiment, refuse_residuals
from prefmesh.policies.base import Params, average
from prefmesh.policies.log_linear import LogLinearPolicy
from prefmesh.randomness import generator
from prefmesh.run import Listener, Silent
from prefmesh.theory.constants import GradientMoments, gradient_moments, price_of_consensus
from prefmesh.theory.curvature import Ends, hessian_ends
from prefmesh.theory.problem import LogLinearProblem
from prefmesh.theory.slices import Slices, take_slices

PAIRS = 2048
"""With a language model, so many pairs of all agents together are measured at the start, and 16 to 256 of each agent."""
CURVATURE_PAIRS = 64
"""Of all agents together, for the Hessian of f; half as many of one agent for its own. Second derivatives cost most."""
CURVATURE_AGENTS = 8
"""Agents whose own Hessian is looked at."""
POINTS = 3
"""Of the region: the start, and evenly spaced rounds up to the last."""
TOGETHER = 1e-6
"""Agents whose consensus error is at most this share of the squared way that they have come are at one place."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How closely to look. None for `pairs` (of each agent) or `curvature_pairs` (of all together): all of them.

    Gradients are taken over `pairs` at the start, where agents are compared, and over half as many at later points.
    `tolerance`, relative to the larger end of the spectrum, and `products` with the Hessian at most: of a Lanczos run;
    those of single agents begin close to f's and take `agent_products`.
    """

    pairs: int | None
    curvature_pairs: int | None
    tolerance: float
    products: int
    agent_products: int

    @classmethod
    def of(cls, problem: Problem, agents: int, pairs: int | None) -> "Effort":
        """Everything, where the policy is log-linear and that costs nothing; else what takes a small model a minute."""
        if isinstance(problem.policy, LogLinearPolicy):
            return cls(pairs=pairs, curvature_pairs=None, tolerance=1e-6, products=200, agent_products=200)
        return cls(
            pairs=pairs or int(np.clip(PAIRS // agents, 16, 256)),
            curvature_pairs=CURVATURE_PAIRS,
            tolerance=0.02,
            products=20,
            agent_products=6,
        )


@dataclass(frozen=True, kw_only=True)
class Point:
    """What was measured at the average model after a round. Curvature is not measured everywhere."""

    round: int
    moments: GradientMoments
    hessian: Ends | None = None
    agent_hessians: dict[int, Ends] | None = None


@dataclass(frozen=True, kw_only=True)
class Landscape:
    """Everything that `prefmesh landscape` shows. `batch_size` none: full. `rounds` of the run were made."""

    config: ExperimentConfig
    names: tuple[str, ...]
    parameters: int
    rounds: int
    batch_size: int | None
    effort: Effort
    curvature_pairs: tuple[int, int]
    points: list[Point]
    groups: Groups
    exact: LogLinearProblem | None
    prices: Float[np.ndarray, " agents"] | None
    why_no_prices: str
    slices: Slices

    @property
    def smoothness(self) -> float:
        """Lam as seen: the largest |eigenvalue| of the Hessian of f or of an f_i, over the region."""
        return max(ends.size for ends in self._ends())

    @cached_property
    def price_by_chance(self) -> Float[np.ndarray, " agents"] | None:
        """What the prices would be if nobody disagreed: a policy of one's own also fits the accidents of its pairs."""
        return None if self.prices is None or self.exact is None else self.exact.price_by_chance()

    @property
    def lowest_eigenvalue(self) -> float:
        """The lowest end of any Hessian seen: below 0, the loss is not convex."""
        return min(ends.smallest for ends in self._ends())

    @property
    def gradient_noise(self) -> float:
        """sigma^2 of the config's minibatches, the largest over agents and the region."""
        return max(point.moments.gradient_noise(self.batch_size) for point in self.points)

    @property
    def heterogeneity(self) -> float:
        """zeta^2, the largest over the region."""
        return max(point.moments.heterogeneity() for point in self.points)

    @property
    def cosine(self) -> Matrix:
        """Of agents' gradients at the start, chance taken out."""
        moments = self.points[0].moments
        return cosines(moments.inner, moments.chance)

    @property
    def attenuation(self) -> Matrix:
        """What cosines of 1 would look like there, before chance is taken out."""
        moments = self.points[0].moments
        return attenuation(moments.inner, moments.chance)

    def _ends(self) -> Iterator[Ends]:
        for point in self.points:
            if point.hessian is not None:
                yield point.hessian
            yield from (point.agent_hessians or {}).values()


def measure(
    experiment: Experiment, *, rounds: int, pairs: int | None = None, listener: Listener | None = None
) -> Landscape:
    """Run the first `rounds` rounds of the experiment and measure at `POINTS` of them. Writes nothing.

    `pairs` of each agent to take gradients over; none: `Effort.of`. Raises `Diverged` where the run does.
    """
    refuse_residuals(experiment.config, "landscape")
    listener = listener or Silent()
    problem, config = experiment.learner.problem, experiment.config
    weights = experiment.method.population.weights
    shards = [agent.train for agent in experiment.division.agents]
    effort = Effort.of(problem, len(shards), pairs)
    stops = sorted({round(share * rounds) for share in np.linspace(0, 1, POINTS)})
    curved = (stops[0], stops[-1])
    sampled = _sample(shards, effort.curvature_pairs, config.seed)
    points: list[Point] = []
    models: dict[int, Params] = {}
    state = experiment.learner.begin(experiment.start)
    for round_ in range(rounds + 1):
        if round_ > 0:
            state = _advance(experiment.learner, state, round_)
            listener.round(round_, rounds, {})
        if round_ not in stops:
            continue
        models[round_] = {name: tensor.clone() for name, tensor in average(state.theta).items()}
        look = effort.pairs if effort.pairs is None or round_ == 0 else max(2, effort.pairs // 2)
        moments = gradient_moments(
            problem, models[round_], shards, weights, pairs=look, random=generator(config.seed, "landscape", round_),
            step=_teller(listener, f"gradients after round {round_}", len(shards)),
        )  # fmt: skip
        hessian = None
        if round_ in curved:
            listener.stage(f"curvature after round {round_}")
            hessian = _global_ends(problem, models[round_], sampled, weights, effort, config.seed)
        points.append(Point(round=round_, moments=moments, hessian=hessian))
    steepest = int(np.argmax([-1.0 if point.hessian is None else point.hessian.size for point in points]))
    listener.stage("curvature of single agents")
    points[steepest] = _with_agent_hessians(
        points[steepest], problem, models[points[steepest].round], shards, effort, config.seed
    )
    listener.stage("loss slices")
    agents_models = _agent_models(experiment, state, rounds)
    slices = take_slices(problem, agents_models, shards, weights, seed=config.seed)
    exact, prices, why_not = price_of_consensus(problem, shards, weights)
    batch, first = config.optimizer.batch_size, points[0].moments
    return Landscape(
        config=config,
        names=tuple(agent.name for agent in experiment.division.agents),
        parameters=sum(tensor.numel() for tensor in experiment.start.values()),
        rounds=rounds,
        batch_size=None if batch == "full" else batch,
        effort=effort,
        curvature_pairs=(sum(map(len, sampled)), _agent_share(effort, shards)),
        points=points,
        groups=find_groups(first.inner, first.chance, first.ghosts, generator(config.seed, "groups")),
        exact=exact,
        prices=prices,
        why_no_prices=why_not,
        slices=slices,
    )


def _teller(listener: Listener, what: str, agents: int) -> Callable[[int], None]:
    """Says how many agents are done."""
    return lambda agent: listener.stage(f"{what}: {agent + 1} of {agents} agents")


def _advance(learner: Learner, state: State, round_: int) -> State:
    state, found = learner.round(state, round_)
    if not (np.isfinite(found["loss"]) and found["parameters_finite"]):
        raise Diverged(
            f"landscape: the run stopped being finite in round {round_}; try a smaller optimizer.lr, or fewer --rounds"
        )
    return state


def _sample(
    shards: Sequence[Int[np.ndarray, "_"]], pairs: int | None, seed: int
) -> list[Int[np.ndarray, "_"]]:
    """Some pairs of every agent (at least one), equally many where they have them; the same at every point."""
    if pairs is None:
        return list(shards)
    each = max(1, pairs // len(shards))
    random = generator(seed, "curvature pairs")
    return [random.choice(shard, min(each, len(shard)), replace=False) for shard in shards]


def _global_ends(
    problem: Problem,
    row: Params,
    sampled: list[Int[np.ndarray, "_"]],
    weights: Float[np.ndarray, " agents"],
    effort: Effort,
    seed: int,
) -> Ends:
    share = np.concatenate(
        [np.full(len(rows), w / len(rows)) for rows, w in zip(sampled, weights, strict=True)]
    )
    return hessian_ends(
        problem,
        row,
        np.concatenate(sampled),
        share,
        random=generator(seed, "lanczos"),
        tolerance=effort.tolerance,
        most_products=effort.products,
    )


def _agent_share(effort: Effort, shards: Sequence[Int[np.ndarray, "_"]]) -> int:
    """How many of its pairs an agent's own Hessian is taken over, at most."""
    longest = max(map(len, shards))
    return longest if effort.curvature_pairs is None else min(effort.curvature_pairs // 2, longest)


def _with_agent_hessians(
    point: Point,
    problem: Problem,
    row: Params,
    shards: Sequence[Int[np.ndarray, "_"]],
    effort: Effort,
    seed: int,
) -> Point:
    """Of the agents whose pairs pull hardest: a large grad h makes a pair's noise and its curvature large."""
    assert point.hessian is not None
    noisiest = np.argsort(-point.moments.gradient_noises(1), kind="stable")
    if effort.curvature_pairs is not None:
        noisiest = noisiest[:CURVATURE_AGENTS]
    most = _agent_share(effort, shards)
    found = {}
    for i in noisiest.tolist():
        random = generator(seed, "agent curvature", i)
        rows = shards[i] if len(shards[i]) <= most else random.choice(shards[i], most, replace=False)
        found[i] = hessian_ends(
            problem,
            row,
            rows,
            np.full(len(rows), 1 / len(rows)),
            random=random,
            tolerance=effort.tolerance,
            most_products=effort.agent_products,
            near=point.hessian.vector,
        )
    return Point(round=point.round, moments=point.moments, hessian=point.hessian, agent_hessians=found)


def _agent_models(experiment: Experiment, state: State, rounds: int) -> Params:
    """Every agent's own model (agents, ...): its row of Theta, or, where all are at one place, where its local steps lead from there."""
    mean = average(state.theta)
    shards = experiment.method.population.shards
    moved = sum(float((mean[name] - start).square().sum()) for name, start in experiment.start.items())
    if len(next(iter(state.theta.values()))) == shards and consensus_error(state.theta) > TOGETHER * moved:
        return state.theta
    alone = METHODS["local_only"]
    given = experiment.config.method
    settings = alone.Settings(name="local_only", rounds=given.rounds, local_steps=given.local_steps)
    old = experiment.learner
    learner = Learner(
        problem=old.problem,
        method=alone(settings, experiment.method.population),
        optimizer=old.optimizer,
        sampler=Sampler(
            [agent.train for agent in experiment.division.agents], old.optimizer, experiment.config.seed
        ),
        agents_per_pass=old.agents_per_pass,
    )
    return _advance(learner, learner.begin(mean), max(1, rounds)).theta
