"""Placement: brute force over all seats, and what simulation says of the seats that were chosen."""

from itertools import permutations

import numpy as np
import pytest

from prefmesh.theory import LogLinearProblem, placement, simulate
from prefmesh.topology.build import build_mixing_matrix


def mixing(graph: str, agents: int, weights: str = "metropolis") -> np.ndarray:
    return build_mixing_matrix(graph, weights, agents, 0).matrix.toarray()


def grouped(agents: int, pairs: int = 40, dim: int = 3, seed: int = 0) -> LogLinearProblem:
    """Two groups of opposite taste, numbered so that a path or ring has all of one before all of the other."""
    rng = np.random.default_rng(seed)
    taste = rng.normal(size=dim)
    shards = []
    for i in range(agents):
        x = rng.normal(size=(pairs, dim))
        want = (taste if i < agents / 2 else -taste) + 0.3 * rng.normal(size=dim)
        shards.append(x * np.where(x @ want + rng.logistic(size=pairs) > 0, 1, -1)[:, None])
    return LogLinearProblem(shards, 1.0)


@pytest.mark.parametrize("graph", ["path", "ring", "star", "tree"])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_placement_of_seven_is_better(graph, seed) -> None:
    rng = np.random.default_rng(seed)
    w, gradients = mixing(graph, 7), rng.normal(size=(7, 3))
    gradients -= gradients.mean(0)
    found = placement.place(w, gradients, 0.1, 0.5, seed=seed)
    errors = [
        placement.predicted_consensus_error(w, gradients[list(users)], 0.1, 0.5)
        for users in permutations(range(7))
    ]
    assert found.predicted == pytest.approx(min(errors), rel=1e-10)
    assert found.random == pytest.approx(np.mean(errors), rel=1e-10)
    assert found.as_numbered == pytest.approx(errors[0], rel=1e-10)
    seats = gradients[found.users]
    assert placement.predicted_consensus_error(w, seats, 0.1, 0.5) == pytest.approx(found.predicted)


@pytest.mark.parametrize("graph", ["ring", "star", "grid"])
@pytest.mark.parametrize("local_steps", [1, 3])
def test_the_prediction_is_what_simulation_shows(graph, local_steps) -> None:
    problem = grouped(9)
    w, star = mixing(graph, 9), problem.optimum()
    gradients, hessians = problem.agent_gradients(star), problem.agent_hessians(star)
    lr = 0.02 / problem.smoothness()
    h = placement.disagreement_curvature(gradients, hessians)
    predicted = placement.predicted_consensus_error(w, gradients, lr, h, local_steps)
    run = simulate.dec_dpo(problem, w, lr, rounds=120, local_steps=local_steps, theta0=star)
    assert run.consensus_error[-1] == pytest.approx(predicted, rel=0.1)


def test_the_law_is_exact_in_the_small_step_limit() -> None:
    problem = grouped(8)
    w, star = mixing("path", 8), problem.optimum()
    gradients = problem.agent_gradients(star)
    ratios = []
    for lr in (2e-2, 1e-2):
        run = simulate.dec_dpo(problem, w, lr, rounds=250, theta0=star)
        ratios.append(run.consensus_error[-1] / placement.predicted_consensus_error(w, gradients, lr))
    assert abs(ratios[0] - 1) < 0.2
    assert abs(ratios[1] - 1) == pytest.approx(abs(ratios[0] - 1) / 2, rel=0.15)


@pytest.mark.parametrize("graph", ["ring", "path", "grid"])
def test_seats_that_mix_the_groups_lower_the_error_in_simulation(graph) -> None:
    problem = grouped(16)
    w, star = mixing(graph, 16), problem.optimum()
    gradients, hessians = problem.agent_gradients(star), problem.agent_hessians(star)
    lr = 0.05 / problem.smoothness()
    h = placement.disagreement_curvature(gradients, hessians)
    found = placement.place(w, gradients, lr, h)

    def simulated(users: np.ndarray) -> float:
        return simulate.dec_dpo(
            problem, placement.seated(w, users), lr, rounds=150, theta0=star
        ).consensus_error[-1]

    rng = np.random.default_rng(1)
    at_random = [simulated(rng.permutation(16)) for _ in range(3)]
    chosen, numbered = simulated(found.users), simulated(np.arange(16))
    assert chosen < 0.5 * min(at_random)
    assert chosen < 0.2 * numbered
    assert chosen == pytest.approx(found.predicted, rel=0.15)


def test_seated_reorders_by_users() -> None:
    w = mixing("path", 4)
    users = np.array([2, 0, 3, 1])  # node 0 has user 2, linked to node 1's user 0
    found = placement.seated(w, users)
    assert found[2, 0] == w[0, 1]
    assert found[2, 3] == w[0, 2] == 0
    np.testing.assert_allclose(found.sum(axis=1), 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mixing_matrix": np.roll(np.eye(3), 1, 1)}, "W up to 1 from W"),
        ({"mixing_matrix": np.eye(3)}, r"found \|lambda"),
        ({"mixing_matrix": np.ones((3, 2)) / 2}, "mixing_matrix: found shape"),
        ({"gradients": np.ones((2, 4))}, "gradients: found 2 rows; allowed: 3"),
        ({"gradients": np.full((3, 4), np.nan)}, "all finite"),
        ({"lr": 0.0}, "lr: found 0.0"),
        ({"starts": 0}, "starts: found 0"),
    ],
)
def test_bad_input(change, said) -> None:
    given = {"mixing_matrix": mixing("ring", 3), "gradients": np.ones((3, 4)), "lr": 0.1} | change
    with pytest.raises(ValueError, match=said):
        placement.place(**given)
