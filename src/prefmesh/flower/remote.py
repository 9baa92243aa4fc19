"""A run whose agents live at sites, as its server sees it: rounds and evaluations ask sites, and mix what they answer.

`Rounds` (prefmesh/run.py) drives it as it drives any run: logs, checkpoints, going on, the run directory.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int

from prefmesh.algorithms import optimizers
from prefmesh.algorithms.consensus import consensus_error, mixing_error
from prefmesh.algorithms.gradients import norm_sq
from prefmesh.algorithms.local_rule import STATS
from prefmesh.algorithms.methods import Method
from prefmesh.algorithms.state import State, take
from prefmesh.config import ExperimentConfig
from prefmesh.errors import InputError, PeerLost
from prefmesh.experiment import method_of, policy_of
from prefmesh.flower.site import Part
from prefmesh.measure import Evaluation, HeldOut, summarized
from prefmesh.mesh import Group, factor_pairs
from prefmesh.policies.base import Params, Policy
from prefmesh.preferences.census import Census, HeldOutPairs, Told
from prefmesh.preferences.pairs import Pair

LAST = "sites/last"
"""In `State.memory`: of each agent, the last round whose answer was taken, (agents,)."""


Aggregate = Callable[[Params], Params]
"""From where the answers' updates lead from the server's model, (answers, ...), to one row (1, ...), in place of their mean."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What an agent is asked for: to start from `row` (1, ...), and to go on from what it kept of round `after`."""

    after: int
    row: Params


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Where an agent's local steps led that were asked for in `round`; the measures are `STATS` and whether it remembered."""

    agent: int
    round: int
    row: Params
    measures: dict[str, float]


@runtime_checkable
class Sites(Protocol):
    """Whoever carries messages to sites. What a site may not answer (wrong names, shapes, numbers) is refused there."""

    def train(self, round_: int, orders: dict[int, Order]) -> list[Answer]:
        """Ask these agents; the answers that are there at the deadline, and late ones to earlier rounds."""
        ...

    def evaluate(self, round_: int, row: Params) -> dict[int, Part]:
        """Ask all sites; the parts that are there at the deadline."""
        ...

    def say(self, text: str) -> None:
        """A line for the server's log."""
        ...


def refuse_elsewhere(config: ExperimentConfig, method: Method) -> None:
    """Raise `InputError` for what a server and sites do not do."""
    if not method.one_row:
        raise InputError(
            f"method.name: {config.method.name}, but sites behind a server share one model; allowed: fed_dpo"
        )
    if method.agents_remember:
        raise InputError(
            f"method.name: {config.method.name}, whose agents depend on more than the server's model; allowed: fed_dpo and the like"
        )
    if method.agents_tell:
        raise InputError(
            f"method.name: {config.method.name}, whose server needs sites' losses beside their rows, which are not sent; allowed: fed_dpo "
            "and the like"
        )
    if method.compression:
        raise InputError("method.compression: Flower sends rows as they are; allowed: none")
    if config.policy.lora_mixing == "alternate":
        raise InputError(
            "policy.lora.mixing: alternate, but sites send all factors; allowed under Flower: factors, freeze_a, product"
        )
    if config.policy.lora_mixing == "residual":
        raise InputError(
            "policy.lora.mixing: residual, but whole layers do not travel to sites; allowed under Flower: factors, freeze_a, product"
        )
    if config.policy.lora_ranks is not None:
        raise InputError("policy.lora.ranks: sites train adapters of one rank; allowed under Flower: none")
    if config.runtime.processes > 1:
        raise InputError(f"runtime.processes: {config.runtime.processes}; allowed under Flower: 1")
    if config.evaluation.samples > 0 and hasattr(config.policy, "train"):
        raise InputError(
            f"evaluation.samples: {config.evaluation.samples}, but sites write no texts; allowed under Flower: 0"
        )


