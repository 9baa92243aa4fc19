"""Agents in a pass: the number that is chosen by measuring at start, against fixed ones; and what `memory_gb` promises.

`choice`: 8 agents of GPT-2's shape on harmless pairs (max_length 512), then 32 of the built-in language model, LoRA r = 8, 4
pairs each, a step a round. The fixed numbers run in turn in one process; each of `--repeats` fresh processes also chooses anew,
with an empty cache. Ratio: of the chosen number's median round to the best's. `memory`: the most resident memory of a process
that trains 64 agents of the built-in model with 32 pairs a step, under several `runtime.memory_gb`.

    python benchmarks/chunks.py --data ../shared/data/hh_helpful_harmless.jsonl.gz
"""

import argparse
import json
import os
import statistics
import tempfile
from typing import Any

import machine

FIXED = {"gpt2": [1, 2, 4, 8], "builtin": [1, 2, 4, 8, 16, 32]}
TURNS, ROUNDS = 3, {"gpt2": 1, "builtin": 3}
BUDGETS = ["0.9", "1.2", "2", "4"]


def config(kind: str, data: str, directory: str, batch: int = 4, **runtime: Any) -> Any:
    """DecDPO on a ring, long enough that measuring at start is worth it."""
    from prefmesh.config import ExperimentConfig

    agents = 64 if "memory_gb" in runtime else max(FIXED[kind])
    if kind == "gpt2":
        import trl_step

        found = trl_step.config("gpt2", data, directory, steps=4 * agents)
        preferences = found.preferences.model_dump() | {"partition": "iid", "agents": agents}
        policy = found.policy.model_dump()
    else:
        preferences = {
            "source": "builtin:town",
            "agents": agents,
            "town": {"users": agents, "pairs_per_user": 4 * batch},
        }
        policy = {"model": "builtin:tiny", "lora": {"r": 8}}
    return ExperimentConfig.parse(
        {
            "preferences": preferences,
            "policy": policy,
            "objective": {},
            "method": {"name": "dec_dpo", "rounds": 500, "graph": "ring"},
            "optimizer": {"batch_size": batch},
            "evaluation": {"held_out": 0.0, "samples": 0},
            "runtime": runtime,
        }
    )


def choice(kind: str, data: str) -> dict[str, Any]:
    """What is chosen, and the median round of every fixed number."""
    from prefmesh.bench.ours import Rounds
    from prefmesh.experiment import prepare

    with tempfile.TemporaryDirectory() as directory:
        experiment = prepare(config(kind, data, directory))
    contestants = {size: Rounds(experiment, agents_per_pass=size) for size in FIXED[kind]}
    seconds: dict[int, list[float]] = {size: [] for size in contestants}
    every = ROUNDS[kind]
    for turn in range(TURNS + 1):  # the first warms up
        for size, rounds in contestants.items():
            found = rounds.rounds(turn * every + 1, every).seconds
            seconds[size] += found if turn else []
    medians = {size: statistics.median(each) for size, each in seconds.items()}
    chosen = experiment.learner.agents_per_pass
    return {"chosen": chosen, "seconds": medians, "ratio": medians[chosen] / min(medians.values())}


def memory(budget: str) -> dict[str, Any]:
    """Two rounds under a budget in GiB."""
    from prefmesh.experiment import prepare

    experiment = prepare(config("builtin", "", "", batch=32, memory_gb=float(budget)))
    state = experiment.learner.begin(experiment.start)
    for round_ in (1, 2):
        state, _ = experiment.learner.round(state, round_)
    return {
        "memory_gb": float(budget),
        "peak_gib": machine.peak() / 2**30,
        "agents_per_pass": experiment.learner.agents_per_pass,
    }


def main() -> None:
    """All of it, stored."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="../shared/data/hh_helpful_harmless.jsonl.gz")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, *rest = arguments.child
        print(
            json.dumps(memory(*rest) if kind == "memory" else choice(kind, os.path.abspath(arguments.data)))
        )
        return

    def measure(*what: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as cache:
            found = machine.child(
                __file__, ["--data", arguments.data, "--child", *what], {"PREFMESH_CACHE": cache}
            )
        print(*what, found, flush=True)
        return found

    result = {kind: [measure(kind) for _ in range(arguments.repeats)] for kind in FIXED}
    result["memory"] = [measure("memory", budget) for budget in BUDGETS]
    machine.store("chunks", {"machine": machine.describe()} | result)


if __name__ == "__main__":
    main()
