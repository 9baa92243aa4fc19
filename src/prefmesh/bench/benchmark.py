"""One experiment's rounds, measured: how much, how fast, how close to what the machine can do, and against whom."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from prefmesh.bench import arithmetic, machine
from prefmesh.bench.contest import Contestant, Schedule, against, alone
from prefmesh.bench.flower import Flower
from prefmesh.bench.loops import Naive, Peft
from prefmesh.bench.ours import FirstAgent, Rounds, batches
from prefmesh.bench.trl import Trl
from prefmesh.config import ExperimentConfig
from prefmesh.environment import describe_environment
from prefmesh.errors import InputError
from prefmesh.experiment import Experiment, prepare, refuse_residuals
from prefmesh.policies.causal_lm import CausalLMPolicy
from prefmesh.preferences.tokens import TokenPairs

if TYPE_CHECKING:
    from rich.table import Table

Say = Callable[[str], None]

Check = Callable[[Experiment], None]
Make = Callable[[Experiment], Contestant]

RIVALS: dict[str, tuple[Check, Make, Make]] = {
    "single": (lambda _: None, Rounds, lambda e: Rounds(e, agents_per_pass=1)),
    "peft": (Peft.check, Rounds, Peft),
    "naive": (Naive.check, Rounds, Naive),
    "trl": (Trl.check, FirstAgent, Trl),
    "flower": (Flower.check, Rounds, Flower),
}
"""What a rival refuses, ours, and theirs: our own rounds with one agent a pass; loops over models; TRL on the first agent's steps; Flower's simulation."""


def bench(
    config: ExperimentConfig,
    rivals: list[str],
    schedule: Schedule,
    *,
    trace: Path | None = None,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """All figures, JSON-ready. `trace`: where to write a profile of one more round, in Chrome's trace format.

    Raises `InputError` for an unknown rival, or one that does not do such an experiment.
    """
    for name in rivals:
        if name not in RIVALS:
            raise InputError(f"--against: {name!r} found; allowed: {', '.join(RIVALS)}")
    refuse_residuals(config, "bench")
    config = _long_enough(config, schedule)
    experiment = prepare(config, say)
    learner, policy = experiment.learner, experiment.policy
    for name in rivals:
        RIVALS[name][0](experiment)
    amount = _amount(experiment)
    say("the machine's peak")
    peak = machine.peak_gflops(policy.device, policy.dtype)
    say("rounds")
    rounds = Rounds(experiment)
    turns = alone(rounds, schedule)
    seconds = [s for turn in turns for s in turn.seconds]
    work = amount(range(schedule.rounds + 1, schedule.total + 1))
    total = sum(seconds)
    found: dict[str, Any] = {
        "machine": describe_environment(config.seed, policy.device),
        "config": config.model_dump(mode="json"),
        "agents": experiment.method.agents,
        "agents_per_pass": learner.agents_per_pass,
        "peak_gflops": peak,
        "peak_share": work["needed_gflop"] / total / peak if work["needed_gflop"] else None,
        "tokens_per_second": work["tokens"] / total if work["tokens"] else None,
        "pairs_per_second": work["pairs"] / total,
        "seconds_per_round": statistics.median(seconds),
        "rounds": len(seconds),
        "gflop_per_round": {"needed": work["needed_gflop"] / len(seconds), "done": None},
        "bytes_per_round": experiment.method.bytes_sent(
            1,
            model_bytes=experiment.method.message_bytes(rounds.state.theta),
            data_bytes=experiment.data_bytes,
        ),
        "peak_memory_gb": machine.peak_memory_gb(policy.device),
    }
    if work["needed_gflop"]:
        counted = arithmetic.done(lambda: rounds.rounds(schedule.total + 1, 1)) / 1e9
        excess = counted / amount(range(schedule.total + 1, schedule.total + 2))["needed_gflop"]
        found["gflop_per_round"]["done"] = excess * found["gflop_per_round"]["needed"]
    if trace is not None:
        say("a round under the profiler")
        found["profile"] = _profiled(lambda: rounds.rounds(schedule.total + 2, 1), trace)
    found["against"] = {}
    for name in rivals:
        say(f"against {name}")
        # Made now and dropped after: many models would count as our memory, and crowd the next rival's.
        _, ours, theirs = RIVALS[name]
        found["against"][name] = against(ours(experiment), theirs(experiment), schedule)
        say(f"{name} takes {found['against'][name]['ratio']:.3g} times our seconds")
    return found


def _long_enough(config: ExperimentConfig, schedule: Schedule) -> ExperimentConfig:
    """With as many rounds as are measured, one under the counter and one under the profiler."""
    method = config.method.model_copy(update={"rounds": max(config.method.rounds, schedule.total + 2)})
    return config.model_copy(update={"method": method})


def _amount(experiment: Experiment) -> Callable[[range], dict[str, float | int]]:
    """What given rounds hold: pairs, tokens of prompts and completions, and the arithmetic that they need in 1e9 operations.

    Where agents sit out, those of the round are taken to have been in every round before: the amount is what is asked for.
    """
    learner, policy, data = experiment.learner, experiment.policy, experiment.learner.problem.data
    cost = arithmetic.Arithmetic.of(policy, experiment.start) if isinstance(policy, CausalLMPolicy) else None

    def of(rounds: range) -> dict[str, float | int]:
        drawn = [batches(learner, r, experiment.method.participants(r))[0].reshape(-1) for r in rounds]
        rows = np.concatenate(drawn)
        if cost is None or not isinstance(data, TokenPairs):
            return {"pairs": len(rows), "tokens": 0, "needed_gflop": 0.0}
        sides = (data.prompt, data.chosen, data.rejected)
        tokens = sum(len(side[i]) for i in rows.tolist() for side in sides)
        return {"pairs": len(rows), "tokens": tokens, "needed_gflop": cost.needed(data, rows) / 1e9}

    return of


def _profiled(work: Callable[[], object], trace: Path) -> dict[str, float | int]:
    """Each operation's own share of the time, largest first; what lasts less than a thousandth is left out."""
    on_gpu = torch.cuda.is_available()
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=kinds) as profiler:
        work()
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    own = {
        event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total
        for event in profiler.key_averages()
    }
    total = sum(own.values())
    shares = {name: time / total for name, time in sorted(own.items(), key=lambda item: -item[1])}
    return {name: share for name, share in shares.items() if share >= 1e-3}


