"""Rounds against the number of agents: is their time linear, and what does an agent cost in memory?

Two kinds of agents on a ring (DecDPO), each number of them in a fresh process:

`log_linear`: d = 64 hashed features, 4 pairs a step, SGD, one step a round; the time of 1,000 rounds as measured, without
preparing the preferences, which is reported beside it.
`lora`: the built-in language model, LoRA r = 4, AdamW whose moments stay at the agents, 4 pairs a step; the second of two
rounds. Memory is the most that the process held, libraries and preferences included.

    python benchmarks/scale.py
"""

import argparse
import json
import time
from typing import Any

import machine
import numpy as np

KINDS = {"log_linear": ([100, 1_000, 10_000], 1_000), "lora": ([10, 100, 1_000], 2)}
"""Numbers of agents, and rounds."""


def config(kind: str, agents: int) -> Any:
    """A run on the built-in town; each agent holds eight pairs."""
    from prefmesh.config import ExperimentConfig

    policies = {
        "log_linear": {"model": "log_linear", "features": "hashed", "dim": 64},
        "lora": {"model": "builtin:tiny", "train": "lora", "lora": {"r": 4, "lora_alpha": 8}},
    }
    optimizers = {"log_linear": {"name": "sgd", "lr": 1.0}, "lora": {"name": "adamw", "state": "keep"}}
    return ExperimentConfig.parse(
        {
            "preferences": {
                "source": "builtin:town",
                "agents": agents,
                "town": {"users": agents, "pairs_per_user": 8},
            },
            "policy": policies[kind],
            "objective": {},
            "method": {"name": "dec_dpo", "rounds": KINDS[kind][1], "graph": "ring"},
            "optimizer": optimizers[kind] | {"batch_size": 4},
            "evaluation": {"held_out": 0.0, "samples": 0},
            "runtime": {},
        }
    )


def once(kind: str, agents: int) -> dict[str, Any]:
    """One number of agents in this process."""
    from prefmesh.experiment import prepare

    started = time.perf_counter()
    experiment = prepare(config(kind, agents))
    prepared = time.perf_counter()
    learner = experiment.learner
    state = learner.begin(experiment.start)
    seconds = []
    for round_ in range(1, KINDS[kind][1] + 1):
        before = time.perf_counter()
        state, measures = learner.round(state, round_)
        seconds.append(time.perf_counter() - before)
    return {
        "agents": agents,
        "rounds": len(seconds),
        "seconds": sum(seconds),
        "seconds_per_round": float(np.median(seconds[1:])),
        "preparing_seconds": prepared - started,
        "agents_per_pass": learner.agents_per_pass,
        "peak_gb": machine.peak() / 1e9,
        "loss": measures["loss"],
    }


def main() -> None:
    """All numbers of agents, and the exponents by which time and memory grow between the two largest."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=sorted(KINDS), default=sorted(KINDS))
    parser.add_argument("--no-store", action="store_true", help="print, and write no result")
    parser.add_argument("--child", nargs=2, metavar=("KIND", "AGENTS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(once(arguments.child[0], int(arguments.child[1]))))
        return
    for kind in arguments.kinds:
        runs = []
        for agents in KINDS[kind][0]:
            runs.append(machine.child(__file__, ["--child", kind, str(agents)]))
            print(kind, json.dumps(runs[-1]), flush=True)
        few, many = runs[-2:]
        decade = np.log(many["agents"] / few["agents"])
        found = {
            "machine": machine.describe(),
            "runs": runs,
            "time_exponent": float(np.log(many["seconds_per_round"] / few["seconds_per_round"]) / decade),
            "kilobytes_per_agent": (many["peak_gb"] - few["peak_gb"])
            / (many["agents"] - few["agents"])
            * 1e6,
        }
        print(json.dumps({key: found[key] for key in ("time_exponent", "kilobytes_per_agent")}), flush=True)
        if not arguments.no_store:
            machine.store(f"scale_{kind}", found)


if __name__ == "__main__":
    main()
