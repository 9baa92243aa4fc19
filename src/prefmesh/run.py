"""From the parts of an experiment through its rounds to a run directory."""

import json
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int
from safetensors.numpy import save_file

from prefmesh import checkpoint
from prefmesh.algorithms.local_rule import STATS
from prefmesh.algorithms.methods import Method
from prefmesh.algorithms.methods.gossip import Gossip
from prefmesh.algorithms.state import State, take
from prefmesh.checkpoint import Checkpoint
from prefmesh.config import ExperimentConfig, load_config
from prefmesh.environment import describe_environment, versions
from prefmesh.errors import Diverged, InputError
from prefmesh.evaluation.statistics import accuracy_interval
from prefmesh.experiment import prepare
from prefmesh.interruption import Interrupted, stop_requested
from prefmesh.measure import Evaluation
from prefmesh.mesh import ALONE, Group, residual_bytes
from prefmesh.metrics import (
    JsonLines,
    NoLines,
    new_directory,
    read_lines,
    refuse_taken,
    write_json,
    write_text,
)
from prefmesh.policies.base import Params, Policy
from prefmesh.policies.causal_lm import CausalLMPolicy
from prefmesh.policies.export import save_policy, save_tensors
from prefmesh.policies.loading import model_source
from prefmesh.preferences.census import Census
from prefmesh.preferences.pairs import Pair
from prefmesh.preferences.reading import ReadReport
from prefmesh.preferences.town import Town
from prefmesh.topology.describe import description

LOGS = ("metrics.jsonl", "agents.jsonl")


@runtime_checkable
class Learns(Protocol):
    """What a run asks of whoever does the rounds: `prefmesh.algorithms.rounds.Learner`, here or elsewhere."""

    @property
    def agents_per_pass(self) -> int: ...

    def begin(self, row: Params) -> State: ...

    def round(
        self, state: State, round_: int, *, consensus: bool = True, evaluated: bool = True
    ) -> tuple[State, dict[str, float]]: ...


@runtime_checkable
class Evaluates(Protocol):
    """What a run asks of whoever measures: `prefmesh.measure.Evaluator`, here or elsewhere."""

    @property
    def held(self) -> Int[np.ndarray, " pairs"]: ...

    def evaluate(self, theta: Params, round_: int) -> Evaluation: ...

    def mean(self, theta: Params) -> Params: ...

    def differ(self, theta: Params) -> bool: ...


@runtime_checkable
class Parts(Protocol):
    """What a run is made of: `prefmesh.experiment.Experiment`, or its likeness where agents live behind a server."""

    @property
    def config(self) -> ExperimentConfig: ...
    @property
    def pairs(self) -> list[Pair]: ...
    @property
    def report(self) -> ReadReport | None: ...
    @property
    def census(self) -> Census: ...
    @property
    def policy(self) -> Policy: ...
    @property
    def method(self) -> Method: ...
    @property
    def learner(self) -> Learns: ...
    @property
    def evaluator(self) -> Evaluates: ...
    @property
    def start(self) -> Params: ...
    @property
    def town(self) -> Town | None: ...
    @property
    def data_bytes(self) -> int: ...


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
    config: ExperimentConfig,
    out: Path,
    *,
    listener: Listener | None = None,
    name: str | None = None,
    group: Group = ALONE,
) -> dict[str, Any]:
    """Run an experiment in a new directory; its summary (in process 0: the others do not write one, and return {}).

    `group`: the processes that share it, each of which calls this. Where a launcher started them again after one was killed, the
    run goes on that the first attempt began. Raises `InputError` (nothing is written), `Diverged`, `Interrupted` or `PeerLost`
    (what there is stays).
    """
    _meet(config, group)
    if group.attempt and _of_process_0(group, (out / "config.yaml").is_file()):
        return resume(out, config=config, listener=listener, name=name, group=group)
    first = group.rank == 0
    group.together(lambda: refuse_taken(out, otherwise="--resume to go on with a run") if first else None)
    listener = listener or Silent()
    experiment = prepare(config, listener.stage, group=group)

    def begin(directory: Path) -> None:
        described(experiment, directory)

    group.together(lambda: new_directory(out, begin) if first else None)
    # Where the other processes see another disk, they have a directory of their own there, for what they host.
    there = (out / "config.yaml").is_file()
    group.together(lambda: None if there else new_directory(out, begin))
    return Rounds(experiment, out, listener, name or config.method.name).go()


