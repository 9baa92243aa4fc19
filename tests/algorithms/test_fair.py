"""One policy that does not forget its worst users: weights by losses, against plain numpy and the optima that they are for."""

from functools import cache
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from prefmesh.algorithms.methods import Population
from prefmesh.algorithms.methods.group_robust import GroupRobust, GroupRobustSettings
from prefmesh.algorithms.methods.q_fed_avg import QFedAvg, QFedAvgSettings
from prefmesh.compression import Chain
from prefmesh.config import ExperimentConfig
from prefmesh.errors import InputError
from prefmesh.run import run
from prefmesh.theory import LogLinearProblem, simulate
from tests import problems
from tests.algorithms.test_lora_mixing import learner
from tests.theory.test_laws import tastes

SMALL = tastes(4, 3, pairs=5)


@cache
def opposed() -> LogLinearProblem:
    """Nine agents of one taste, three of nearly the opposite one; each group with pairs of its own. Smoothness near 1."""
    random = np.random.default_rng(3)
    shards = []
    for taste in ([1.5, 1.0], [-1.5, 0.4]):
        x = random.normal(size=(16, 2))
        first = x @ np.array(taste) + random.logistic(size=16) > 0
        shards.append(np.where(first[:, None], x, -x))
    return LogLinearProblem([shards[0]] * 9 + [shards[1]] * 3, 1.0)


def minimax(on: LogLinearProblem) -> tuple[np.ndarray, float]:
    """min t with f_i(theta) <= t for all i, by SLSQP."""
    found = minimize(
        lambda x: x[-1],
        np.append(np.zeros(on.dim), 1.0),
        jac=lambda x: np.append(np.zeros(on.dim), 1.0),
        constraints={
            "type": "ineq",
            "fun": lambda x: x[-1] - on.agent_losses(x[:-1]),
            "jac": lambda x: np.hstack([-on.agent_gradients(x[:-1]), np.ones((on.num_agents, 1))]),
        },
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 200},
    )
    assert found.success
    return found.x[:-1], float(found.x[-1])


def gap(losses: np.ndarray) -> float:
    return float(losses.max() - losses.mean())


def ends(on: LogLinearProblem, theta: np.ndarray, lr: float, local_steps: int) -> np.ndarray:
    """Every agent's Delta."""
    rows = np.tile(theta, (on.num_agents, 1))
    for _ in range(local_steps):
        rows = rows - lr * on.agent_gradients(rows)
    return rows - theta


class TestGroupRobust:
    def test_by_hand(self) -> None:
        """q_i <- q_i exp(eta F_i), normalised; then the sum of q_i Delta_i."""
        theta, q, lr, eta = np.zeros(3), np.full(4, 0.25), 0.4, 2.0
        for _ in range(5):
            q = q * np.exp(eta * SMALL.agent_losses(theta))
            q = q / q.sum()
            theta = theta + q @ ends(SMALL, theta, lr, 3)
        assert q.max() > 1.5 * q.min()
        found = simulate.method(SMALL, "group_robust", lr=lr, rounds=5, local_steps=3, robust_step_size=eta)
        np.testing.assert_allclose(found.final, theta, rtol=0, atol=1e-13)

    @pytest.mark.parametrize("participation", [2, 3])
    def test_some_are_as_good_as_all_on_average(self, participation: int) -> None:
        """Over all draws of S of 5: log q_i - log q_j moves by eta (F_i - F_j), and weights of fixed q are those of all."""
        w, losses = np.array([0.1, 0.3, 0.2, 0.25, 0.15]), np.array([0.3, 0.9, 0.5, 0.7, 0.1])
        for eta in (0.0, 0.8):
            settings = GroupRobustSettings(
                name="group_robust", participation=participation, robust_step_size=eta
            )
            method = GroupRobust(settings, Population(weights=w, seed=0))
            moved, counted = [], np.zeros(5)
            draws = list(combinations(range(5), participation))
            for draw in draws:
                acting = np.array(draw)
                state = method.begin({"theta": torch.zeros(1, 2)})
                weights = method.weigh(state, acting, losses[acting][:, None])
                log_q = state.memory["log_q"].numpy()
                assert np.exp(log_q).sum() == pytest.approx(1)
                np.testing.assert_allclose(weights, 5 / participation * np.exp(log_q[acting]))
                moved.append(log_q - np.log(w))
                counted[acting] += weights / len(draws)
            mean = np.mean(moved, axis=0)
            np.testing.assert_allclose(mean - mean[0], eta * (losses - losses[0]), rtol=0, atol=1e-12)
            if not eta:
                np.testing.assert_allclose(counted, w)

    @pytest.mark.parametrize("compression", [(), ({"name": "top_k", "share": 0.5}, "int8")])
    def test_the_worst_group_is_served_as_well_as_can_be(self, compression: Chain) -> None:
        """The fixed point is the minimax optimum that SLSQP finds: both losses are equal there. FedDPO follows the nine."""
        on = opposed()
        theta, worst = minimax(on)
        settings = {"lr": 2.0, "rounds": 60}
        found = simulate.method(on, "group_robust", robust_step_size=1.0, compression=compression, **settings)
        np.testing.assert_allclose(found.final, theta, rtol=0, atol=1e-8)
        losses = on.agent_losses(found.final)
        assert losses.max() == pytest.approx(worst, abs=1e-8)
        assert gap(losses) < 1e-8
        fed = on.agent_losses(simulate.method(on, "fed_dpo", **settings).final)
        assert fed.max() > worst + 0.1
        assert gap(fed) > 0.1
        assert fed[0] < losses[0]

    def test_with_some_and_local_steps_it_stays_near(self) -> None:
        on = opposed()
        _, worst = minimax(on)
        found = simulate.method(
            on, "group_robust", lr=0.5, rounds=80, local_steps=2, participation=6, robust_step_size=0.3
        )
        assert on.agent_losses(found.average[-40:].mean(0)).max() < worst + 0.02


