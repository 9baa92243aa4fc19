"""What a lower precision of the frozen base and gradient checkpointing change: numbers, time and memory, in fresh processes.

`log_probs`: the built-in language model's log-probabilities of completions, base in bfloat16 and in 4 bits against float32
(adapters stay in float32; none are trained here). `accuracy`: a whole FedDPO run with LoRA on the built-in town, held-out
accuracy with each base, seed by seed. `step`: one pass with gradients of four agents of GPT-2's shape, 4 pairs each, in
float32 and bfloat16, with and without checkpointing; median of `REPEATS`, and the most memory above what the loaded model takes.

    python benchmarks/precision.py
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import numpy as np

BASES = ["float32", "bfloat16", "4bit"]
AGENTS, REPEATS = 4, 7


def config(base: str, seed: int) -> Any:
    """FedDPO of eight agents with LoRA on the built-in town."""
    from prefmesh.config import ExperimentConfig

    return ExperimentConfig.parse(
        {
            "seed": seed,
            "preferences": {
                "source": "builtin:town",
                "agents": 8,
                "town": {"users": 8, "pairs_per_user": 600, "temperature": 0.4},
            },
            "policy": {
                "model": "builtin:tiny",
                "lora": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
                "load_in_4bit": base == "4bit",
            },
            "objective": {"beta": 0.5},
            "method": {"name": "fed_dpo", "rounds": 100, "local_steps": 3},
            "optimizer": {"name": "adamw", "lr": 5e-3, "batch_size": 16, "schedule": "cosine"},
            "evaluation": {"every": 100, "held_out": 0.4, "samples": 0, "gradient_pairs": 300},
            "runtime": {"dtype": "bfloat16" if base == "bfloat16" else "float32"},
        }
    )


def accuracy(base: str, seed: str) -> dict[str, Any]:
    """A whole run."""
    from prefmesh.run import run

    with tempfile.TemporaryDirectory() as directory:
        found = run(config(base, int(seed)), Path(directory) / "run")
    return {
        "accuracy": found["final"]["eval/rewards/accuracies"],
        "accuracy_interval": found["accuracy_interval"],
        "held_out_pairs": found["held_out_pairs"],
    }


def log_probs() -> dict[str, Any]:
    """Of all completions under the reference, in nats."""
    from prefmesh.experiment import prepare

    full, *others = (prepare(config(base, 0)).learner.problem.reference.double() for base in BASES)
    found: dict[str, Any] = {"completions": full.numel(), "nats_mean": float(full.abs().mean())}
    for base, other in zip(BASES[1:], others, strict=True):
        apart = (other - full).abs()
        found[base] = {"apart_mean": float(apart.mean()), "apart_most": float(apart.max())}
    return found


def step(dtype: str, checkpointing: str) -> dict[str, Any]:
    """One pass with gradients on the model and the pairs of `default_round.py`."""
    import default_round
    import torch

    from prefmesh.algorithms.gradients import Problem, loss_and_gradient
    from prefmesh.objectives import ObjectiveSettings
    from prefmesh.policies.causal_lm import CausalLMPolicy

    model = default_round.model().to(getattr(torch, dtype))
    policy = CausalLMPolicy(model, None, train="lora", checkpointing=checkpointing == "true")  # type: ignore[arg-type]
    data = default_round.pairs()
    rows = default_round.batches(0)[:AGENTS, 0]
    problem = Problem(
        policy=policy, data=data, reference=torch.zeros(len(data), 2), objective=ObjectiveSettings()
    )
    theta = {name: tensor.repeat(AGENTS, 1, 1) for name, tensor in policy.initial(0).items()}
    weights = torch.full(rows.shape, 1 / rows.shape[1])
    loss_and_gradient(problem, theta, rows, weights)
    before = machine.reset_peak()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        loss_and_gradient(problem, theta, rows, weights)
        seconds.append(time.perf_counter() - started)
    return {
        "seconds": statistics.median(seconds),
        "memory_above_gb": (machine.peak() - before) / 1e9,
        "tokens": int(data.cost[rows].sum()),
    }


def _against(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> dict[str, float]:
    """Seed by seed: the mean difference of accuracies and its standard error."""
    differences = [b["accuracy"] - a["accuracy"] for a, b in zip(first, second, strict=True)]
    error = float(np.std(differences, ddof=1) / len(differences) ** 0.5)
    return {"mean": float(np.mean(differences)), "standard_error": error}


def main() -> None:
    """All measurements, stored."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="of each step, alternating")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, *rest = arguments.child
        print(json.dumps({"accuracy": accuracy, "log_probs": log_probs, "step": step}[kind](*rest)))
        return

    def measure(*what: str) -> dict[str, Any]:
        found = machine.child(__file__, ["--child", *what])
        print(*what, found, flush=True)
        return found

    steps = [
        {
            f"{dtype}, checkpointing {checkpointing}": measure("step", dtype, checkpointing)
            for dtype in BASES[:2]
            for checkpointing in ("false", "true")
        }
        for _ in range(arguments.repeats)
    ]
    runs = {base: [measure("accuracy", base, str(seed)) for seed in range(arguments.seeds)] for base in BASES}
    machine.store(
        "precision",
        {
            "machine": machine.describe(),
            "steps": steps,
            "log_probs": measure("log_probs"),
            "runs": runs,
            "accuracy_against_float32": {base: _against(runs[BASES[0]], runs[base]) for base in BASES[1:]},
        },
    )


if __name__ == "__main__":
    main()
