"""From the parts of an experiment through its rounds to a run directory."""

import hashlib
import json
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from safetensors.numpy import save_file

from prefmesh import checkpoint
from prefmesh.algorithms.methods.dec_dpo import DecDPO
from prefmesh.algorithms.state import State, take
from prefmesh.config import ExperimentConfig, load_config
from prefmesh.environment import describe_environment
from prefmesh.errors import Diverged, InputError
from prefmesh.experiment import Experiment, prepare
from prefmesh.interruption import Interrupted, stop_requested
from prefmesh.measure import Evaluation
from prefmesh.metrics import JsonLines, new_directory, read_lines, refuse_taken, write_json, write_text
from prefmesh.policies.base import Params, average, row_bytes
from prefmesh.policies.causal_lm import CausalLMPolicy
from prefmesh.policies.export import save_policy, save_tensors
from prefmesh.policies.loading import model_source
from prefmesh.preferences.texts import text_key
from prefmesh.topology.describe import description

LOGS = ("metrics.jsonl", "agents.jsonl")


@runtime_checkable
class Listener(Protocol):
    """Who wants to know how a run goes on."""

    def stage(self, text: str) -> None: ...

    def round(self, round_: int, rounds: int, metrics: Mapping[str, Any]) -> None: ...


class Silent:
    """Nobody."""

    def stage(self, text: str) -> None:
        """Ignored."""

    def round(self, round_: int, rounds: int, metrics: Mapping[str, Any]) -> None:
        """Ignored."""


def run(
    config: ExperimentConfig, out: Path, *, listener: Listener | None = None, name: str | None = None
) -> dict[str, Any]:
    """Run an experiment in a new directory; its summary.

    Raises `InputError` (nothing is written), `Diverged` or `Interrupted` (what there is stays).
    """
    refuse_taken(out, otherwise="--resume to go on with a run")
    listener = listener or Silent()
    _set_threads(config)
    experiment = prepare(config, listener.stage)

    def begin(directory: Path) -> None:
        environment = describe_environment(config.seed, experiment.policy.device)
        taken = {"agents_per_pass": experiment.learner.agents_per_pass}
        write_json(directory / "environment.json", environment | taken)
        write_text(directory / "config.yaml", config.to_yaml())

    new_directory(out, begin)
    return _Run(experiment, out, listener, name or config.method.name).go()


def resume(
    out: Path,
    *,
    config: ExperimentConfig | None = None,
    listener: Listener | None = None,
    name: str | None = None,
) -> dict[str, Any]:
    """Go on with an unfinished run, bit for bit as if it had not been stopped; a finished one is left as it is.

    Raises `InputError` where there is no run, or one of another config.
    """
    if not (out / "config.yaml").is_file():
        raise InputError(f"{out}: no run to resume (it has no config.yaml); allowed: a run directory")
    own = load_config(out / "config.yaml")
    if config is not None and config.hash() != own.hash():
        raise InputError(
            f"{out}: found a run of another config; allowed: the config in {out / 'config.yaml'}"
        )
    if (done := finished(out)) is not None:
        return done
    listener = listener or Silent()
    _set_threads(own)
    # As before: another number would round otherwise.
    path = out / "environment.json"
    environment = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    experiment = prepare(own, listener.stage, agents_per_pass=environment.get("agents_per_pass"))
    return _Run(experiment, out, listener, name or own.method.name).go()


def finished(out: Path) -> dict[str, Any] | None:
    """The summary of a run that is done, else none."""
    path = out / "summary.json"
    if not path.is_file():
        return None
    summary = json.loads(path.read_text(encoding="utf-8"))
    return summary if summary["status"] == "done" else None


