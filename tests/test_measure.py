"""What an evaluation measures, per user and per agent; and that a run that diverged says so."""

import json
import math

import numpy as np
import pytest
import torch

from prefmesh.algorithms.gradients import Problem
from prefmesh.config import ExperimentConfig
from prefmesh.errors import Diverged, InputError
from prefmesh.evaluation.scores import log_probs
from prefmesh.evaluation.settings import EvaluationSettings
from prefmesh.experiment import Experiment, prepare
from prefmesh.measure import Evaluator, score
from prefmesh.objectives import ObjectiveSettings
from prefmesh.preferences.census import Census
from prefmesh.preferences.division import divide
from prefmesh.preferences.pairs import Pair
from prefmesh.preferences.settings import PreferencesSettings
from prefmesh.run import run
from tests import models, problems


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PREFMESH_CACHE", str(tmp_path / "cache"))


def town(**changes) -> ExperimentConfig:
    """Six residents, log-linear on attributes."""
    raw = {
        "preferences": {"source": "builtin:town", "agents": 6, "town": {"users": 6, "pairs_per_user": 30}},
        "policy": {"model": "log_linear", "features": "attributes"},
        "method": {"name": "dec_dpo", "graph": "ring", "rounds": 3},
        "optimizer": {"name": "sgd", "lr": 20.0},
        "evaluation": {"every": 1, "held_out": 0.2},
    }
    for section, values in changes.items():
        raw[section] = raw.get(section, {}) | values
    return ExperimentConfig.parse(raw)


def evaluated(experiment: Experiment, rounds: int = 3):
    """The state and its evaluation after some rounds."""
    state, _, _ = problems.go(experiment.learner, experiment.start, rounds)
    return state, experiment.evaluator.evaluate(state.theta, rounds)


class TestAccuracies:
    def test_the_average_and_everyones_own(self) -> None:
        """By numpy: h = (phi_w - phi_l)^T theta, of the average model and of each agent's on its own pairs."""
        experiment = prepare(town())
        state, found = evaluated(experiment)
        data = experiment.learner.problem.data
        x = (data.chosen - data.rejected).double().numpy()
        theta = state.theta["theta"].double().numpy()
        held_out = [agent.held_out for agent in experiment.division.agents]
        rows = np.concatenate(held_out)
        h, own = (
            x[rows] @ theta.mean(0),
            np.concatenate([x[r] @ t for r, t in zip(held_out, theta, strict=True)]),
        )
        metrics = found.metrics
        assert metrics["eval/rewards/accuracies"] == pytest.approx(np.mean(h > 0))
        assert metrics["eval/own/rewards/accuracies"] == pytest.approx(np.mean(own > 0))
        assert metrics["eval/rewards/margins"] == pytest.approx(0.1 * h.mean(), rel=1e-4)
        assert metrics["eval/own/rewards/margins"] == pytest.approx(0.1 * own.mean(), rel=1e-4)
        assert metrics["eval/loss"] == pytest.approx(np.log1p(np.exp(-0.1 * h)).mean(), rel=1e-4)
        # One record per user; weighted by pairs they make up the whole.
        assert len(found.users) == 6
        assert sum(u["pairs"] for u in found.users) == len(rows)
        for key, total in (
            ("accuracy", "eval/rewards/accuracies"),
            ("own_accuracy", "eval/own/rewards/accuracies"),
        ):
            mean = sum(u[key] * u["pairs"] for u in found.users) / len(rows)
            assert mean == pytest.approx(metrics[total])
        users = [np.log1p(np.exp(-0.1 * x[r] @ theta.mean(0))).mean() for r in held_out]
        assert metrics["eval/users/loss_gap"] == pytest.approx(max(users) - np.mean(users), rel=1e-4)
        assert sorted(u["loss"] for u in found.users) == pytest.approx(sorted(users), rel=1e-4)
        assert metrics["eval/accuracy_worst_tenth"] == min(u["accuracy"] for u in found.users)

    def test_the_gradient_is_the_global_one_at_the_average(self) -> None:
        """||sum_i w_i grad f_i(mean theta)||^2 over training pairs, unclipped, whatever the local optimiser clips."""
        for weights in ("uniform", "by_size"):
            experiment = prepare(
                town(
                    objective={"weights": weights},
                    optimizer={"max_grad_norm": 1e-3, "name": "sgd", "lr": 20.0},
                )
            )
            state, found = evaluated(experiment)
            data = experiment.learner.problem.data
            x = (data.chosen - data.rejected).double().numpy()
            theta = state.theta["theta"].double().numpy().mean(0)
            shards = [agent.train for agent in experiment.division.agents]
            share = experiment.method.population.weights
            if weights == "by_size":
                assert share == pytest.approx(np.array([len(s) for s in shards]) / sum(map(len, shards)))
            gradient = sum(
                w * -(0.1 / (1 + np.exp(0.1 * x[s] @ theta))) @ x[s] / len(s)
                for w, s in zip(share, shards, strict=True)
            )
            loss = sum(
                w * np.log1p(np.exp(-0.1 * x[s] @ theta)).mean() for w, s in zip(share, shards, strict=True)
            )
            assert found.metrics["grad_norm_sq"] == pytest.approx(float(gradient @ gradient), rel=1e-4)
            assert found.metrics["train_loss"] == pytest.approx(loss, rel=1e-5)

    def test_it_begins_at_ln_2_and_one_half(self) -> None:
        _, found = evaluated(prepare(town()), rounds=0)
        assert found.metrics["train_loss"] == pytest.approx(math.log(2))
        assert found.metrics["eval/rewards/accuracies"] == 0.5
        assert {u["accuracy"] for u in found.users} == {u["own_accuracy"] for u in found.users} == {0.5}

    def test_one_policy_has_one_figure(self) -> None:
        """FedDPO's agents share a row: own and average are the same numbers."""
        _, found = evaluated(prepare(town().replace({"method": {"name": "fed_dpo", "rounds": 3}})))
        assert all(
            (getattr(found.own, name) == getattr(found.average, name)).all()
            for name in ("margin", "accuracy", "loss")
        )
        assert all(u["accuracy"] == u["own_accuracy"] for u in found.users)

    def test_nothing_held_out(self) -> None:
        _, found = evaluated(prepare(town(evaluation={"held_out": 0, "every": 1})))
        assert found.users == []
        assert set(found.metrics) == {"train_loss", "grad_norm_sq"}
        assert len(found.average.rows) == 0


