"""FedSoft: policies held to mixtures of models, how mixtures are found, and where it all comes to rest."""

from typing import Any

import numpy as np
import pytest
import torch

from prefmesh.algorithms.methods import Population
from prefmesh.algorithms.methods.fed_soft import FedSoft, FedSoftSettings, best_shares, likeliest_shares
from prefmesh.algorithms.rounds import Learner
from prefmesh.algorithms.similarity import by_direction
from prefmesh.theory import simulate
from tests import problems
from tests.theory.test_laws import tastes

AGENTS, DIM = 6, 3
PROBLEM = tastes(AGENTS, DIM)
PAIRS = PROBLEM.delta_features


def go(name: str = "fed_soft", *, lr: float = 0.4, rounds: int, **settings: Any) -> np.ndarray:
    """Every agent's policy in the end, (agents, d), after full-batch SGD."""
    return simulate.method(PROBLEM, name, lr=lr, rounds=rounds, **settings).final


def learner(lr: float, rounds: int, local_steps: int, **settings: Any) -> Learner:
    member = simulate.Member(PROBLEM, "fed_soft", settings)
    return simulate.Ensemble([member], lr, rounds=rounds, local_steps=local_steps).learner


def pair_losses(theta: np.ndarray) -> list[np.ndarray]:
    """Of each agent, (k, n_i): -log sigmoid(beta x^T theta_j)."""
    return [np.log1p(np.exp(-PROBLEM.beta * theta @ x.T)) for x in PAIRS]


def shares(theta: np.ndarray, least: float) -> np.ndarray:
    """On which share of its pairs each model is the best, as the paper counts; floored, and adding up to 1."""
    best = [loss.argmin(0) for loss in pair_losses(theta)]
    counted = np.array([[np.mean(b == j) for j in range(len(theta))] for b in best])
    raised = np.maximum(counted, least)
    return raised / raised.sum(1, keepdims=True)


class TestRounds:
    def test_by_hand(self) -> None:
        """A round apart, groups by direction, then mixtures in rounds 2, 4 and 6."""
        least, held = 0.3, 0.7
        own = np.zeros((AGENTS, DIM))
        for _ in range(3):
            own = own - 0.4 * PROBLEM.agent_gradients(own)
        u = np.eye(2)[by_direction(own @ own.T, 2)]
        u = np.maximum(u, least) / (1 + least)
        theta = u.T @ own / u.sum(0)[:, None]
        first = u
        for round_ in range(2, 8):
            if round_ % 2 == 0:
                u = shares(theta, least)
            for _ in range(3):
                own = own - 0.4 * (PROBLEM.agent_gradients(own) + held * (own - u @ theta))
            theta = u.T @ own / u.sum(0)[:, None]
        assert np.ptp(u) > 0.1
        assert not np.array_equal(u, first)
        found = go(rounds=7, local_steps=3, proximity=held, estimate_every=2, least_share=least)
        np.testing.assert_allclose(found, own, rtol=0, atol=1e-13)

    def test_not_held_it_is_alone(self) -> None:
        settings = {"rounds": 9, "local_steps": 3}
        np.testing.assert_array_equal(go(proximity=0.0, **settings), go("local_only", **settings))

    def test_models_that_nobody_calls_his_own_stay(self) -> None:
        """Agents 0, 2 and 3 of 5 take part. Model 0 counts 0.45 of 0.55 there, more than three fifths: it goes all the way. Model 1
        counts 0.15 of 0.35, five sevenths of three fifths. Model 2 is agent 4's alone, but for next to nothing."""
        weights = np.array([0.1, 0.2, 0.2, 0.3, 0.2])
        method = FedSoft(FedSoftSettings(name="fed_soft", clusters=3), Population(weights=weights, seed=0))
        state = method.begin({"w": torch.tensor([[0.0]])})
        assert (state.memory["mixture"] == 1 / 3).all()
        state.memory["model/w"] = torch.tensor([[10.0], [20.0], [30.0]])
        u = [[1.0, 0, 1e-9], [0.5, 0.5, 1e-9], [0.25, 0.75, 1e-9], [1, 0, 1e-9], [0, 0.5, 0.5]]
        state.memory["mixture"] = torch.tensor(u, dtype=torch.float64)
        state = method.mix(state, 2, np.array([0, 2, 3]), {"w": torch.tensor([[24.0], [11.0], [28.0]])})
        mean = (0.1 * 24 + 0.2 * 0.25 * 11 + 0.3 * 28) / 0.45
        assert state.memory["model/w"][:, 0].tolist() == pytest.approx([mean, 20 - 9 * 5 / 7, 30])
        assert state.theta["w"][:, 0].tolist() == [24, 0, 11, 28, 0]

    def test_bytes(self) -> None:
        settings = FedSoftSettings(
            name="fed_soft", clusters=3, warm_rounds=2, participation=4, estimate_every=2
        )
        method = FedSoft(settings, Population(weights=np.full(5, 0.2), seed=0))
        sent = [method.bytes_sent(r, model_bytes=10, data_bytes=0) for r in range(1, 7)]
        assert sent == [0, 40, 160, 80, 160, 80]


