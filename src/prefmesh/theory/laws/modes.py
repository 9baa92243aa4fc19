"""What decides beyond the gap: the consensus error mode by mode of the mixing matrix (docs/theory, section 5.5)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from prefmesh.theory.laws.local_steps import check_steps
from prefmesh.theory.problem import LogLinearProblem, check_batch_size
from prefmesh.theory.simulate import Matrix, period

Modal = Float[np.ndarray, " modes"]


@dataclass(frozen=True, kw_only=True)
class Modes:
    """The N - 1 modes along which agents can differ, by falling |eigenvalue| of W; u_k of unit length.

    `heterogeneity` is ||sum_i u_ki grad f_i(theta*)||^2 / N, which adds up to zeta^2 at the optimum; `noise` the trace of a
    minibatch gradient's covariance along the mode; `bias` and `variance` what each adds to the consensus error (5.17).
    Within an eigenvalue that repeats only sums have a meaning.
    """

    eigenvalues: Modal
    vectors: Float[np.ndarray, "agents modes"]
    heterogeneity: Modal
    noise: Modal
    bias: Modal
    variance: Modal

    @property
    def consensus_error(self) -> float:
        """The modal form's e."""
        return float(self.bias.sum() + self.variance.sum())


def disagreement_by_mode(
    problem: LogLinearProblem,
    mixing_matrix: Matrix | Sequence[Matrix],
    lr: float,
    batch_size: int | None = None,
    local_steps: int = 1,
) -> Modes:
    """Which modes of a symmetric W carry the users' disagreement, and what each adds to e, to first order in lr.

    All agents are given the mean Hessian at the optimum: exact for quadratic losses that share theirs, elsewhere the
    reading aid to `dec_dpo_stationary`. Raises `ValueError` for a W that is not symmetric and for an unstable `lr`.
    """
    check_steps(lr, local_steps)
    check_batch_size(batch_size)
    w = _one_symmetric(mixing_matrix, problem.num_agents)
    best = problem.optimum()
    eigenvalues, vectors = np.linalg.eigh(w)
    off_mean = np.delete(np.arange(len(w)), _mean_mode(eigenvalues, vectors))
    order = off_mean[np.argsort(-np.abs(eigenvalues[off_mean]), kind="stable")]
    eigenvalues, vectors = eigenvalues[order], vectors[:, order]
    curvature, axes = np.linalg.eigh(problem.hessian(best))
    slower = 1 - lr * curvature
    contraction = slower**local_steps  # (d,)
    if not np.abs(contraction).max() < 1 - 1e-12:
        raise ValueError(
            f"lr: a round shrinks deviations to {np.abs(contraction).max():.6g} of their size; allowed: below 1, a smaller lr"
        )
    # sum_e slower^e and sum_e slower^2e: how a gradient, and noise, add up over the local steps
    powers = slower ** np.arange(local_steps)[:, None]
    drift, gathered = powers.sum(0), np.square(powers).sum(0)
    pull = vectors.T @ problem.agent_gradients(best) @ axes
    scatter = np.einsum("da,ide,ea->ia", axes, problem.gradient_covariances(best), axes)
    scatter = np.square(vectors).T @ scatter / (batch_size or np.inf)
    lam = eigenvalues[:, None]
    agents = problem.num_agents
    bias = np.square(lam * lr * drift * pull / (1 - lam * contraction)) / agents
    variance = lam**2 * lr**2 * gathered * scatter / (1 - lam**2 * contraction**2) / agents
    return Modes(
        eigenvalues=eigenvalues,
        vectors=vectors,
        heterogeneity=np.square(pull).sum(1) / agents,
        noise=scatter.sum(1),
        bias=bias.sum(1),
        variance=variance.sum(1),
    )


@dataclass(frozen=True, kw_only=True)
class ModeShares:
    """The N - 1 modes by falling |eigenvalue|: each one's part of zeta^2, and of the consensus error it causes (5.19)."""

    eigenvalues: Modal
    heterogeneity: Modal
    consensus_error: Modal


def modes_of_gradients(mixing_matrix: Matrix, inner: Float[np.ndarray, "agents agents"]) -> ModeShares:
    """The same from the inner products <grad f_i, grad f_j> alone, so of any policy at any model (5.19).

    `heterogeneity` adds up to zeta^2 (equal weights); of inner products that were estimated parts may be negative.
    `consensus_error` is in units of (lr E)^2, curvature left out. Raises `ValueError` for a W that is not symmetric.
    """
    w = _one_symmetric(mixing_matrix, len(inner))
    eigenvalues, vectors = np.linalg.eigh(w)
    off_mean = np.delete(np.arange(len(w)), _mean_mode(eigenvalues, vectors))
    order = off_mean[np.argsort(-np.abs(eigenvalues[off_mean]), kind="stable")]
    lam, vectors = eigenvalues[order], vectors[:, order]
    heterogeneity = np.einsum("ik,ij,jk->k", vectors, inner, vectors) / len(w)
    return ModeShares(
        eigenvalues=lam,
        heterogeneity=heterogeneity,
        consensus_error=np.square(lam / (1 - lam)) * heterogeneity,
    )


def _one_symmetric(
    mixing_matrix: Matrix | Sequence[Matrix], agents: int
) -> Float[np.ndarray, "agents agents"]:
    first, *more = period(mixing_matrix, agents)
    if more:
        raise ValueError(
            f"mixing_matrix: found a period of {1 + len(more)}; allowed: one matrix, whose modes stay"
        )
    w = first.toarray()
    asymmetry = float(np.abs(w - w.T).max())
    if asymmetry > 1e-12:
        raise ValueError(
            f"mixing_matrix: W and its transpose differ by {asymmetry:.3g}; allowed: a symmetric W, whose modes are orthogonal"
        )
    return w


def _mean_mode(eigenvalues: np.ndarray, vectors: np.ndarray) -> int:
    """Which column is 1 / sqrt(N)."""
    along = np.abs(vectors.sum(0))
    return int(along.argmax())
