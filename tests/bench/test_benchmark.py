"""`prefmesh bench`: its formula against torch's own counter, its rivals against our numbers, its refusals."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from prefmesh.algorithms.gradients import loss_and_gradient
from prefmesh.bench import arithmetic
from prefmesh.bench.benchmark import bench
from prefmesh.bench.contest import Schedule
from prefmesh.bench.trl import Trl
from prefmesh.config import ExperimentConfig
from prefmesh.errors import InputError
from prefmesh.experiment import prepare
from prefmesh.mesh import Group
from tests.mesh.processes import together
from tests.runs import TOWN

SHORT = Schedule(turns=1, rounds=1)


def config(**method: object) -> ExperimentConfig:
    return ExperimentConfig.parse(
        {
            "preferences": {"source": "builtin:town", "agents": 3, "town": {"users": 3, "pairs_per_user": 8}},
            "policy": {"model": "builtin:tiny", "train": "lora", "lora": {"r": 2, "lora_alpha": 4}},
            "objective": {},
            "method": {"name": "dec_dpo", "rounds": 3, "graph": "ring"} | method,
            "optimizer": {"name": "adamw", "lr": 1e-3, "batch_size": 2},
            "evaluation": {"held_out": 0.0, "samples": 0},
            "runtime": {},
        }
    )


def test_all_keys_and_rivals_that_compute_the_same():
    found = bench(config(), ["single", "peft", "naive"], SHORT)
    for key in (
        "machine",
        "peak_gflops",
        "peak_share",
        "tokens_per_second",
        "pairs_per_second",
        "peak_memory_gb",
    ):
        assert found[key], key
    for name, result in found["against"].items():
        assert result["losses_apart"] < 1e-5, name
        assert result["ratio"] == pytest.approx(result["runs"][0]["theirs"] / result["runs"][0]["ours"])


def test_threads_of_the_config_are_used() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        raw = config().plain() | {"runtime": {"threads": 1}}
        assert bench(ExperimentConfig.parse(raw), [], SHORT)["machine"]["threads"] == 1
    finally:
        torch.set_num_threads(before)


def measured(group: Group, settings: ExperimentConfig, where: Path) -> None:
    found = bench(settings, ["single", "peft"], SHORT, group=group, trace=where / "trace.json")
    if group.rank == 0:
        (where / "found.json").write_text(json.dumps(found))


def test_processes_share_our_rounds_and_process_0_does_the_rivals(tmp_path: Path) -> None:
    """The losses are everybody's, and the work is what one process does."""
    shared = config().replace({"runtime.processes": 2})
    together(measured, 2, shared, tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    one = bench(config(), ["peft"], SHORT)
    assert found["processes"] == 2
    assert found["machine"]["threads"] == 1
    for key in ("agents", "bytes_per_round"):
        assert found[key] == one[key]
    needed = found["gflop_per_round"]["needed"]
    assert needed == pytest.approx(one["gflop_per_round"]["needed"])
    # Passes of fewer agents pad otherwise, within attention alone.
    assert needed < found["gflop_per_round"]["done"] < 1.2 * one["gflop_per_round"]["done"]
    for name, result in found["against"].items():
        assert result["losses_apart"] < 1e-5, name
        assert result["ours"] > 0
        assert result["theirs"] > 0
    assert found["profile"]
    assert (tmp_path / "trace.json").is_file()
    with pytest.raises(InputError, match=r"--against trl: runtime.processes 2 found; allowed: 1"):
        Trl.check(replace(prepare(config()), config=shared))


def test_the_command_starts_the_processes(tmp_path: Path) -> None:
    """One object on stdout, process 0's."""
    file = tmp_path / "town.yaml"
    file.write_text(yaml.safe_dump(TOWN | {"runtime": {}}))
    words = ["bench", str(file), "--processes", "2", "--turns", "1", "--rounds", "1", "--json"]
    ended = subprocess.run(
        [sys.executable, "-m", "prefmesh", *words], capture_output=True, text=True, check=True
    )
    found = json.loads(ended.stdout)
    assert found["processes"] == found["config"]["runtime"]["processes"] == 2
    assert found["pairs_per_second"] > 0


def test_trl_computes_the_same_as_the_first_agent_and_prints_nothing(capsys):
    pytest.importorskip("trl")
    result = bench(config(), ["trl"], Schedule(turns=1, rounds=2))["against"]["trl"]
    assert result["losses_apart"] < 1e-5
    assert len(result["runs"]) == 1
    assert capsys.readouterr().out == ""


def test_what_is_needed_is_what_is_done_but_for_padding_in_attention():
    """Counted by torch: the formula's products, the adapters', and attention over padded places beside."""
    experiment = prepare(config())
    learner, policy = experiment.learner, experiment.policy
    rows = np.arange(2)
    needed = arithmetic.Arithmetic.of(policy, experiment.start)

    def work() -> None:
        loss_and_gradient(learner.problem, experiment.start, rows[None], torch.full((1, 2), 0.5))

    counted = arithmetic.done(work)
    attention = needed.needed(learner.problem.data, rows) - arithmetic.Arithmetic(
        token=needed.token, seen=0, predicted=needed.predicted
    ).needed(learner.problem.data, rows)
    exact = needed.needed(learner.problem.data, rows) - attention
    assert exact <= counted
    # Attention may cost several times what is needed for it: padding, masked places, scores taken twice.
    assert counted <= exact + 6 * attention


@pytest.mark.parametrize(
    ("settings", "rivals", "words"),
    [
        ({}, ["nobody"], "--against: 'nobody' found; allowed: single"),
        ({"name": "fed_dpo", "participation": 2}, ["naive"], "with participation or staleness found"),
    ],
)
def test_refusals(settings, rivals, words):
    given = config() if not settings else _without_graph(settings)
    with pytest.raises(InputError, match=words):
        bench(given, rivals, SHORT)


def _without_graph(method: dict[str, object]) -> ExperimentConfig:
    raw = config().model_dump(mode="json")
    return ExperimentConfig.parse(raw | {"method": {"rounds": 3} | method})
