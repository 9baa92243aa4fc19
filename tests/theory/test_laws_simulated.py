"""Laws against long simulations; the full table of graphs is benchmarks/stationary_law.py."""

import numpy as np
import pytest

from prefmesh.theory import laws
from prefmesh.theory.simulate import Ensemble, Member, period
from prefmesh.topology.build import build_mixing_matrix
from tests.theory.test_laws import tastes

REPLICAS = 8


def scatter(members, lr, local_steps, batch, start, burn_in, rounds):
    """Per member: the mean of the average model, its covariance, and the consensus error, over `rounds` rounds."""
    agents, dim = members[0].problem.num_agents, members[0].problem.dim
    ensemble = Ensemble(
        members, lr, rounds=burn_in + rounds, local_steps=local_steps, batch_size=batch, seed=2
    )
    first, second, error = np.zeros((len(members), dim)), np.zeros((len(members), dim, dim)), 0.0
    for r, theta in enumerate(ensemble.run(start)):
        if r > burn_in:
            own = theta.reshape(len(members), agents, dim)
            average = own.mean(1)
            first += average
            second += average[:, :, None] * average[:, None, :]
            error = error + np.square(own - average[:, None]).sum((1, 2)) / agents
    first, second = first / rounds, second / rounds
    return first, second - first[:, :, None] * first[:, None, :], error / rounds


@pytest.mark.slow
@pytest.mark.parametrize(("local_steps", "lr"), [(1, 0.05), (1, 0.3), (4, 0.1)])
def test_feddpo_covariance_with_participants_and_minibatches(local_steps, lr):
    """N = 10, S = 2 and 5, smoothness 1: the Gaussian closure within 5 %, entries too; the law at the smallest step."""
    problem, batch = tastes(10, 2, pairs=40), 2
    choices, replicas = (2, 5), 12
    members = [
        Member(problem, "fed_dpo", {"participation": s}, seed=1000 + k)
        for s in choices
        for k in range(replicas)
    ]
    mean, covariance, _ = scatter(members, lr, local_steps, batch, problem.optimum(), 300, 16000)
    for i, s in enumerate(choices):
        own = slice(i * replicas, (i + 1) * replicas)
        traces = np.trace(covariance[own], axis1=1, axis2=2)
        error = traces.std(ddof=1) / np.sqrt(replicas) / traces.mean()
        law = laws.fed_dpo_stationary(problem, lr, local_steps, s, batch)
        gaussian = laws.fed_dpo_gaussian(problem, lr, local_steps, s, batch)
        to_law = traces.mean() / np.trace(law.covariance)
        to_gaussian = traces.mean() / np.trace(gaussian.covariance)
        print(f"E {local_steps} S {s}: law {to_law:.4f}, gaussian {to_gaussian:.4f} +- {error:.4f}")
        assert error < 0.02
        assert to_gaussian == pytest.approx(1, abs=0.05)
        largest = np.abs(gaussian.covariance).max()
        np.testing.assert_allclose(covariance[own].mean(0), gaussian.covariance, rtol=0, atol=0.05 * largest)
        assert to_law == pytest.approx(1, abs=0.05 if lr == 0.05 else 0.12)
        shift = mean[own].mean(0) - gaussian.fixed_point
        assert np.abs(shift).max() < 0.1 * np.sqrt(np.trace(law.covariance))


@pytest.mark.slow
@pytest.mark.parametrize("lr", [0.5, 1.0])
def test_decdpo_at_large_steps(lr):
    """The law with the Hessian's noise within 12 % at lr Lam = 0.5; the Gaussian closure within 4 % up to 1."""
    problem, batch, agents = tastes(8, 2), 2, 8
    graphs = [
        build_mixing_matrix(name, "metropolis", agents, 0).matrix for name in ("path", "star", "hypercube")
    ]
    members = [Member(problem, "dec_dpo", mixing=period(w, agents)) for w in graphs for _ in range(REPLICAS)]
    *_, errors = scatter(members, lr, 1, batch, problem.optimum(), 500, 6000)
    for found, w in zip(errors.reshape(len(graphs), REPLICAS), graphs, strict=True):
        gaussian = laws.dec_dpo_gaussian(problem, w, lr, batch).consensus_error
        law = laws.dec_dpo_stationary(problem, w, lr, batch).consensus_error
        first = laws.dec_dpo_stationary(problem, w, lr, batch, hessian_noise=False).consensus_error
        print(
            f"lr {lr}: first order {found.mean() / first:.4f}, Hessian {found.mean() / law:.4f}, "
            f"gaussian {found.mean() / gaussian:.4f} +- {found.std(ddof=1) / np.sqrt(REPLICAS) / found.mean():.4f}"
        )
        assert found.mean() == pytest.approx(gaussian, rel=0.04)
        if lr == 0.5:
            assert found.mean() == pytest.approx(law, rel=0.12)
