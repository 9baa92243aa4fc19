"""A run that was stopped, however and whenever, and resumed leaves what an uninterrupted one leaves, bit for bit."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from prefmesh import checkpoint
from prefmesh import run as running
from prefmesh.config import ExperimentConfig
from prefmesh.errors import Diverged, InputError
from prefmesh.experiment import prepare
from prefmesh.interruption import Interrupted
from tests.runs import TINY, TOWN, config, contents, without_seconds

ROUNDS = 5
ADAMW = {"name": "adamw", "lr": 0.05}
PARTIAL = {"name": "fed_dpo", "participation": 2, "rounds": ROUNDS, "local_steps": 2}
GOSSIP = {"name": "dec_dpo", "graph": "path", "rounds": ROUNDS, "local_steps": 2}

LOG_LINEAR: dict[str, dict[str, dict[str, Any]]] = {
    "centralized": {"method": {"name": "centralized"}, "optimizer": ADAMW},
    "fed_dpo": {"method": {"name": "fed_dpo"}, "optimizer": {"momentum": 0.9}},
    "fed_dpo partial": {"method": PARTIAL, "optimizer": {**ADAMW, "sampling": "with_replacement"}},
    "fed_dpo stale": {"method": {**PARTIAL, "staleness": 2}, "optimizer": ADAMW},
    "fed_dpo stale, reset": {
        "method": {**PARTIAL, "staleness": 3, "staleness_schedule": "max"},
        "optimizer": {**ADAMW, "state": "reset"},
    },
    "group_robust": {
        "method": {**PARTIAL, "name": "group_robust", "robust_step_size": 2.0, "compression": ["int8"]},
        "optimizer": ADAMW,
    },
    "q_fed_avg": {"method": {**PARTIAL, "name": "q_fed_avg", "q": 2.0}, "optimizer": {"momentum": 0.9}},
    "dec_dpo": {"method": GOSSIP, "optimizer": {**ADAMW, "weight_decay": 0.1, "max_grad_norm": 0.5}},
    "dec_dpo sgd": {
        "method": {**GOSSIP, "graph": {"name": "erdos_renyi", "p": 0.5}},
        "optimizer": {"batch_size": "full"},
    },
    "dec_dpo reset": {"method": GOSSIP, "optimizer": {"momentum": 0.9, "state": "reset", "lr": 0.5}},
    "collaboration graph": {"method": {**GOSSIP, "name": "collaboration_graph"}, "optimizer": ADAMW},
    "ditto": {"method": {**PARTIAL, "name": "ditto"}, "optimizer": ADAMW},
    "apfl": {"method": {**PARTIAL, "name": "apfl", "alpha_lr": 1.0}, "optimizer": {"momentum": 0.9}},
    "dec_ditto": {"method": {**GOSSIP, "name": "dec_ditto", "node_dropout": 0.3}, "optimizer": ADAMW},
    "dec_apfl": {"method": {**GOSSIP, "name": "dec_apfl", "alpha_lr": 1.0}, "optimizer": {"momentum": 0.9}},
    "fed_soft": {"method": {**PARTIAL, "name": "fed_soft", "estimate_every": 2}, "optimizer": ADAMW},
    "ifca": {"method": {**PARTIAL, "name": "ifca"}, "optimizer": ADAMW},
    "local_only": {
        "method": {"name": "local_only"},
        "optimizer": {**ADAMW, "schedule": "cosine", "warmup_rounds": 2},
    },
}


def log_linear(name: str) -> ExperimentConfig:
    return config(TOWN, **LOG_LINEAR[name])


class Killed(BaseException):
    """As sudden as it gets within a process: no `except Exception` sees it."""


class KilledAfter(running.Silent):
    """Kills the run once a round's metrics are written, before its checkpoint is."""

    def __init__(self, round_: int):
        self.at = round_

    def round(self, round_: int, rounds: int, metrics: Mapping[str, Any]) -> None:
        if round_ == self.at:
            raise Killed