def resume(
    out: Path,
    *,
    config: ExperimentConfig | None = None,
    listener: Listener | None = None,
    name: str | None = None,
    group: Group = ALONE,
) -> dict[str, Any]:
    """Go on with an unfinished run, bit for bit as if it had not been stopped; a finished one is left as it is.

    Raises `InputError` where there is no run, or one of another config.
    """
    own = group.together(lambda: config_of(out, config))
    _meet(own, group)
    done = finished(out)
    if _of_process_0(group, done is not None):
        return done or {}
    listener = listener or Silent()
    # As before: another number would round otherwise.
    path = out / "environment.json"
    environment = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    agents_per_pass = int(_of_process_0(group, environment.get("agents_per_pass") or 0)) or None
    experiment = prepare(own, listener.stage, agents_per_pass=agents_per_pass, group=group)
    return Rounds(experiment, out, listener, name or own.method.name).go()


def described(experiment: "Parts", directory: Path) -> None:
    """What a run directory holds before round 0: the whole config, and where it runs."""
    environment = describe_environment(experiment.config.seed, experiment.policy.device)
    taken = {"agents_per_pass": experiment.learner.agents_per_pass}
    write_json(directory / "environment.json", environment | taken)
    write_text(directory / "config.yaml", experiment.config.to_yaml())


def config_of(out: Path, given: ExperimentConfig | None = None) -> ExperimentConfig:
    """A run's own config. Raises `InputError` where there is no run, or one of another config than the given one."""
    if not (out / "config.yaml").is_file():
        raise InputError(f"{out}: no run to resume (it has no config.yaml); allowed: a run directory")
    own = load_config(out / "config.yaml")
    if given is not None and given.hash() != own.hash():
        raise InputError(
            f"{out}: found a run of another config; allowed: the config in {out / 'config.yaml'}"
        )
    return own


def _meet(config: ExperimentConfig, group: Group) -> None:
    """Raise `InputError` where processes are not as many as the config says, or do not agree on it or on the software."""
    if group.size != config.runtime.processes:
        raise InputError(
            f"runtime.processes: {config.runtime.processes}, but {group.size} run this; allowed: prefmesh run, which starts them, or "
            "a launcher that starts as many"
        )
    group.agree(versions() | {"the config": config.hash()})


def _of_process_0(group: Group, number: float | int) -> float:
    """What process 0 says."""
    return float(group.gather(np.array([[float(number)]]))[0, 0])


def finished(out: Path) -> dict[str, Any] | None:
    """The summary of a run that is done, else none."""
    path = out / "summary.json"
    if not path.is_file():
        return None
    summary = json.loads(path.read_text(encoding="utf-8"))
    return summary if summary["status"] == "done" else None