@pytest.mark.parametrize(
    ("wanted", "pairs", "sample"),
    [("auto", 2000, None), ("auto", 2001, 500), ("all", 5000, None), (64, 5000, 64), (64, 10, 64)],
)
def test_how_many_pairs_the_gradient_is_taken_over(wanted, pairs, sample) -> None:
    few = models.pairs(12)
    division = divide(
        few, PreferencesSettings(source="x.jsonl", agents=1, partition="iid"), held_out=0, seed=0
    )
    made = Evaluator(
        problem=problems.problem("log_linear", 12),
        method=problems.learner(problems.problem("log_linear", 12), [12], {"name": "local_only"}, {}).method,
        pairs=few,
        division=division,
        census=Census.of(few, division),
        settings=EvaluationSettings(gradient_pairs=wanted),
        training=np.arange(pairs),
        weights=np.full(pairs, 1 / pairs),
        seed=0,
    )
    assert made.gradient_sample == sample


FULL = {"name": "sgd", "lr": 20.0, "batch_size": "full"}


class TestNeighbours:
    """`evaluation.neighbour_mixes`: each agent measures at W^k Theta of its own."""

    @pytest.mark.parametrize("weights", ["uniform", "by_size"])
    def test_by_hand(self, weights: str) -> None:
        experiment = prepare(
            town(evaluation={"neighbour_mixes": 2}, objective={"weights": weights}, optimizer=FULL)
        )
        learner = experiment.learner
        state = learner.begin(experiment.start)
        for round_ in (1, 2):
            state, measures = learner.round(state, round_)
        found = experiment.evaluator.evaluate(state.theta, 2)
        data = learner.problem.data
        x = (data.chosen - data.rejected).double().numpy()
        theta = state.theta["theta"].double().numpy()
        w2 = np.linalg.matrix_power(experiment.method.matrix(1).toarray(), 2)
        middle = w2 @ theta
        expected = np.square(theta - middle).sum() / 6
        assert measures["consensus_error"] == pytest.approx(expected, rel=1e-4)
        agents, share = experiment.division.agents, experiment.method.population.weights
        parts, loss = np.zeros_like(theta), 0.0
        for i, agent in enumerate(agents):
            h = x[agent.train] @ middle[i]
            parts[i] = -6 * share[i] * 0.1 * (1 / (1 + np.exp(0.1 * h))) @ x[agent.train] / len(agent.train)
            loss += share[i] * np.log1p(np.exp(-0.1 * h)).mean()
        assert found.metrics["grad_norm_sq"] == pytest.approx(np.square(w2 @ parts).sum() / 6, rel=1e-4)
        assert found.metrics["train_loss"] == pytest.approx(loss, rel=1e-5)
        right = [x[a.held_out] @ middle[i] > 0 for i, a in enumerate(agents)]
        assert found.metrics["eval/rewards/accuracies"] == pytest.approx(np.concatenate(right).mean())

    @pytest.mark.parametrize("gradient_pairs", ["all", 20])
    def test_many_mixes_are_the_average(self, gradient_pairs: str | int) -> None:
        """And the fewer, the further a ring's figures are from those at the average."""
        exact, *others = (
            prepare(
                town(
                    evaluation={"gradient_pairs": gradient_pairs} | mixes,
                    optimizer=FULL,
                    runtime={"dtype": "float64"},
                )
            )
            for mixes in ({}, {"neighbour_mixes": 1}, {"neighbour_mixes": 3}, {"neighbour_mixes": 100})
        )
        learner = exact.learner
        state = learner.begin(exact.start)
        for round_ in (1, 2, 3):
            state, _ = learner.round(state, round_)
        expected = exact.evaluator.evaluate(state.theta, 3).metrics
        far = []
        for one in others:
            found = one.evaluator.evaluate(state.theta, 3).metrics
            far.append(max(abs(found[key] - expected[key]) for key in ("train_loss", "grad_norm_sq")))
        assert far[0] > far[1] > far[2]
        assert far[2] < 1e-12
        found = others[2].evaluator.evaluate(state.theta, 3).metrics
        assert found == pytest.approx(expected, abs=1e-9)

    def test_whole_users_are_held_out(self) -> None:
        """Nobody's pairs: the last agent's middle scores them."""
        experiment = prepare(
            town(
                preferences={"partition": "iid", "agents": 4},
                evaluation={"by": "user", "held_out": 0.34, "neighbour_mixes": 1},
            )
        )
        state, found = evaluated(experiment)
        data = experiment.learner.problem.data
        last = experiment.method.matrix(1).toarray()[-1] @ state.theta["theta"].double().numpy()
        h = (data.chosen - data.rejected).double().numpy()[experiment.division.unassigned_held_out] @ last
        assert found.average.margin == pytest.approx(h, rel=1e-4, abs=1e-5)

    def test_a_method_without_neighbours(self) -> None:
        with pytest.raises(InputError, match=r"^evaluation.neighbour_mixes: 2, but agents of fed_dpo"):
            prepare(
                town(evaluation={"neighbour_mixes": 2}).replace({"method": {"name": "fed_dpo", "rounds": 3}})
            )


