"""Placement: which user sits on which node of the graph, to lower the consensus error (docs/theory, section 6).

To first order in the step size, agents' disagreement is what mixing leaves of their gradients' differences. Neighbours who
pull apart cancel each other; neighbours who pull alike do not. Seating users is a quadratic assignment problem.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import quadratic_assignment

from prefmesh.randomness import derived_seed

Square = Float[np.ndarray, "agents agents"]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """`users` (N,): the user on each node. Predicted consensus error there, as users sat, and on average over all placements."""

    users: Int[np.ndarray, " nodes"]
    predicted: float
    as_numbered: float
    random: float


def predicted_consensus_error(
    mixing_matrix: np.ndarray, gradients: np.ndarray, lr: float, curvature: float = 0.0, local_steps: int = 1
) -> float:
    """The part of e that heterogeneity causes in the stationary state, to first order in the step (eq. 6.5).

    e = (1/N) sum_{k >= 2} ||lambda_k lr E b_k / (1 - lambda_k (1 - lr E h))||^2, b_k (d,) being the coefficients of `gradients`
    (N, d) at the optimum along mode k of the symmetric `mixing_matrix` (N, N), and h the `curvature`.
    """
    response = _response(mixing_matrix, lr * local_steps, curvature)
    _check_gradients(gradients, len(response))
    return float(np.square(response @ gradients).sum() / len(response))


def disagreement_curvature(
    gradients: Float[np.ndarray, "agents dim"], hessians: Float[np.ndarray, "agents dim dim"]
) -> float:
    """h of eq. (6.5): the mean Hessian's curvature along the agents' disagreements, sum g_i^T H g_i / sum g_i^T g_i."""
    differences = gradients - gradients.mean(0)
    size = float(np.square(differences).sum())
    if size == 0:
        return 0.0
    return float(np.einsum("nd,de,ne->", differences, hessians.mean(0), differences) / size)


def place(
    mixing_matrix: np.ndarray,
    gradients: np.ndarray,
    lr: float,
    curvature: float = 0.0,
    local_steps: int = 1,
    *,
    starts: int = 16,
    seed: int = 0,
) -> Placement:
    """The users' seats that minimise `predicted_consensus_error`: swaps of two from several starts (eq. 6.6).

    A local search, and no proof of the best: quadratic assignment is NP-hard. Starts: as numbered, the relaxation of
    Vogelstein et al. 2015, and `starts` random ones.
    """
    response = _response(mixing_matrix, lr * local_steps, curvature)
    n = len(response)
    _check_gradients(gradients, n)
    if starts < 1:
        raise ValueError(f"starts: found {starts}; allowed: at least 1")
    # e = (1/N) sum_ij (M^2)_ij (G G^T)_{p_i p_j}
    flow = response @ response
    differences = gradients - gradients.mean(0)
    likeness = differences @ differences.T
    rng = np.random.default_rng(derived_seed(seed, "placement"))
    seats = [np.arange(n), quadratic_assignment(flow, likeness, method="faq", options={"rng": rng}).col_ind]
    seats += [rng.permutation(n) for _ in range(starts)]

    def cost(users: Int[np.ndarray, " nodes"]) -> float:
        return float((flow * likeness[np.ix_(users, users)]).sum() / n)

    best = min((_swap_to_the_end(flow, likeness, start) for start in seats), key=cost)
    return Placement(
        users=best,
        predicted=cost(best),
        as_numbered=cost(np.arange(n)),
        random=_mean_over_placements(flow, likeness) / n,
    )


def seated(mixing_matrix: Square, users: Int[np.ndarray, " nodes"]) -> Square:
    """The mixing matrix in the order of the users' numbers: entry (users[a], users[b]) is that of nodes (a, b)."""
    found = np.empty_like(mixing_matrix)
    found[np.ix_(users, users)] = mixing_matrix
    return found


def _swap_to_the_end(
    flow: Square, likeness: Square, users: Int[np.ndarray, " nodes"]
) -> Int[np.ndarray, " nodes"]:
    """The best swap of two seats, again and again, until none lowers sum_ab flow_ab likeness_{users_a users_b}."""
    users = users.copy()
    own, scale = np.diag(flow), np.abs(flow).max() * np.abs(likeness).max()
    while True:
        k = likeness[np.ix_(users, users)]
        cross, on = flow @ k, np.diag(k)
        twice = cross + cross.T - np.diag(cross)[:, None] - np.diag(cross)
        # Those sums run over all nodes; the two that swap meet each other and themselves differently.
        between = (own[:, None] - flow) * (k - on[:, None]) + (flow - own) * (on - k)
        change = 2 * (twice - between) + (own[:, None] - own) * (on - on[:, None])
        a, b = np.unravel_index(change.argmin(), change.shape)
        if change[a, b] >= -1e-12 * scale:
            return users
        users[[a, b]] = users[[b, a]]


def _mean_over_placements(flow: Square, likeness: Square) -> float:
    """Diagonal meets diagonal and pairs meet pairs, each equally often."""
    n = len(flow)
    on = np.trace(flow) * np.trace(likeness) / n
    off = (flow.sum() - np.trace(flow)) * (likeness.sum() - np.trace(likeness))
    return float(on + off / max(1, n * (n - 1)))


def _response(mixing_matrix: np.ndarray, step: float, curvature: float) -> Square:
    """M = sum_{k >= 2} lambda_k step / (1 - lambda_k (1 - step h)) v_k v_k^T: agents' distance from the mean is -M G."""
    w = np.asarray(mixing_matrix, dtype=np.float64)
    n = len(w)
    if w.shape != (n, n) or not np.isfinite(w).all():
        raise ValueError(f"mixing_matrix: found shape {w.shape}; allowed: a finite (N, N) matrix")
    apart = np.abs(w - w.T).max()
    if apart > 1e-10 or np.abs(w.sum(1) - 1).max() > 1e-10:
        raise ValueError(
            f"mixing_matrix: found row sums up to {np.abs(w.sum(1) - 1).max():.3g} from 1 and W up to {apart:.3g} from W^T; "
            "allowed: a symmetric doubly stochastic matrix"
        )
    if not (np.isfinite(step) and step > 0):
        raise ValueError(f"lr: found {step} with all local steps; allowed: a finite number above 0")
    values, modes = np.linalg.eigh(w - 1 / n)  # the mean's mode has 0 here, which adds nothing
    factor = values * (1 - step * curvature)
    if np.abs(factor).max() >= 1:
        raise ValueError(
            f"mixing_matrix, lr: found |lambda (1 - lr E h)| = {np.abs(factor).max():.6g}; allowed: below 1, where agents settle"
        )
    return (modes * (values * step / (1 - factor))) @ modes.T


def _check_gradients(gradients: np.ndarray, agents: int) -> None:
    if len(gradients) != agents or not np.isfinite(gradients).all():
        raise ValueError(
            f"gradients: found {len(gradients)} rows; allowed: {agents}, one per node, all finite"
        )
