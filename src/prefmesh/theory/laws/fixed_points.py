"""Where full batches come to rest: the exact fixed points of FedDPO and DecDPO, by Newton's method.

FedDPO, S = N:   theta = (1/N) sum_i M_i^E(theta)            (docs/theory, eq. (5.1))
DecDPO:          Theta = W M^E(Theta), row i of M^E(Theta) being M_i^E(theta_i)      (5.3)
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Float
from scipy.sparse import csr_array
from scipy.sparse.linalg import LinearOperator, eigs

from prefmesh.theory.laws.local_steps import LocalSteps, Spread, check_steps, take
from prefmesh.theory.problem import LogLinearProblem, Matrices, Rows, Vector
from prefmesh.theory.simulate import Matrix, period

NEWTON_STEPS = 60
DENSE = 600
"""Up to this size all eigenvalues are computed to find the largest."""


def fed_dpo_fixed_point(problem: LogLinearProblem, lr: float, local_steps: int) -> Vector:
    """(d,): the server's model that a round with all agents and full shards does not move.

    Raises `ValueError` naming `lr` where rounds move away from it (spectral radius of the Jacobian >= 1).
    """
    check_steps(lr, local_steps)
    return settle_server(problem, lr, local_steps)[0]


def dec_dpo_fixed_point(
    problem: LogLinearProblem, mixing_matrix: Matrix | Sequence[Matrix], lr: float, local_steps: int = 1
) -> Rows:
    """(N, d): every agent's model, after mixing, that a round (a period, after its last matrix) does not move.

    Raises `ValueError` for what is no mixing matrix (or period of them), and naming `lr` where rounds move away from it.
    """
    check_steps(lr, local_steps)
    mixing = period(mixing_matrix, problem.num_agents)
    return settle(problem, mixing, lr, local_steps)[0]


def settle_server(
    problem: LogLinearProblem,
    lr: float,
    local_steps: int,
    spread: Spread | None = None,
    start: Vector | None = None,
) -> tuple[Vector, LocalSteps]:
    """FedDPO's fixed point, sought from `start` (None: the optimum), and all agents' local steps from there.

    With `spread`, that of the means over this scatter. Raises `ValueError` naming `lr` where rounds move away from it.
    """

    def residual(theta: np.ndarray) -> tuple[np.ndarray, LocalSteps]:
        steps = take(problem, np.tile(theta, (problem.num_agents, 1)), lr, local_steps, spread)
        return steps.update.mean(0), steps

    def jacobian(steps: LocalSteps) -> np.ndarray:
        return steps.jacobian.mean(0) - np.eye(problem.dim)

    start = problem.optimum() if start is None else start
    theta, steps = _newton(start, _reach(problem, lr, local_steps), residual, jacobian)
    _refuse_unstable(float(np.abs(np.linalg.eigvals(steps.jacobian.mean(0))).max()))
    return theta, steps


def settle(
    problem: LogLinearProblem,
    mixing: Sequence[csr_array],
    lr: float,
    local_steps: int,
    spread: Sequence[Spread] | np.ndarray | None = None,
    start: Rows | None = None,
) -> tuple[Rows, list[LocalSteps]]:
    """DecDPO's fixed point before the first matrix of the period, and the local steps of every round from there.

    `spread` (one for every round of the period) and `start` as in `settle_server`. Raises `ValueError` naming `lr` where
    rounds move away from it.
    """
    shape = (problem.num_agents, problem.dim)

    def residual(flat: np.ndarray) -> tuple[np.ndarray, list[LocalSteps]]:
        start = theta = flat.reshape(shape)
        phases = []
        moved = np.zeros(shape)
        for k, w in enumerate(mixing):
            phases.append(take(problem, theta, lr, local_steps, None if spread is None else spread[k]))
            # W (Theta + U) - Theta, without Theta's own rounding
            moved = w @ (moved + phases[-1].update) + (w @ start - start)
            theta = start + moved
        return moved.reshape(-1), phases

    def jacobian(phases: list[LocalSteps]) -> np.ndarray:
        product = np.eye(problem.num_agents * problem.dim)
        for w, steps in zip(mixing, phases, strict=True):
            product = round_map(w, steps.jacobian, product)
        product.flat[:: len(product) + 1] -= 1
        return product

    start = np.tile(problem.optimum(), (problem.num_agents, 1)) if start is None else start
    theta, phases = _newton(start.reshape(-1), _reach(problem, lr, local_steps), residual, jacobian)
    _refuse_unstable(_radius(mixing, [steps.jacobian for steps in phases]))
    return theta.reshape(shape), phases


def round_map(w: csr_array, jacobian: Matrices, right: np.ndarray) -> np.ndarray:
    """(W x I) blockdiag(K_i) times a matrix of N d rows."""
    agents, dim, _ = jacobian.shape
    local = jacobian @ right.reshape(agents, dim, -1)
    return np.ascontiguousarray(w @ local.reshape(agents, -1)).reshape(agents * dim, -1)


def _refuse_unstable(radius: float) -> None:
    """Raises `ValueError` where the spectral radius of a round's Jacobian is 1 or more."""
    if not radius < 1 - 1e-12:
        raise ValueError(
            f"lr: a round's Jacobian at the fixed point has spectral radius {radius:.6g}; allowed: below 1, a smaller lr"
        )


