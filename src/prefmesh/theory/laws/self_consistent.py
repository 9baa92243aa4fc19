"""Covariances that depend on themselves: linearly (a minibatch's Hessian acts on the scatter), or by a Gaussian's means."""

from collections.abc import Callable

import numpy as np
from scipy.sparse.linalg import LinearOperator, gmres

TOLERANCE = 1e-9
ITERATIONS = 300


def linear_fixed_point(constant: np.ndarray, linear: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """x = constant + linear(x) for covariances (..., d, d), where `linear` keeps them positive semidefinite.

    Raises `ValueError` naming `lr` where `linear` does not contract: the variance then grows for ever.
    """
    if not constant.any():
        return constant
    shape = constant.shape
    operator = LinearOperator(
        (constant.size, constant.size),
        matvec=lambda x: x - linear(x.reshape(shape)).reshape(-1),
        dtype=np.float64,
    )
    flat, failed = gmres(operator, constant.reshape(-1), rtol=TOLERANCE, atol=0.0, restart=60, maxiter=10)
    found = flat.reshape(shape)
    found = (found + found.swapaxes(-1, -2)) / 2
    eigenvalues = np.linalg.eigvalsh(found)
    # (I - L)^-1 of a positive L keeps covariances positive just where L's spectral radius is below 1.
    if failed or eigenvalues.min() < -1e-8 * eigenvalues.max():
        raise ValueError(
            "lr: minibatch noise feeds on itself: the covariance's map has spectral radius "
            f"{_growth(constant, linear):.4g}; allowed: below 1, a smaller lr or a larger batch_size"
        )
    return found


def repeated(step: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    """x = step(x), by repetition until the relative change is 1e-9. Raises `ValueError` naming `lr` where it does not end."""
    change = np.inf
    for _ in range(ITERATIONS):
        moved = step(x)
        size = np.abs(moved).max()
        change = np.abs(moved - x).max() / size if size else 0.0
        x = moved
        if change <= 1e-9:
            return x
    raise ValueError(
        f"lr: the Gaussian closure still changes by {change:.3g} after {ITERATIONS} repetitions; allowed: a smaller lr"
    )


def _growth(x: np.ndarray, linear: Callable[[np.ndarray], np.ndarray], steps: int = 100) -> float:
    """Spectral radius of a positive map, by the power method."""
    ratio = 0.0
    for _ in range(steps):
        x = linear(x / np.linalg.norm(x))
        ratio = float(np.linalg.norm(x))
    return ratio