class CtrlCIn(running.Silent):
    """Sends this process SIGINT in the middle of a round's end."""

    def __init__(self, round_: int):
        self.at = round_

    def round(self, round_: int, rounds: int, metrics: Mapping[str, Any]) -> None:
        if round_ == self.at:
            signal.raise_signal(signal.SIGINT)


def assert_same(resumed: Path, whole: Path) -> None:
    """Two finished run directories differ in nothing but what time they took."""
    mine, theirs = contents(resumed), contents(whole)
    assert set(mine) == set(theirs)
    for name in mine:
        if name == "metrics.jsonl":
            a, b = (without_seconds(files[name].decode()) for files in (mine, theirs))
            assert a == b
            assert [record["round"] for record in a] == list(range(a[-1]["round"] + 1))
        elif name == "summary.json" or (name.startswith("checkpoints/") and name.endswith(".json")):
            a, b = (_timeless(json.loads(files[name])) for files in (mine, theirs))
            assert a == b, name
        else:
            assert mine[name] == theirs[name], name


def _timeless(record: dict[str, Any]) -> dict[str, Any]:
    """Without seconds, the length of the log that holds seconds, and the hash over both."""
    record.pop("seconds")
    record.pop("mark_sha256", None)
    record.get("final", {}).pop("seconds", None)
    record.get("log_bytes", {}).pop("metrics.jsonl", None)
    return record


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run of a config, made once."""
    made: dict[str, Path] = {}

    def run(settings: ExperimentConfig) -> Path:
        key = settings.hash()
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole") / "run"
            running.run(settings, made[key])
        return made[key]

    return run


# ---- stopped after a round


@pytest.mark.parametrize("name", LOG_LINEAR)
def test_killed_after_any_round(name, whole, tmp_path):
    settings = log_linear(name)
    for stop in (0, 1, 4, ROUNDS):
        out = tmp_path / str(stop)
        with pytest.raises(Killed):
            running.run(settings, out, listener=KilledAfter(stop))
        assert not (out / "summary.json").exists()
        running.resume(out)
        assert_same(out, whole(settings))


@pytest.mark.parametrize("name", ["centralized", "fed_dpo stale", "dec_dpo", "local_only"])
def test_interrupted_between_checkpoints(name, whole, tmp_path):
    """Ctrl-C: the round under way is finished and kept, also where no checkpoint was due."""
    settings = log_linear(name)
    before = signal.getsignal(signal.SIGINT)
    for stop in (1, 2):
        out = tmp_path / str(stop)
        with pytest.raises(Interrupted, match=rf"stopped after round {stop} of {ROUNDS}; .*--resume {out}"):
            running.run(settings, out, listener=CtrlCIn(stop))
        assert checkpoint.newest_round(out / "checkpoints") == stop
        summary = json.loads((out / "summary.json").read_text())
        assert (summary["status"], summary["rounds"]) == ("interrupted", stop)
        assert signal.getsignal(signal.SIGINT) is before
        running.resume(out)
        _with_checkpoints_of(whole(settings), out)
        assert_same(out, whole(settings))


def _with_checkpoints_of(whole: Path, out: Path) -> None:
    """An interrupted run has a checkpoint more, and dropped an older one for it; the last one must be its own."""
    for path in (out / "checkpoints").iterdir():
        if f"{ROUNDS:06d}" not in path.name:
            path.unlink()
    for path in (whole / "checkpoints").iterdir():
        if f"{ROUNDS:06d}" not in path.name:
            shutil.copy(path, out / "checkpoints")


def test_ctrl_c_in_the_last_round_ends_the_run(whole, tmp_path):
    settings = log_linear("dec_dpo")
    running.run(settings, tmp_path / "run", listener=CtrlCIn(ROUNDS))
    assert_same(tmp_path / "run", whole(settings))


def test_killed_again_and_again(whole, tmp_path):
    settings = log_linear("fed_dpo stale")
    out = tmp_path / "run"
    with pytest.raises(Killed):
        running.run(settings, out, listener=KilledAfter(0))
    for stop in (0, 2, 3, 3, 4, 5, 5):
        with pytest.raises(Killed):
            running.resume(out, listener=KilledAfter(stop))
    running.resume(out)
    assert_same(out, whole(settings))


LM: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({**GOSSIP, "rounds": 2}, {}),
    "residual": (
        {**PARTIAL, "rounds": 3, "local_steps": 1},
        {"lora": {"r": 2, "mixing": "residual"}},
    ),
    # Clipping sums over all tensors: resumed, they must come in the order that they had.
    "full": ({**GOSSIP, "rounds": 2, "local_steps": 1}, {"train": "full"}),
}


@pytest.mark.parametrize("name", LM)
def test_language_models(name, whole, tmp_path):
    method, policy = LM[name]
    raw = {**TINY, "policy": {"model": "builtin:tiny", "max_length": 96, **policy}}
    settings = config(raw, method=method, optimizer={"max_grad_norm": 0.5}, runtime={"checkpoint_every": 1})
    with pytest.raises(Killed):
        running.run(settings, tmp_path / "run", listener=KilledAfter(2))
    running.resume(tmp_path / "run")
    assert_same(tmp_path / "run", whole(settings))
    adapter = tmp_path / "run" / "adapters" / "agent_0002" / "adapter_model.safetensors"
    assert adapter.is_file() == (name == "lora")


def test_as_many_agents_in_a_pass_as_before(tmp_path, monkeypatch):
    """What was measured to be fastest may come out otherwise when the run goes on; another number would round otherwise."""
    settings = config(TINY, method=GOSSIP, runtime={"checkpoint_every": 1, "memory_gb": 0.8})
    taken: list[tuple[int, int]] = []
    original = running.prepare

    def noting(*args: Any, **options: Any) -> Any:
        experiment = original(*args, **options)
        taken.append((experiment.learner.agents_per_pass, experiment.policy.pass_bytes))
        return experiment

    monkeypatch.setattr(running, "prepare", noting)
    for number in (2, 3):
        with monkeypatch.context() as patch:
            patch.setattr("prefmesh.algorithms.chunks.fastest", lambda *_, n=number: n)
            patch.setenv("PREFMESH_CACHE", str(tmp_path / str(number)))
            if number == 2:
                with pytest.raises(Killed):
                    running.run(settings, tmp_path / "run", listener=KilledAfter(2))
            else:
                summary = running.resume(tmp_path / "run")
    assert taken[0] == taken[1]
    assert taken[0][0] == 2
    # The policy is kept for the next config, the memory that this one leaves to a pass is not.
    unlimited = config(TINY, method=GOSSIP, runtime={"checkpoint_every": 1})
    policy = prepare(unlimited, agents_per_pass=2).policy
    assert taken[0][1] < policy.pass_bytes == policy.usual_pass_bytes
    assert summary["agents_per_pass"] == 2
    assert summary["prompts_read_once"] is True


# ---- stopped elsewhere


@pytest.mark.parametrize("what", ["save_row", "Rounds._finish", "Rounds._summary"])
def test_killed_between_the_last_checkpoint_and_the_end(what, whole, tmp_path, monkeypatch):
    settings = log_linear("dec_dpo")

    def kill(*args: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(f"prefmesh.run.{what}", kill)
        with pytest.raises(Killed):
            running.run(settings, tmp_path / "run")
    running.resume(tmp_path / "run")
    assert_same(tmp_path / "run", whole(settings))


@pytest.mark.parametrize("what", ["os.fsync", "os.replace", "os.rename"])
def test_a_run_appears_whole_or_not_at_all(what, tmp_path, monkeypatch):
    """Killed while its directory is made: the same command can be given again."""
    settings = log_linear("local_only")

    def kill(*args: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(what, kill)
        with pytest.raises(Killed):
            running.run(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    running.run(settings, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("log", ["metrics.jsonl", "agents.jsonl"])
def test_half_a_line_is_cut(log, whole, tmp_path):
    settings = log_linear("dec_dpo")
    out = tmp_path / "run"
    with pytest.raises(Killed):
        running.run(settings, out, listener=KilledAfter(3))
    with open(out / log, "ab") as file:
        file.write(b'{"round": 4, "lo')
    running.resume(out)
    assert_same(out, whole(settings))


def test_threads_of_the_config_are_used(tmp_path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        running.run(config(TOWN, runtime={"threads": 1}), tmp_path / "run")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


# ---- damaged checkpoints

DAMAGE = {
    "a bit flipped": lambda path: _flip(path, path.stat().st_size - 1),
    "a bit of the header flipped": lambda path: _flip(path, 20),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "no mark": lambda path: path.with_suffix(".json").unlink(),
    "empty mark": lambda path: path.with_suffix(".json").write_bytes(b""),
    "half a mark": lambda path: path.with_suffix(".json").write_bytes(b'{"round": 4, "conf'),
    "a mark of another kind": lambda path: path.with_suffix(".json").write_text("[]"),
    "a mark without hash": lambda path: path.with_suffix(".json").write_text('{"round": 4}'),
    "a mark that is no text": lambda path: path.with_suffix(".json").write_bytes(b"\xff\xfe"),
}


def _flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


def _stopped(settings: ExperimentConfig, out: Path, after: int) -> list[Path]:
    """Kill a run after a round; its checkpoints, oldest first."""
    with pytest.raises(Killed):
        running.run(settings, out, listener=KilledAfter(after))
    return sorted((out / "checkpoints").glob("*.safetensors"))


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_newest_checkpoint_is_passed_over(name, whole, tmp_path):
    settings = log_linear("dec_dpo")
    out = tmp_path / "run"
    older, newest = _stopped(settings, out, after=5)
    DAMAGE[name](newest)
    found = checkpoint.load(out / "checkpoints", config=settings.hash())
    assert found is not None
    assert (found[0].round, older.name) == (2, "round_000002.safetensors")
    with pytest.raises(Killed):  # the one before is what it goes on with
        running.resume(out, listener=KilledAfter(3))
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4
    running.resume(out)
    assert_same(out, whole(settings))


@pytest.mark.parametrize("name", DAMAGE)
def test_without_a_whole_checkpoint_the_run_starts_again(name, whole, tmp_path):
    settings = log_linear("fed_dpo stale")
    out = tmp_path / "run"
    for path in _stopped(settings, out, after=5):
        DAMAGE[name](path)
    assert checkpoint.load(out / "checkpoints", config=settings.hash()) is None
    # Killed once more on the way: the new checkpoints count, whatever lay there before.
    with pytest.raises(Killed):
        running.resume(out, listener=KilledAfter(3))
    found = checkpoint.load(out / "checkpoints", config=settings.hash())
    assert found is not None
    assert found[0].round == 2
    running.resume(out)
    assert_same(out, whole(settings))


def test_one_checkpoint_kept_and_damaged(whole, tmp_path):
    settings = config(TOWN, runtime={"checkpoints_kept": 1, "checkpoint_every": 1})
    out = tmp_path / "run"
    [only] = _stopped(settings, out, after=4)
    _flip(only, 100)
    with pytest.raises(Killed):
        running.resume(out, listener=KilledAfter(2))
    [only] = (out / "checkpoints").glob("*.safetensors")
    assert only.name == "round_000001.safetensors"
    running.resume(out)
    assert_same(out, whole(settings))


# ---- what resuming refuses, or leaves alone


def test_a_finished_run_is_left_as_it_is(tmp_path, monkeypatch):
    out = tmp_path / "run"
    summary = running.run(log_linear("dec_dpo"), out)
    before = contents(out)
    monkeypatch.setattr(running, "prepare", lambda *_: pytest.fail("nothing needs to be prepared"))
    assert running.resume(out) == json.loads(json.dumps(summary))
    assert running.resume(out, config=log_linear("dec_dpo"))["status"] == "done"
    assert contents(out) == before


def test_another_config_is_refused_and_nothing_is_touched(tmp_path):
    out = tmp_path / "run"
    settings = log_linear("dec_dpo")
    _stopped(settings, out, after=3)
    before = contents(out)
    with pytest.raises(InputError, match="found a run of another config"):
        running.resume(out, config=settings.replace({"optimizer.lr": 0.06}))
    assert contents(out) == before
    # The config in the directory itself was changed: the checkpoints are of the old one.
    raw = yaml.safe_load((out / "config.yaml").read_text())
    raw["method"]["graph"] = "complete"
    (out / "config.yaml").write_text(yaml.safe_dump(raw))
    before = contents(out)
    with pytest.raises(InputError, match=r"round_000002\.safetensors: found a checkpoint of another config"):
        running.resume(out)
    assert contents(out) == before


def test_every_part_of_the_state_is_in_the_checkpoint(whole):
    """Parameters, moments, step counts, past models and how far each shard is read: all that a round depends on."""
    tensors = load_file(
        whole(log_linear("fed_dpo stale")) / "checkpoints" / f"round_{ROUNDS:06d}.safetensors"
    )
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items() if "theta" not in name} == {
        "batches_drawn": (4,), "optimizer/steps": (4,),
    }  # fmt: skip
    dim = tensors["theta/theta"].shape[-1]
    assert tensors["theta/theta"].shape == (1, dim)  # shared by all: stored once
    assert tensors["memory/server/theta"].shape == (3, dim)
    assert tensors["optimizer/exp_avg/theta"].shape == tensors["optimizer/exp_avg_sq/theta"].shape == (4, dim)
    # Two participants in each of five rounds, two steps each.
    assert tensors["batches_drawn"].sum() == tensors["optimizer/steps"].sum() == 2 * ROUNDS * 2
    assert (tensors["memory/server/theta"][0] == tensors["theta/theta"][0]).all()


def test_a_diverged_run_diverges_again(tmp_path):
    # Decay of more than 1 per step blows the parameters up by 1e6 in each: float32 is left in round 4.
    settings = config(TOWN, optimizer={"lr": 1e6, "weight_decay": 1.0})
    out = tmp_path / "run"
    with pytest.raises(
        Diverged, match=r"stopped being finite in round \d.*the checkpoint of round \d is kept"
    ) as first:
        running.run(settings, out)
    before = contents(out)
    assert json.loads(before["summary.json"])["status"] == "diverged"
    with pytest.raises(Diverged) as second:
        running.resume(out)
    assert str(second.value) == str(first.value)
    after = contents(out)
    assert without_seconds(after["metrics.jsonl"].decode()) == without_seconds(
        before["metrics.jsonl"].decode()
    )
    assert {k: v for k, v in after.items() if "checkpoints" in k and "json" not in k} == {
        k: v for k, v in before.items() if "checkpoints" in k and "json" not in k
    }


# ---- as a person does it


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_with_130_and_it_can_be_resumed(how, tmp_path):
    settings = config(
        TOWN, method={"name": "dec_dpo", "rounds": 60, "local_steps": 20}, evaluation={"every": 60}
    )
    (tmp_path / "x.yaml").write_text(settings.to_yaml())
    out = tmp_path / "run"
    child = subprocess.Popen(
        [sys.executable, "-m", "prefmesh", "run", tmp_path / "x.yaml", "--out", out],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while child.poll() is None and not any((out / "checkpoints").glob("*.json")):
        time.sleep(0.002)
    child.send_signal(how)
    said, complaint = child.communicate()
    assert child.returncode == 130, complaint
    assert said == ""
    assert complaint.startswith("prefmesh: stopped after round ")
    assert complaint.endswith(f"go on with: prefmesh run --resume {out}\n")
    assert complaint.count("\n") == 1  # piped: no progress
    done = checkpoint.newest_round(out / "checkpoints")
    assert done == len((out / "metrics.jsonl").read_text().splitlines()) - 1
    with pytest.raises(Killed):  # it can be resumed, from where it stopped
        running.resume(out, listener=KilledAfter(done + 1))
    assert len((out / "metrics.jsonl").read_text().splitlines()) == done + 2
