"""The paper's default round against a naive loop: 5 agents, 3 local steps, 4 pairs of at most 64 tokens a step.

The model has GPT-2's shape with 6 layers, width 768 and 50,257 tokens, and random weights. Each variant runs in a fresh
process: two rounds, of which the second is reported (the first also pays for first touches of memory). Variants alternate,
`--repeats` times. Times are of rounds alone; scoring the reference once, which ours does before the first round, is
reported beside them and added to one round in `ratio_with_reference`. The yardstick is the loop of the paper's script:
one sequence per forward pass, the reference scored at every step, one full model per agent, all of it trained
(`naive-full`). `naive-lora` is the same loop with PEFT's adapter. `ours-bf16`: LoRA on a base in bfloat16, adapters in float32.

    python benchmarks/default_round.py --repeats 3
"""

import argparse
import json
import statistics
import time
from typing import Any

import machine

AGENTS, STEPS, BATCH, VOCABULARY = 5, 3, 4, 50_257
ROUNDS = 2
VARIANTS = ["naive-lora", "ours-lora", "ours-bf16", "naive-full", "ours-full"]


def model() -> Any:
    """Random weights, the same in every process."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from prefmesh.randomness import torch_seeded

    config = GPT2Config(
        n_layer=6, n_embd=768, n_head=12, vocab_size=VOCABULARY, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    with torch_seeded(0, "benchmark model"):
        return GPT2LMHeadModel(config).eval()


def pairs() -> Any:
    """Random ids: enough pairs for every agent's two rounds; a prompt of 8 to 24 tokens, 32 to 64 with the completion."""
    from prefmesh.preferences.tokens import Ragged, TokenPairs
    from prefmesh.randomness import generator

    random = generator(0, "benchmark pairs")

    def ids(count: int) -> list[int]:
        return random.integers(0, VOCABULARY, count).tolist()

    prompts, sides = [], ([], [])
    for _ in range(AGENTS * ROUNDS * STEPS * BATCH):
        prompts.append(ids(int(random.integers(8, 25))))
        for side in sides:
            side.append(ids(int(random.integers(32, 65)) - len(prompts[-1])))
    return TokenPairs(*(Ragged.of(side) for side in (prompts, *sides)))


def batches(round_: int) -> Any:
    """Rows (agents, steps, batch) of a round (from 0): every pair is seen once."""
    import numpy as np

    every = np.arange(AGENTS * ROUNDS * STEPS * BATCH).reshape(AGENTS, ROUNDS, STEPS, BATCH)
    return every[:, round_]


def policy(train: str) -> Any:
    """Ours, on the benchmark's model; `bf16`: adapters in float32 on a base in bfloat16."""
    import torch

    from prefmesh.policies.causal_lm import CausalLMPolicy

    base = model().to(torch.bfloat16) if train == "bf16" else model()
    # No text is encoded here: pairs are made of token ids.
    return CausalLMPolicy(base, None, train="full" if train == "full" else "lora")  # type: ignore[arg-type]


def ours(train: str, mixing: str) -> dict[str, Any]:
    """Rounds of prefmesh's own loop."""
    import numpy as np

    from prefmesh.algorithms.chunks import fitting
    from prefmesh.algorithms.gradients import Problem
    from prefmesh.algorithms.methods import METHODS, Population
    from prefmesh.algorithms.optimizers import OptimizerSettings
    from prefmesh.algorithms.rounds import Learner
    from prefmesh.evaluation.scores import log_probs
    from prefmesh.objectives import ObjectiveSettings

    data, built = pairs(), policy(train)
    started = time.perf_counter()
    reference = log_probs(built, None, data, np.arange(len(data)))
    reference_seconds = (time.perf_counter() - started) / ROUNDS
    problem = Problem(policy=built, data=data, reference=reference, objective=ObjectiveSettings())
    method_class = METHODS["fed_dpo" if mixing == "server" else "dec_dpo"]
    settings = method_class.Settings(name=mixing, rounds=ROUNDS, local_steps=STEPS)
    method = method_class(settings, Population(weights=np.full(AGENTS, 1 / AGENTS), seed=0))
    learner = Learner(
        problem=problem,
        method=method,
        optimizer=OptimizerSettings(batch_size=BATCH),
        sampler=_Given(),  # type: ignore[arg-type]
        agents_per_pass=fitting(problem, method, BATCH, built.tokens_per_pass),
    )
    row = built.initial(0)
    state = learner.begin(row)
    losses, seconds = [], []
    for round_ in range(ROUNDS):
        started = time.perf_counter()
        state, measures = learner.round(state, round_ + 1)
        seconds.append(time.perf_counter() - started)
        losses.append(measures["loss"])
    moved = sum(float((state.theta[name].mean(0) - row[name][0]).double().square().sum()) for name in row)
    return {
        "seconds": seconds,
        "losses": losses,
        "moved": moved**0.5,
        "reference_seconds": reference_seconds,
    }