class TestQFedAvg:
    @pytest.mark.parametrize("lipschitz", [None, 0.7])
    def test_by_hand(self, lipschitz: float | None) -> None:
        """Algorithm 2 as it is written, with Delta w_i = L (theta - end_i)."""
        theta, q, lr = np.zeros(3), 1.5, 0.4
        smoothness = 1 / lr if lipschitz is None else lipschitz
        for _ in range(5):
            f = SMALL.agent_losses(theta)
            delta_w = -smoothness * ends(SMALL, theta, lr, 3)
            h = q * f ** (q - 1) * np.square(delta_w).sum(1) + smoothness * f**q
            theta = theta - (f[:, None] ** q * delta_w).sum(0) / h.sum()
        found = simulate.method(SMALL, "q_fed_avg", lr=lr, rounds=5, local_steps=3, q=q, lipschitz=lipschitz)
        np.testing.assert_allclose(found.final, theta, rtol=0, atol=1e-13)

    @pytest.mark.parametrize("q", [1.0, 4.0])
    def test_it_leads_to_the_fair_optimum(self, q: float) -> None:
        """Of sum_i f_i^{q+1} / (q + 1), by BFGS. The larger q, the smaller the worst loss."""
        on = opposed()

        def aim(theta: np.ndarray) -> tuple[float, np.ndarray]:
            f = on.agent_losses(theta)
            return float((f ** (q + 1)).sum() / (q + 1)), f**q @ on.agent_gradients(theta)

        optimum = minimize(aim, np.zeros(2), jac=True, method="BFGS", options={"gtol": 1e-10}).x
        found = simulate.method(on, "q_fed_avg", lr=3.0, rounds=50, q=q)
        np.testing.assert_allclose(found.final, optimum, rtol=0, atol=1e-6)
        worst = [on.agent_losses(theta).max() for theta in (minimax(on)[0], optimum, on.optimum())]
        assert worst[0] < worst[1] < worst[2]

    def test_losses_of_any_size(self) -> None:
        """A loss of 0 counts nothing beside others, and large powers do not overflow."""
        told = np.array([[0.0, 0.1], [0.2, 0.1], [0.4, 0.1]])
        for q in (0.5, 1.0, 900.0):
            method = QFedAvg(
                QFedAvgSettings(name="q_fed_avg", q=q), Population(weights=np.full(3, 1 / 3), seed=0)
            )
            state = method.begin({"theta": torch.zeros(1, 2)})
            found = method.weigh(state, np.arange(3), told)
            assert np.isfinite(found).all()
            assert found[0] < 1e-4
            with pytest.raises(
                InputError, match=r"^method.name: q_fed_avg, but agent 4's loss is -0.1; allowed"
            ):
                method.weigh(state, np.array([1, 2, 4]), told - 0.1 * np.array([[0, 0], [0, 0], [5, 0]]))


