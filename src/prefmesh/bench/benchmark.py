"""One experiment's rounds, measured: how much, how fast, how close to what the machine can do, and against whom."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from prefmesh.bench import arithmetic, machine
from prefmesh.bench.contest import Contestant, Schedule, against, alone
from prefmesh.bench.flower import Flower
from prefmesh.bench.loops import Naive, Peft
from prefmesh.bench.ours import AllThreads, FirstAgent, Rounds, batches
from prefmesh.bench.trl import Trl
from prefmesh.config import ExperimentConfig
from prefmesh.environment import describe_environment
from prefmesh.errors import InputError
from prefmesh.experiment import Experiment, prepare, refuse_residuals
from prefmesh.mesh import ALONE, Group
from prefmesh.policies.causal_lm import CausalLMPolicy
from prefmesh.preferences.tokens import TokenPairs
from prefmesh.threads import threads

if TYPE_CHECKING:
    from rich.table import Table

Say = Callable[[str], None]


class Rival(NamedTuple):
    """`check` raises `InputError` for experiments that it does not do; ours beside it; theirs, `shared` by our processes or done in process 0
    with everybody's pairs and all threads."""

    check: Callable[[Experiment], None]
    ours: Callable[[Experiment], Contestant]
    theirs: Callable[[Experiment], Contestant]
    shared: bool = False


RIVALS = {
    "single": Rival(lambda _: None, Rounds, lambda e: Rounds(e, agents_per_pass=1), shared=True),
    "peft": Rival(Peft.check, Rounds, Peft),
    "naive": Rival(Naive.check, Rounds, Naive),
    "trl": Rival(Trl.check, FirstAgent, Trl),
    "flower": Rival(Flower.check, Rounds, Flower),
}
"""Our own rounds with one agent a pass; loops over models; TRL on the first agent's steps; Flower's simulation."""


def bench(
    config: ExperimentConfig,
    rivals: list[str],
    schedule: Schedule,
    *,
    trace: Path | None = None,
    say: Say = lambda _: None,
    group: Group = ALONE,
) -> dict[str, Any]:
    """All figures, JSON-ready. `trace`: where to write a profile of one more round, in Chrome's trace format.

    `group`: the processes that share the agents, each of which calls this; what process 0 returns is of all. Raises `InputError` for an
    unknown rival, or one that does not do such an experiment.
    """
    for name in rivals:
        if name not in RIVALS:
            raise InputError(f"--against: {name!r} found; allowed: {', '.join(RIVALS)}")
    refuse_residuals(config, "bench")
    config = _long_enough(config, schedule)
    experiment = prepare(config, say, group=group)
    learner, policy = experiment.learner, experiment.policy
    for name in rivals:
        RIVALS[name].check(experiment)
    all_threads = int(group.total(np.array([float(torch.get_num_threads())]))[0])
    say("the machine's peak")
    peak = 0.0
    if group.rank == 0:
        with threads(all_threads):
            peak = machine.peak_gflops(policy.device, policy.dtype)
    say("rounds")
    rounds = Rounds(experiment)
    turns = alone(rounds, schedule)
    seconds = [s for turn in turns for s in turn.seconds]
    total, memory = sum(seconds), machine.peak_memory_gb(policy.device)
    counted = 0.0
    if isinstance(policy, CausalLMPolicy):  # others' arithmetic has no formula to stand beside
        counted = arithmetic.done(lambda: rounds.rounds(schedule.total + 1, 1)) / 1e9
    counted, memory = group.total(np.array([counted, memory])).tolist()
    shares = {}
    if trace is not None:
        say("a round under the profiler")
        one_more = schedule.total + 2
        shares = _profiled(lambda: rounds.rounds(one_more, 1), trace if group.rank == 0 else None)
    whole = experiment if group.size == 1 else _whole(experiment, say) if group.rank == 0 else None
    found: dict[str, Any] = {}
    if whole is not None:
        work = _amount(whole, range(schedule.rounds + 1, schedule.total + 1))
        needed = work["needed_gflop"]
        last = _amount(whole, range(schedule.total + 1, schedule.total + 2))["needed_gflop"]
        found = {
            "machine": describe_environment(config.seed, policy.device),
            "config": config.model_dump(mode="json"),
            "processes": group.size,
            "agents": experiment.method.agents,
            "agents_per_pass": min(learner.agents_per_pass, experiment.method.mesh.hosted),
            "peak_gflops": peak,
            "peak_share": needed / total / peak if needed else None,
            "tokens_per_second": work["tokens"] / total if work["tokens"] else None,
            "pairs_per_second": work["pairs"] / total,
            "seconds_per_round": statistics.median(seconds),
            "rounds": len(seconds),
            "gflop_per_round": {
                "needed": needed / len(seconds),
                "done": counted / last * needed / len(seconds) if needed else None,
            },
            "bytes_per_round": experiment.method.bytes_sent(
                1,
                model_bytes=experiment.method.message_bytes(rounds.state.theta),
                data_bytes=whole.data_bytes,
            ),
            "peak_memory_gb": memory,
        }
        if trace is not None:
            found["profile"] = shares
    found["against"] = {}
    for name in rivals:
        say(f"against {name}")
        # Made now and dropped after: many models would count as our memory, and crowd the next rival's.
        rival = RIVALS[name]
        if rival.shared:
            theirs = rival.theirs(experiment)
        else:
            theirs = AllThreads(None if whole is None else rival.theirs(whole), all_threads)
        found["against"][name] = against(rival.ours(experiment), theirs, schedule)
        say(f"{name} takes {found['against'][name]['ratio']:.3g} times our seconds")
    return found