def table(found: dict[str, Any]) -> "list[Table]":
    """`bench`'s findings for the terminal."""
    from rich.table import Table

    rows = Table(title="prefmesh bench", show_header=False)
    machine_ = found["machine"]
    rows.add_row("machine", f"{machine_['device_name'] or machine_['cpu']}, {machine_['threads']} threads")
    rows.add_row("matrix products at best", f"{found['peak_gflops']:,.0f} GFLOP/s in this precision")
    rows.add_row("agents", f"{found['agents']:,}, {found['agents_per_pass']} in a pass of the model")
    rows.add_row("a round", f"{found['seconds_per_round']:.3g} s, median of {found['rounds']}")
    rows.add_row("pairs", f"{found['pairs_per_second']:,.1f} per second")
    if found["tokens_per_second"]:
        rows.add_row("tokens", f"{found['tokens_per_second']:,.0f} per second")
        gflop = found["gflop_per_round"]
        rows.add_row(
            "arithmetic of a round", f"{gflop['needed']:,.3g} GFLOP needed, {gflop['done']:,.3g} done"
        )
        rows.add_row("share of the peak", f"{found['peak_share']:.0%} for what is needed")
    rows.add_row("sent in a round", f"{found['bytes_per_round'] / 1e6:,.3g} MB")
    rows.add_row("memory at most", f"{found['peak_memory_gb']:.2f} GiB")
    tables = [rows]
    if found["against"]:
        rivals = Table(title="against others, in turn: medians")
        for title in ("", "theirs, s", "ours, s", "theirs / ours", "of each turn", "losses apart"):
            rivals.add_column(title, justify="left" if not title else "right")
        for name, r in found["against"].items():
            each = ", ".join(f"{run['theirs'] / run['ours']:.2f}" for run in r["runs"])
            rivals.add_row(
                name,
                f"{r['theirs']:.3g}",
                f"{r['ours']:.3g}",
                f"{r['ratio']:.2f}",
                each,
                f"{r['losses_apart']:.1e}",
            )
            for part in ("computing", "overhead"):
                if part in r:
                    rivals.add_row(f"  {part}", f"{r[part]:.3g}")
        tables.append(rivals)
    if "profile" in found:
        shares = Table(title="time of a round by operation")
        shares.add_column("operation")
        shares.add_column("share", justify="right")
        for name, share in list(found["profile"].items())[:15]:
            shares.add_row(name, f"{share:.1%}")
        tables.append(shares)
    return tables
