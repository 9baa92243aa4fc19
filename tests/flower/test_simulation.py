"""Flower's simulation engine between server and sites: the numbers of one process, answers that are refused, late ones, mods."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prefmesh import run as running
from tests.flower.test_remote import ADAMW, FED, ROWS, row
from tests.runs import TOWN, config, without_seconds, write_yaml

pytest.importorskip("flwr", reason="flwr is not installed (extra: flower)")
pytest.importorskip("ray", reason="flwr's simulation is not installed (extra: flower)")

ROOT = Path(__file__).resolve().parents[2]


def simulate(place: Path, agents: int, runs: list[dict[str, Any]], **told: Any) -> str:
    """Run them; what the server and the sites said."""
    (place / "home").mkdir(exist_ok=True)
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.flower.simulated",
            json.dumps({"agents": agents, "runs": runs, **told}),
        ],
        cwd=ROOT,
        env=os.environ
        | {"FLWR_HOME": str(place / "home"), "FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        | {"OMP_NUM_THREADS": "1", "PREFMESH_CACHE": str(place / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-4000:]
    return ended.stdout


@pytest.mark.parametrize(("agents", "names"), [(4, [n for n in ROWS if n[0] != "L"]), (3, ["LoRA, stale"])])
def test_flower_is_one_process(agents: int, names: list[str], tmp_path: Path) -> None:
    runs = []
    for k, name in enumerate(names):
        settings = row(name)
        running.run(settings, tmp_path / f"one_{k}")
        runs.append(
            {
                "config": str(write_yaml(tmp_path / f"{k}.yaml", settings.plain())),
                "out": str(tmp_path / f"many_{k}"),
            }
        )
    simulate(tmp_path, agents, runs)
    for k, name in enumerate(names):
        one, many = tmp_path / f"one_{k}", tmp_path / f"many_{k}"
        (path,) = (one / "policy").glob("*.safetensors")
        mine, theirs = load_file(path), load_file(many / "policy" / path.name)
        for key, tensor in mine.items():
            torch.testing.assert_close(theirs[key], tensor, rtol=0, atol=ROWS[name][2])
        logs = [without_seconds((d / "metrics.jsonl").read_text()) for d in (one, many)]
        for a, b in zip(*logs, strict=True):
            for key, value in a.items():
                assert b[key] == pytest.approx(value, rel=1e-4, abs=1e-5), (name, key)
        summary = json.loads((many / "summary.json").read_text())
        assert (summary["status"], summary["agents"]) == ("done", agents)
        assert (
            summary["bytes_sent_total"] == json.loads((one / "summary.json").read_text())["bytes_sent_total"]
        )


def test_nonsense_is_refused_and_named(tmp_path: Path) -> None:
    settings = config(TOWN, method={**FED, "rounds": 5}, optimizer=ADAMW)
    file = write_yaml(tmp_path / "x.yaml", settings.plain())
    said = simulate(tmp_path, 4, [{"config": str(file), "out": str(tmp_path / "run")}], mods=["broken"])
    for line in (
        "round 1: the answer of site 000001 is refused: row: theta is not finite",
        "round 2: the answer of site 000001 is refused: row: theta is (1, ",
        "round 3: the answer of site 000001 is refused: row: tensor 'other' is unknown",
        "round 4: the answer of site 000001 is refused: measures: loss is missing",
    ):
        assert f"prefmesh: {line}" in said, said[-3000:]
    lines = without_seconds((tmp_path / "run" / "metrics.jsonl").read_text())
    assert [record.get("sites") for record in lines] == [None, 3, 3, 3, 3, 4]


def test_a_slow_site(tmp_path: Path) -> None:
    settings = config(
        TOWN, method={**FED, "rounds": 4, "local_steps": 1, "staleness": 3}, evaluation={"every": 4}
    )
    file = write_yaml(tmp_path / "x.yaml", settings.plain())
    runs = [{"config": str(file), "out": str(tmp_path / "run"), "keys": {"round-timeout": 8}}]
    said = simulate(tmp_path, 4, runs, mods=["slow"], workers=3)
    assert "prefmesh: round 1: site 000002 did not answer within 8 s" in said
    assert "agent 2's update of round 1 is taken now" in said
    lines = without_seconds((tmp_path / "run" / "metrics.jsonl").read_text())
    assert lines[1]["sites"] == 3
    assert sum(record.get("late", 0) for record in lines) == 1


def test_flowers_clipping_combines(tmp_path: Path) -> None:
    """Its mod for local differential privacy: no site's update is longer than it says."""
    settings = config(TOWN, method=FED, optimizer=ADAMW)
    file = write_yaml(tmp_path / "x.yaml", settings.plain())
    for clip in (0.01, 1e6):
        out = str(tmp_path / f"{clip}")
        simulate(tmp_path, 4, [{"config": str(file), "out": out}], clip=clip)
    clipped, free = (
        load_file(tmp_path / f"{c}" / "policy" / "policy.safetensors")["theta"] for c in (0.01, 1e6)
    )
    running.run(settings, tmp_path / "one")
    one = load_file(tmp_path / "one" / "policy" / "policy.safetensors")["theta"]
    torch.testing.assert_close(free, one, rtol=0, atol=1e-5)
    assert (
        0.01 < clipped.norm() <= 3 * 0.01 * 1.001 < one.norm()
    )  # three rounds, all sites pulling one way or another
