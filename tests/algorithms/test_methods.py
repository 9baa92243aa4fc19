"""Where each method leads on log-linear problems: to the optimum, to a known bias, or as another method does."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from prefmesh.algorithms.methods import METHODS, Population
from prefmesh.errors import InputError
from prefmesh.theory import LogLinearProblem, laws, simulate
from prefmesh.topology.build import build_mixing_matrix
from tests import problems
from tests.theory.test_laws import tastes

PROBLEM = tastes(6, 3)
"""Smoothness 1: a step of 1 is safe."""
OPTIMUM = PROBLEM.optimum()


def go(name: str, *, rounds: int, lr: float = 0.5, on: LogLinearProblem = PROBLEM, **settings) -> simulate.Trajectory:  # fmt: skip
    return simulate.method(on, name, lr=lr, rounds=rounds, **settings)


def far(found: simulate.Trajectory, from_: np.ndarray = OPTIMUM) -> float:
    """The largest distance of an agent's number from a model's."""
    return float(np.abs(found.final - from_).max())


class TestOptimum:
    """Full batches, many rounds: every agent is at the optimum of f, where FedDPO and DecDPO stay away from it."""

    @pytest.mark.parametrize("local_steps", [1, 4])
    def test_scaffold(self, local_steps: int) -> None:
        assert far(go("scaffold", rounds=150, local_steps=local_steps)) < 1e-10
        bias = laws.fed_dpo_fixed_point(PROBLEM, 0.5, local_steps)
        assert far(go("fed_dpo", rounds=150, local_steps=local_steps), bias) < 1e-10
        assert (np.abs(bias - OPTIMUM).max() > 1e-3) == (local_steps > 1)

    def test_scaffold_with_some(self) -> None:
        """A few agents a round: variates of the others wait, and still lead to the optimum."""
        assert far(go("scaffold", rounds=250, local_steps=3, participation=2)) < 1e-10
        assert far(go("fed_dpo", rounds=100, local_steps=3, participation=2)) > 1e-3

    @pytest.mark.parametrize(
        ("name", "settings"),
        [
            ("gradient_tracking", {}),
            ("gradient_tracking", {"local_steps": 4}),
            ("gradient_tracking", {"graph": "exponential", "weights": "uniform"}),
            ("gradient_tracking", {"link_dropout": 0.3, "lr": 0.2}),
            ("gradient_tracking", {"schedule": "matching", "lr": 0.2}),
            ("gradient_tracking", {"node_dropout": 0.2, "lr": 0.2, "rounds": 450}),
            ("momentum_tracking", {"momentum": 0.8, "lr": 0.2}),
            ("momentum_tracking", {}),
            ("exact_diffusion", {}),
            ("exact_diffusion", {"graph": "star"}),
            ("extra", {}),
            ("extra", {"graph": "path"}),
        ],
        ids=str,
    )
    def test_gossip(self, name: str, settings: dict) -> None:
        assert far(go(name, **{"rounds": 350} | settings)) < 1e-10
        plain = {key: value for key, value in settings.items() if key in ("graph", "weights")}
        assert far(go("dec_dpo", rounds=60, **plain)) > 1e-3

    def test_weights_count(self) -> None:
        """Unequal weights: the limit is where sum_i w_i grad f_i = 0."""
        sizes, every = [6, 9, 12], tastes(3, 3).delta_features
        on = simulate._as_trained(np.concatenate([x[:n] for x, n in zip(every, sizes, strict=True)]), 1.0)
        theta = {}
        for name, method in (
            ("centralized", {"local_steps": 1}),
            ("scaffold", {"local_steps": 3}),
            ("gradient_tracking", {"local_steps": 3, "graph": "ring"}),
            ("exact_diffusion", {"graph": "ring"}),
            ("extra", {"graph": "ring"}),
            ("momentum_tracking", {"graph": "ring"}),
            ("push_sum", {"graph": "complete"}),
        ):
            made = problems.learner(
                on,
                sizes,
                {"name": name, "rounds": 250, **method},
                {"name": "sgd", "lr": 0.4, "batch_size": "full"},
                weights="by_size",
            )
            state, _, _ = problems.go(made)
            theta[name] = state.theta["theta"]
        for name, found in theta.items():
            if name != "push_sum":
                torch.testing.assert_close(
                    found, theta["centralized"].expand_as(found), rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
                )  # fmt: skip
        # Push-sum is DecDPO with another W: on the complete graph, FedDPO.
        torch.testing.assert_close(theta["push_sum"][0], theta["centralized"][0], rtol=0, atol=1e-9)

    def test_fed_nova(self) -> None:
        """Slow devices lead FedDPO to the optimum of sum_i E_i f_i; per step, they lead near that of f."""
        steps = {"local_steps": 8, "least_local_steps": 1, "lr": 0.02, "rounds": 200}
        plain, nova = (far(go("fed_nova", normalise=n, **steps)) for n in (False, True))
        assert nova < 0.1 * plain
        made = METHODS["fed_nova"]
        settings = made.Settings(name="fed_nova", **{k: v for k, v in steps.items() if k != "lr"})
        counts = made(settings, Population(weights=np.full(6, 1 / 6), seed=0)).steps
        assert counts.min() >= 1
        assert counts.max() <= 8
        assert len(set(counts.tolist())) > 1
        theta = np.zeros(3)
        for _ in range(20):  # Newton's steps to the optimum of sum_i E_i f_i
            gradient, hessian = PROBLEM.agent_gradients(theta), PROBLEM.agent_hessians(theta)
            theta = theta - np.linalg.solve(
                np.tensordot(counts, hessian, 1), np.tensordot(counts, gradient, 1)
            )
        assert far(go("fed_nova", normalise=False, **steps), theta) < plain / 5


class TestFederated:
    def test_without_mu_it_is_fed_dpo(self) -> None:
        settings = {"rounds": 20, "local_steps": 3, "participation": 4, "batch_size": 4}
        expected = go("fed_dpo", **settings)
        for name, same in (
            ("fed_prox", {"mu": 0.0}),
            ("fed_opt", {"server": "momentum", "beta1": 0.0, "server_lr": 1.0}),
            ("fed_nova", {"least_local_steps": 3}),
        ):
            found = go(name, **settings, **same)
            np.testing.assert_allclose(found.average, expected.average, rtol=0, atol=1e-14, err_msg=name)

    def test_fed_prox_by_hand(self) -> None:
        """E steps of every agent along grad f_i + mu (theta - theta^r), then the mean."""
        mu, lr, theta = 0.7, 0.3, np.zeros(3)
        for _ in range(4):
            rows = np.tile(theta, (6, 1))
            for _ in range(3):
                rows = rows - lr * (PROBLEM.agent_gradients(rows) + mu * (rows - theta))
            theta = rows.mean(0)
        found = go("fed_prox", rounds=4, local_steps=3, lr=lr, mu=mu)
        np.testing.assert_allclose(found.final, theta, rtol=0, atol=1e-14)

    def test_fed_prox_drifts_less(self) -> None:
        drift = [far(go("fed_prox", rounds=80, local_steps=8, mu=mu, lr=0.1)) for mu in (0.0, 0.5, 5.0)]
        assert drift[0] > drift[1] > 1.5 * drift[2]

    @pytest.mark.parametrize("server", ["momentum", "adam", "yogi", "adagrad"])
    def test_server_optimisers_by_hand(self, server: str) -> None:
        of = {"server": server, "server_lr": 0.1, "beta1": 0.8}
        if server != "momentum":
            of["tau"] = 0.01
        if server in ("adam", "yogi"):
            of["beta2"] = 0.95
        theta, m, v = np.zeros(3), np.zeros(3), np.full(3, 0.01**2)
        for _ in range(6):
            delta = -0.5 * PROBLEM.gradient(theta)
            if server == "momentum":
                m = 0.8 * m + delta
                theta = theta + 0.1 * m
                continue
            m = 0.8 * m + 0.2 * delta
            v = {
                "adagrad": v + delta**2,
                "adam": 0.95 * v + 0.05 * delta**2,
                "yogi": v - 0.05 * delta**2 * np.sign(v - delta**2),
            }[server]
            theta = theta + 0.1 * m / (np.sqrt(v) + 0.01)
        np.testing.assert_allclose(go("fed_opt", rounds=6, **of).final, theta, rtol=0, atol=1e-13)

    def test_fed_buff(self) -> None:
        """Alike devices and a buffer of N wait for all: FedDPO. Else some are stale, and never older than the model."""
        expected = go("fed_dpo", rounds=10, local_steps=2)
        found = go("fed_buff", rounds=10, local_steps=2, buffer=6, spread=0.0)
        np.testing.assert_allclose(found.average, expected.average, rtol=0, atol=1e-14)
        made = METHODS["fed_buff"]
        settings = made.Settings(name="fed_buff", rounds=60, buffer=2, spread=1.0)
        method = made(settings, Population(weights=np.full(6, 1 / 6), seed=0))
        began = np.zeros(6, dtype=int)
        for round_ in range(1, 61):
            who = method.participants(round_)
            assert len(set(who.tolist())) == 2
            assert (method.ages(round_)[who] == round_ - 1 - began[who]).all()
            began[who] = round_
        assert method.depth > 2
        assert far(go("fed_buff", rounds=300, buffer=2, spread=0.5, lr=0.2)) < 0.5

    def test_a_stale_update_counts_less(self) -> None:
        """N w_i / (K sqrt(1 + q_i)), by hand."""
        made = METHODS["fed_buff"]
        method = made(made.Settings(name="fed_buff", rounds=8, buffer=1, spread=0.0), Population(weights=np.full(2, 0.5), seed=0))  # fmt: skip
        # Two devices of one speed: 0 comes first, 1 next, who began when 0 did; then 0 again, who began a round before.
        assert [method.participants(r).tolist() for r in (1, 2, 3)] == [[0], [1], [0]]
        assert [int(method.ages(r)[method.participants(r)][0]) for r in (1, 2, 3)] == [0, 1, 1]
        found = method.shares(2, np.array([1]), np.array([1]))
        assert found == pytest.approx([1 / np.sqrt(2)])


class TestGossip:
    def test_one_peer_is_exact_after_a_period(self) -> None:
        """N = 8: three rounds without learning bring all to the mean; a message an agent and round."""
        made = METHODS["dec_dpo"]
        settings = made.Settings(name="dec_dpo", graph="exponential", schedule="one_peer")
        method = made(settings, Population(weights=np.full(8, 1 / 8), seed=0))
        theta = torch.randn(8, 5, dtype=torch.float64)
        rows = {"theta": theta.clone()}
        for round_ in (1, 2, 3):
            rows = method.mesh.mix(method.matrix(round_), rows)
            assert method.bytes_sent(round_, model_bytes=10, data_bytes=0) == 80
        torch.testing.assert_close(rows["theta"], theta.mean(0, keepdim=True).expand(8, 5))

    @pytest.mark.parametrize(
        "settings",
        [
            {"schedule": "matching"},
            {"schedule": "one_peer", "graph": "exponential"},
            {"link_dropout": 0.4},
            {"node_dropout": 0.4, "graph": "complete"},
            {"schedule": "matching", "link_dropout": 0.2, "node_dropout": 0.2},
        ],
        ids=str,
    )
    def test_every_round_keeps_the_mean(self, settings: dict) -> None:
        """Doubly stochastic whatever is lost; links are the graph's; over rounds all reach the mean."""
        made = METHODS["dec_dpo"]
        method = made(
            made.Settings(name="dec_dpo", **settings), Population(weights=np.full(9, 1 / 9), seed=1)
        )
        graph = method.mixing.matrix.toarray() != 0
        product = np.eye(9)
        for round_ in range(1, 600):
            w = method.matrix(round_).toarray()
            np.testing.assert_allclose([w.sum(0), w.sum(1)], 1, rtol=0, atol=1e-12)
            assert w.min() >= 0
            assert (graph | (w == 0)).all()
            product = w @ product
            up = method.participants(round_)
            down = np.setdiff1d(np.arange(9), up)
            assert (w[down] == np.eye(9)[down]).all()
        np.testing.assert_allclose(product, 1 / 9, rtol=0, atol=1e-9)

    def test_what_is_lost_is_lost_as_often_as_said(self) -> None:
        made = METHODS["dec_dpo"]
        settings = made.Settings(name="dec_dpo", graph="complete", link_dropout=0.3, node_dropout=0.1)
        method = made(settings, Population(weights=np.full(10, 0.1), seed=0))
        up, links, rounds = 0, 0, 400
        for round_ in range(1, rounds + 1):
            there = method.participants(round_)
            up += len(there)
            w = method.matrix(round_).toarray()
            links += np.count_nonzero(np.triu(w, 1))
        assert up / rounds / 10 == pytest.approx(0.9, abs=4 * np.sqrt(0.09 / (rounds * 10)))
        expected = 0.7 * 0.81
        assert links / rounds / 45 == pytest.approx(expected, abs=0.02)

    def test_who_is_down_stays_where_it_was(self) -> None:
        found = simulate.Ensemble(
            [simulate.Member(PROBLEM, "dec_dpo", {"node_dropout": 0.5})], 0.5, rounds=20
        )
        method, last = found.learner.method, None
        for round_, theta in enumerate(found.run()):
            if last is not None:
                down = np.setdiff1d(np.arange(6), method.participants(round_))
                assert (theta[down] == last[down]).all()
                up = method.participants(round_)
                assert (theta[up] != last[up]).any(axis=1).all()
            last = theta.copy()

    def test_tracking_is_diging(self) -> None:
        """E = 1: Theta <- W (Theta - lr Y), Y <- W Y + grad - grad before, Y^0 the gradients."""
        w = build_mixing_matrix("ring", "metropolis", agents=6, seed=0).matrix.toarray()
        theta, lr = np.zeros((6, 3)), 0.4
        gradient = PROBLEM.agent_gradients(theta)
        y = gradient.copy()
        for _ in range(7):
            theta = w @ (theta - lr * y)
            new = PROBLEM.agent_gradients(theta)
            y, gradient = w @ y + new - gradient, new
        np.testing.assert_allclose(go("gradient_tracking", rounds=7, lr=lr).final, theta, rtol=0, atol=1e-13)
        np.testing.assert_allclose(go("momentum_tracking", rounds=7, lr=lr).final, theta, rtol=0, atol=1e-13)

    def test_extra_and_exact_diffusion_by_their_recursions(self) -> None:
        w = build_mixing_matrix("ring", "metropolis", agents=6, seed=0).matrix.toarray()
        lazy, lr, grad = (np.eye(6) + w) / 2, 0.4, PROBLEM.agent_gradients
        old = np.zeros((6, 3))
        new = w @ old - lr * grad(old)
        for _ in range(6):
            old, new = new, new + w @ new - lazy @ old - lr * (grad(new) - grad(old))
        np.testing.assert_allclose(go("extra", rounds=7, lr=lr).final, new, rtol=0, atol=1e-13)
        old = np.zeros((6, 3))
        new = lazy @ (old - lr * grad(old))
        for _ in range(6):
            old, new = new, lazy @ (2 * new - old - lr * (grad(new) - grad(old)))
        np.testing.assert_allclose(go("exact_diffusion", rounds=7, lr=lr).final, new, rtol=0, atol=1e-13)

    def test_exact_diffusion_with_local_steps_is_where_fed_dpo_is(self) -> None:
        """All agents equal, at FedDPO's bias."""
        found = go("exact_diffusion", rounds=200, local_steps=4)
        assert far(found, laws.fed_dpo_fixed_point(PROBLEM, 0.5, 4)) < 1e-9
        assert found.consensus_error[-1] < 1e-20

    def test_momentum_tracking_by_hand(self) -> None:
        w = build_mixing_matrix("ring", "metropolis", agents=6, seed=0).matrix.toarray()
        theta = c = u = np.zeros((6, 3))
        for _ in range(7):
            u = 0.8 * u + PROBLEM.agent_gradients(theta)
            theta, c = w @ (theta - 0.1 * (u - c)), w @ (c - u) + u
        found = go("momentum_tracking", rounds=7, lr=0.1, momentum=0.8)
        np.testing.assert_allclose(found.final, theta, rtol=0, atol=1e-13)

    def test_push_sum_reaches_the_average(self) -> None:
        """On a directed graph whose columns, not rows, sum to one; without its weight the limit leans."""
        made = METHODS["push_sum"]
        settings = made.Settings(name="push_sum", graph={"name": "erdos_renyi", "p": 0.3, "directed": True})
        method = made(settings, Population(weights=np.full(12, 1 / 12), seed=0))
        a = method.matrix(1).toarray()
        np.testing.assert_allclose(a.sum(0), 1, rtol=0, atol=1e-12)
        assert np.abs(a.sum(1) - 1).max() > 0.1
        theta = torch.randn(12, 4, dtype=torch.float64)
        state = method.begin({"theta": theta[:1]})
        state.theta = {"theta": theta.clone()}
        for round_ in range(1, 200):
            state = method.mix(state, round_, np.arange(12), {"theta": state.theta["theta"].clone()})
        torch.testing.assert_close(state.theta["theta"], theta.mean(0, keepdim=True).expand(12, 4), rtol=0, atol=1e-10)  # fmt: skip
        leaning = np.linalg.matrix_power(a, 200) @ theta.numpy()
        assert np.abs(leaning - theta.numpy().mean(0)).max() > 0.01

    def test_push_sum_learns(self) -> None:
        graph = {"name": "erdos_renyi", "p": 0.5, "directed": True}
        bias = [far(go("push_sum", rounds=r, lr=lr, graph=graph)) for lr, r in ((0.2, 100), (0.04, 400))]
        assert bias[0] > 3 * bias[1]

    def test_asynchronous_pairs(self) -> None:
        """One agent a round, who averages with a neighbour; smaller steps end nearer to the optimum, all rounds alike in work."""
        made = METHODS["async_gossip"]
        method = made(
            made.Settings(name="async_gossip", wakes=2), Population(weights=np.full(8, 1 / 8), seed=0)
        )
        met = np.zeros((8, 8))
        for round_ in range(1, 400):
            assert len(method.participants(round_)) == 2
            w = method.matrix(round_).toarray()
            np.testing.assert_allclose([w.sum(0), w.sum(1)], 1)
            assert (np.diag(w) < 1).sum() <= 4
            met += w
        assert ((met > 0) == (method.mixing.matrix.toarray() > 0)).all()
        bias = [np.abs(go("async_gossip", rounds=r, lr=lr).average[-200:].mean(0) - OPTIMUM).max() for lr, r in ((0.5, 300), (0.05, 1200))]  # fmt: skip
        assert bias[0] > 2 * bias[1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "fed_nova", "least_local_steps": 3}, r"^method.least_local_steps: found 3; allowed: 1 to 1"),
        ({"name": "fed_buff", "buffer": 7}, r"^method.buffer: found 7 updates; allowed: 1 to 6"),
        ({"name": "scaffold", "participation": 7}, r"^method.participation: found 7"),
        ({"name": "momentum_tracking", "local_steps": 2}, r"^method.local_steps: 2; allowed for momentum_tracking: 1"),
        ({"name": "extra", "graph": "exponential", "weights": "uniform"}, r"^method.graph: exponential, whose W is not"),
        ({"name": "dec_dpo", "schedule": "one_peer"}, r"^method.schedule: one_peer, but graph is ring"),
        ({"name": "dec_dpo", "graph": "exponential", "schedule": "one_peer", "link_dropout": 0.1}, r"^method.link_dropout, node_dropout, but the graph is directed"),
        ({"name": "dec_dpo", "graph": "exponential", "weights": "uniform", "link_dropout": 0.1}, r"the graph is directed"),
        ({"name": "dec_dpo", "schedule": "matching", "weights": "max_degree"}, r"^method.weights: max_degree, but pairs average"),
        ({"name": "async_gossip", "wakes": 4}, r"^method.wakes: 4, each with a partner, of 6 agents; allowed: 1 to 3"),
        ({"name": "push_sum", "graph": "rng"}, r"^method.graph: unknown name 'rng'"),
    ],
)  # fmt: skip
def test_refused(settings: dict, said: str) -> None:
    made = METHODS[settings["name"]].Settings(**settings)
    with pytest.raises(InputError, match=said):
        made.check(6)


def test_options_that_would_do_nothing() -> None:
    for unused in ({"beta2": 0.5}, {"tau": 0.1}):
        with pytest.raises(ValidationError, match="server is momentum"):
            METHODS["fed_opt"].Settings(name="fed_opt", server="momentum", **unused)
    with pytest.raises(InputError, match="unknown name 'fed_dop'"):
        go("fed_dop", rounds=1)