@dataclass(frozen=True, kw_only=True)
class RemoteLearner:
    """Rounds at sites. `least`: answers in time that a round needs. `aggregate`: instead of the method's mean."""

    method: Method
    optimizer: optimizers.OptimizerSettings
    sites: Sites
    least: int
    aggregate: Aggregate | None = None
    agents_per_pass: int = 1
    sent: dict[tuple[int, int], Params] = field(default_factory=dict)
    """Where an agent began in a round, for answers that may come late."""

    def begin(self, row: Params) -> State:
        """State before round 1. Moments are at the sites."""
        state = self.method.begin(row)
        state.memory[LAST] = torch.zeros(self.method.agents, dtype=torch.int64)
        return state

    def round(
        self, state: State, round_: int, *, consensus: bool = True, evaluated: bool = True
    ) -> tuple[State, dict[str, float]]:
        """The state after round `round_`, and its measures: of the agents whose answers were taken (`sites`, of these `late`).

        Raises `PeerLost` where fewer than `least` answered in time.
        """
        method, oldest = self.method, round_ - getattr(self.method.settings, "staleness", 0)
        active = method.participants(round_)
        orders = {}
        for agent in active.tolist():
            row = method.start(state, round_, np.array([agent]))
            orders[agent] = Order(after=int(state.memory[LAST][agent]), row=take(row, np.array([0])))
            self.sent[round_, agent] = orders[agent].row
        answers = self.sites.train(round_, orders)
        in_time = [answer for answer in answers if answer.round == round_]
        least = min(self.least, len(active))
        if len(in_time) < least:
            raise PeerLost(
                f"round {round_}: {len(in_time)} of {len(active)} sites answered in time; allowed: at least {least}"
            )
        taken = sorted(
            [*in_time, *self._late(answers, state, round_, oldest)], key=lambda a: (a.agent, a.round)
        )
        agents = np.array([answer.agent for answer in taken])
        end = {name: torch.cat([answer.row[name] for answer in taken]) for name in state.theta}
        measures = {key: float(np.mean([answer.measures[key] for answer in taken])) for key in STATS}
        measures |= {"lr": optimizers.learning_rate(self.optimizer, round_, method.settings.rounds)}
        measures |= {"sites": float(len(taken)), "late": float(len(taken) - len(in_time))}
        for answer in taken:
            state.memory[LAST][answer.agent] = answer.round
            if not answer.measures["remembered"]:
                self.sites.say(
                    f"round {round_}: agent {answer.agent} had lost what it kept, and began with fresh moments"
                )
        for key in [
            key for key in self.sent if key[0] < oldest or key in {(a.round, a.agent) for a in taken}
        ]:
            del self.sent[key]
        if consensus:
            measures["consensus_error_before_mixing"] = consensus_error(end, method.mesh, len(agents))
            measures["consensus_error"] = 0.0
        measures["parameters_finite"] = True  # what is not is refused when it comes
        if self.aggregate is not None:
            # One answer whose update leads from the server's model to what the rule found.
            agents, end = agents[:1], self._aggregated(state, round_, agents, end)
        plain = evaluated and self.aggregate is None and factor_pairs(list(end))
        meant = method.meant(state, round_, agents, end) if plain else None
        state = method.mix(state, round_, agents, end)
        if meant is not None:
            row = {name: tensor[:1] for name, tensor in state.theta.items()}
            measures["lora/mixing_error"] = mixing_error(meant, (torch.ones(1, dtype=torch.float64), row))
        return state, measures

    def _aggregated(self, state: State, round_: int, agents: np.ndarray, end: Params) -> Params:
        assert self.aggregate is not None
        start, server = self.method.start(state, round_, agents), take(state.theta, np.array([0]))
        found = self.aggregate({name: server[name] + end[name] - start[name] for name in end})
        return {name: found[name] - server[name] + start[name][:1] for name in end}

    def _late(self, answers: list[Answer], state: State, round_: int, oldest: int) -> list[Answer]:
        """Late answers that the method's staleness allows, moved to where their agents would have begun now: their *updates* count."""
        found = []
        for answer in answers:
            if answer.round == round_:
                continue
            start = self.sent.get((answer.round, answer.agent))
            if start is None or answer.round < oldest:
                self.sites.say(
                    f"round {round_}: agent {answer.agent} answered round {answer.round} too late; dropped (method.staleness allows "
                    f"{round_ - oldest} rounds)"
                )
                continue
            self.sites.say(
                f"round {round_}: agent {answer.agent}'s update of round {answer.round} is taken now"
            )
            now = self.method.start(state, round_, np.array([answer.agent]))
            row = {name: tensor - start[name] + now[name] for name, tensor in answer.row.items()}
            found.append(replace(answer, row=row))
        return found


