"""`prefmesh run` in several processes as a user meets it: started, killed, interrupted, at odds with each other."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import equal

from prefmesh import run as running
from prefmesh.config import ExperimentConfig
from prefmesh.errors import InputError, PeerLost
from prefmesh.launch import _exit_code
from prefmesh.mesh import Group
from prefmesh.mesh.torch_group import launched
from tests.mesh.processes import free_port, together
from tests.runs import FILE, ROWS, TOWN, config, prefmesh, without_seconds, write_jsonl, write_yaml

PATIENCE = 120

LONG: dict[str, Any] = {
    **TOWN,
    "method": {"name": "dec_dpo", "rounds": 300, "local_steps": 2, "graph": "ring"},
    "optimizer": {"name": "adamw", "lr": 0.05, "max_grad_norm": 1.0},
    "evaluation": {"every": 50, "held_out": 0.2},
    "runtime": {"checkpoint_every": 20, "threads": 1, "timeout": 60},
}
"""Long enough to be killed on the way."""


class Started:
    """`prefmesh ARGUMENTS` in a process of its own."""

    def __init__(self, *arguments: str | Path, log: Path):
        self.log = log
        self.file = log.open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "prefmesh", *map(str, arguments)],
            stdout=self.file,
            stderr=subprocess.STDOUT,
        )

    def wait(self) -> tuple[int, str]:
        """Its exit code and all that it printed; killed where it hangs."""
        try:
            code = self.process.wait(timeout=PATIENCE)
        finally:
            for pid in (*self.workers(), self.process.pid):
                _kill(pid, signal.SIGKILL)
            self.file.close()
        return code, self.log.read_text()

    def workers(self) -> list[int]:
        """The processes that it started, in the order of their ranks."""
        found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        pids = [int(pid) for pid in found.read_text().split()] if found.exists() else []
        ranks = {pid: rank for pid in pids if (rank := _rank(pid)) is not None}
        return sorted(ranks, key=ranks.__getitem__)

    def until(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not ready():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)


def _kill(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _rank(pid: int) -> int | None:
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((int(word[5:]) for word in words if word.startswith(b"RANK=")), None)


def rounds_logged(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def assert_same(one: Path, other: Path) -> None:
    """Two runs of the same processes: bit for bit, apart from times, and from bytes that going on costs."""
    names = [sorted(str(p.relative_to(d)) for p in d.rglob("*.safetensors")) for d in (one, other)]
    assert names[0] == names[1]
    for name in names[0]:
        mine, theirs = load_file(one / name), load_file(other / name)
        assert all(equal(tensor, theirs[key]) for key, tensor in mine.items()), name
    for name in ("metrics.jsonl", "agents.jsonl"):
        mine, theirs = (without_seconds((d / name).read_text()) for d in (one, other))
        for record in mine + theirs:
            record.pop("wire_bytes", None)
        assert mine == theirs


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The uninterrupted run of two processes, and what the command printed."""
    place = tmp_path_factory.mktemp("whole")
    file = write_yaml(place / "long.yaml", LONG)
    code, said = Started(
        "run", file, "--processes", "2", "--out", place / "run", "--json", log=place / "log"
    ).wait()
    assert code == 0, said
    shown = json.loads(said)  # one process prints, and nothing else does
    assert shown["report"] == str(place / "run" / "report.html")
    return place


