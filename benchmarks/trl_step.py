"""A step of DPO against TRL's `DPOTrainer`: Anthropic's harmless pairs, LoRA r = 8, 4 pairs a step, one agent.

Both train the same model from the same adapter on the same pairs in the same order, in one process, in turn; times are of
single steps (forward, backward, AdamW), medians. TRL has its reference precomputed and checkpoints nothing; its padding-free
option needs flash attention. The model has random weights and a tokenizer made from the pairs' own texts with as many tokens
as the model's vocabulary asks for.

    python benchmarks/trl_step.py --model gpt2 --data ../shared/data/hh_helpful_harmless.jsonl.gz
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from typing import Any

import machine
import numpy as np

BATCH, BETA, LR, MAX_LENGTH = 4, 0.1, 1e-3, 512
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

    return train_tokenizer(texts, vocab_size=size, max_length=MAX_LENGTH, chat=False)


class Ours:
    """One agent that steps through the pairs."""

    def __init__(self, family: str, words: Any, some: list[Any], packs: bool):
        import torch

        from prefmesh.algorithms.gradients import Problem
        from prefmesh.algorithms.optimizers import OptimizerSettings, initial_state
        from prefmesh.evaluation.scores import log_probs
        from prefmesh.objectives import ObjectiveSettings
        from prefmesh.policies.causal_lm import CausalLMPolicy

        policy = CausalLMPolicy(model(family), words, train="lora", max_length=MAX_LENGTH)
        policy.packs = packs
        data = policy.encode(some)
        reference = log_probs(policy, None, data, np.arange(len(data)))
        objective = ObjectiveSettings(beta=BETA)
        self.problem = Problem(policy=policy, data=data, reference=reference, objective=objective)
        self.settings = OptimizerSettings(lr=LR, batch_size=BATCH)
        self.start = policy.initial(0)
        self.theta = {name: tensor.clone() for name, tensor in self.start.items()}
        self.state = initial_state(self.settings, self.theta, 1)
        self.weights = torch.full((1, BATCH), 1 / BATCH)
        self.done = 0

    def steps(self, count: int) -> tuple[list[float], list[float]]:
        """Seconds and losses of the next steps."""
        from prefmesh.algorithms.gradients import loss_and_gradient
        from prefmesh.algorithms.optimizers import apply

        seconds, losses = [], []
        for _ in range(count):
            started = time.perf_counter()
            rows = np.arange(self.done * BATCH, (self.done + 1) * BATCH)[None]
            loss, gradient, _ = loss_and_gradient(self.problem, self.theta, rows, self.weights)
            self.theta, self.state = apply(self.settings, LR, self.theta, gradient, self.state)
            seconds.append(time.perf_counter() - started)
            losses.append(float(loss))
            self.done += 1
        return seconds, losses


class Theirs:
    """TRL's trainer on the same, from the same adapter."""

    def __init__(self, family: str, words: Any, some: list[Any], start: dict[str, Any]):
        self.family, self.words, self.some, self.start = family, words, some, start

    def steps(self, first: int, count: int) -> tuple[list[float], list[float]]:
        """Seconds and losses of a fresh trainer's steps on the pairs from step `first` on."""
        import torch
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import TrainerCallback
        from trl import DPOConfig, DPOTrainer

        from prefmesh.policies.lora import peft_state

        rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in self.some]
        seconds: list[float] = []

        class Clock(TrainerCallback):
            started = 0.0

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                Clock.started = time.perf_counter()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                seconds.append(time.perf_counter() - Clock.started)

        with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            args = DPOConfig(
                output_dir=directory, beta=BETA, learning_rate=LR, lr_scheduler_type="constant", max_grad_norm=0.0, weight_decay=0.0,
                per_device_train_batch_size=BATCH, max_steps=count, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
                bf16=False, gradient_checkpointing=False, max_length=MAX_LENGTH, precompute_ref_log_probs=True,
                train_sampling_strategy="sequential", disable_tqdm=True,
            )  # fmt: skip
            trainer = DPOTrainer(
                model=model(self.family),
                args=args,
                train_dataset=Dataset.from_list(rows[first * BATCH : (first + count) * BATCH]),
                processing_class=self.words,
                peft_config=LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, task_type="CAUSAL_LM"),
                callbacks=[Clock()],
            )
            given = peft_state({name: tensor[0] for name, tensor in self.start.items()})
            own = {
                name.replace(".default", ""): parameter
                for name, parameter in trainer.model.named_parameters()  # type: ignore[union-attr]
                if "lora_" in name
            }
            assert own.keys() == given.keys(), "both train the same layers"
            with torch.no_grad():
                for name, parameter in own.items():
                    parameter.copy_(given[name])
            trainer.train()
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return seconds, losses


def main() -> None:
    """Run in turn, print, store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="gpt2")
    parser.add_argument("--data", default="../shared/data/hh_helpful_harmless.jsonl.gz")
    parser.add_argument("--steps", type=int, default=20, help="of the comparison of losses")
    parser.add_argument("--repeats", type=int, default=3, help="turns of as many steps for the times")
    parser.add_argument("--no-store", action="store_true", help="print, and write no result")
    arguments = parser.parse_args()

    some = pairs(arguments.data)[: BATCH * arguments.steps * (arguments.repeats + 1)]
    texts = [part for p in pairs(arguments.data) for part in (p.prompt + p.chosen, p.rejected)]
    words = tokenizer(texts, MODELS[arguments.model]["vocab_size"])
    ours = {packs: Ours(arguments.model, words, some, packs) for packs in (True, False)}
    theirs = Theirs(arguments.model, words, some, ours[True].start)
    data = ours[True].problem.data
    lengths = [
        float(np.mean([len(ids) for ids in part])) for part in (data.prompt, data.chosen, data.rejected)
    ]
    _, our_losses = ours[True].steps(arguments.steps)
    ours[False].steps(arguments.steps)
    _, their_losses = theirs.steps(0, arguments.steps)
    apart = max(abs(a - b) for a, b in zip(our_losses, their_losses, strict=True))
    print(
        f"mean tokens of prompt, chosen, rejected: {lengths}; losses apart by at most {apart:.2e}", flush=True
    )
    rows = []
    for turn in range(1, arguments.repeats + 1):
        packed, _ = ours[True].steps(arguments.steps)
        trl, _ = theirs.steps(turn * arguments.steps, arguments.steps)
        padded, _ = ours[False].steps(arguments.steps)
        # The first step of a fresh trainer also pays for first touches.
        rows.append(
            {
                name: statistics.median(s[1:])
                for name, s in (("packed", packed), ("trl", trl), ("padded", padded))
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "machine": machine.describe(),
        "model": arguments.model,
        "mean_tokens": lengths,
        "steps_a_turn": arguments.steps,
        "turns": rows,
        "trl_over_ours": statistics.median(row["trl"] / row["packed"] for row in rows),
        "padded_over_packed": statistics.median(row["padded"] / row["packed"] for row in rows),
        "final_loss": {"ours": our_losses[-1], "trl": their_losses[-1]},
        "losses_apart": apart,
    }
    print(json.dumps(result, indent=2))
    if not arguments.no_store:
        machine.store(f"trl_step_{arguments.model}", result)


if __name__ == "__main__":
    main()
