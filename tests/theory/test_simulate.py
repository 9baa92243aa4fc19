"""Simulations: by plain loops of numpy, side by side = alone, and bad input."""

import numpy as np
import pytest
from scipy.sparse import csr_array

from prefmesh.theory import simulate
from prefmesh.theory.simulate import Ensemble, Member
from prefmesh.topology.build import build_mixing_matrix
from tests.theory.test_problem import drawn

RING = build_mixing_matrix("ring", "metropolis", agents=4, seed=0).matrix
PATH = build_mixing_matrix("path", "metropolis", agents=4, seed=0).matrix
FOUR = drawn(sizes=(20, 25, 15, 30))


def test_dec_dpo_is_the_recursion() -> None:
    """Theta <- W (Theta - lr grad F(Theta)), twice a round before mixing, full batches."""
    found = simulate.dec_dpo(FOUR, RING, 0.3, 5, local_steps=2)
    theta = np.zeros((4, 3))
    averages, errors = [theta.mean(0)], [0.0]
    for _ in range(5):
        for _ in range(2):
            theta = theta - 0.3 * FOUR.agent_gradients(theta)
        theta = RING.toarray() @ theta
        averages.append(theta.mean(0))
        errors.append(float(np.mean(((theta - theta.mean(0)) ** 2).sum(1))))
    np.testing.assert_allclose(found.final, theta, atol=1e-14)
    np.testing.assert_allclose(found.average, averages, atol=1e-14)
    np.testing.assert_allclose(found.consensus_error, errors, atol=1e-14)
    norms = [float(FOUR.gradient(a) @ FOUR.gradient(a)) for a in averages]
    np.testing.assert_allclose(found.grad_norm_sq, norms, rtol=1e-10)


def test_matrices_take_turns() -> None:
    found = simulate.dec_dpo(FOUR, [RING, PATH], 0.3, 3)
    theta = np.zeros((4, 3))
    for w in (RING, PATH, RING):
        theta = w @ (theta - 0.3 * FOUR.agent_gradients(theta))
    np.testing.assert_allclose(found.final, theta, atol=1e-14)


def test_fed_dpo_is_the_mean_of_local_steps() -> None:
    start = np.array([0.5, -0.5, 1.0])
    found = simulate.fed_dpo(FOUR, 0.3, 4, local_steps=3, theta0=start)
    theta = start
    for _ in range(4):
        own = np.tile(theta, (4, 1))
        for _ in range(3):
            own = own - 0.3 * FOUR.agent_gradients(own)
        theta = own.mean(0)
    np.testing.assert_allclose(found.final, theta, atol=1e-14)
    assert found.final.shape == (3,)
    assert (found.consensus_error == 0).all()
    np.testing.assert_array_equal(found.average[0], start)


def test_minibatches_are_unbiased_and_as_noisy_as_said() -> None:
    """One step from 0 over many seeds: its mean is the full step's, its covariance lr^2 C / (N b)."""
    b, lr = 2, 0.3
    steps = np.array([simulate.fed_dpo(FOUR, lr, 1, batch_size=b, seed=seed).final for seed in range(600)])
    expected = -lr * FOUR.gradient(np.zeros(3))
    covariance = lr**2 * FOUR.gradient_covariances(np.zeros(3)).mean(0) / (4 * b)
    error = np.sqrt(np.diag(covariance) / len(steps))
    assert (abs(steps.mean(0) - expected) < 4 * error).all()
    variance = np.diag(covariance)
    # The variance of a sample variance of nearly normal numbers: 2 / n.
    assert (abs(steps.var(0) - variance) < 4 * variance * np.sqrt(2 / len(steps))).all()


def test_participation_and_staleness_change_the_run() -> None:
    runs = [
        simulate.fed_dpo(FOUR, 0.5, 6, local_steps=2, **settings).final
        for settings in ({}, {"participation": 2}, {"staleness": 2}, {"staleness": 5})
    ]
    for i, a in enumerate(runs):
        for b in runs[:i]:
            assert abs(a - b).max() > 1e-4


@pytest.mark.parametrize("kind", ["mixing", "fed_dpo", "both"])
def test_side_by_side_is_alone(kind: str) -> None:
    """Full batches, so that nothing is drawn but participants, which follow each member's own seed."""
    gossip = [Member(FOUR, "dec_dpo", mixing=(csr_array(w),)) for w in (RING, PATH)]
    server = [Member(FOUR, "fed_dpo", {"participation": 2, "staleness": 2}, seed=seed) for seed in (3, 4)]
    members = {"mixing": gossip, "fed_dpo": server, "both": [*gossip, *server]}[kind]
    *_, last = Ensemble(members, 0.4, rounds=5, local_steps=2).run()
    for member, first in zip(members, range(0, 99, 4), strict=False):
        *_, alone = Ensemble([member], 0.4, rounds=5, local_steps=2).run()
        np.testing.assert_allclose(last[first : first + 4], alone, atol=1e-14)


def test_divergence_is_said() -> None:
    huge = drawn(beta=1.0)
    far = type(huge)([1e250 * shard for shard in huge.delta_features], 1.0)
    with pytest.raises(FloatingPointError, match=r"lr: the parameters stopped being finite in round"):
        simulate.fed_dpo(far, 1e30, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: simulate.fed_dpo(FOUR, 0.0, 1), r"lr: found 0.0"),
        (lambda: simulate.fed_dpo(FOUR, 1e40, 1), r"lr: found 1e\+40; allowed: above 0 and below"),
        (lambda: simulate.fed_dpo(FOUR, 0.1, 0), r"rounds, local_steps: found 0, 1"),
        (lambda: simulate.fed_dpo(FOUR, 0.1, 1, batch_size=0), r"batch_size: found 0"),
        (lambda: simulate.fed_dpo(FOUR, 0.1, 1, participation=5), r"participation: found 5 participants"),
        (lambda: simulate.fed_dpo(FOUR, 0.1, 1, theta0=np.zeros(2)), r"theta0: found shape \(2,\)"),
        (lambda: simulate.dec_dpo(FOUR, np.eye(3), 0.1, 1), r"mixing_matrix: found shape \(3, 3\)"),
        (
            lambda: simulate.dec_dpo(FOUR, np.triu(np.ones((4, 4))) / 4, 0.1, 1),
            r"mixing_matrix: row 3 sums to 0.25",
        ),
        (lambda: simulate.dec_dpo(FOUR, np.full((4, 4), np.nan), 0.1, 1), r"mixing_matrix: found non-finite"),
        (lambda: simulate.dec_dpo(FOUR, [], 0.1, 1), r"mixing_matrix: found no matrix"),
    ],
)
def test_bad_input(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
