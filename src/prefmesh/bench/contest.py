"""Two ways of doing the same work, in turn, in one process: medians and ratios of runs that stood next to each other."""

import statistics
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """Of each round: seconds and the mean loss of its steps; `parts`: what the seconds went into, where that is known."""

    seconds: list[float]
    losses: list[float]
    parts: dict[str, list[float]] = field(default_factory=dict)


@runtime_checkable
class Contestant(Protocol):
    """Whoever does an experiment's rounds."""

    def rounds(self, first: int, count: int) -> Timed:
        """Do rounds `first` (from 1) and so on."""
        ...


class RoundByRound(ABC):
    """A contestant whose rounds are timed one by one, until `device` has done what it was told."""

    device: torch.device

    @abstractmethod
    def round(self, round_: int) -> float:
        """Do one round; the mean loss of its steps."""

    def rounds(self, first: int, count: int) -> Timed:
        """Go on with rounds `first` and so on."""
        seconds, losses = [], []
        for round_ in range(first, first + count):
            started = time.perf_counter()
            losses.append(self.round(round_))
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds.append(time.perf_counter() - started)
        return Timed(seconds=seconds, losses=losses)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """So many `turns` of each, after one that warms up; so many `rounds` a turn."""

    turns: int
    rounds: int

    @property
    def starts(self) -> range:
        """The round that each turn begins with."""
        return range(1, self.total + 1, self.rounds)

    @property
    def total(self) -> int:
        """Rounds that each contestant does, the first turn included."""
        return self.rounds * (self.turns + 1)


def alone(ours: Contestant, schedule: Schedule) -> list[Timed]:
    """The turns of one, without the first."""
    return [ours.rounds(first, schedule.rounds) for first in schedule.starts][1:]


def against(ours: Contestant, theirs: Contestant, schedule: Schedule) -> dict[str, Any]:
    """Seconds a round of both (medians over turns of medians within one), and the median of the turns' ratios.

    The rival's `parts` stand beside them under their own names, likewise medians. `losses_apart`: the largest difference of
    a loss in the first turn, in which both began at the same parameters and saw the same pairs in the same order.
    """
    both = [
        (ours.rounds(first, schedule.rounds), theirs.rounds(first, schedule.rounds))
        for first in schedule.starts
    ]
    mine, other = both[0]
    runs = [
        {"ours": statistics.median(a.seconds), "theirs": statistics.median(b.seconds)} for a, b in both[1:]
    ]
    parts = {
        name: statistics.median(statistics.median(b.parts[name]) for _, b in both[1:]) for name in other.parts
    }
    return {
        "ratio": statistics.median(run["theirs"] / run["ours"] for run in runs),
        "ours": statistics.median(run["ours"] for run in runs),
        "theirs": statistics.median(run["theirs"] for run in runs),
        **parts,
        "runs": runs,
        "losses_apart": max(abs(a - b) for a, b in zip(mine.losses, other.losses, strict=True)),
    }