def at_rest(u: np.ndarray, held: float) -> np.ndarray:
    """v (agents, d) with grad f_i(v_i) + held (v_i - sum_j u_ij theta_j) = 0, theta_j the mean of v by u_ij: by Newton.

    It is the minimum of sum_i f_i(v_i) + held/2 sum_ij u_ij |v_i - theta_j|^2 over v and theta, which is convex.
    """
    coupled = held * (np.eye(AGENTS) - u @ (u / u.sum(0)).T)
    v = np.zeros((AGENTS, DIM))
    for _ in range(50):
        jacobian = np.kron(coupled, np.eye(DIM))
        for i, hessian in enumerate(PROBLEM.agent_hessians(v)):
            jacobian[i * DIM : (i + 1) * DIM, i * DIM : (i + 1) * DIM] += hessian
        residual = PROBLEM.agent_gradients(v) + coupled @ v
        v = v - np.linalg.solve(jacobian, residual.reshape(-1)).reshape(v.shape)
    assert np.abs(residual).max() < 1e-14
    return v


class TestAtRest:
    @pytest.mark.parametrize(("lr", "local_steps"), [(1.0, 1), (0.5, 4)])
    def test_one_model(self, lr: float, local_steps: int) -> None:
        """Whatever the steps, the minimum of pFedMe's objective: neither everybody alone nor one policy."""
        expected = at_rest(np.ones((AGENTS, 1)), 0.5)
        found = go(lr=lr, rounds=150, local_steps=local_steps, clusters=1, proximity=0.5)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
        np.testing.assert_allclose(PROBLEM.agent_gradients(found).sum(0), 0, atol=1e-9)
        assert np.ptp(expected, axis=0).max() > 0.1
        assert np.abs(expected - PROBLEM.agent_optima()).max() > 0.1

    @pytest.mark.parametrize("mixtures", ["pairs", "likelihood"])
    def test_two_models(self, mixtures: str) -> None:
        """At the mixtures that it came to, which its models give again."""
        made = learner(0.5, 150, 4, proximity=0.5, mixtures=mixtures, estimate_every=1)
        state, _, _ = problems.go(made, {"theta": torch.zeros(1, DIM, dtype=torch.float64)})
        u, theta = state.memory["mixture"].numpy(), state.memory["model/theta"].numpy()
        np.testing.assert_allclose(state.theta["theta"].numpy(), at_rest(u, 0.5), rtol=0, atol=1e-9)
        assert np.ptp(u[:, 0]) > 0.1
        if mixtures == "pairs":
            np.testing.assert_allclose(u, shares(theta, 1e-4), rtol=0, atol=1e-12)


class TestMixtures:
    """One agent, two models: model 0 makes a share p of the pairs `a` times as likely as model 1, and the others 1/a times.

    sum_b log(u e^-loss_b0 + (1 - u) e^-loss_b1) is the largest where p (a - 1) / (u a + 1 - u) = (1 - p) (a - 1) / (u + (1 - u) a):
    u = (p (1 + a) - 1) / (a - 1), or the nearest to it of 0 .. 1.
    """

    @staticmethod
    def losses(p: float, a: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Of both models, in two batches, where one pair only fills up; and the pairs' weights."""
        better = np.log(a) * torch.tensor([[[1.0, -1, 1], [1, -1, 1]]], dtype=torch.float64)
        weights = torch.tensor([[[p, 1 - p, 0.0], [p / 2, 1 - p, p / 2]]], dtype=torch.float64)
        return torch.stack([torch.ones_like(better), 1 + better]), weights

    @pytest.mark.parametrize(
        ("p", "a", "u"), [(0.5, 4.0, 0.5), (0.6, 4.0, 2 / 3), (0.3, 9.0, 0.25), (0.9, 4.0, 1.0)]
    )
    def test_shares(self, p: float, a: float, u: float) -> None:
        losses, weights = self.losses(p, a)
        assert best_shares(losses, weights)[0].tolist() == pytest.approx([p, 1 - p], abs=1e-12)
        assert likeliest_shares(losses, weights)[0].tolist() == pytest.approx([u, 1 - u], abs=1e-6)

    def test_equal_models_count_alike(self) -> None:
        assert likeliest_shares(*self.losses(0.6, 1.0))[0].tolist() == pytest.approx([0.5, 0.5])
