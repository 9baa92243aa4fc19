"""A plan for an experiment: from its config and the costs of its machines to settings, with reasons and a config to run."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import ceil, isfinite
from typing import Any

import numpy as np

from prefmesh.config import ExperimentConfig
from prefmesh.errors import InputError
from prefmesh.experiment import Experiment, prepare, refuse_residuals
from prefmesh.policies.base import row_bytes
from prefmesh.policies.log_linear import FeaturePairs
from prefmesh.theory import plan_constants
from prefmesh.theory.clock import Devices, Links
from prefmesh.theory.constants import NotLogLinear, as_log_linear
from prefmesh.theory.forecast import Forecast, Setting
from prefmesh.theory.plan_constants import Constants, Extrapolation, Guaranteed, guaranteed
from prefmesh.theory.planner import (
    SEEDS,
    Costs,
    Foresees,
    Priced,
    Simulator,
    Space,
    ranked,
    refine,
    step_sizes,
)
from prefmesh.theory.problem import LogLinearProblem

Say = Callable[[str], None]

SPARE = 1.25
"""The config runs so many times the planned rounds: single runs scatter about the expected one."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Seconds of the plan and of its neighbours, simulated with seeds that the plan has not seen; None: target not reached."""

    plan: float | None
    neighbours: list[tuple[Setting, float | None]]
    excess: float | None
    """How much longer the plan takes than the best of them, as a part of the best."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is proposed and why. `source`: where rounds come from (`simulated` or `extrapolated`)."""

    target: float
    setting: Setting
    rounds: int
    seconds: float
    round_seconds: float
    bytes: float | int
    source: str
    forecast_rounds: int | None
    constants: Constants
    guaranteed: Guaranteed
    reasons: list[str]
    alternatives: list[tuple[Setting, float]]
    check: Checked | None
    config: ExperimentConfig

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "target_loss": self.target,
            "setting": asdict(self.setting),
            "rounds": self.rounds,
            "seconds": self.seconds,
            "bytes": self.bytes,
            "seconds_per_round": self.round_seconds,
            "source": self.source,
            "forecast_rounds": self.forecast_rounds,
            "constants": asdict(self.constants),
            "guaranteed": asdict(self.guaranteed),
            "reasons": self.reasons,
            "alternatives": [
                {"setting": asdict(setting), "seconds": seconds} for setting, seconds in self.alternatives
            ],
            "check": None
            if self.check is None
            else {
                "plan_seconds": self.check.plan,
                "excess": self.check.excess,
                "neighbours": [
                    {"setting": asdict(setting), "seconds": seconds}
                    for setting, seconds in self.check.neighbours
                ],
            },
            "config": self.config.plain(),
        }


def log_linear_problem(experiment: Experiment) -> LogLinearProblem | None:
    """The experiment as a log-linear problem, one shard per agent's training pairs; None for other policies.

    Raises `InputError` where the objective is not DPO's own with uniform weights.
    """
    problem = experiment.learner.problem
    if not isinstance(problem.data, FeaturePairs):
        return None
    shards = [agent.train for agent in experiment.division.agents]
    try:
        return as_log_linear(problem, shards, experiment.method.population.weights)
    except NotLogLinear as reason:
        raise InputError(
            f"objective: {reason}; allowed in a plan: sigmoid, no label_smoothing, uniform weights"
        ) from None


