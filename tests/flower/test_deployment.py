"""examples/flower/run_local.sh: SuperLink and SuperNodes as processes of their own, with TLS and keys; killed and unwanted ones."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prefmesh import run as running
from prefmesh.config import load_config
from tests.runs import without_seconds

pytest.importorskip("flwr", reason="flwr is not installed (extra: flower)")
for program in ("openssl", "ssh-keygen", "setsid"):
    if shutil.which(program) is None:
        pytest.skip(f"no {program}", allow_module_level=True)

pytestmark = pytest.mark.slow

APP = Path(__file__).resolve().parents[2] / "examples" / "flower"
BIN = Path(sys.executable).parent
PATIENCE = 900


def environment(home: Path) -> dict[str, str]:
    return os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }


def free_ports(count: int) -> int:
    """The first of so many free ports in a row."""
    for first in range(20000, 40000, 10):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise OSError("no ports")


class Local:
    """The script on its way, in `place`."""

    def __init__(self, place: Path, more: str = "", rounds: int | None = None):
        self.place, self.port, self.app = place, free_ports(6), APP
        if rounds:
            self.app = place.with_suffix(".app")
            shutil.copytree(APP, self.app)
            town = self.app / "town.yaml"
            town.write_text(town.read_text().replace("rounds: 3", f"rounds: {rounds}"))
        self.log = place.with_suffix(".log")
        self.nodes: list[subprocess.Popen[bytes]] = []
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["bash", self.app / "run_local.sh", place, more],
                env=environment(place / "home") | {"PORT": str(self.port)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def said(self) -> str:
        return self.log.read_text()

    def until(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not ready():
            assert time.monotonic() < deadline, self.said()[-3000:]
            assert self.process.poll() is None, self.said()[-3000:]
            time.sleep(0.2)

    def node(self, log: Path, *arguments: str | Path, port: int) -> subprocess.Popen[bytes]:
        """Another SuperNode of the test's own."""
        command = [
            BIN / "flower-supernode",
            "--superlink",
            f"127.0.0.1:{self.port}",
            "--port",
            str(port),
            *arguments,
        ]
        with log.open("w") as file:
            node = subprocess.Popen(
                command, env=environment(log.with_suffix(".home")), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )  # fmt: skip
        self.nodes.append(node)
        return node

    def rounds(self) -> int:
        """How many have been logged."""
        metrics = self.place / "run" / "metrics.jsonl"
        return max(0, metrics.read_text().count("\n") - 1) if metrics.exists() else 0

    def wait(self) -> int:
        return self.process.wait(PATIENCE)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[[str], Local]]:
    """Starts the script; stops what is left of it."""
    made: list[Local] = []

    def start(more: str = "", rounds: int | None = None) -> Local:
        made.append(Local(tmp_path / "local", more, rounds))
        return made[-1]

    yield start
    for local in made:
        for node in local.nodes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()
        with contextlib.suppress(ProcessLookupError):
            local.process.send_signal(signal.SIGTERM)
        local.wait()


def test_it_leaves_the_run_of_one_process(started: Callable[..., Local], tmp_path: Path) -> None:
    local = started()
    assert local.wait() == 0, local.said()[-3000:]
    config = load_config(APP / "town.yaml", ["runtime.agents_per_pass=1"])
    running.run(config, one := tmp_path / "one")
    mine, theirs = (
        load_file(d / "policy" / "adapter_model.safetensors") for d in (one, tmp_path / "local" / "run")
    )
    for key, tensor in mine.items():
        torch.testing.assert_close(theirs[key], tensor, rtol=0, atol=1e-6)
    logs = [without_seconds((d / "metrics.jsonl").read_text()) for d in (one, tmp_path / "local" / "run")]
    for a, b in zip(*logs, strict=True):
        for key, value in a.items():
            assert b[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    assert (tmp_path / "local" / "run" / "report.html").is_file()
    pids = (tmp_path / "local" / "pids").read_text().split()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids), "something still runs"