class _Given:
    """A sampler that deals the pairs as the naive loop gets them."""

    def draw(self, round_: int, shards: Any, drawn: Any, steps: int) -> tuple[Any, Any]:
        import numpy as np

        rows = batches(round_ - 1)[shards]
        return rows, np.full(rows.shape, 1 / BATCH)


def naive(train: str, mixing: str) -> dict[str, Any]:
    """Rounds of the yardstick."""
    import torch
    from naive import Naive, trained

    data, start = pairs(), model()
    reference = start if train == "full" else model()
    if train == "lora":
        start = _with_peft(start)
    agents = Naive(start, reference.requires_grad_(train == "full"), AGENTS)
    before = trained(agents.models[0])
    losses, seconds = [], []
    for round_ in range(ROUNDS):
        own = [
            [[(data.prompt[i], data.chosen[i], data.rejected[i]) for i in step] for step in agent]
            for agent in batches(round_).tolist()
        ]
        started = time.perf_counter()
        losses.append(agents.round(own, mixing))
        seconds.append(time.perf_counter() - started)
    after = [trained(m) for m in agents.models]
    moved = sum(
        float((torch.stack([state[name] for state in after]).mean(0) - before[name]).double().square().sum())
        for name in before
    )
    return {"seconds": seconds, "losses": losses, "moved": moved**0.5, "reference_seconds": 0.0}


def _with_peft(base: Any) -> Any:
    """PEFT's adapter of the same shape, started at the same factors as ours."""
    from peft import get_peft_model
    from peft.utils import set_peft_model_state_dict

    from prefmesh.policies import lora

    settings = lora.LoraSettings()
    names = lora.inject(twin := model(), settings)
    config = lora.peft_config(twin, settings, names, base="benchmark")
    config.inference_mode = False
    wrapped = get_peft_model(base, config)
    row = {name: t[0] for name, t in lora.initial_factors(twin, names, 0).items()}
    set_peft_model_state_dict(wrapped, lora.peft_state(row))
    return wrapped


def once(variant: str, mixing: str) -> dict[str, Any]:
    """One variant in this process."""
    who, _, train = variant.partition("-")
    found = {"naive": naive, "ours": ours}[who](train, mixing)
    return found | {"peak_bytes": machine.peak()}


def main() -> None:
    """Run all variants and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--mixing", nargs="+", choices=["server", "ring"], default=["server", "ring"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--no-store", action="store_true", help="print, and write no result")
    parser.add_argument("--child", nargs=2, metavar=("VARIANT", "MIXING"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(once(*arguments.child)))
        return
    result = {"machine": machine.describe(), "agents": AGENTS, "local_steps": STEPS, "pairs_per_step": BATCH}
    for mixing in arguments.mixing:
        runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in arguments.variants}
        for _ in range(arguments.repeats):
            for variant in arguments.variants:
                runs[variant].append(machine.child(__file__, ["--child", variant, mixing]))
                print(mixing, variant, json.dumps(runs[variant][-1]), flush=True)
        result[mixing] = summary(runs)
        print(json.dumps(result[mixing], indent=2))
    if not arguments.no_store:
        machine.store("default_round", result)


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over repeats; ratios naive / ours pair the runs that stood next to each other."""
    found: dict[str, Any] = {}
    for variant, repeats in runs.items():
        seconds = [r["seconds"][-1] for r in repeats]
        found[variant] = {
            "seconds": statistics.median(seconds),
            "seconds_all": seconds,
            "first_round_seconds": statistics.median(r["seconds"][0] for r in repeats),
            "reference_seconds": statistics.median(r["reference_seconds"] for r in repeats),
            "peak_gb": statistics.median(r["peak_bytes"] for r in repeats) / 1e9,
            "losses": repeats[0]["losses"],
            "moved": repeats[0]["moved"],
        }
    # The paper's script trains full models: the yardstick of both; a naive loop with LoRA stands beside it.
    for naive_train, ours_train in (
        ("full", "lora"),
        ("full", "bf16"),
        ("full", "full"),
        ("lora", "lora"),
        ("lora", "bf16"),
    ):
        slow, fast = runs.get(f"naive-{naive_train}"), runs.get(f"ours-{ours_train}")
        if slow and fast:
            ratios = [a["seconds"][-1] / b["seconds"][-1] for a, b in zip(slow, fast, strict=True)]
            with_reference = [
                a["seconds"][-1] / (b["seconds"][-1] + b["reference_seconds"])
                for a, b in zip(slow, fast, strict=True)
            ]
            found[f"naive-{naive_train}/ours-{ours_train}"] = {
                "ratio": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "ratio_with_reference": statistics.median(with_reference),
            }
    return found


if __name__ == "__main__":
    main()
