"""Rates of methods: fitted, from the Jacobian of a round, and by hand."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from prefmesh.theory import convergence, laws
from prefmesh.theory.convergence import RoundMap, converge, predicted_rate, slope
from prefmesh.theory.verify import Effort
from prefmesh.theory.verify.claim import Finding
from prefmesh.theory.verify.law_claims import metropolis
from prefmesh.theory.verify.method_claims import CASES, bias, expected_limit, optimum, problem, rates, way

PROBLEM = problem(0)
H = PROBLEM.agent_hessians


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Rounds of six users in three dimensions are no work for several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("label", "kept"),
    [
        ("FedDPO, E = 4", 0),
        pytest.param("FedAvgM, E = 4", 0, marks=pytest.mark.slow),
        ("SCAFFOLD, E = 4", 3),
        ("DecDPO", 0),
        pytest.param("push-sum, directed", 1, marks=pytest.mark.slow),
        pytest.param("gradient tracking", 3, marks=pytest.mark.slow),
        pytest.param("momentum tracking", 3, marks=pytest.mark.slow),
        ("exact diffusion", 3),
        pytest.param("EXTRA", 3, marks=pytest.mark.slow),
    ],
)
def test_fitted_is_predicted(label: str, kept: int) -> None:
    """J is off by what the loss is not quadratic: at most about the first distance of the fit, 1e-4, and rounding at its last.

    What is kept: the mean of corrections (d = 3 numbers) or the sum of push-sum's weights.
    """
    found = way(label, 0)
    of = found.predicted
    assert of is not None
    assert found.rate == pytest.approx(of.over_the_window, rel=2e-4)
    # Smaller eigenvalues bend the way: exp(-window) of 1e-7 leaves the slope within 2 % here.
    assert found.rate == pytest.approx(of.rate, rel=0.02)
    assert of.kept == kept
    assert of.kept_moved < 1e-10


def test_by_hand() -> None:
    """One local step: the Hessians at the limit say it all, without differences.

    DecDPO: (W x I) diag(I - lr H_i). Exact diffusion on (theta, psi): psi' = D theta, theta' = W~ (D theta + theta - psi).
    """
    lr, w, d = 0.5, metropolis("ring", 6), 3
    ends = laws.dec_dpo_fixed_point(PROBLEM, w, lr)
    values = np.linalg.eigvals(np.kron(w, np.eye(d)) @ _block(np.eye(d) - lr * H(ends)))
    of = way("DecDPO", 0).predicted
    assert of is not None
    assert of.rate == pytest.approx(-np.log(np.abs(values).max()), rel=1e-8)

    step, lazy = _block(np.eye(d) - lr * H(PROBLEM.optimum())), np.kron((np.eye(6) + w) / 2, np.eye(d))
    jacobian = np.block([[lazy @ (step + np.eye(18)), -lazy], [step, np.zeros((18, 18))]])
    of = way("exact diffusion", 0).predicted
    assert of is not None
    assert of.rate == pytest.approx(predicted_rate(jacobian)[0], rel=1e-7)

    # Local steps of FedDPO, whose Hessians are taken on the way: K_i, as in eq. (5.2).
    theta, k = np.tile(expected_limit("FedDPO, E = 4", 0)[0], (6, 1)), np.tile(np.eye(d), (6, 1, 1))
    for _ in range(4):
        k = (np.eye(d) - 0.2 * H(theta)) @ k
        theta = theta - 0.2 * PROBLEM.agent_gradients(theta)
    of = way("FedDPO, E = 4", 0).predicted
    assert of is not None
    assert of.rate == pytest.approx(-np.log(np.abs(np.linalg.eigvals(k.mean(0))).max()), rel=1e-8)


@pytest.mark.slow
def test_heavy_ball() -> None:
    """A server's momentum whose eigenvalues are complex: lambda lambda' = beta1, so the rate is ln(1 / beta1) / 2."""
    of = way("FedAvgM, E = 4", 0).predicted
    assert of is not None
    assert of.rate == pytest.approx(np.log(2) / 2, rel=1e-8)


def test_limits() -> None:
    """Of those that are quick; of all, in the claims."""
    for label in ("SCAFFOLD, E = 4", "exact diffusion", "FedDPO, E = 4", "DecDPO"):
        np.testing.assert_allclose(way(label, 0).limit, expected_limit(label, 0), rtol=0, atol=1e-9)
        assert (np.abs(way(label, 0).limit - PROBLEM.optimum()).max() < 1e-9) == CASES[label].corrected


@pytest.mark.slow
@pytest.mark.parametrize("claimed", [optimum, bias, rates])
def test_claims(claimed) -> None:
    found: Finding = claimed(Effort(quick=True))
    assert found.holds, found


def test_slope_of_a_geometric_row() -> None:
    found, error = slope(3 * 0.8 ** np.arange(20))
    assert found == pytest.approx(-np.log(0.8), rel=1e-12)
    assert error < 1e-8


def test_what_is_not_below_one() -> None:
    """A kept number is left out; a drift (two eigenvalues 1, one v), and growth, are refused."""
    rate, kept = predicted_rate(np.diag([1.0, 0.5, -0.6]))
    assert rate == pytest.approx(-np.log(0.6))
    assert np.abs(kept[:, 0]).tolist() == [1.0, 0.0, 0.0]
    for jacobian in (np.array([[1.0, 1.0], [0.0, 1.0]]), np.diag([1.0, 1.2])):
        with pytest.raises(ValueError, match="modulus"):
            predicted_rate(jacobian)


def test_too_large_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convergence, "ROUNDS", 50)
    case = CASES["gradient tracking"]
    with pytest.raises(ValueError, match="lr"):
        converge(PROBLEM, RoundMap(PROBLEM, case.name, {}, lr=30.0))


def _block(blocks: np.ndarray) -> np.ndarray:
    n, d, _ = blocks.shape
    out = np.zeros((n, d, n, d))
    out[np.arange(n), :, np.arange(n)] = blocks
    return out.reshape(n * d, n * d)
