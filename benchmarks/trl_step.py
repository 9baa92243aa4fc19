"""A step of DPO against TRL's `DPOTrainer`: Anthropic's harmless pairs, LoRA r = 8, 4 pairs a step, one agent.

Both train the same model from the same adapter on the same pairs in the same order, in one process, in turn (the contestants of
`prefmesh bench --against trl`, and ours with padded rows beside); times are of single steps, medians. TRL has its reference
precomputed and checkpoints nothing; its padding-free option needs flash attention. The model has random weights and a tokenizer
made from the pairs' own texts with as many tokens as the model's vocabulary asks for.

    python benchmarks/trl_step.py --model gpt2 --data ../shared/data/hh_helpful_harmless.jsonl.gz

With `--leave DIRECTORY` nothing is measured: the model and its config stay there, for `prefmesh bench DIRECTORY/config.yaml`.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import machine

BATCH = 4
MODELS = {
    "gpt2": {"vocab_size": 50_257, "n_layer": 6, "n_embd": 768, "n_head": 12, "n_positions": 1024},
    "llama": {
        "vocab_size": 32_000, "num_hidden_layers": 6, "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12,
        "max_position_embeddings": 1024, "tie_word_embeddings": True,
    },
}  # fmt: skip


def model(family: str) -> Any:
    """Random weights, the same at every call; no dropout."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from prefmesh.randomness import torch_seeded

    config = AutoConfig.for_model(family, **MODELS[family], bos_token_id=0, eos_token_id=0, pad_token_id=1)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    with torch_seeded(0, "benchmark model"):
        return AutoModelForCausalLM.from_config(config).eval()


def pairs(data: str) -> list[Any]:
    """The harmless ones, in the file's order."""
    from prefmesh.preferences.reading import read
    from prefmesh.preferences.settings import PreferencesSettings

    return read(PreferencesSettings(source=data, where={"user": "harmless"})).pairs


def tokenizer(texts: list[str], size: int) -> Any:
    """Made from all texts of the pairs, of at most `size` tokens."""
    from prefmesh.policies.warmstart import train_tokenizer

    return train_tokenizer(texts, vocab_size=size, max_length=512, chat=False)


def config(family: str, data: str, directory: str, steps: int) -> Any:
    """One agent that holds all harmless pairs, a step a round; the model and its tokenizer are left in `directory`."""
    from prefmesh.config import ExperimentConfig

    texts = [part for p in pairs(data) for part in (p.prompt + p.chosen, p.rejected)]
    model(family).save_pretrained(directory)
    tokenizer(texts, MODELS[family]["vocab_size"]).save_pretrained(directory)
    raw = {
        "preferences": {"source": data, "where": {"user": "harmless"}, "limit": BATCH * steps},
        "policy": {
            "model": directory,
            "train": "lora",
            "lora": {"r": 8, "lora_alpha": 16},
            "max_length": 512,
        },
        "objective": {"beta": 0.1},
        "method": {"name": "centralized", "rounds": steps},
        "optimizer": {"name": "adamw", "lr": 1e-3, "batch_size": BATCH},
        "evaluation": {"held_out": 0.0, "samples": 0},
        "runtime": {},
    }
    return ExperimentConfig.parse(raw)


def main() -> None:
    """Run in turn, print, store."""
    from prefmesh.bench.contest import Schedule
    from prefmesh.bench.ours import FirstAgent
    from prefmesh.bench.trl import Trl
    from prefmesh.experiment import prepare

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="gpt2")
    parser.add_argument("--data", default="../shared/data/hh_helpful_harmless.jsonl.gz")
    parser.add_argument("--steps", type=int, default=20, help="a turn; the first turn compares the losses")
    parser.add_argument("--repeats", type=int, default=3, help="turns whose times count")
    parser.add_argument("--no-store", action="store_true", help="print, and write no result")
    parser.add_argument(
        "--leave", metavar="DIRECTORY", help="make the model and its config.yaml there, and stop"
    )
    arguments = parser.parse_args()
    schedule = Schedule(turns=arguments.repeats, rounds=arguments.steps)
    if arguments.leave:
        left = config(arguments.model, str(Path(arguments.data).resolve()), arguments.leave, schedule.total)
        (Path(arguments.leave) / "config.yaml").write_text(left.to_yaml())
        return

    class Padded(FirstAgent):
        """Ours as it is for models that cannot read packed rows."""

        def round(self, round_: int) -> float:
            self.learner.problem.policy.packs = False
            try:
                return super().round(round_)
            finally:
                self.learner.problem.policy.packs = True

    with tempfile.TemporaryDirectory() as directory:
        prepared = prepare(config(arguments.model, str(Path(arguments.data)), directory, schedule.total))
        contestants = {"packed": FirstAgent(prepared), "trl": Trl(prepared), "padded": Padded(prepared)}
        turns = []
        for first in schedule.starts:
            turns.append({name: c.rounds(first, schedule.rounds) for name, c in contestants.items()})
            print(
                json.dumps({name: statistics.median(t.seconds) for name, t in turns[-1].items()}), flush=True
            )
    data = prepared.learner.problem.data
    # The first step of a fresh trainer also pays for first touches.
    rows = [{name: statistics.median(t.seconds[1:]) for name, t in turn.items()} for turn in turns[1:]]
    ours, theirs = turns[0]["packed"].losses, turns[0]["trl"].losses
    result = {
        "machine": machine.describe(),
        "model": arguments.model,
        "mean_tokens": [float(part.lengths.mean()) for part in (data.prompt, data.chosen, data.rejected)],
        "steps_a_turn": arguments.steps,
        "turns": rows,
        "trl_over_ours": statistics.median(row["trl"] / row["packed"] for row in rows),
        "padded_over_packed": statistics.median(row["padded"] / row["packed"] for row in rows),
        "final_loss": {"ours": ours[-1], "trl": theirs[-1]},
        "losses_apart": max(abs(a - b) for a, b in zip(ours, theirs, strict=True)),
    }
    print(json.dumps(result, indent=2))
    if not arguments.no_store:
        machine.store(f"trl_step_{arguments.model}", result)


if __name__ == "__main__":
    main()
