"""Two ways of doing the same work, in turn, in one process: medians and ratios of runs that stood next to each other."""

import statistics
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from prefmesh.bench.ours import Timed


@runtime_checkable
class Contestant(Protocol):
    """Whoever does an experiment's rounds."""

    def rounds(self, first: int, count: int) -> Timed:
        """Do rounds `first` (from 1) and so on."""
        ...


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """So many `turns` of each, after one that warms up; so many `rounds` a turn."""

    turns: int
    rounds: int

    @property
    def total(self) -> int:
        """Rounds that each contestant does, the first turn included."""
        return self.rounds * (self.turns + 1)


def alone(ours: Contestant, schedule: Schedule) -> list[Timed]:
    """The turns of one, without the first."""
    starts = range(1, schedule.total + 1, schedule.rounds)
    return [ours.rounds(first, schedule.rounds) for first in starts][1:]


def against(ours: Contestant, theirs: Contestant, schedule: Schedule) -> dict[str, Any]:
    """Seconds a round of both (medians over turns of medians within one), and the median of the turns' ratios.

    `losses_apart`: the largest difference of a loss in the first turn, in which both began at the same parameters and saw the
    same pairs in the same order.
    """
    runs: list[dict[str, float]] = []
    apart = 0.0
    for first in range(1, schedule.total + 1, schedule.rounds):
        mine, other = ours.rounds(first, schedule.rounds), theirs.rounds(first, schedule.rounds)
        if first == 1:
            apart = max(abs(a - b) for a, b in zip(mine.losses, other.losses, strict=True))
        else:
            runs.append({"ours": statistics.median(mine.seconds), "theirs": statistics.median(other.seconds)})
    return {
        "ratio": statistics.median(run["theirs"] / run["ours"] for run in runs),
        "ours": statistics.median(run["ours"] for run in runs),
        "theirs": statistics.median(run["theirs"] for run in runs),
        "runs": runs,
        "losses_apart": apart,
    }
