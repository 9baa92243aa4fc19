"""TRL's `DPOTrainer` on the first agent's steps: one agent is what it knows.

Its own best settings here: reference log-probabilities computed beforehand, no gradient checkpointing (its padding-free option
needs flash attention). Only the steps are timed: from a step's beginning to its end, as its callbacks see it.
"""

import tempfile
import time
import warnings
from importlib.util import find_spec
from typing import Any

import numpy as np

from prefmesh.bench.contest import Timed
from prefmesh.bench.ours import batches
from prefmesh.bench.plain import language_model, plain_model, start_adapter
from prefmesh.errors import InputError
from prefmesh.experiment import Experiment
from prefmesh.policies import lora


class Trl:
    """A fresh trainer a turn, from the start parameters; only the first turn's losses can be compared with ours."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment

    @staticmethod
    def check(experiment: Experiment) -> None:
        """Raise `InputError` where TRL is missing, or does not train like this."""
        if find_spec("trl") is None:
            raise InputError("--against trl: trl is not installed; allowed: pip install 'trl>=1.16'")
        language_model(experiment)
        if (processes := experiment.config.runtime.processes) > 1:
            raise InputError(
                f"--against trl: runtime.processes {processes} found; allowed: 1 (beside it, one agent's steps are done)"
            )
        optimizer, objective = experiment.learner.optimizer, experiment.config.objective
        if not objective.plain_dpo:
            raise InputError(
                "--against trl: allowed: objective.loss_type sigmoid alone, without label_smoothing or f_divergence_type"
            )
        if optimizer.name != "adamw" or optimizer.schedule != "constant" or optimizer.warmup_rounds:
            raise InputError(
                "--against trl: allowed: optimizer.name adamw with schedule constant and no warm-up"
            )

    def rounds(self, first: int, count: int) -> Timed:
        """Seconds and losses of the steps, added up (averaged) over each round's local steps."""
        from datasets import Dataset
        from transformers import PrinterCallback, TrainerCallback
        from trl.trainer.dpo_config import DPOConfig
        from trl.trainer.dpo_trainer import DPOTrainer

        experiment, policy = self.experiment, language_model(self.experiment)
        rows = [
            batches(experiment.learner, r, np.arange(1))[0][0] for r in range(first, first + count)
        ]  # (steps, batch) each
        flat = np.concatenate(rows)
        pairs = [experiment.pairs[i] for i in flat.reshape(-1).tolist()]
        data = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
        seconds: list[float] = []

        class Clock(TrainerCallback):
            started = 0.0

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                Clock.started = time.perf_counter()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                seconds.append(time.perf_counter() - Clock.started)

        settings, objective = experiment.learner.optimizer, experiment.config.objective
        with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            args = DPOConfig(
                output_dir=directory, beta=objective.beta, loss_type=["sigmoid"],
                learning_rate=settings.lr, lr_scheduler_type="constant", max_grad_norm=settings.max_grad_norm or 0.0,
                weight_decay=settings.weight_decay, adam_beta1=settings.betas[0], adam_beta2=settings.betas[1], adam_epsilon=settings.eps,
                per_device_train_batch_size=flat.shape[1], max_steps=len(flat), logging_steps=1, save_strategy="no", report_to="none",
                use_cpu=policy.device.type == "cpu", bf16=False, gradient_checkpointing=False, max_length=policy.max_length,
                precompute_ref_log_probs=True, train_sampling_strategy="sequential", disable_tqdm=True,
            )  # fmt: skip
            adapter = None
            if policy.train == "lora":
                adapter = lora.peft_config(policy.model, policy.lora_settings, policy.targets, base=directory)
                adapter.inference_mode = False
            trainer = DPOTrainer(
                model=plain_model(experiment, adapter=False),  # type: ignore[arg-type]
                args=args,
                train_dataset=Dataset.from_list(data),
                processing_class=policy.tokenizer,
                peft_config=adapter,
                callbacks=[Clock()],
            )
            trainer.remove_callback(PrinterCallback)  # stdout is for tables and JSON
            if adapter:
                start_adapter(trainer.model, experiment)  # type: ignore[arg-type]
            trainer.train()
            losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        each = rows[0].shape[0]
        return Timed(
            seconds=[sum(seconds[i : i + each]) for i in range(0, len(seconds), each)],
            losses=[sum(losses[i : i + each]) / each for i in range(0, len(losses), each)],
        )
