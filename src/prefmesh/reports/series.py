"""What the figures draw: curves over rounds (mean and spread over seeds) and accuracies of users."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int

from prefmesh.randomness import generator
from prefmesh.reports.runs import Row, Run, value


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One metric of one variant. `std` is nan where fewer than two seeds have reached the round; `spread` says what it is."""

    label: str
    style: int
    rounds: Float[np.ndarray, " points"]
    bytes_sent: Float[np.ndarray, " points"]
    mean: Float[np.ndarray, " points"]
    std: Float[np.ndarray, " points"]
    seeds: int
    spread: str = "standard deviation"

    def with_standard_error(self) -> "Curve":
        """The same with the standard error of the mean as its band: std / sqrt(seeds)."""
        return replace(self, std=self.std / np.sqrt(self.seeds), spread="standard error")

    @property
    def sends_nothing(self) -> bool:
        return bool(np.all(self.bytes_sent == 0))


def curve(label: str, style: int, runs: Sequence[Run], key: str) -> Curve | None:
    """The metric's mean and sample standard deviation over the runs that have it, round by round.

    A value that is not finite stays so: the mean of that round is then drawn as a gap.
    None where no run has the metric.
    """
    found: dict[int, list[tuple[float, float]]] = {}
    with_metric = 0
    for run in runs:
        points = [(row, number) for row in run.metrics if (number := value(row, key)) is not None]
        with_metric += bool(points)
        for row, number in points:
            sent = value(row, "bytes_sent_total")
            found.setdefault(row["round"], []).append((number, np.nan if sent is None else sent))
    if not found:
        return None
    rounds = sorted(found)
    return Curve(
        label=label,
        style=style,
        rounds=np.array(rounds, dtype=np.float64),
        bytes_sent=np.array([np.mean([sent for _, sent in found[r]]) for r in rounds]),
        mean=np.array([mean([number for number, _ in found[r]]) for r in rounds]),
        std=np.array([sample_std([number for number, _ in found[r]]) for r in rounds]),
        seeds=with_metric,
    )


def mean(numbers: Sequence[float]) -> float:
    """The mean; nan where any number is not finite (inf - inf would warn).

    >>> mean([1.0, 2.0]), mean([1.0, float("inf")])
    (1.5, nan)
    """
    return float(np.mean(numbers)) if np.all(np.isfinite(numbers)) else float("nan")


def sample_std(numbers: Sequence[float]) -> float:
    """The standard deviation with n - 1 in the denominator; nan for fewer than two finite numbers.

    >>> sample_std([1.0, 3.0]) == 2**0.5
    True
    """
    if len(numbers) < 2 or not np.all(np.isfinite(numbers)):
        return float("nan")
    return float(np.std(numbers, ddof=1))


@dataclass(frozen=True, kw_only=True)
class Users:
    """Held-out accuracy of every user, ascending, with the number of pairs behind each."""

    accuracy: Float[np.ndarray, " users"]
    pairs: Int[np.ndarray, " users"]

    @property
    def pooled(self) -> float:
        """Accuracy over all pairs: what every user's accuracy would be if users did not differ."""
        return float(np.average(self.accuracy, weights=self.pairs))


def users(rows: Sequence[Row], *, own: bool) -> Users | None:
    """The users' accuracies of agents.jsonl rows; None where there is none."""
    key = "own_accuracy" if own else "accuracy"
    found = [(number, int(row["pairs"])) for row in rows if (number := value(row, key)) is not None]
    found = [(number, pairs) for number, pairs in sorted(found) if np.isfinite(number) and pairs > 0]
    if not found:
        return None
    accuracy, pairs = zip(*found, strict=True)
    return Users(accuracy=np.array(accuracy, dtype=np.float64), pairs=np.array(pairs, dtype=np.int64))


def tenth(count: int) -> int:
    """How many users the worst tenth holds: a tenth, rounded up.

    >>> tenth(5), tenth(20), tenth(21)
    (1, 2, 3)
    """
    return -(-count // 10)


def worst_tenth(accuracy: Float[np.ndarray, "*draws users"]) -> Float[np.ndarray, "*draws"]:
    """Mean accuracy of the worst tenth, of accuracies that ascend along the last axis."""
    return np.asarray(accuracy[..., : tenth(accuracy.shape[-1])].mean(axis=-1))


def binomial_null(group: Users, draws: int = 2000) -> Float[np.ndarray, "draws users"]:
    """Accuracies, ascending in each draw, of users who do not differ: Binomial(pairs, pooled) / pairs.

    Per-user figures on few pairs are mostly noise; this is how far noise alone would spread them.
    Fewer draws for many users, whose quantiles need fewer.
    """
    draws = int(np.clip(2_000_000 // len(group.pairs), 200, draws))
    rng = generator(0, "reports/binomial_null", len(group.pairs))
    correct = rng.binomial(group.pairs, min(group.pooled, 1.0), size=(draws, len(group.pairs)))
    return np.sort(correct / group.pairs, axis=1)


def flags(mean: Float[np.ndarray, " points"], floor: float) -> dict[str, Bool[np.ndarray, " points"]]:
    """Which points a logarithmic axis that ends at `floor` cannot show, and why."""
    finite = np.isfinite(mean)
    return {
        "negative": finite & (mean < 0),
        "zero": finite & (mean == 0),
        "below": finite & (mean > 0) & (mean < floor),
        "non_finite": ~finite,
    }
