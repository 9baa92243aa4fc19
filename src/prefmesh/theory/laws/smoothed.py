"""A log-linear problem averaged over a Gaussian scatter of every agent's parameters (docs/theory, section 5.7).

theta_i ~ N(mean_i, P_i) makes beta h = z Gaussian for every pair, with standard deviation beta sqrt(x^T P_i x), so that all
averages are integrals over one variable, done by Gauss-Hermite quadrature.
"""

import numpy as np
from jaxtyping import Float
from scipy.special import expit

from prefmesh.theory.problem import LogLinearProblem, Matrices, Rows

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(15)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


class Smoothed:
    """`spread` (N, d, d): the covariance of every agent's theta; methods take the means (N, d)."""

    def __init__(self, problem: LogLinearProblem, spread: Matrices):
        self._x, self._weight, self._beta = problem._all.x, problem._all.weight, problem.beta
        self._spread = spread
        variance = np.einsum("npd,nde,npe->np", self._x, spread, self._x, optimize=True)
        self._deviation = problem.beta * np.sqrt(np.maximum(variance, 0))

    def losses(self, mean: Rows) -> Float[np.ndarray, " agents"]:
        """E f_i."""
        return (self._weight * (np.logaddexp(0, -self._z(mean)) @ WEIGHTS)).sum(1)

    def agent_gradients(self, mean: Rows) -> Rows:
        """E grad f_i = -beta E_j[E sigmoid(-z) x]."""
        first, _ = self._moments(mean)
        return -self._beta * np.einsum("np,npd->nd", self._weight * first, self._x)

    def agent_hessians(self, mean: Rows) -> Matrices:
        """E hess f_i = beta^2 E_j[E[s (1 - s)] x x^T]: also what links theta's scatter to the gradient's (Stein)."""
        first, second = self._moments(mean)
        return self._second_moments(first - second)

    def gradient_covariances(self, mean: Rows) -> Matrices:
        """One pair's gradient around E_j of it, over pairs and scatter: E[g g^T] - E g E g^T - H P H (5.21)."""
        gradient, hessian = self.agent_gradients(mean), self.agent_hessians(mean)
        _, second = self._moments(mean)
        of_means = gradient[:, :, None] * gradient[:, None, :] + hessian @ self._spread @ hessian
        return self._second_moments(second) - of_means

    def _z(self, mean: Rows) -> Float[np.ndarray, "agents pairs nodes"]:
        centre = self._beta * np.einsum("npd,nd->np", self._x, mean)
        return centre[:, :, None] + self._deviation[:, :, None] * NODES

    def _moments(
        self, mean: Rows
    ) -> tuple[Float[np.ndarray, "agents pairs"], Float[np.ndarray, "agents pairs"]]:
        """E sigmoid(-z) and E sigmoid(-z)^2."""
        s = expit(-self._z(mean))
        return s @ WEIGHTS, np.square(s) @ WEIGHTS

    def _second_moments(self, of_pairs: Float[np.ndarray, "agents pairs"]) -> Matrices:
        weight = self._beta**2 * self._weight * of_pairs
        return (self._x * weight[:, :, None]).swapaxes(1, 2) @ self._x