def test_killed_and_unwanted_nodes(started: Callable[..., Local], tmp_path: Path) -> None:
    local = started("round-timeout=60.0")
    place, out = tmp_path / "local", tmp_path / "local" / "run"
    metrics = out / "metrics.jsonl"
    local.until(lambda: "here, 3 of 3" in local.said())
    # A node with a key that nobody registered, and one that speaks plaintext.
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", tmp_path / "stranger"], check=True
    )
    certificate = ["--root-certificates", place / "server" / "ca.crt"]
    key = ["--auth-supernode-private-key", tmp_path / "stranger"]
    stranger = local.node(tmp_path / "stranger.log", *certificate, *key, port=local.port + 4)
    plain = local.node(tmp_path / "plain.log", "--insecure", port=local.port + 5)
    # A site dies in a round.
    local.until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 1)
    time.sleep(2)
    victim = int((place / "pids").read_text().split()[2])
    os.killpg(victim, signal.SIGKILL)
    assert local.wait() == 0, local.said()[-3000:]
    records = without_seconds(metrics.read_text())
    assert [record["round"] for record in records] == [0, 1, 2, 3]
    assert min(record["sites"] for record in records[1:]) == 2
    assert json.loads((out / "summary.json").read_text())["status"] == "done"
    # The first is told so, the second never gets a word through.
    for node, log, says in (
        (stranger, "stranger.log", "305"),
        (plain, "plain.log", "Connection attempt failed"),
    ):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)
        assert says in (tmp_path / log).read_text() + str(node.wait())
    assert local.said().count("is here") == 3
    assert "is refused" not in local.said()


def test_a_site_comes_back(started: Callable[..., Local], tmp_path: Path) -> None:
    """Its SuperNode is killed, started anew a minute later, and takes part again."""
    local = started("round-timeout=20.0", rounds=6)
    local.until(lambda: local.rounds() >= 1)
    victim = int((tmp_path / "local" / "pids").read_text().split()[2])
    os.killpg(victim, signal.SIGKILL)
    time.sleep(60)  # Flower takes a key back only when it has missed the node's heartbeats
    place = tmp_path / "local"
    local.node(
        tmp_path / "back.log",
        *("--root-certificates", place / "server" / "ca.crt"),
        *("--auth-supernode-private-key", place / "keys" / "site_1"),
        *("--node-config", f'site="site_1" partition-id=1 memory="{place}/site_1/memory"'),
        port=local.port + 4,
    )
    assert local.wait() == 0, local.said()[-3000:]
    assert "site site_1 is back" in local.said()
    records = without_seconds((place / "run" / "metrics.jsonl").read_text())
    sites = [int(record["sites"]) for record in records[1:]]
    assert len(sites) == 6
    assert sites[0] == sites[-1] == 3
    assert min(sites) == 2


def test_a_server_goes_on(started: Callable[..., Local], tmp_path: Path) -> None:
    """Its process is killed; a new run on the same SuperLink, told to resume, leaves what an undisturbed one leaves."""
    local = started(rounds=5)
    place = tmp_path / "local"
    local.until(lambda: local.rounds() >= 2)
    os.kill(local.process.pid, signal.SIGSTOP)  # else the script ends with its run, and stops the nodes
    killed = [
        path.parent.name
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if b"serverapp" in path.read_bytes() and str(place).encode() in (path.parent / "environ").read_bytes()
    ]
    assert killed
    for pid in killed:
        os.kill(int(pid), signal.SIGKILL)
    subprocess.run(
        [BIN / "flwr", "run", local.app, "here", "--stream", "--run-config", f'resume="{place}/run"'],
        env=environment(place / "home"), check=True, timeout=PATIENCE, capture_output=True,
    )  # fmt: skip
    os.kill(local.process.pid, signal.SIGCONT)
    assert local.wait() == 0, local.said()[-3000:]
    running.run(load_config(local.app / "town.yaml", ["runtime.agents_per_pass=1"]), one := tmp_path / "one")
    mine, theirs = (load_file(d / "policy" / "adapter_model.safetensors") for d in (one, place / "run"))
    for key, tensor in mine.items():
        torch.testing.assert_close(theirs[key], tensor, rtol=0, atol=1e-6)
    records = without_seconds((place / "run" / "metrics.jsonl").read_text())
    assert [record["round"] for record in records] == list(range(6))