def _radius(mixing: Sequence[csr_array], jacobians: Sequence[Matrices]) -> float:
    """Spectral radius of a period's Jacobian; where a bound below 1 comes for nothing, that bound."""
    norms = [
        np.linalg.norm(w.toarray(), 2) * np.linalg.norm(k, 2, axis=(1, 2)).max()
        for w, k in zip(mixing, jacobians, strict=True)
    ]
    if np.prod(norms) < 1 - 1e-9:
        return float(np.prod(norms))

    def product(x: np.ndarray) -> np.ndarray:
        for w, k in zip(mixing, jacobians, strict=True):
            x = round_map(w, k, x)
        return x

    size = jacobians[0].shape[0] * jacobians[0].shape[1]
    if size <= DENSE:
        return float(np.abs(np.linalg.eigvals(product(np.eye(size)))).max())
    operator = LinearOperator((size, size), matvec=lambda x: product(x[:, None])[:, 0], dtype=np.float64)
    found = eigs(operator, k=1, which="LM", v0=np.ones(size), ncv=40, return_eigenvectors=False)
    return float(np.abs(found).max())


def _reach(problem: LogLinearProblem, lr: float, local_steps: int) -> float:
    """No agent moves farther than this in a round: the gradient of a pair is at most beta ||x||."""
    longest = max(float(np.linalg.norm(x, axis=1).max()) for x in problem.delta_features)
    return lr * local_steps * problem.beta * longest


Evaluated = TypeVar("Evaluated")


def _newton(
    start: Vector,
    scale: float,
    residual: Callable[[Vector], tuple[Vector, Evaluated]],
    jacobian: Callable[[Evaluated], Float[np.ndarray, "unknowns unknowns"]],
) -> tuple[Vector, Evaluated]:
    """The zero next to `start`, to rounding; `scale` is how far a round can move. Steps are halved until the residual falls."""
    x, (r, at) = start, residual(start)
    first = norm = np.linalg.norm(r)
    for _ in range(NEWTON_STEPS):
        if norm == 0:
            break
        step, length = np.linalg.solve(jacobian(at), r), 1.0
        while length > 1e-6:
            moved = x - length * step
            r_moved, at_moved = residual(moved)
            if np.linalg.norm(r_moved) < norm:
                break
            length /= 2
        else:  # nothing falls any more: rounding, or no zero here
            break
        x, r, at = moved, r_moved, at_moved
        norm = np.linalg.norm(r)
        if length == 1 and np.linalg.norm(step) <= 1e-10 * np.linalg.norm(x):
            break  # the next step would be the square of this one
    if not norm <= max(1e-10 * first, 1e-13 * (np.linalg.norm(x) + scale)):
        raise ValueError(
            f"lr: Newton's method left a residual of {norm:.3g} (from {first:.3g}) and found no fixed point; "
            "allowed: a smaller lr"
        )
    return x, at
