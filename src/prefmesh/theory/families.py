"""Families of log-linear problems in which one constant is set and the others stay: where exponents are measured.

Which exponent holds depends on the family (docs/theory, section 3.7), so each has a name.
"""

import numpy as np

from prefmesh.theory.problem import LogLinearProblem

COPIES = 40
"""How often a shared pair is answered by one user: the grain of its probabilities."""


def one_user(agents: int, *, dim: int = 6, pairs: int = 60, seed: int = 0) -> LogLinearProblem:
    """All agents hold the same pairs with the same answers: zeta^2 = 0."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(pairs, dim))
    wrong = x @ random.normal(size=dim) / np.sqrt(dim) + random.logistic(size=pairs) < 0
    return LogLinearProblem([np.where(wrong[:, None], -x, x)] * agents, 1.0)


def shared_pairs(spread: float | int, *, agents: int = 4, dim: int = 4, seed: int = 0) -> LogLinearProblem:
    """All users judge the same pairs; how far they disagree is `spread` in [0, 1], and zeta is proportional to it.

    Users 2k and 2k+1 lean to opposite sides of the same probabilities, so theta* does not depend on `spread`, which is
    rounded to eighths.
    """
    random = np.random.default_rng(seed)
    x = random.normal(size=(2 * dim, dim))
    mean = random.integers(16, 33, size=2 * dim)  # of COPIES answers, for the first response
    lean = random.choice([-1, 1], size=(agents // 2, 2 * dim))
    eighths = round(8 * spread)
    shards = []
    for user in range(agents):
        first = mean + (1 - 2 * (user % 2)) * lean[user // 2] * eighths
        shards.append(
            np.concatenate(
                [
                    row * np.where(np.arange(COPIES) < k, 1, -1)[:, None]
                    for row, k in zip(x, first, strict=True)
                ]
            )
        )
    return LogLinearProblem(shards, 1.0)


def own_pairs(
    spread: float | int, *, agents: int = 4, dim: int = 4, pairs: int = 12, seed: int = 0
) -> LogLinearProblem:
    """Users judge pairs of their own, so Hessians differ; zeta is proportional to `spread`, and theta* = 0.

    User i holds x + spread c_i and -x + spread c_i for every base pair x, with sum_i c_i = 0: the gradients at 0 are
    -(beta / 2) spread c_i, and the Hessians there change by spread^2 alone.
    """
    random = np.random.default_rng(seed)
    c = random.normal(size=(agents, dim))
    c -= c.mean(0)
    shards = []
    for user in range(agents):
        x = random.normal(size=(pairs, dim)) * random.uniform(0.5, 1.5, dim)
        shards.append(np.concatenate([x, -x]) + spread * c[user])
    return LogLinearProblem(shards, 1.0)
