"""Planner: which method, E, S, step size, batch and graph reach a target loss in the least time (docs/theory, section 7).

A forecast of rounds times the clock's seconds per round ranks all settings; on a log-linear problem the best of them are then
simulated, by the training algorithm itself, and the quickest simulated one is the plan.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Protocol, runtime_checkable

import numpy as np

from prefmesh.algorithms.methods.dec_dpo import DecDPO
from prefmesh.errors import InputError
from prefmesh.theory.clock import Devices, Links, federated_seconds, gossip_seconds, round_ends
from prefmesh.theory.forecast import Pooled, Setting
from prefmesh.theory.problem import LogLinearProblem
from prefmesh.theory.simulate import Ensemble, Member

GRAPHS = ("ring", "torus", "hypercube", "star", "complete")
"""Those that a plan may propose, where the number of agents allows."""
SEEDS = 8
"""Runs that a simulated loss is the mean of."""
REFINED = 24
"""Settings that are simulated before the plan is chosen."""
NEAR = 1.5
"""A simulation is given up where its clock has passed the quickest so far by this factor."""
RUN_OFF = ((20, 64, 1.0), (6, 256, 2.0))
"""Rounds of the run-off: so many settings, with so many fresh seeds each, whose mean loss has to be below the target by so many of
its standard errors: a setting that barely touches the target would be no plan."""
FORESEEN = 4
"""The first of the forecast, which the run-off looks at too."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a round costs. `devices`: seconds of a step on `pairs_per_step` pairs; other batches in proportion."""

    devices: Devices
    links: Links
    model_bytes: int
    pairs_per_step: int

    def for_batch(self, pairs: np.ndarray) -> Devices:
        """Devices whose steps take `pairs` (N,) pairs."""
        scale = pairs / self.pairs_per_step
        return replace(self.devices, seconds_per_step=self.devices.seconds_per_step * scale)


@dataclass(frozen=True, kw_only=True)
class Priced:
    """A setting with what is foreseen of it; `None`: the target is not reached. Bytes are of all agents together."""

    setting: Setting
    rounds: int | None
    round_seconds: float
    round_bytes: float | int

    @property
    def seconds(self) -> float:
        """Until the target."""
        return np.inf if self.rounds is None else self.rounds * self.round_seconds


@runtime_checkable
class Foresees(Protocol):
    """Anything that says how many rounds a setting needs."""

    def rounds(self, setting: Setting) -> int | None: ...


