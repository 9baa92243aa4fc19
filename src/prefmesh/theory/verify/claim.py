"""A claim of the theory, checked by experiment: what is said, what was predicted, what was measured, and the verdict."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from prefmesh.errors import unknown_name

Source = Literal["paper", "prefmesh"]
Kind = Literal["equal", "at most", "exponent", "order"]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve of a claim's figure: a `line` (predicted), or `points` (measured) with their standard errors."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None
    kind: Literal["line", "points"] = "line"


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A claim's figure, as numbers."""

    x_label: str
    y_label: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What an experiment gave. `error`: the standard error of `measured`; 0 where nothing is random.

    `kind` says how the two are compared: `equal` (ratio within `tolerance` of 1), `at most` (measured <= predicted, two
    standard errors allowed), `exponent` (difference within `tolerance`), `order` (rank correlation of the predicted with
    the measured order of things: 1 to within `tolerance`). A large error excuses nothing else: experiments make it small.
    """

    kind: Kind
    predicted: float
    measured: float
    error: float = 0.0
    tolerance: float = 0.0
    note: str = ""
    plot: Plot | None = None

    @property
    def ratio(self) -> float:
        """Measured / predicted."""
        return self.measured / self.predicted if self.predicted else float("nan")

    @property
    def holds(self) -> bool:
        """Whether the claim stands."""
        if self.kind == "at most":
            return self.measured <= self.predicted + 2 * self.error
        allowed = self.tolerance * (abs(self.predicted) if self.kind == "equal" else 1.0)
        return bool(abs(self.measured - self.predicted) <= allowed)  # False for NaN


def furthest_from_one(
    predicted: Sequence[float],
    seen: Sequence[float],
    error: Sequence[float],
    settings: Sequence[str],
    *,
    tolerance: float,
    axes: tuple[str, str],
    names: tuple[str, str],
) -> Finding:
    """Of several settings, the one whose ratio of seen to predicted is furthest from 1; all of them in the figure.

    `axes`: what is predicted and what is seen; `names`: of the line and of the points.
    """
    ratios = np.array(seen) / predicted
    worst = int(np.abs(ratios - 1).argmax())
    line = sorted(predicted)
    points = Series(
        label=names[1],
        x=list(predicted),
        y=list(seen),
        error=list(error) if any(error) else None,
        kind="points",
    )
    return Finding(
        kind="equal",
        predicted=predicted[worst],
        measured=seen[worst],
        error=error[worst],
        tolerance=tolerance,
        note=f"{len(settings)} settings, ratios {ratios.min():.3f} to {ratios.max():.3f}. Furthest off: {settings[worst]}.",
        plot=Plot(
            x_label=axes[0],
            y_label=axes[1],
            series=[Series(label=names[0], x=line, y=line), points],
            log_x=True,
            log_y=True,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much work an experiment may be: `quick` is for a minute in all. Everything derives from the seed."""

    quick: bool = False
    seed: int = 0

    def pick(self, quick: int, full: int) -> int:
        """A number of rounds, seeds or members."""
        return quick if self.quick else full


@dataclass(frozen=True, kw_only=True)
class Claim:
    """`statement` in words, `of`: the class of problem that it is about, `where`: its equation."""

    name: str
    statement: str
    source: Source
    of: str
    where: str
    experiment: Callable[[Effort], Finding]


CLAIMS: dict[str, Claim] = {}


def claim(
    name: str, statement: str, *, of: str, where: str, source: Source = "prefmesh"
) -> Callable[[Callable[[Effort], Finding]], Callable[[Effort], Finding]]:
    """Register an experiment as the check of a claim."""

    def register(experiment: Callable[[Effort], Finding]) -> Callable[[Effort], Finding]:
        assert name not in CLAIMS, name
        CLAIMS[name] = Claim(
            name=name, statement=statement, source=source, of=of, where=where, experiment=experiment
        )
        return experiment

    return register


@dataclass(frozen=True, kw_only=True)
class Row:
    """A claim with its finding, or with what went wrong."""

    claim: Claim
    finding: Finding | None
    seconds: float
    problem: str = ""

    @property
    def verdict(self) -> str:
        """`holds`, `fails`, or `not checked` where the experiment broke."""
        if self.finding is None:
            return "not checked"
        return "holds" if self.finding.holds else "fails"

    def to_json(self) -> dict[str, Any]:
        """Plain values; numbers that are not finite as words."""
        found = self.finding
        return {
            "name": self.claim.name,
            "source": self.claim.source,
            "statement": self.claim.statement,
            "of": self.claim.of,
            "where": self.claim.where,
            "verdict": self.verdict,
            "seconds": self.seconds,
            **({"problem": self.problem} if self.problem else {}),
            **(
                {
                    "kind": found.kind,
                    "predicted": _number(found.predicted),
                    "measured": _number(found.measured),
                    "standard_error": _number(found.error),
                    "ratio": _number(found.ratio),
                    "tolerance": found.tolerance,
                    "note": found.note,
                }
                if found
                else {}
            ),
        }


def _number(value: float) -> float | str:
    return float(value) if np.isfinite(value) else str(value)


@dataclass(frozen=True, kw_only=True)
class Verification:
    """All rows, and how they were made."""

    rows: list[Row] = field(default_factory=list)
    effort: Effort = Effort()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "quick": self.effort.quick,
            "seed": self.effort.seed,
            "claims": [row.to_json() for row in self.rows],
        }


def chosen(words: Sequence[str] | None) -> list[Claim]:
    """The claims whose names contain any of these words, or all. Raises `InputError` for a word that none contains."""
    for word in words or ():
        if not any(word.lower() in name.lower() for name in CLAIMS):
            raise unknown_name("--only", word, CLAIMS, kind="claim")
    return [one for name, one in CLAIMS.items() if not words or any(w.lower() in name.lower() for w in words)]
