"""Linear stochastic recursions of stacked agents, solved for their stationary covariance.

    P = A P A^T + (W x I) blockdiag(Q_i) (W x I)^T,    A = (W x I) blockdiag(K_i)          (docs/theory, eq. (5.11))

Noise enters at the agents and is then mixed, so what is asked for is linear in the blocks Q_i, and only the blocks P_ii
and the covariance of the average model are ever needed. `Symmetric` does it by one eigendecomposition, `Periodic` for
any period of matrices by doubling.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.sparse import csr_array

from prefmesh.theory.laws.fixed_points import round_map
from prefmesh.theory.problem import Matrices

PhaseBlocks = Float[np.ndarray, "phases agents dim dim"]
Square = Float[np.ndarray, "unknowns unknowns"]

REFINED = 1e-10
"""Relative size of what a further correction would change, at which they end."""


@dataclass(frozen=True, kw_only=True)
class Covariances:
    """At the start of every round of the period: `blocks`, the P_ii, and `average`, that of the mean model."""

    blocks: PhaseBlocks
    average: Float[np.ndarray, "phases dim dim"]


class Symmetric:
    """One symmetric W, and K_i with positive definite symmetric parts (lr times the largest curvature below 1).

    With R = blockdiag(K_i)^(1/2), R A R^-1 = R (W x I) R is symmetric: V diag(s) V^T. In the basis F = R^-1 V the equation
    is divided by 1 - s_k s_l, entry by entry. For E > 1 the K_i are symmetric only to O(lr^3); what is left is added by
    iteration (5.14).
    """

    def __init__(self, w: csr_array, jacobian: Matrices):
        agents, dim, _ = jacobian.shape
        even = (jacobian + jacobian.swapaxes(1, 2)) / 2
        values, vectors = np.linalg.eigh(even)
        root = (vectors * np.sqrt(values)[:, None, :]) @ vectors.swapaxes(1, 2)
        inverse = (vectors / np.sqrt(values)[:, None, :]) @ vectors.swapaxes(1, 2)
        dense = np.einsum("iab,ij,jbc->iajc", root, w.toarray(), root, optimize=True)
        dense = dense.reshape(agents * dim, agents * dim)
        self._s, v = np.linalg.eigh((dense + dense.T) / 2)
        self._f = inverse @ v.reshape(agents, dim, -1)
        self._gain = np.outer(self._s, self._s) / (1 - np.outer(self._s, self._s))
        odd = (jacobian - jacobian.swapaxes(1, 2)) / 2
        # A correction of O(lr^3): float32 rounds it by less than `REFINED`, at half the time.
        self._odd = self._congruent(odd).astype(np.float32) if np.abs(odd).max() > 1e-15 else None

    @staticmethod
    def suits(mixing: Sequence[csr_array], jacobians: Sequence[Matrices]) -> bool:
        """Whether it can be used."""
        w, k = mixing[0], jacobians[0]
        asymmetry = abs(w - w.T)
        symmetric = len(mixing) == 1 and (asymmetry.nnz == 0 or asymmetry.max() <= 1e-12)
        return bool(symmetric and np.linalg.eigvalsh((k + k.swapaxes(1, 2)) / 2).min() > 1e-6)

    def solve(self, noise: PhaseBlocks) -> Covariances:
        """The stationary covariances under these Q_i."""
        source = self._congruent(noise[0])
        p = self._gain * source
        before = size = np.abs(p).max()
        while self._odd is not None:
            turned = self._odd @ p.astype(np.float32)
            correction = turned + turned.T + turned @ self._odd.T
            refined = self._gain * (source + correction)
            change = np.abs(refined - p).max()
            p = refined
            if change * (change / before) <= REFINED * size:  # they shrink geometrically
                break
            before = change
        agents, dim, size = self._f.shape
        half = (self._f.reshape(-1, size) @ p).reshape(agents, dim, size)
        mean = self._f.mean(0)
        return Covariances(blocks=(half @ self._f.swapaxes(1, 2))[None], average=(mean @ p @ mean.T)[None])

    def _congruent(self, blocks: Matrices) -> Square:
        """F^T blockdiag F."""
        size = self._f.shape[2]
        return self._f.reshape(-1, size).T @ (blocks @ self._f).reshape(-1, size)


class Periodic:
    """Any period of doubly stochastic matrices, by Smith's doubling: P_0 = sum_t A^t N (A^t)^T, twice as many terms a step.

    Dense in N d; meant for N d up to some hundreds.
    """

    def __init__(self, mixing: Sequence[csr_array], jacobians: Sequence[Matrices]):
        self._mixing = list(mixing)
        self._jacobians = list(jacobians)
        agents, dim, _ = jacobians[0].shape
        power = np.eye(agents * dim)
        for w, k in zip(mixing, jacobians, strict=True):
            power = round_map(w, k, power)
        self._powers = [power]
        while np.linalg.norm(power) > 1e-9:  # what is left out has the square of this
            power = power @ power
            self._powers.append(power)

    def solve(self, noise: PhaseBlocks) -> Covariances:
        """The stationary covariances under these Q_i of every round."""
        p = np.zeros_like(self._powers[0])
        for k in range(len(noise)):
            p = self._round(k, p, noise[k])
        for power in self._powers:
            p = p + power @ p @ power.T
        _, agents, dim, _ = noise.shape
        blocks, average = [], []
        for k in range(len(noise)):
            tensor = p.reshape(agents, dim, agents, dim)
            blocks.append(np.einsum("iaib->iab", tensor))
            average.append(tensor.mean((0, 2)))
            p = self._round(k, p, noise[k])
        return Covariances(blocks=np.array(blocks), average=np.array(average))

    def _round(self, k: int, p: Square, noise: Matrices) -> Square:
        """A P A^T + (W x I) blockdiag(Q_i) (W x I)^T."""
        agents, dim, _ = noise.shape
        w, jacobian = self._mixing[k], self._jacobians[k]
        half = (jacobian @ p.reshape(agents, dim, -1)).reshape(agents * dim, agents, dim)
        local = np.einsum("xjb,jcb->xjc", half, jacobian).reshape(agents, dim, agents, dim)
        every = np.arange(agents)
        local[every, :, every, :] += noise
        mixed = w @ local.reshape(agents, -1)
        mixed = w @ mixed.reshape(agents, dim, agents, dim).transpose(2, 3, 0, 1).reshape(agents, -1)
        return mixed.reshape(agents * dim, agents * dim)  # transposed, and symmetric