def test_killed_and_started_again(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = Started(
        "run", whole / "long.yaml", "-p", "2", "--restarts", "2", "--out", out, log=tmp_path / "log"
    )
    for rank, after in ((1, 60), (0, 160)):
        run.until(lambda after=after: rounds_logged(out) > after and len(run.workers()) == 2)
        _kill(run.workers()[rank], signal.SIGKILL)
        run.until(lambda: len(run.workers()) < 2)
    code, said = run.wait()
    assert code == 0, said
    assert "Traceback" not in said
    assert_same(out, whole / "run")


def test_killed_and_resumed(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = Started("run", whole / "long.yaml", "-p", "2", "--out", out, log=tmp_path / "log")
    run.until(lambda: rounds_logged(out) > 60)
    _kill(run.workers()[1], signal.SIGKILL)
    code, said = run.wait()
    assert code == 4
    lines = said.splitlines()
    assert (
        lines[-1]
        == "prefmesh: process 1 of 2 was killed (SIGKILL); go on with --resume, or let --restarts do it"
    )
    assert len(lines) <= 2  # what process 0 says, if it is quick enough
    # The run knows how many processes it has.
    code, said = Started("run", "--resume", out, log=tmp_path / "log").wait()
    assert code == 0, said
    assert_same(out, whole / "run")


def test_interrupted(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = Started("run", whole / "long.yaml", "-p", "2", "--out", out, log=tmp_path / "log")
    run.until(lambda: rounds_logged(out) > 60)
    _kill(run.process.pid, signal.SIGINT)
    code, said = run.wait()
    assert code == 130
    (line,) = said.splitlines()
    assert line.startswith("prefmesh: stopped after round ")
    assert line.endswith(f"of 300; go on with: prefmesh run --resume {out}")
    assert json.loads((out / "summary.json").read_text())["status"] == "interrupted"


def test_who_is_said_to_have_failed(capfd) -> None:
    """The one that did not just lose another."""
    assert _exit_code({0: 4, 1: 2}, 2) == 2
    assert _exit_code({0: 4, 1: 4}, 2) == 4
    assert capfd.readouterr().err == ""
    assert _exit_code({0: 4, 2: -9, 3: 2}, 4) == 4
    assert "process 2 of 4 was killed (SIGKILL)" in capfd.readouterr().err


# ---- at odds


def _other_config(group: Group, out: Path) -> None:
    raw = config(TOWN).plain()
    raw["runtime"]["processes"] = group.size
    raw["seed"] += group.rank // 2
    with pytest.raises(
        InputError, match=r"^the config: process 2 of 3 found another one than process 0 \(process .'s is"
    ):
        running.run(ExperimentConfig.parse(raw), out, group=group)
    raw["seed"] = 0
    raw["runtime"]["processes"] = 2
    with pytest.raises(InputError, match=r"^runtime.processes: 2, but 3 run this"):
        running.run(ExperimentConfig.parse(raw), out, group=group)


def _refused_in_one(group: Group, place: Path) -> None:
    """One process has no data file (each is in a directory of its own); or no run to go on with."""
    own = place / str(group.rank)
    own.mkdir()
    os.chdir(own)
    if group.rank == 0:
        write_jsonl(own / "answers.jsonl", ROWS)
    raw = config(FILE).plain()
    raw["runtime"]["processes"] = group.size
    said = "no such file: answers.jsonl" if group.rank else "process 0 of 2: stopped, since process 1 refused"
    with pytest.raises(InputError, match=said):
        running.run(ExperimentConfig.parse(raw), Path("run"), group=group)
    assert not Path("run").exists()


def _one_leaves(group: Group, place: Path) -> None:
    raw = config(LONG).plain()
    raw["runtime"]["processes"] = group.size

    class Leaving(running.Silent):
        def round(self, round_: int, rounds: int, metrics: Any) -> None:
            if round_ == 30 and group.rank == 1:
                raise KeyError("a fault of our own")

    with pytest.raises(KeyError if group.rank == 1 else PeerLost):
        running.run(ExperimentConfig.parse(raw), place / "run", group=group, listener=Leaving())


@pytest.mark.parametrize(("work", "size"), [(_other_config, 3), (_refused_in_one, 2)])
def test_one_line_in_each_process(work, size: int, tmp_path: Path) -> None:
    together(work, size, tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def as_one_of(monkeypatch, rank: int, size: int, port: int) -> None:
    there = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in there.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_peer_that_never_appears(rank: int, monkeypatch, tmp_path: Path) -> None:
    as_one_of(monkeypatch, rank, 2, port := free_port())
    assert launched() == 2
    file = write_yaml(tmp_path / "town.yaml", TOWN)
    started = time.monotonic()
    found = prefmesh("run", file, "--out", tmp_path / "run", "-o", "runtime.timeout=1")
    assert found.code == 2
    assert f"process {rank} of 2" in found.err
    assert f"did not all meet at 127.0.0.1:{port} within 1 s" in found.err
    assert "allowed: all of them started" in found.err
    assert found.err.count("\n") == 1
    assert time.monotonic() - started < 60
    assert not (tmp_path / "run").exists()


def test_a_port_in_use(monkeypatch, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        as_one_of(monkeypatch, 0, 2, port := taken.getsockname()[1])
        file = write_yaml(tmp_path / "town.yaml", TOWN)
        found = prefmesh("run", file, "--out", tmp_path / "run", "-o", "runtime.timeout=1")
    assert found.code == 2
    assert f"127.0.0.1:{port}" in found.err
    assert "failed to listen" in found.err
    assert "a free MASTER_PORT" in found.err
    assert found.err.count("\n") == 1


def test_a_launcher_that_tells_too_little(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    file = write_yaml(tmp_path / "town.yaml", TOWN)
    found = prefmesh("run", file, "--out", tmp_path / "run")
    assert found.code == 2
    assert "RANK: missing, though WORLD_SIZE is 2" in found.err
    found = prefmesh("run", file)
    assert found.code == 2
    assert "--out: missing" in found.err


def test_another_number_of_processes_than_the_run_has(tmp_path: Path) -> None:
    running.run(config(TOWN), tmp_path / "run")
    found = prefmesh("run", "--resume", tmp_path / "run", "--processes", "2")
    assert found.code == 2
    assert f"--processes: 2, but the run in {tmp_path / 'run'} has 1" in found.err


def test_a_process_that_leaves_is_missed(tmp_path: Path) -> None:
    together(_one_leaves, 2, tmp_path)