@dataclass(frozen=True, kw_only=True)
class Space:
    """The settings that a plan chooses from: all combinations, coarse to fine by factors of two."""

    agents: int
    lrs: tuple[float, ...]
    local_steps: tuple[int, ...] = (1, 2, 4, 8, 16)
    batch_sizes: tuple[int | None, ...] = (4, 16, 64)
    graphs: tuple[str, ...] = GRAPHS

    @property
    def participations(self) -> tuple[int | None, ...]:
        """A quarter, a half and all of the agents."""
        few = sorted({s for s in (self.agents // 4, self.agents // 2) if 0 < s < self.agents})
        return (*few, None)

    def places(self) -> Iterator[tuple[int | None, str | None]]:
        """(S, None) for a server, (None, graph) for the graphs that this number of agents has."""
        yield from ((s, None) for s in self.participations)
        for graph in self.graphs:
            try:
                Setting(method="dec_dpo", local_steps=1, lr=1.0, graph=graph).mixing(self.agents)
            except InputError:
                continue
            yield None, graph

    def all(self) -> list[Setting]:
        """Every combination."""
        places = list(self.places())
        return [
            Setting(
                method="fed_dpo" if graph is None else "dec_dpo",
                local_steps=e,
                lr=lr,
                batch_size=batch,
                participation=s,
                graph=graph,
            )
            for e in self.local_steps
            for lr in self.lrs
            for batch in self.batch_sizes
            for s, graph in places
        ]

    def neighbours(self, setting: Setting) -> list[Setting]:
        """One step away in E, in lr or in the batch, or any other S or graph, all else equal."""

        def beside(values: Sequence, here) -> list:  # type: ignore[no-untyped-def, type-arg]
            at = values.index(here)
            return [values[k] for k in (at - 1, at + 1) if 0 <= k < len(values)]

        found = [replace(setting, local_steps=e) for e in beside(self.local_steps, setting.local_steps)]
        found += [replace(setting, lr=lr) for lr in beside(self.lrs, setting.lr)]
        found += [replace(setting, batch_size=b) for b in beside(self.batch_sizes, setting.batch_size)]
        # A step size goes with the number of steps that it is taken.
        for e in beside(self.local_steps, setting.local_steps):
            found += [replace(setting, local_steps=e, lr=lr) for lr in beside(self.lrs, setting.lr)]
        for s, graph in self.places():
            method = "fed_dpo" if graph is None else "dec_dpo"
            found.append(replace(setting, method=method, participation=s, graph=graph))
        return [other for other in dict.fromkeys(found) if other != setting]


def price(setting: Setting, forecast: Foresees, costs: Costs, shards: np.ndarray, seed: int = 0) -> Priced:
    """Rounds, seconds and bytes of a setting; `shards` (N,): how many pairs each agent has, which full batches take."""
    pairs = np.full(len(shards), setting.batch_size) if setting.batch_size else shards
    devices = costs.for_batch(pairs)
    method = setting.build(len(shards), rounds=200, seed=seed)
    if isinstance(method, DecDPO) and devices.distribution == "constant":
        seconds = gossip_seconds(method, devices, costs.links, costs.model_bytes)[0]
    elif isinstance(method, DecDPO):
        seconds = float(round_ends(method, devices, costs.links, costs.model_bytes, seed)[-1] / 200)
    else:
        seconds = federated_seconds(method, devices, costs.links, costs.model_bytes)  # type: ignore[arg-type]
    return Priced(
        setting=setting,
        rounds=forecast.rounds(setting),
        round_seconds=seconds,
        round_bytes=method.bytes_sent(2, model_bytes=costs.model_bytes, data_bytes=0),
    )


def ranked(space: Space, forecast: Foresees, costs: Costs, shards: np.ndarray, seed: int = 0) -> list[Priced]:
    """All settings that are foreseen to reach the target, quickest first. Rounds as short as the clock says are priced once."""
    clocked: dict[tuple, Priced] = {}  # type: ignore[type-arg]
    found = []
    for setting in space.all():
        key = (setting.method, setting.local_steps, setting.batch_size, setting.participation, setting.graph)
        if key not in clocked:
            clocked[key] = price(setting, forecast, costs, shards, seed)
        rounds = forecast.rounds(setting)
        if rounds is not None:
            found.append(replace(clocked[key], setting=setting, rounds=rounds))
    return sorted(found, key=lambda priced: priced.seconds)


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """Rounds and the clock's seconds at which the mean loss over seeds first was at most the target; None: it never was."""

    setting: Setting
    rounds: int | None
    seconds: float
    watched: float
    """Seconds of the clock that were simulated."""


class Simulator:
    """Seconds to the target, by the training algorithm and the clock. What was simulated is kept.

    `sure`: by how many of its standard errors the mean loss over seeds has to be below the target.
    """

    def __init__(
        self, problem: LogLinearProblem, target: float, costs: Costs, *, seeds: int = SEEDS, seed: int = 0,
        sure: float = 0.0,
    ):  # fmt: skip
        self.problem, self.target, self.costs = problem, target, costs
        self.seeds, self.seed, self.sure = seeds, seed, sure
        self.shards = np.array([len(shard) for shard in problem.delta_features])
        self._pooled = Pooled(problem)
        self.found: dict[Setting, Simulated] = {}

    def run(self, settings: Sequence[Setting], limit: float, most_rounds: int = 4000) -> list[Simulated]:
        """Each setting until it reaches the target, or until `limit` seconds of its clock or `most_rounds` are over."""

        def together(setting: Setting) -> tuple[float, int, int]:
            return setting.lr, setting.local_steps, setting.batch_size or 0

        def known(setting: Setting) -> bool:
            kept = self.found.get(setting)
            return kept is not None and (kept.rounds is not None or kept.watched >= limit)

        new = sorted((s for s in dict.fromkeys(settings) if not known(s)), key=together)
        for _, group in groupby(new, key=together):
            self._side_by_side(list(group), limit, most_rounds)
        return [self.found[setting] for setting in settings]

    def with_other_seeds(self, seeds: int, sure: float) -> "Simulator":
        """A fresh one that shares no seed with this."""
        return Simulator(
            self.problem, self.target, self.costs, seeds=seeds, seed=self.seed + self.seeds, sure=sure
        )

    def _side_by_side(self, settings: list[Setting], limit: float, most_rounds: int) -> None:
        """Settings of one lr, E and batch, each with all seeds, in one stacked pass until the last has ended."""
        n, first = self.problem.num_agents, settings[0]
        ends = [self._ends(setting, limit, most_rounds) for setting in settings]
        last = max(len(end) - 1 for end in ends)
        members = [self._member(setting, k) for setting in settings for k in range(self.seeds)]
        ensemble = Ensemble(
            members,
            first.lr,
            rounds=last,
            local_steps=first.local_steps,
            batch_size=first.batch_size,
            seed=self.seed,
        )
        open_ = dict(enumerate(settings))
        for r, theta in enumerate(ensemble.run()):
            losses = self._pooled.losses(theta.reshape(len(members), n, -1).mean(1))
            losses = losses.reshape(len(settings), self.seeds)
            sure = losses.mean(1) + self.sure * losses.std(1) / self.seeds**0.5
            for k, loss in enumerate(sure):
                if k in open_ and (loss <= self.target or r == len(ends[k]) - 1):
                    reached, now = bool(loss <= self.target), float(ends[k][r])
                    self.found[open_.pop(k)] = Simulated(
                        setting=settings[k],
                        rounds=r if reached else None,
                        seconds=now if reached else np.inf,
                        watched=now,
                    )
            if not open_:
                return

    def _ends(self, setting: Setting, limit: float, most_rounds: int) -> np.ndarray:
        """The clock's seconds from the start to the first round that ends at `limit` or later."""
        pairs = np.full(len(self.shards), setting.batch_size) if setting.batch_size else self.shards
        devices, rounds = self.costs.for_batch(pairs), 32
        while True:
            method = setting.build(self.problem.num_agents, rounds, self.seed)
            ends = round_ends(method, devices, self.costs.links, self.costs.model_bytes, self.seed)
            if ends[-1] >= limit or rounds == most_rounds:
                return ends[: int(np.searchsorted(ends, limit)) + 1]
            rounds = min(2 * rounds, most_rounds)

    def _member(self, setting: Setting, k: int) -> Member:
        seed = self.seed + k
        if setting.method == "fed_dpo":
            return Member(self.problem, "fed_dpo", {"participation": setting.participation}, seed=seed)
        matrix = setting.mixing(self.problem.num_agents, self.seed).matrix
        return Member(self.problem, "dec_dpo", mixing=(matrix,), seed=seed)


def refine(
    priced: Sequence[Priced], space: Space, simulator: Simulator, say: Callable[[str], None] = lambda _: None
) -> list[Simulated]:
    """Simulates the quickest foreseen settings, then the neighbours of the quickest simulated one until none is quicker.

    A setting is given up once its clock has passed the quickest so far by a half. Those that are left, and the first of the
    forecast, run off (`RUN_OFF`), each time fewer with more seeds: the least of many noisy figures is one that had luck. What came
    out of that, quickest first.
    """
    shortlist = [p.setting for p in priced[:REFINED]]
    foreseen = {p.setting: p.seconds for p in priced}
    found: dict[Setting, Simulated] = {}
    best, limit = np.inf, 3 * priced[0].seconds
    again: list[Simulated] = []

    def simulate(settings: Sequence[Setting]) -> None:
        nonlocal best
        for outcome in simulator.run(settings, min(limit, NEAR * best)):
            found[outcome.setting] = outcome
            best = min(best, outcome.seconds)

    say(f"simulating the {len(shortlist)} quickest")
    for start in range(0, len(shortlist), 8):  # those that have ended bound the rest
        simulate(shortlist[start : start + 8])
    if not np.isfinite(best):
        return []
    while True:
        before = best
        leader = min(found.values(), key=lambda outcome: outcome.seconds).setting
        say(f"simulating the neighbours of {leader}")
        around = [other for other in space.neighbours(leader) if other not in found]
        simulate([other for other in around if foreseen.get(other, np.inf) < 2 * best])
        if best >= before:
            break
    last = [outcome.setting for outcome in _quickest(found.values())]
    entered, judge = [*shortlist[:FORESEEN], *last], simulator
    for number, (kept, seeds, sure) in enumerate(RUN_OFF, start=1):
        say(f"run-off {number} of {len(RUN_OFF)}, {seeds} seeds")
        entered, judge = list(dict.fromkeys(entered))[:kept], judge.with_other_seeds(seeds, sure)
        again = judge.run(entered, 3 * best)
        if not _quickest(again):  # nothing is sure: the mean has to do
            judge = judge.with_other_seeds(seeds, 0.0)
            again = judge.run(entered, 3 * best)
        entered = [outcome.setting for outcome in _quickest(again)] or entered
    return sorted(again, key=lambda outcome: outcome.seconds)


def _quickest(outcomes: Iterable[Simulated]) -> list[Simulated]:
    """Those that reached the target, quickest first."""
    reached = [outcome for outcome in outcomes if outcome.rounds is not None]
    return sorted(reached, key=lambda outcome: outcome.seconds)


def step_sizes(largest_curvature: float, coarsest: float = 1.5, count: int = 6) -> tuple[float, ...]:
    """coarsest / L and down from it by factors of two, ascending."""
    return tuple(coarsest / largest_curvature / 2.0**k for k in reversed(range(count)))