class _Run:
    """One run directory while it is written."""

    def __init__(self, experiment: Experiment, out: Path, listener: Listener, name: str):
        self.experiment, self.out, self.listener, self.name = experiment, out, listener, name
        self.config = experiment.config
        self.rounds = self.config.method.rounds
        self.hash = self.config.hash()
        self.bytes_sent_total = 0
        self.seconds = 0.0

    def go(self) -> dict[str, Any]:
        """All rounds from the newest checkpoint, or from the start."""
        experiment = self.experiment
        method = experiment.method
        state, first = self._restore()
        if isinstance(method, DecDPO):
            write_json(self.out / "topology.json", description(method.mixing))
        evaluation: Evaluation | None = None
        started, before = time.perf_counter(), self.seconds
        with closing(self.metrics), closing(self.agents), stop_requested() as stop:
            for round_ in range(first, self.rounds + 1):
                state, evaluation = self._round(state, round_)
                self.seconds = before + time.perf_counter() - started
                due = round_ % self.config.runtime.checkpoint_every == 0 or round_ == self.rounds
                stopping = stop() and round_ < self.rounds
                if due or stopping:
                    self._checkpoint(state, round_)
                if stopping:
                    self._summary("interrupted", None)
                    raise Interrupted(
                        f"stopped after round {round_} of {self.rounds}; go on with: prefmesh run --resume {self.out}"
                    )
        if evaluation is None:
            # Killed between the last checkpoint and the end: measure again what was measured then.
            evaluation = self._evaluate(state, self.rounds)
        return self._finish(state, evaluation)

    def _restore(self) -> tuple[State, int]:
        """The state and the round to go on with; logs are cut to what the checkpoint knows."""
        checkpoints = self.out / "checkpoints"
        found = checkpoint.load(checkpoints, config=self.hash)
        keep = found[0].log_bytes if found else dict.fromkeys(LOGS, 0)
        for name in LOGS:
            path = self.out / name
            if (size := path.stat().st_size if path.exists() else 0) < keep[name]:
                raise InputError(
                    f"{path}: found {size} bytes, fewer than the {keep[name]} that its checkpoint knows of; "
                    "allowed: the file as the run wrote it, or no checkpoints/ to start again from round 0"
                )
        kept = self.config.runtime.checkpoints_kept
        checkpoint.forget_newer(checkpoints, than=found[0].round if found else -1, keep=kept)
        self.metrics, self.agents = (JsonLines(self.out / name, keep=keep[name]) for name in LOGS)
        method, device = self.experiment.method, self.experiment.policy.device
        if found is None:
            return self.experiment.learner.begin(self.experiment.start), 0
        record, tensors = found
        self.bytes_sent_total, self.seconds = record.bytes_sent_total, record.seconds
        # Copies: tensors mapped from a file are not aligned as torch allocates, and products may round by that.
        placed = {
            name: t if name == "batches_drawn" else t.to(device, copy=True) for name, t in tensors.items()
        }
        state = State.from_tensors(placed, method.agents, like=self.experiment.start)
        return state, record.round + 1

    def _round(self, state: State, round_: int) -> tuple[State, Evaluation | None]:
        """One round with its metrics line; round 0 only measures."""
        started = time.perf_counter()
        measures: dict[str, Any] = {"round": round_}
        if round_ > 0:
            state, found = self.experiment.learner.round(state, round_)
            self._refuse_divergence(round_, found)
            sent = self.experiment.method.bytes_sent(
                round_, model_bytes=row_bytes(state.theta), data_bytes=self.experiment.data_bytes
            )
            self.bytes_sent_total += sent
            measures |= found | {"bytes_sent": sent}
        else:
            measures["bytes_sent"] = 0
        measures["bytes_sent_total"] = self.bytes_sent_total
        measures["seconds"] = time.perf_counter() - started
        evaluation = None
        if round_ % self.config.evaluation.every == 0 or round_ == self.rounds:
            evaluation = self._evaluate(state, round_)
            measures |= evaluation.metrics
            for record in evaluation.users:
                self.agents.append({"round": round_, **record})
        self.metrics.append(measures)
        if evaluation is not None and not np.isfinite(evaluation.metrics["train_loss"]):
            raise self._diverged(round_, "the loss")
        self.listener.round(round_, self.rounds, measures)
        return state, evaluation

    def _evaluate(self, state: State, round_: int) -> Evaluation:
        one_policy = self.experiment.method.one_policy
        return self.experiment.evaluator.evaluate(state.theta, round_, one_policy=one_policy, samples=True)

    def _refuse_divergence(self, round_: int, found: dict[str, Any]) -> None:
        finite_loss, finite_theta = np.isfinite(found["loss"]), found.pop("parameters_finite")
        if finite_loss and finite_theta:
            return
        self.metrics.append({"round": round_, **found})
        raise self._diverged(round_, "the loss" if not finite_loss else "a parameter")

    def _diverged(self, round_: int, what: str) -> Diverged:
        """The error to raise, after the summary is written."""
        self._summary("diverged", None)
        kept = checkpoint.newest_round(self.out / "checkpoints")
        where = (
            f"the checkpoint of round {kept} is kept"
            if kept is not None
            else "no checkpoint had been written yet"
        )
        return Diverged(
            f"{self.out}: {what} stopped being finite in round {round_}; {where}. Try a smaller optimizer.lr"
        )

    def _checkpoint(self, state: State, round_: int) -> None:
        checkpoint.save(
            self.out / "checkpoints",
            state.tensors(),
            round_=round_,
            config=self.hash,
            log_bytes={"metrics.jsonl": self.metrics.sync(), "agents.jsonl": self.agents.sync()},
            bytes_sent_total=self.bytes_sent_total,
            seconds=self.seconds,
            keep=self.config.runtime.checkpoints_kept,
        )

    def _finish(self, state: State, evaluation: Evaluation) -> dict[str, Any]:
        """Policies, held-out figures, and last the summary, which marks the run as done."""
        self._save(average(state.theta), self.out / "policy")
        own = next(iter(state.theta.values()))
        differ = own.shape[0] > 1 and own.stride(0) != 0
        if differ and getattr(self.config.policy, "train", "lora") == "lora":
            for i in range(own.shape[0]):
                self._save(take(state.theta, np.array([i])), self.out / "adapters" / f"agent_{i:04d}")
            write_json(self.out / "adapters" / "users.json", self._agent_of_user())
        one_policy = self.experiment.method.one_policy
        headline = evaluation.average if one_policy else evaluation.own
        if len(headline.rows):
            save_file(
                {
                    "rows": headline.rows,
                    "margin": np.ascontiguousarray(headline.margin),
                    "accuracy": np.ascontiguousarray(headline.accuracy),
                    "own_accuracy": np.ascontiguousarray(evaluation.own.accuracy),
                    "prompt": np.array(
                        [_number_of(text_key(self.experiment.pairs[i].prompt)) for i in headline.rows]
                    ),
                },
                self.out / "held_out.safetensors",
            )
        return self._summary("done", evaluation)

    def _agent_of_user(self) -> dict[str, int]:
        """The agent of each user whose training pairs all lie with one."""
        found: dict[str, set[int]] = {}
        for i, agent in enumerate(self.experiment.division.agents):
            for row in agent.train:
                found.setdefault(self.experiment.pairs[row].user, set()).add(i)
        return {user: next(iter(agents)) for user, agents in sorted(found.items()) if len(agents) == 1}

    def _save(self, row: Params, directory: Path) -> None:
        policy = self.experiment.policy
        if isinstance(policy, CausalLMPolicy):
            save_policy(policy, row, directory, base=model_source(self.config.policy.model))
        else:
            save_tensors(row, directory)

    def _summary(self, status: str, evaluation: Evaluation | None) -> dict[str, Any]:
        """Write and return `summary.json`."""
        experiment = self.experiment
        one_policy = experiment.method.one_policy
        found = (evaluation.average if one_policy else evaluation.own) if evaluation else None
        rows = found.rows if found is not None else np.arange(0)
        held_out = [experiment.pairs[i] for i in rows]
        last = (read_lines(self.out / "metrics.jsonl") or [{}])[-1]
        summary = {
            "name": self.name,
            "method": self.config.method.name,
            "status": status,
            "seed": self.config.seed,
            "rounds": last.get("round", 0),
            "agents": len(experiment.division.agents),
            "users": len({pair.user for pair in experiment.pairs}),
            "agents_per_pass": experiment.learner.agents_per_pass,
            # None where no prompt is read at all; False: the model attends by code of its own, prompts are read twice.
            "prompts_read_once": getattr(experiment.policy, "packs", None),
            "training_pairs": int(sum(len(agent.train) for agent in experiment.division.agents)),
            "held_out_pairs": len(rows),
            "headline": "average" if one_policy else "own",
            "final": {key: value for key, value in last.items() if key != "round"},
            "accuracy_interval": list(experiment.evaluator.interval(found)[1:])
            if found is not None and len(rows)
            else None,
            "ceiling": experiment.town.ceiling(held_out) if experiment.town and held_out else None,
            "leakage": experiment.division.leakage.shares(),
            "read": asdict(experiment.report) if experiment.report else None,
            "bytes_sent_total": self.bytes_sent_total,
            "seconds": self.seconds,
        }
        write_json(self.out / "summary.json", summary)
        return summary


def _number_of(text: str) -> int:
    """A 63-bit number for a text: pairs of one prompt are told apart without keeping the text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _set_threads(config: ExperimentConfig) -> None:
    if config.runtime.threads is not None:
        torch.set_num_threads(config.runtime.threads)
