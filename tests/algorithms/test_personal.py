"""Personal policies: together and then alone, and groups that are found by their gradients."""

import json

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from prefmesh.algorithms.methods import METHODS, Population
from prefmesh.algorithms.methods.clustered import SKETCH, sketched
from prefmesh.algorithms.similarity import inner_products
from prefmesh.config import ExperimentConfig
from prefmesh.errors import InputError
from prefmesh.experiment import prepare
from prefmesh.run import run
from tests import problems


def town(groups: int, heterogeneity: float, **method) -> ExperimentConfig:
    users = {
        "users": 12,
        "pairs_per_user": 150,
        "heterogeneity": heterogeneity,
        "groups": groups,
        "temperature": 0.4,
    }
    return ExperimentConfig.parse(
        {
            "preferences": {"source": "builtin:town", "agents": 12, "town": users},
            "policy": {"model": "log_linear", "features": "attributes"},
            "objective": {"beta": 0.5},
            "method": {"rounds": 30, "local_steps": 3, **method},
            "optimizer": {"name": "adamw", "lr": 0.1, "batch_size": 16},
            "evaluation": {"every": 30, "held_out": 0.2},
        }
    )  # fmt: skip


def accuracy(config: ExperimentConfig, out) -> float:
    summary = run(config, out)
    own = "own/" if summary["headline"] == "own" else ""
    return summary["final"][f"eval/{own}rewards/accuracies"]


class TestTown:
    def test_where_groups_are_opposed_personal_policies_win(self, tmp_path) -> None:
        """Two groups, g and -g: one policy is at the consensus' ceiling, personal ones ten points above at least."""
        together = accuracy(town(2, 3.0, name="fed_dpo"), tmp_path / "fed")
        for k, method in enumerate(({"name": "clustered"}, {"name": "fine_tuning", "personal_rounds": 10})):
            assert accuracy(town(2, 3.0, **method), tmp_path / f"{k}") > together + 0.1
        found = list(json.loads((tmp_path / "0" / "groups.json").read_text()).values())
        # Residents are dealt to groups in turn: the found ones are exactly these (an adjusted Rand index of 1).
        assert found in ([0, 1] * 6, [1, 0] * 6)

    def test_where_all_agree_they_lose_little(self, tmp_path) -> None:
        together = accuracy(town(0, 0.0, name="fed_dpo"), tmp_path / "fed")
        assert accuracy(town(0, 0.0, name="clustered"), tmp_path / "clustered") >= together - 0.01
        assert set(json.loads((tmp_path / "clustered" / "groups.json").read_text()).values()) == {0}


class TestCollaborationGraph:
    def test_groups_part_and_agreement_costs_little(self, tmp_path) -> None:
        """The figures of three seeds are in docs/log.md; this is one."""
        for groups, heterogeneity, gain in ((2, 3.0, 0.1), (0, 0.0, -0.015)):
            together = accuracy(town(groups, heterogeneity, name="fed_dpo"), tmp_path / f"fed_{groups}")
            learned = town(groups, heterogeneity, name="collaboration_graph")
            assert accuracy(learned, tmp_path / f"graph_{groups}") > together + gain

    def test_without_sharpness_it_is_dec_dpo(self) -> None:
        on, sizes, optimizer = problems.problem("log_linear", 24), [6, 9, 4, 5], {"name": "sgd", "lr": 1.0}
        first = {"rounds": 4, "local_steps": 2, "graph": "ring"}
        mine = {"name": "collaboration_graph", "sharpness": 0.0, **first}
        a, _, _ = problems.go(problems.learner(on, sizes, mine, optimizer, weights="by_size"))
        b, _, _ = problems.go(problems.learner(on, sizes, {"name": "dec_dpo", **first}, optimizer, weights="by_size"))  # fmt: skip
        torch.testing.assert_close(a.theta["theta"], b.theta["theta"], rtol=0, atol=1e-12)

    def test_weights_are_the_minimum(self) -> None:
        """One round of four agents that end at 0, 1, 1 and 5, by a general solver."""
        made = METHODS["collaboration_graph"]
        settings = made.Settings(name="collaboration_graph", rounds=3, sharpness=0.7)  # pyright: ignore[reportCallIssue]
        method = made(settings, Population(weights=np.full(4, 0.25), seed=0))
        state = method.begin({"w": torch.zeros(1, 1, dtype=torch.float64)})
        end = torch.tensor([[0.0], [1.0], [1.0], [5.0]], dtype=torch.float64)
        found = method.mix(state, 1, np.arange(4), {"w": end.clone()}).theta["w"][:, 0]
        for i in range(4):
            others = [j for j in range(4) if j != i]
            d = (end[others, 0] - end[i, 0]).square().numpy()
            d /= d.mean()

            def price(w, d=d) -> float:
                return float(((w - 0.25) ** 2).sum() + 2 * 0.7 * 0.25 * (w @ d))

            best = minimize(
                price, np.full(3, 0.25), bounds=[(0, 1)] * 3, options={"ftol": 1e-15},
                constraints={"type": "eq", "fun": lambda w: w.sum() - 0.75}, method="SLSQP",
            )  # fmt: skip
            expected = 0.25 * float(end[i, 0]) + best.x @ end[others, 0].numpy()
            assert float(found[i]) == pytest.approx(expected, abs=1e-6)
        assert 0 < float(found[1]) < 1

    def test_models_are_sent_whole(self) -> None:
        with pytest.raises(InputError, match="allowed for collaboration_graph: none"):
            prepare(town(0, 0.0, name="collaboration_graph", compression=["int8"]))


