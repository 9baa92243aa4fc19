"""Flower's simulation against our rounds: the same losses and parameters over turns, its parts, its refusals."""

import os

import pytest
import torch

from prefmesh.bench import flower
from prefmesh.bench.benchmark import bench
from prefmesh.bench.contest import Schedule
from prefmesh.bench.flower import Flower
from prefmesh.bench.ours import Rounds
from prefmesh.config import ExperimentConfig
from prefmesh.errors import InputError
from prefmesh.experiment import prepare


def config(**changes: dict[str, object]) -> ExperimentConfig:
    sections = {
        "preferences": {"source": "builtin:town", "agents": 3, "town": {"users": 3, "pairs_per_user": 8}},
        "policy": {"model": "builtin:tiny", "train": "lora", "lora": {"r": 2, "lora_alpha": 4}},
        "objective": {},
        "method": {"name": "fed_dpo", "rounds": 4, "local_steps": 2},
        "optimizer": {"name": "adamw", "lr": 1e-3, "batch_size": 2, "state": "reset", "schedule": "cosine"},
        "evaluation": {"held_out": 0.0, "samples": 0},
        "runtime": {"device": "cpu"},
    }
    return ExperimentConfig.parse({name: changes.get(name, section) for name, section in sections.items()})


def test_losses_and_parameters_are_ours_over_two_turns(monkeypatch):
    pytest.importorskip("flwr", reason="flwr is not installed (extra: flower)")
    pytest.importorskip("ray", reason="ray is not installed (extra: flower)")
    monkeypatch.setattr(flower.torch, "get_num_threads", lambda: 2)  # workers
    experiment = prepare(config())
    ours, theirs = Rounds(experiment), Flower(experiment)
    for first in (1, 3):
        mine, other = ours.rounds(first, 2), theirs.rounds(first, 2)
        assert other.losses == pytest.approx(mine.losses, abs=1e-5)
        for seconds, computing, overhead in zip(
            other.seconds, other.parts["computing"], other.parts["overhead"], strict=True
        ):
            assert computing > 0
            assert computing + overhead == pytest.approx(seconds)
        for name, reached in theirs.theta.items():
            torch.testing.assert_close(reached, ours.state.theta[name][:1], atol=1e-5, rtol=0)
            assert not torch.equal(reached, experiment.start[name])


def test_a_simulation_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(flower, "CHILD", "raise SystemExit('no such cluster')")
    with pytest.raises(RuntimeError, match="exit code 1:\nno such cluster"):
        Flower(prepare(config())).rounds(1, 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": {"name": "local_only", "rounds": 4}}, "local_only found; allowed: fed_dpo"),
        ({"method": {"name": "fed_dpo", "participation": 2}}, "with participation or staleness found"),
        ({"method": {"name": "fed_dpo", "staleness": 1}}, "with participation or staleness found"),
        ({"objective": {"weights": "by_size"}}, "objective.weights by_size found; allowed: uniform"),
        ({"optimizer": {"state": "keep"}}, "optimizer.state keep found; allowed: reset"),
        ({"policy": {"model": "log_linear"}}, "log_linear found; allowed: a language model"),
    ],
)
def test_refusals(changes, words):
    with pytest.raises(InputError, match=words):
        bench(config(**changes), ["flower"], Schedule(turns=1, rounds=1))


def test_a_plugins_loss_is_refused(monkeypatch):
    monkeypatch.setitem(flower.LOSSES, "mine", lambda log_probs, settings: -log_probs.margin)
    with pytest.raises(InputError, match="a plugin's loss 'mine' found; allowed: prefmesh's own"):
        Flower.check(prepare(config(objective={"loss_type": "mine"})))


def test_without_flwr_the_refusal_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(flower, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"flwr's simulation is not installed; allowed: pip install"):
        Flower.check(prepare(config()))


def test_the_child_is_told_to_stay_alone_and_silent(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    told = flower._environment(tmp_path, 1)
    assert "RAY_ADDRESS" not in told
    assert told["OMP_NUM_THREADS"] == "1"
    assert told["FLWR_TELEMETRY_ENABLED"] == told["RAY_USAGE_STATS_ENABLED"] == "0"
    assert told["PATH"] == os.environ["PATH"]