def _whole(experiment: Experiment, say: Say) -> Experiment:
    """With all agents and pairs in this process."""
    config = experiment.config.replace({"runtime.processes": 1})
    return prepare(config, say, agents_per_pass=experiment.learner.agents_per_pass)


def _long_enough(config: ExperimentConfig, schedule: Schedule) -> ExperimentConfig:
    """With as many rounds as are measured, one under the counter and one under the profiler."""
    method = config.method.model_copy(update={"rounds": max(config.method.rounds, schedule.total + 2)})
    return config.model_copy(update={"method": method})


def _amount(experiment: Experiment, rounds: range) -> dict[str, float | int]:
    """What given rounds hold: pairs, tokens of prompts and completions, and the arithmetic that they need in 1e9 operations.

    Where agents sit out, those of the round are taken to have been in every round before: the amount is what is asked for.
    """
    learner, policy, data = experiment.learner, experiment.policy, experiment.learner.problem.data
    drawn = [batches(learner, r, experiment.method.participants(r))[0].reshape(-1) for r in rounds]
    rows = np.concatenate(drawn)
    if not isinstance(policy, CausalLMPolicy) or not isinstance(data, TokenPairs):
        return {"pairs": len(rows), "tokens": 0, "needed_gflop": 0.0}
    sides = (data.prompt, data.chosen, data.rejected)
    tokens = sum(len(side[i]) for i in rows.tolist() for side in sides)
    cost = arithmetic.Arithmetic.of(policy, experiment.start)
    return {"pairs": len(rows), "tokens": tokens, "needed_gflop": cost.needed(data, rows) / 1e9}


def _profiled(work: Callable[[], object], trace: Path | None) -> dict[str, float | int]:
    """Each operation's own share of this process's time, largest first; what lasts less than a thousandth is left out."""
    on_gpu = torch.cuda.is_available()
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=kinds) as profiler:
        work()
    if trace is not None:
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
    shared = f"{found['processes']} processes of " if found["processes"] > 1 else ""
    rows.add_row(
        "machine",
        f"{machine_['device_name'] or machine_['cpu']}, {shared}{machine_['threads']} thread{'s' * (machine_['threads'] > 1)}",
    )
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