class TestFineTuning:
    def test_it_is_fed_dpo_and_then_local_only(self) -> None:
        """Round by round, by the two methods themselves."""
        on, sizes = problems.problem("log_linear", 24), [6, 9, 9]
        optimizer = {"name": "adamw", "lr": 0.1}
        both = {
            "name": "fine_tuning",
            "rounds": 7,
            "personal_rounds": 3,
            "local_steps": 2,
            "participation": 2,
        }
        state, _, _ = problems.go(problems.learner(on, sizes, both, optimizer))
        first = {"name": "fed_dpo", "rounds": 7, "local_steps": 2, "participation": 2}
        fed = problems.learner(on, sizes, first, optimizer)
        expected = fed.begin(on.policy.initial(0))
        for round_ in range(1, 5):
            expected, _ = fed.round(expected, round_)
        alone = problems.learner(on, sizes, {"name": "local_only", "rounds": 7, "local_steps": 2}, optimizer)
        expected.theta = {name: tensor.clone() for name, tensor in expected.theta.items()}
        for round_ in range(5, 8):
            expected, _ = alone.round(expected, round_)
        assert problems.apart(state.theta, expected.theta) == 0
        assert (state.theta["theta"][0] != state.theta["theta"][1]).any()

    def test_bytes(self) -> None:
        made = METHODS["fine_tuning"]
        method = made(made.Settings(name="fine_tuning", rounds=6, personal_rounds=2, participation=3), Population(weights=np.full(5, 0.2), seed=0))  # fmt: skip
        sent = [method.bytes_sent(r, model_bytes=10, data_bytes=0) for r in range(1, 7)]
        assert sent == [60, 60, 60, 60, 0, 0]
        assert [len(method.participants(r)) for r in (4, 5)] == [3, 5]


class TestClustered:
    def test_a_group_moves_together(self) -> None:
        """Agents 0 and 2, weights 1 and 3, and 1 alone: theta_i + the weighted mean of the group's updates."""
        made = METHODS["clustered"]
        method = made(made.Settings(name="clustered", rounds=9, warm_rounds=2), Population(weights=np.array([0.2, 0.2, 0.6]), seed=0))  # fmt: skip
        state = method.begin({"w": torch.tensor([[10.0]])})
        state.memory["group"] = torch.tensor([0, 1, 0])
        state = method.mix(state, 5, np.arange(3), {"w": torch.tensor([[11.0], [12.0], [15.0]])})
        assert state.theta["w"][:, 0].tolist() == pytest.approx([14, 12, 14])

    def test_warm_rounds_are_fed_dpo(self) -> None:
        on, sizes, optimizer = problems.problem("log_linear", 24), [6, 9, 9], {"name": "sgd", "lr": 1.0}
        first = {"rounds": 9, "local_steps": 2}
        mine = problems.learner(on, sizes, {"name": "clustered", "warm_rounds": 8, **first}, optimizer, weights="by_size")  # fmt: skip
        fed = problems.learner(on, sizes, {"name": "fed_dpo", **first}, optimizer, weights="by_size")
        a, _, _ = problems.go(mine, rounds=7)
        b, _, _ = problems.go(fed, rounds=7)
        torch.testing.assert_close(a.theta["theta"], b.theta["theta"], rtol=0, atol=1e-12)

    def test_sketches_keep_inner_products(self) -> None:
        """Unbiased, with a standard error of about |a| |b| / sqrt(SKETCH), and the same for whoever sketches."""
        torch.manual_seed(0)
        rows = {"a": torch.randn(4, 60, 50), "b": torch.randn(4, 700)}
        exact = inner_products(rows)
        lengths = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
        found = np.array([inner_products({"s": sketched(rows, seed)}) for seed in range(40)])
        error = lengths / np.sqrt(SKETCH)
        assert (np.abs(found.mean(0) - exact) < 4 * 1.5 * error / np.sqrt(40)).all()
        assert (np.abs(found - exact) < 6 * 1.5 * error).all()
        alone = sketched({name: tensor[2:3] for name, tensor in rows.items()}, 7)
        torch.testing.assert_close(alone[0], sketched(rows, 7)[2])

    @pytest.mark.parametrize("clusters", [2, 3])
    def test_as_many_groups_as_wanted(self, clusters: int) -> None:
        experiment = prepare(town(clusters, 3.0, name="clustered", clusters=clusters))
        learner = experiment.learner
        state = learner.begin(experiment.start)
        for round_ in range(1, 7):
            state, _ = learner.round(state, round_)
        found = state.memory["group"].numpy()
        truth = np.arange(12) % clusters
        assert len({(a, b) for a, b in zip(found, truth, strict=True)}) == clusters == len(set(found))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"name": "fine_tuning", "rounds": 5},
            r"^method.personal_rounds: found 5 of 5 rounds; allowed: 1 to 4",
        ),
        ({"name": "clustered", "rounds": 6}, r"^method.warm_rounds: found 6 of 6 rounds; allowed: 2 to 5"),
        ({"name": "clustered", "clusters": 7}, r"^method.clusters: found 7; allowed: auto, or 2 to 6"),
    ],
)
def test_refused(settings: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        METHODS[settings["name"]].Settings(**settings).check(6)
