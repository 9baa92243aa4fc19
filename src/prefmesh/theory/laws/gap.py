"""Graphs whose order by spectral gap is wrong, and users that make it so (docs/theory, section 5.6)."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from jaxtyping import Float

from prefmesh.theory.laws.dec_dpo import dec_dpo_stationary
from prefmesh.theory.problem import LogLinearProblem
from prefmesh.theory.simulate import Matrix, period
from prefmesh.topology.spectrum import mixing_rate


@dataclass(frozen=True, kw_only=True)
class Misordered:
    """By its gap `promised` is the better graph (rho smaller, or the same); by the law it has the larger consensus error."""

    promised: str
    better: str
    rho: tuple[float, float]
    consensus_error: tuple[float, float]

    @property
    def ratio(self) -> float:
        """How many times larger the error of `promised` is."""
        return self.consensus_error[0] / self.consensus_error[1]


def misordered_by_gap(
    problem: LogLinearProblem,
    mixing_matrices: Mapping[str, Matrix],
    lr: float,
    batch_size: int | None,
    local_steps: int = 1,
    least_ratio: float = 1.05,
) -> list[Misordered]:
    """All pairs of graphs that 1 - rho orders wrongly by a factor of at least `least_ratio`, the worst first."""
    rho, error = {}, {}
    for name, matrix in mixing_matrices.items():
        rho[name] = mixing_rate(period(matrix, problem.num_agents, f"mixing_matrices[{name!r}]")[0])
        error[name] = dec_dpo_stationary(problem, matrix, lr, batch_size, local_steps).consensus_error
    found = [
        Misordered(promised=a, better=b, rho=(rho[a], rho[b]), consensus_error=(error[a], error[b]))
        for a, b in permutations(mixing_matrices, 2)
        if rho[a] <= rho[b] + 1e-12 and error[a] >= least_ratio * error[b]
    ]
    return sorted(found, key=lambda pair: -pair.ratio)


def users_along(
    direction: Float[np.ndarray, " agents"],
    delta_features: Float[np.ndarray, "pairs dim"],
    beta: float,
    strength: float = 0.8,
    repeats: int = 20,
) -> LogLinearProblem:
    """Users who judge the same pairs and disagree along one direction over the agents, such as an eigenvector of W.

    User i prefers the first of every pair in a share 1/2 + strength v_i / 2 of its `repeats` judgements (rounded), v being
    `direction` scaled to max |v| = 1. So grad f_i at theta = 0 is -(beta / 2) strength v_i mean(delta): all heterogeneity
    lies along v. Raises `ValueError` where `strength` is not within 0 to 1.
    """
    v = np.asarray(direction, dtype=np.float64)
    if not 0 <= strength <= 1:
        raise ValueError(f"strength: found {strength}; allowed: 0 to 1")
    if not (np.isfinite(v).all() and v.any()):
        raise ValueError(
            "direction: found only zeros or entries that are not finite; allowed: one number per agent"
        )
    firsts = np.rint(repeats * (1 + strength * v / np.abs(v).max()) / 2).astype(int)
    signs = np.where(np.arange(repeats) < firsts[:, None], 1.0, -1.0)  # (agents, repeats)
    return LogLinearProblem([np.concatenate([sign * delta_features for sign in own]) for own in signs], beta)