class TestTies:
    def test_a_policy_that_did_not_move_ties(self) -> None:
        for kind in ("log_linear", "lora", "full"):
            on = problems.problem(kind, 6, "float32")
            found = score(on, on.policy.initial(0), np.arange(6))
            assert (found.accuracy == 0.5).all()
            assert np.abs(found.margin).max() < 1e-4

    def test_equal_completions_tie_whatever_the_policy(self) -> None:
        policy = problems.causal_lm("lora")
        same = Pair(prompt="w1 w2", chosen=" w3", rejected=" w3", user="u")
        data = policy.encode([same, *models.pairs(3)])
        on = Problem(
            policy=policy,
            data=data,
            reference=log_probs(policy, None, data, np.arange(4)),
            objective=ObjectiveSettings(),
        )
        torch.manual_seed(0)
        moved = {name: t + torch.randn_like(t) for name, t in policy.initial(0).items()}
        found = score(on, moved, np.arange(4))
        assert found.accuracy[0] == 0.5
        assert set(found.accuracy[1:]) <= {0.0, 1.0}


@pytest.fixture
def files(tmp_path):
    """A tiny model's directory and a file of pairs of eight users."""
    models.model().save_pretrained(tmp_path / "model")
    models.tokenizer().save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected, "user": p.user}
        for p in models.pairs(80, users=8)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def lm(files, **changes) -> ExperimentConfig:
    raw = {
        "preferences": {"source": str(files / "pairs.jsonl")},
        "policy": {"model": str(files / "model"), "lora": {"r": 2}},
        "method": {"name": "fed_dpo", "rounds": 1},
        "optimizer": {"lr": 0.01},
        "evaluation": {"every": 1, "samples": 12, "max_new_tokens": 6},
    }
    for section, values in changes.items():
        raw[section] = raw.get(section, {}) | values
    return ExperimentConfig.parse(raw)