def make_plan(
    config: ExperimentConfig,
    target: float,
    devices: Devices,
    links: Links,
    *,
    check: bool = False,
    say: Say = lambda _: None,
) -> Plan:
    """The plan. `devices.seconds_per_step` is the time of a step on a batch of the config's own size.

    Raises `InputError`: a target that is not below the loss at the start, or that nothing reaches.
    """
    refuse_residuals(config, "plan")
    experiment = prepare(config, say)
    shards = np.array([len(agent.train) for agent in experiment.division.agents])
    if len(shards) < 2:
        raise InputError("preferences.agents: found 1; allowed: at least 2, a plan is for agents who share")
    full = config.optimizer.batch_size == "full"
    batch = round(shards.mean()) if config.optimizer.batch_size == "full" else config.optimizer.batch_size
    costs = Costs(
        devices=devices,
        links=links,
        model_bytes=row_bytes(experiment.start),
        pairs_per_step=batch,
    )
    sizes = sorted({max(1, batch // 16), max(1, batch // 4)}) if full else sorted({max(1, batch // 4), batch})
    batches: tuple[int | None, ...] = (*sizes, None if full else 4 * batch)
    try:
        problem = log_linear_problem(experiment)
        say("measuring constants")
        forecast: Foresees
        if problem is not None:
            forecast = Forecast(problem, target)
            middle = (forecast.start + forecast.at_target) / 2
            points = np.array([forecast.start, middle, forecast.at_target])
            constants = plan_constants.of_log_linear(problem, points)
            largest = forecast.largest_curvature
        else:
            constants = plan_constants.measured(experiment)
            forecast, largest = Extrapolation(constants, target, len(shards)), constants.smoothness
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from None
    adaptive = config.optimizer.name == "adamw" and problem is None
    space = Space(agents=len(shards), lrs=step_sizes(largest), batch_sizes=batches)
    say("ranking settings")
    order = ranked(space, forecast, costs, shards, config.seed)
    if not order:
        raise InputError(
            f"target_loss: found {target:.6g}; no setting is foreseen to get there (noise, sampling or drift keep all above it); "
            "allowed: a higher target"
        )
    chosen, rounds, seconds, alternatives = _choose(problem, target, costs, space, order, config.seed, say)
    foreseen = forecast.rounds(chosen.setting)
    checked = None
    if check and problem is not None:
        say("checking neighbours")
        checked = _check(
            Simulator(problem, target, costs, seeds=2 * SEEDS, seed=config.seed + 1000),
            space,
            chosen.setting,
            seconds,
        )
    return Plan(
        target=target,
        setting=chosen.setting,
        rounds=rounds,
        seconds=seconds,
        round_seconds=chosen.round_seconds,
        bytes=rounds * chosen.round_bytes,
        source="extrapolated" if problem is None else "simulated",
        forecast_rounds=foreseen,
        constants=constants,
        guaranteed=guaranteed(constants, chosen.setting, rounds, len(shards)),
        reasons=_reasons(config, chosen, seconds, alternatives, costs, constants, adaptive, len(shards)),
        alternatives=alternatives,
        check=checked,
        config=_to_run(config, chosen.setting, ceil(SPARE * rounds), adaptive),
    )


def _choose(
    problem: LogLinearProblem | None,
    target: float,
    costs: Costs,
    space: Space,
    order: Sequence[Priced],
    seed: int,
    say: Say,
) -> tuple[Priced, int, float, list[tuple[Setting, float]]]:
    """The plan, its rounds and seconds, and the quickest of every other S or graph (foreseen), quickest first."""
    by_setting = {priced.setting: priced for priced in order}
    chosen, rounds, seconds = order[0], order[0].rounds, order[0].seconds
    if problem is not None:
        simulated = refine(order, space, Simulator(problem, target, costs, seed=seed), say)
        if not simulated:
            raise InputError(
                f"target_loss: found {target:.6g}; settings that were foreseen to reach it did not in simulation; allowed: a higher target"
            )
        best = simulated[0]
        if best.rounds is None:  # luck alone had brought them there
            raise InputError(
                f"target_loss: found {target:.6g}; no setting reaches it reliably in simulation; allowed: a higher target"
            )
        chosen, rounds, seconds = by_setting[best.setting], best.rounds, best.seconds
    assert rounds is not None
    others: dict[tuple[int | None, str | None], tuple[Setting, float]] = {}
    for priced in order:
        key = (priced.setting.participation, priced.setting.graph)
        if key != (chosen.setting.participation, chosen.setting.graph):
            others.setdefault(key, (priced.setting, priced.seconds))
    return chosen, rounds, seconds, list(others.values())


def _check(simulator: Simulator, space: Space, setting: Setting, seconds: float) -> Checked:
    found = simulator.run([setting, *space.neighbours(setting)], 3 * seconds)
    plan, best = found[0].seconds, min(outcome.seconds for outcome in found)
    return Checked(
        plan=plan if isfinite(plan) else None,
        neighbours=[
            (outcome.setting, outcome.seconds if isfinite(outcome.seconds) else None)
            for outcome in sorted(found[1:], key=lambda outcome: outcome.seconds)
        ],
        excess=plan / best - 1 if isfinite(plan) else None,
    )


def _reasons(
    config: ExperimentConfig,
    chosen: Priced,
    seconds: float,
    alternatives: Sequence[tuple[Setting, float]],
    costs: Costs,
    constants: Constants,
    adaptive: bool,
    agents: int,
) -> list[str]:
    """In words, from the figures."""
    setting = chosen.setting
    per_step = np.mean(costs.devices.seconds_per_step) * (
        (setting.batch_size or costs.pairs_per_step) / costs.pairs_per_step
    )
    computing = float(setting.local_steps * per_step)
    share = min(1.0, computing / chosen.round_seconds) if chosen.round_seconds else 1.0
    said = [
        f"A round takes {chosen.round_seconds:.4g} s, {100 * share:.0f} % of it an agent's {setting.local_steps} steps: "
        + (
            "links decide, so several steps share a message."
            if share < 0.5 and setting.local_steps > 1
            else "more steps a round would not pay for their drift."
            if share < 0.5
            else "computing decides."
        )
    ]
    if alternatives:
        other, least = alternatives[0]
        said.append(f"The best with another server or graph, {other}, is foreseen to take {least:.4g} s.")
    if setting.method == "fed_dpo":
        s = setting.participants(agents)
        said.append(
            f"S = {s} of {agents}: sampling noise goes with (N - S) / (S (N - 1)) zeta^2 = "
            f"{(agents - s) / (s * (agents - 1)) * constants.heterogeneity:.3g}, and the server's link carries {2 * s} models a round."
        )
    else:
        said.append(
            f"{setting.graph}: rho = {setting.mixing(agents).rho:.4g}; the average model's noise does not depend on the graph, "
            "only the drift of agents who disagree does."
        )
    if setting.batch_size is not None:
        noise = constants.noise / (setting.batch_size * setting.participants(agents))
        said.append(f"Noise of a step of all participants: sigma^2 / (b S) = {noise:.3g}.")
    if not constants.exact:
        said.append(
            "Rounds and seconds are a rough extrapolation of the loss's fall at the start: they rank settings, and are no prediction."
        )
    if adaptive:
        said.append(
            "Heuristic: the theory is about SGD with a constant step. For AdamW only method, E, S, graph and batch are taken over, "
            "and lr stays the config's own."
        )
    elif config.optimizer.name == "adamw":
        said.append("The plan is for SGD with a constant step, in place of the config's AdamW.")
    return said


def _to_run(config: ExperimentConfig, setting: Setting, rounds: int, adaptive: bool) -> ExperimentConfig:
    """The config with the plan's method and optimiser."""
    method = setting.method_settings(rounds)
    if "graph" in method:
        method["graph"] = setting.graph
    batch = setting.batch_size or "full"
    sampling = "shuffle" if batch == "full" else "with_replacement"
    optimizer: dict[str, Any] = {"name": "sgd", "lr": setting.lr, "batch_size": batch, "sampling": sampling}
    if adaptive:
        optimizer = config.plain()["optimizer"] | {"batch_size": batch}
    return config.replace({"method": method, "optimizer": optimizer})