@dataclass(frozen=True, kw_only=True)
class RemoteEvaluator:
    """Evaluations at sites. `tested` (agents,): held-out pairs of each."""

    config: ExperimentConfig
    method: Method
    census: Census
    tested: Int[np.ndarray, " agents"]
    sites: Sites

    def evaluate(self, theta: Params, round_: int) -> Evaluation:
        """Of the server's model. Where a site does not answer, of the others: their weights are then made to add up to 1."""
        parts = self.sites.evaluate(round_, take(theta, np.array([0])))
        if not parts:
            raise PeerLost(f"evaluation of round {round_}: no site answered in time; allowed: at least 1")
        for agent in sorted(set(range(self.method.agents)) - set(parts)):
            self.sites.say(f"evaluation of round {round_}: agent {agent} did not answer, and is left out")
        share = float(self.method.population.weights[list(parts)].sum())
        answered = [parts[agent] for agent in sorted(parts)]
        sums = []
        for k in range(len(answered[0].contributions)):
            losses, gradients = zip(*(part.contributions[k] for part in answered), strict=True)
            gradient = {
                name: torch.stack([g[name] for g in gradients]).sum(0) / share for name in gradients[0]
            }
            sums.append((sum(losses) / share, gradient))
        norm, loss = norm_sq(sums)
        held, by = self.census.held_out, np.repeat(np.arange(self.method.agents), self.tested)
        there = np.isin(by, sorted(parts))
        names = ("row", "agent", "user", "prompt")
        census = replace(
            self.census, held_out=HeldOutPairs(**{name: getattr(held, name)[there] for name in names})
        )
        columns = {
            name: np.concatenate([getattr(part.held_out, name) for part in answered])
            for name in ("margin", "accuracy", "loss")
        }
        found = HeldOut(rows=census.held_out.row, **columns)
        beta, one_policy = self.config.objective.beta, self.method.one_policy
        return summarized(census, found, found, loss=loss, norm=norm, beta=beta, one_policy=one_policy)

    def mean(self, theta: Params) -> Params:
        """The server's model (1, ...)."""
        return take(theta, np.array([0]))

    def differ(self, theta: Params) -> bool:
        """Never: sites hold the server's."""
        return False

    @property
    def held(self) -> Int[np.ndarray, " pairs"]:
        """Held-out rows here: none."""
        return np.arange(0)


@dataclass(frozen=True, kw_only=True)
class RemoteExperiment:
    """The parts of a run as its server has them: no pairs, a policy to begin with and to save. See `prefmesh.run.Parts`."""

    config: ExperimentConfig
    census: Census
    policy: Policy
    method: Method
    learner: RemoteLearner
    evaluator: RemoteEvaluator
    start: Params
    data_bytes: int
    pairs: list[Pair] = field(default_factory=list)
    report: Any = None
    town: Any = None

    @classmethod
    def of(
        cls,
        config: ExperimentConfig,
        told: list[Told],
        data_bytes: int,
        sites: Sites,
        least: int,
        aggregate: Aggregate | None = None,
    ) -> "RemoteExperiment":
        """`told`: what each agent's site said of its pairs, in the order of the agents."""
        census = Census.of_sites(told)
        if len(census.sizes) != len(told):
            raise InputError(f"{len(told)} sites told of {len(census.sizes)} agents; allowed: one each")
        method = method_of(config, census, None, Group())
        refuse_elsewhere(config, method)
        if aggregate is not None and config.policy.lora_mixing == "product":
            raise InputError(
                "policy.lora.mixing: product; allowed with another aggregation than the mean: factors, freeze_a"
            )
        if aggregate is not None and config.objective.weights != "uniform":
            raise InputError(
                "objective.weights: by_size; allowed with another aggregation than the mean: uniform"
            )
        policy = policy_of(config)
        return cls(
            config=config,
            census=census,
            policy=policy,
            method=method,
            learner=RemoteLearner(
                method=method, optimizer=config.optimizer, sites=sites, least=least, aggregate=aggregate
            ),
            evaluator=RemoteEvaluator(
                config=config,
                method=method,
                census=census,
                tested=np.array([site.counts[4] for site in told]),
                sites=sites,
            ),
            start=policy.initial(config.seed),
            data_bytes=data_bytes,
        )