class TestSamples:
    def test_kl_is_zero_at_the_reference_and_not_after(self, files) -> None:
        experiment = prepare(lm(files))
        _, before = evaluated(experiment, 0)
        _, after = evaluated(experiment, 3)
        assert before.metrics["eval/kl"] == pytest.approx(0, abs=1e-5)
        assert abs(after.metrics["eval/kl"]) > 1e-4
        assert after.metrics["eval/kl_stderr"] > 0
        assert "eval/win_rate" not in after.metrics  # real users: no utility is known

    def test_local_only_writes_with_everyones_own(self, files) -> None:
        _, found = evaluated(prepare(lm(files, method={"name": "local_only"})), 1)
        assert abs(found.metrics["eval/kl"]) > 0

    @pytest.mark.parametrize("method", ["fed_dpo", "local_only"])
    def test_held_out_users_belong_to_no_agent(self, files, method) -> None:
        """All held-out pairs are nobody's own: prompts are theirs, and local-only has nothing to write."""
        config = lm(
            files,
            method={"name": method},
            evaluation={"by": "user", "held_out": 0.25, "every": 1, "samples": 12, "max_new_tokens": 6},
        )
        experiment = prepare(config)
        assert len(experiment.division.unassigned_held_out) == 20
        _, found = evaluated(experiment, 1)
        assert {u["agent"] for u in found.users} == {None}
        assert len(found.users) == 2
        assert ("eval/kl" in found.metrics) == (method == "fed_dpo")


class TestDivergence:
    def lines(self, out) -> list[dict]:
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    def test_a_loss_that_is_not_finite_ends_the_run(self, files) -> None:
        """The first step goes to parameters that are finite and useless; the second one's loss is not a number."""
        config = lm(
            files,
            optimizer={"name": "sgd", "lr": 1e30},
            evaluation={"every": 10},
            method={"name": "fed_dpo", "rounds": 9},
        )
        with pytest.raises(
            Diverged, match=r"the loss stopped being finite in round 2; the checkpoint of round 0 is kept"
        ):
            run(config, files / "out")
        last = self.lines(files / "out")[-1]
        assert last["round"] == 2
        assert last["loss"] is None
        assert last["loss/non_finite"] in ("nan", "inf")
        for key in last:
            if key.endswith("/non_finite"):
                assert last[key.removesuffix("/non_finite")] is None
        summary = json.loads((files / "out" / "summary.json").read_text())
        assert summary["status"] == "diverged"
        assert summary["rounds"] == 2
        assert not (files / "out" / "policy").exists()

    @pytest.mark.parametrize("rounds", [1, 4])
    def test_what_only_the_evaluation_sees_ends_it_too(self, files, rounds) -> None:
        """One step to parameters that are finite and useless: the next loss is NaN, and there may be no next round."""
        config = lm(
            files, optimizer={"name": "sgd", "lr": 1e30}, method={"name": "fed_dpo", "rounds": rounds}
        )
        with pytest.raises(Diverged, match="the loss stopped being finite in round 1"):
            run(config, files / "out")
        last = self.lines(files / "out")[-1]
        assert last["round"] == 1
        assert last["train_loss"] is None
        assert last["train_loss/non_finite"] in ("nan", "inf")
        assert json.loads((files / "out" / "summary.json").read_text())["status"] == "diverged"


def test_divisions_are_what_is_measured() -> None:
    """Every held-out pair is scored once: agents' own, then nobody's."""
    pairs = models.pairs(60, users=6)
    division = divide(pairs, PreferencesSettings(source="x.jsonl"), held_out=0.3, by="user", seed=0)
    scored = np.concatenate([*(a.held_out for a in division.agents), division.unassigned_held_out])
    assert sorted(scored) == sorted(division.split.held_out)