class Rounds:
    """One run directory while it is written. Process 0 writes it; the others write checkpoints and adapters of what they host.

    Several processes meet at evaluations and checkpoints, and not before: what rounds in between measured waits in `lines`.
    """

    def __init__(self, experiment: Parts, out: Path, listener: Listener, name: str):
        self.experiment, self.out, self.listener, self.name = experiment, out, listener, name
        self.config = experiment.config
        self.group = experiment.method.mesh.group
        self.rounds = self.config.method.rounds
        self.hash = self.config.hash()
        self.bytes_sent_total = 0
        self.seconds = 0.0
        self.lines: list[dict[str, Any]] = []
        self.wire_bytes = 0
        self.writes = self.group.rank == 0
        self.data_bytes = int(self.group.total(np.array([float(experiment.data_bytes)]))[0])
        self.checkpoints = out / "checkpoints"
        if not self.writes:
            self.checkpoints /= f"process_{self.group.rank:04d}"

    def go(self) -> dict[str, Any]:
        """All rounds from the newest checkpoint, or from the start."""
        experiment = self.experiment
        method = experiment.method
        state, first = self._restore()
        if isinstance(method, Gossip) and self.writes:
            write_json(self.out / "topology.json", description(method.mixing))
        evaluation: Evaluation | None = None
        started, before = time.perf_counter(), self.seconds
        with closing(self.metrics), closing(self.agents), stop_requested() as stop:
            for round_ in range(first, self.rounds + 1):
                state = self._learn(state, round_)
                due = round_ % self.config.runtime.checkpoint_every == 0 or round_ == self.rounds
                evaluated = self._evaluated(round_)
                if self.group.size > 1 and not (due or evaluated):
                    self.listener.round(round_, self.rounds, self.lines[-1])
                    continue
                self._meet()
                evaluation = self._log(state, round_, evaluated=evaluated)
                self.seconds = before + time.perf_counter() - started
                stopping = self._anyone(stop()) and round_ < self.rounds
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
        found = self.group.together(lambda: checkpoint.load(self.checkpoints, config=self.hash))
        # All go on from the round that every process has.
        newest = int(self.group.gather(np.array([[float(found[0].round if found else -1)]])).min())
        if found is not None and found[0].round > newest:
            found = checkpoint.load(self.checkpoints, config=self.hash, at_most=newest)
        self.group.together(lambda: self._refuse_unequal(found, newest))
        keep: dict[str, int] = dict.fromkeys(LOGS, 0)
        if found and self.writes:
            keep = found[0].log_bytes
        self.group.together(lambda: self._refuse_cut(keep) if self.writes else None)
        checkpoint.forget_newer(self.checkpoints, than=newest, keep=self._kept)
        self.metrics, self.agents = (
            JsonLines(self.out / name, keep=keep[name]) if self.writes else NoLines() for name in LOGS
        )
        method, device = self.experiment.method, self.experiment.policy.device
        if found is None:
            return self.experiment.learner.begin(self.experiment.start), 0
        record, tensors = found
        self.bytes_sent_total, self.seconds = record.bytes_sent_total, record.seconds
        # Copies: tensors mapped from a file are not aligned as torch allocates, and products may round by that.
        placed = {
            name: t if name == "batches_drawn" else t.to(device, copy=True) for name, t in tensors.items()
        }
        state = State.from_tensors(placed, method.mesh.hosted, like=self.experiment.start)
        return state, record.round + 1

    @property
    def _kept(self) -> int:
        """Checkpoints that stay. A process that is killed while it writes one leaves the others one ahead."""
        return max(self.config.runtime.checkpoints_kept, 2 if self.group.size > 1 else 1)

    def _refuse_unequal(self, found: tuple[Checkpoint, Any] | None, newest: int) -> None:
        if (found[0].round if found else -1) != newest:
            raise InputError(
                f"{self.checkpoints}: found no undamaged checkpoint of round {newest}, which is the newest of another process; allowed: "
                "the directory as the run wrote it, or no checkpoints/ in any process, to start again from round 0"
            )

    def _refuse_cut(self, keep: dict[str, int]) -> None:
        for name in LOGS:
            path = self.out / name
            if (size := path.stat().st_size if path.exists() else 0) < keep[name]:
                raise InputError(
                    f"{path}: found {size} bytes, fewer than the {keep[name]} that its checkpoint knows of; "
                    "allowed: the file as the run wrote it, or no checkpoints/ to start again from round 0"
                )

    def _learn(self, state: State, round_: int) -> State:
        """One round, whose measures join `lines`; round 0 only measures."""
        started = time.perf_counter()
        line: dict[str, Any] = {"round": round_, "bytes_sent": 0}
        if round_ > 0:
            alone, evaluated = self.group.size == 1, self._evaluated(round_)
            state, found = self.experiment.learner.round(
                state, round_, consensus=alone or evaluated, evaluated=evaluated
            )
            method, policy = self.experiment.method, self.experiment.policy
            line["bytes_sent"] = method.bytes_sent(
                round_,
                model_bytes=method.message_bytes(policy.trained(state.theta, round_)),
                data_bytes=self.data_bytes,
            )
            # Who sits out the round must hear of what is folded into the frozen model, too.
            heard = residual_bytes(state.theta, len(method.participants(round_)))
            line["bytes_sent"] += method.agents * heard
            line |= found
        self.bytes_sent_total += line["bytes_sent"]
        line |= {"bytes_sent_total": self.bytes_sent_total, "seconds": time.perf_counter() - started}
        self.lines.append(line)
        return state

    def _evaluated(self, round_: int) -> bool:
        return round_ % self.config.evaluation.every == 0 or round_ == self.rounds

    def _anyone(self, stop: bool) -> bool:
        return bool(self.group.total(np.array([float(stop)]))[0])

    def _meet(self) -> None:
        """What all processes measured since they met last goes into the log, but for the last line."""
        learned = [line for line in self.lines if line["round"] > 0]
        mesh, method = self.experiment.method.mesh, self.experiment.method
        table = np.zeros((len(learned), len(STATS) + 2))
        for row, line in zip(table, learned, strict=True):
            own = len(mesh.here(method.participants(line["round"])))
            row[:-2] = [own * line[key] for key in STATS]
            row[-2:] = own, not line.pop("parameters_finite")
        *numbers, sent = self.group.total(np.append(table.reshape(-1), float(self.group.bytes_sent)))
        table = np.reshape(numbers, table.shape)
        for row, line in zip(table, learned, strict=True):
            line |= dict(zip(STATS, (row[:-2] / row[-2]).tolist(), strict=True))
            if row[-1] or not np.isfinite(line["loss"]):
                for past in self.lines[: self.lines.index(line) + 1]:
                    self.metrics.append(past)
                what = "a parameter" if np.isfinite(line["loss"]) else "the loss"
                raise self._diverged(line["round"], what)
        if self.group.size > 1:
            self.lines[-1]["wire_bytes"] = int(sent) - self.wire_bytes
            self.wire_bytes = int(sent)
        for line in self.lines[:-1]:
            self.metrics.append(line)
        self.lines = self.lines[-1:]

    def _log(self, state: State, round_: int, *, evaluated: bool) -> Evaluation | None:
        """The last line goes into the log, with what an evaluation finds where one is due."""
        (line,) = self.lines
        self.lines = []
        evaluation = None
        if evaluated:
            evaluation = self._evaluate(state, round_)
            line |= evaluation.metrics
            for record in evaluation.users:
                self.agents.append({"round": round_, **record})
        self.metrics.append(line)
        if evaluation is not None and not np.isfinite(evaluation.metrics["train_loss"]):
            raise self._diverged(round_, "the loss")
        self.listener.round(round_, self.rounds, line)
        return evaluation

    def _evaluate(self, state: State, round_: int) -> Evaluation:
        return self.experiment.evaluator.evaluate(self.experiment.method.policies(state), round_)

    def _diverged(self, round_: int, what: str) -> Diverged:
        """The error to raise, after the summary is written."""
        self._summary("diverged", None)
        kept = checkpoint.newest_round(self.checkpoints)
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
            self.checkpoints,
            state.tensors(),
            round_=round_,
            config=self.hash,
            log_bytes={"metrics.jsonl": self.metrics.sync(), "agents.jsonl": self.agents.sync()},
            bytes_sent_total=self.bytes_sent_total,
            seconds=self.seconds,
            keep=self._kept,
        )

    def _finish(self, state: State, evaluation: Evaluation) -> dict[str, Any]:
        """Policies, held-out figures, and last the summary, which marks the run as done."""
        experiment, method = self.experiment, self.experiment.method
        policies = method.policies(state)
        mean = experiment.evaluator.mean(policies)
        if self.writes:
            save_row(self.config, experiment.policy, mean, self.out / "policy")
        if experiment.evaluator.differ(policies) and getattr(self.config.policy, "train", "lora") == "lora":
            for i in range(method.mesh.hosted):
                place = self.out / "adapters" / f"agent_{method.mesh.first + i:04d}"
                ranks = method.mesh.ranks
                rank = None if ranks is None else int(ranks.of[method.mesh.first + i])
                save_row(self.config, experiment.policy, take(policies, np.array([i])), place, rank)
            if self.writes:
                write_json(self.out / "adapters" / "users.json", experiment.census.agent_of_user)
        groups = method.groups(state)
        if groups is not None and self.writes:
            write_json(
                self.out / "groups.json", dict(zip(experiment.census.names, groups.tolist(), strict=True))
            )
        headline = evaluation.average if method.one_policy else evaluation.own
        if len(headline.rows) and self.writes:
            save_file(
                {
                    "rows": headline.rows,
                    "margin": np.ascontiguousarray(headline.margin),
                    "accuracy": np.ascontiguousarray(headline.accuracy),
                    "own_accuracy": np.ascontiguousarray(evaluation.own.accuracy),
                    "prompt": experiment.census.prompts_of(headline.rows),
                },
                self.out / "held_out.safetensors",
            )
        return self._summary("done", evaluation)

    def _summary(self, status: str, evaluation: Evaluation | None) -> dict[str, Any]:
        """Write and return `summary.json`; the last thing that is written, when all processes are done."""
        experiment = self.experiment
        census, one_policy = experiment.census, experiment.method.one_policy
        found = (evaluation.average if one_policy else evaluation.own) if evaluation else None
        ceiling = self._ceiling() if found is not None and len(found.rows) else None
        if not self.writes:
            return {}
        last = (read_lines(self.out / "metrics.jsonl") or [{}])[-1]
        summary = {
            "name": self.name,
            "method": self.config.method.name,
            "status": status,
            "seed": self.config.seed,
            "rounds": last.get("round", 0),
            "agents": len(census.sizes),
            "users": len(census.users),
            "agents_per_pass": experiment.learner.agents_per_pass,
            # None where no prompt is read at all; False: the model attends by code of its own, prompts are read twice.
            "prompts_read_once": getattr(experiment.policy, "packs", None),
            "training_pairs": int(census.sizes.sum()),
            "held_out_pairs": len(found.rows) if found is not None else 0,
            "headline": "average" if one_policy else "own",
            "final": {key: value for key, value in last.items() if key != "round"},
            "accuracy_interval": list(accuracy_interval(found.accuracy, census.prompts_of(found.rows))[1:])
            if found is not None and len(found.rows)
            else None,
            "ceiling": ceiling,
            "leakage": census.leakage,
            "read": asdict(experiment.report) if experiment.report else None,
            "bytes_sent_total": self.bytes_sent_total,
            "seconds": self.seconds,
        }
        write_json(self.out / "summary.json", summary)
        return summary

    def _ceiling(self) -> dict[str, float] | None:
        """The best that can be expected on everybody's held-out pairs, where users are simulated."""
        town, held = self.experiment.town, self.experiment.evaluator.held
        own = town.ceiling([self.experiment.pairs[i] for i in held]) if town and len(held) else {}
        numbers = [len(held) * own.get(key, 0.0) for key in ("own", "consensus")]
        *sums, count = self.group.total(np.array([*numbers, float(len(held))]))
        return {"own": float(sums[0] / count), "consensus": float(sums[1] / count)} if town else None


def save_row(
    config: ExperimentConfig, policy: Policy, row: Params, directory: Path, rank: int | None = None
) -> None:
    """Write a model (1, ...) of the config's policy as others load it (see `policies.export`)."""
    if isinstance(policy, CausalLMPolicy):
        save_policy(policy, row, directory, base=model_source(config.policy.model), rank=rank)
    else:
        save_tensors(row, directory)
