"""What a run leaves in its directory."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from prefmesh import run as running
from prefmesh.config import ExperimentConfig, load_config
from prefmesh.errors import InputError
from prefmesh.experiment import prepare
from prefmesh.reports import write_report
from tests.runs import FILE, ROWS, TOWN, config, contents, write_jsonl


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The run directory of a config, made once."""
    made: dict[str, Path] = {}

    def ran(settings: ExperimentConfig) -> Path:
        if settings.hash() not in made:
            made[settings.hash()] = tmp_path_factory.mktemp("run") / "out"
            running.run(settings, made[settings.hash()])
        return made[settings.hash()]

    return ran


GOSSIP = config(TOWN, method={"name": "dec_dpo", "graph": "star"})
FEDERATED = config(TOWN, method={"name": "fed_dpo", "participation": 2})
ALONE = config()


def lines(out: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def test_what_is_there(runs):
    agents = {f"adapters/agent_{i:04d}/policy.safetensors" for i in range(4)} | {"adapters/users.json"}
    always = {"config.yaml", "environment.json", "metrics.jsonl", "agents.jsonl", "summary.json", "held_out.safetensors",
              "policy/policy.safetensors", *(f"checkpoints/round_00000{r}.{kind}" for r in (4, 5) for kind in ("json", "safetensors"))}  # fmt: skip
    assert set(contents(runs(GOSSIP))) == always | agents | {"topology.json"}
    assert set(contents(runs(ALONE))) == always | agents
    assert set(contents(runs(FEDERATED))) == always  # one policy: agents do not differ


def test_the_config_as_resolved_gives_the_same_run(runs, tmp_path):
    out = runs(GOSSIP)
    assert load_config(out / "config.yaml") == GOSSIP
    assert (
        yaml.safe_load((out / "config.yaml").read_text())["optimizer"]["momentum"] == 0.0
    )  # defaults written out
    running.run(load_config(out / "config.yaml"), tmp_path / "again")
    for name in ("policy/policy.safetensors", "held_out.safetensors", "agents.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def test_the_environment(runs):
    found = json.loads((runs(GOSSIP) / "environment.json").read_text())
    assert found["seed"] == GOSSIP.seed
    assert {"python", "packages", "git", "platform", "cpu", "cores", "threads", "memory_gb", "device"} <= set(
        found
    )


@pytest.mark.parametrize("settings", [GOSSIP, FEDERATED, ALONE], ids=["gossip", "federated", "alone"])
def test_one_line_per_round_and_one_per_user_and_evaluation(settings, runs):
    out = runs(settings)
    assert [record["round"] for record in lines(out)] == [0, 1, 2, 3, 4, 5]
    evaluated = [record["round"] for record in lines(out) if "eval/rewards/accuracies" in record]
    assert evaluated == [0, 2, 4, 5]  # before the first, every second, after the last
    assert [record["round"] for record in lines(out, "agents.jsonl")] == sorted(evaluated * 4)
    for record in lines(out)[1:]:
        assert {
            "loss",
            "rewards/accuracies",
            "rewards/margins",
            "consensus_error",
            "bytes_sent",
            "seconds",
            "lr",
        } <= set(record)


def test_every_policy_starts_as_the_reference(runs):
    for settings in (GOSSIP, FEDERATED, ALONE):
        first = lines(runs(settings))[0]
        assert first["train_loss"] == pytest.approx(math.log(2))
        assert (first["eval/loss"], first["eval/rewards/accuracies"]) == (pytest.approx(math.log(2)), 0.5)
        assert (first["bytes_sent"], first["bytes_sent_total"]) == (0, 0)


def test_bytes_by_hand(runs):
    """A star of 4 has 3 links, used in both directions; 2 of 4 participants fetch and send; a model is dim float32."""
    dim = load_file(runs(GOSSIP) / "policy" / "policy.safetensors")["theta"].shape[0]
    for settings, messages in ((GOSSIP, 6), (FEDERATED, 4), (ALONE, 0)):
        found = lines(runs(settings))
        assert [record["bytes_sent"] for record in found] == [0] + [messages * 4 * dim] * 5
        assert found[-1]["bytes_sent_total"] == 5 * messages * 4 * dim


def test_what_centralizing_sends_is_the_pairs(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "answers.jsonl", [row | {"prompt": row["prompt"] + " é"} for row in ROWS])
    monkeypatch.chdir(tmp_path)
    running.run(config(FILE, method={"name": "centralized", "rounds": 2}), tmp_path / "out")
    size = sum(len(row[key].encode()) for row in ROWS for key in ("prompt", "chosen", "rejected")) + 3 * len(
        ROWS
    )
    assert [record["bytes_sent"] for record in lines(tmp_path / "out")] == [0, size, 0]


def test_the_policy_is_the_agents_mean(runs):
    own = [
        load_file(runs(GOSSIP) / "adapters" / f"agent_{i:04d}" / "policy.safetensors")["theta"]
        for i in range(4)
    ]
    mean = load_file(runs(GOSSIP) / "policy" / "policy.safetensors")["theta"]
    np.testing.assert_allclose(mean, np.mean(own, axis=0), rtol=1e-6)
    error = np.mean([np.sum((theta - mean) ** 2) for theta in own])
    assert lines(runs(GOSSIP))[-1]["consensus_error"] == pytest.approx(error, rel=1e-4)


def test_held_out_figures_are_those_of_the_saved_policy(runs):
    experiment = prepare(GOSSIP)
    theta = load_file(runs(GOSSIP) / "policy" / "policy.safetensors")["theta"]
    found = load_file(runs(GOSSIP) / "held_out.safetensors")
    data = experiment.learner.problem.data
    margin = ((data.chosen - data.rejected).numpy() @ theta)[found["rows"]]
    np.testing.assert_allclose(found["margin"], margin, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["accuracy"], (margin > 0).astype(float))
    assert lines(runs(GOSSIP))[-1]["eval/rewards/accuracies"] == pytest.approx(found["accuracy"].mean())
    # Pairs of one prompt carry one number.
    prompts = [experiment.pairs[i].prompt for i in found["rows"]]
    assert len(set(zip(prompts, found["prompt"].tolist(), strict=True))) == len(set(prompts)) == len(set(found["prompt"].tolist()))  # fmt: skip


def test_the_summary(runs):
    summary = json.loads((runs(ALONE) / "summary.json").read_text())
    assert (summary["status"], summary["method"], summary["headline"]) == ("done", "local_only", "own")
    assert (summary["agents"], summary["users"], summary["rounds"], summary["seed"]) == (4, 4, 5, 3)
    assert summary["training_pairs"] + summary["held_out_pairs"] == 80
    assert summary["leakage"]["prompt"] == 0
    assert 0.5 < summary["ceiling"]["consensus"] <= summary["ceiling"]["own"] <= 1
    last = lines(runs(ALONE))[-1]
    assert summary["final"] == {key: value for key, value in last.items() if key != "round"}
    low, high = summary["accuracy_interval"]
    assert low <= last["eval/own/rewards/accuracies"] <= high
    assert json.loads((runs(GOSSIP) / "summary.json").read_text())["headline"] == "average"


def test_nothing_held_out(tmp_path):
    summary = running.run(config(TOWN, evaluation={"held_out": 0}), tmp_path / "out")
    assert (summary["held_out_pairs"], summary["accuracy_interval"], summary["ceiling"]) == (0, None, None)
    assert not (tmp_path / "out" / "held_out.safetensors").exists()
    assert lines(tmp_path / "out", "agents.jsonl") == []


def test_an_existing_directory_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "prepare", lambda *_: pytest.fail("nothing needs to be prepared"))
    with pytest.raises(InputError, match="exists already; allowed: a new directory, or --resume"):
        running.run(ALONE, tmp_path)


def test_who_listens_hears_every_round(tmp_path):
    heard: list[object] = []

    class Ear(running.Silent):
        def stage(self, text: str) -> None:
            heard.append(text)

        def round(self, round_: int, rounds: int, metrics: object) -> None:
            heard.append((round_, rounds))

    running.run(ALONE, tmp_path / "out", listener=Ear())
    assert heard[-6:] == [(round_, 5) for round_ in range(6)]
    assert all(isinstance(stage, str) for stage in heard[:-6])


def test_thousands_of_agents_leave_a_report(tmp_path):
    """More than the matrix of which is written out, or whose spectrum is computed."""
    agents = 2_001
    settings = config(
        TOWN,
        preferences={
            "source": "builtin:town",
            "agents": agents,
            "town": {"users": agents, "pairs_per_user": 2},
        },
        method={"name": "dec_dpo", "rounds": 2, "graph": "ring"},
        evaluation={"every": 2, "held_out": 0},
    )
    summary = running.run(settings, tmp_path / "out")
    assert summary["agents"] == agents
    topology = json.loads((tmp_path / "out" / "topology.json").read_text())
    assert topology["mixing_matrix"] is None
    assert len(topology["edges"]) == agents
    assert write_report(tmp_path / "out").stat().st_size > 0