@pytest.mark.parametrize(
    "same", [{"name": "group_robust", "robust_step_size": 0.0}, {"name": "q_fed_avg", "q": 0.0}], ids=str
)
@pytest.mark.parametrize("common", [{"participation": 3}, {"compression": ("sign",)}], ids=str)
def test_without_their_own_number_they_are_fed_dpo(same: dict, common: dict) -> None:
    settings = {"rounds": 6, "local_steps": 3, "batch_size": 4, "lr": 0.5} | common
    expected, found = (simulate.method(SMALL, **m, **settings) for m in ({"name": "fed_dpo"}, same))
    np.testing.assert_allclose(found.average, expected.average, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "settings", [{"name": "group_robust", "participation": 3}, {"name": "q_fed_avg", "q": 2.0}], ids=str
)
def test_passes_do_not_matter(settings: dict) -> None:
    on, sizes = problems.problem("log_linear", 30), [6, 9, 9, 6]
    optimizer = {"name": "sgd", "lr": 1.0, "batch_size": 3}
    found = []
    for together in (1, 3, 4):
        made = problems.learner(on, sizes, {"rounds": 5, "local_steps": 2, **settings}, optimizer, weights="by_size", agents_per_pass=together)  # fmt: skip
        state, _, _ = problems.go(made)
        found.append({"theta": state.theta["theta"], **state.memory})
    for other in found[1:]:
        assert problems.apart(found[0], other) < 1e-12


@pytest.mark.parametrize(
    "same", [{"name": "group_robust", "robust_step_size": 0.0}, {"name": "q_fed_avg", "q": 0.0}], ids=str
)
def test_of_adapters_that_take_turns(same: dict) -> None:
    """Rounds that train B or A alone."""
    sgd = {"name": "sgd", "lr": 0.5, "batch_size": 2}
    found = [
        problems.go(learner("alternate", {"rounds": 3, "local_steps": 2, **m}, sgd))[0]
        for m in ({"name": "fed_dpo"}, same, {"name": "q_fed_avg", "q": 2.0})
    ]
    assert problems.apart(found[0].theta, found[1].theta) < 1e-12
    assert problems.apart(found[0].theta, found[2].theta) > 1e-9


def test_in_the_town_the_worst_off_gain(tmp_path) -> None:
    """Ten residents who differ, 180 held-out pairs each: two points for the worst, and a gap that is a third smaller at least."""
    town = {"users": 10, "pairs_per_user": 600, "heterogeneity": 1.5, "temperature": 0.4}
    final = {}
    for method in ({"name": "fed_dpo"}, {"name": "group_robust", "robust_step_size": 0.3}, {"name": "q_fed_avg", "q": 5.0}):  # fmt: skip
        config = ExperimentConfig.parse(
            {
                "preferences": {"source": "builtin:town", "agents": 10, "town": town},
                "policy": {"model": "log_linear", "features": "attributes"},
                "objective": {"beta": 0.5},
                "method": {"rounds": 30, **method},
                "optimizer": {"name": "sgd", "lr": 10.0, "batch_size": "full"},
                "evaluation": {"every": 30, "held_out": 0.3},
            }
        )
        final[method["name"]] = run(config, tmp_path / method["name"])["final"]
    fed = final.pop("fed_dpo")
    for found in final.values():
        assert found["eval/accuracy_worst_tenth"] > fed["eval/accuracy_worst_tenth"] + 0.02
        assert found["eval/users/loss_gap"] < fed["eval/users/loss_gap"] * 2 / 3
        assert found["eval/rewards/accuracies"] > fed["eval/rewards/accuracies"] - 0.02


RAW = {
    "preferences": {"source": "builtin:town", "agents": 6},
    "policy": {"model": "log_linear", "features": "attributes"},
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": {"name": "group_robust", "participation": 1}}, r"^method.participation: found 1 participant"),
        ({"method": {"name": "group_robust", "participation": 7}}, r"^method.participation: found 7"),
        ({"method": {"name": "group_robust", "robust_step_size": -1}}, r"^method.robust_step_size"),
        ({"method": {"name": "q_fed_avg"}}, r"^method.lipschitz: none is 1/lr"),
        ({"method": {"name": "q_fed_avg", "q": 0, "lipschitz": 0}}, r"lipschitz 0 has no meaning for q 0"),
        ({"method": {"name": "q_fed_avg", "lipschitz": 0}, "objective": {"loss_type": "robust", "label_smoothing": 0.1}}, r"^objective.loss_type: robust may be below 0"),
    ],
)  # fmt: skip
def test_refused(changes: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        ExperimentConfig.parse(RAW | changes)
    ExperimentConfig.parse(RAW | {"method": {"name": "q_fed_avg", "q": 0}})
