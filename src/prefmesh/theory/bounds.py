"""What a bound says: its terms by name, and whether the step size is small enough for it to say anything."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class Condition:
    """`value` <= `limit`, in words `name`; both grow with the step size or stay."""

    name: str
    value: float
    limit: float

    @property
    def holds(self) -> bool:
        """Whether it is fulfilled."""
        return bool(self.value <= self.limit)


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A bound on (1/R) sum_r E||grad f(mean theta^r)||^2, r = 0..R-1. Its terms are fields; all inf where it does not hold."""

    optimisation: float
    noise: float
    drift: float
    consensus_error: float
    """A bound on (1/R) sum_r E e^r, e = (1/N) sum_i ||theta_i - mean||^2; 0 where all agents share one model."""
    lr: float
    largest_lr: float
    """The largest step size for which the bound is stated."""
    conditions: tuple[Condition, ...]

    TERMS: ClassVar[tuple[str, ...]]

    @property
    def terms(self) -> dict[str, float]:
        """Every term by name; their sum is `total`."""
        return {name: getattr(self, name) for name in self.TERMS}

    @property
    def total(self) -> float:
        """The bound."""
        return sum(self.terms.values())

    @property
    def holds(self) -> bool:
        """Whether the step size fulfils every condition."""
        return all(condition.holds for condition in self.conditions)

    @property
    def message(self) -> str:
        """One line: that it holds, or which conditions are violated and by how much."""
        if self.holds:
            return f"holds: lr {self.lr:.4g}, allowed up to {self.largest_lr:.4g}"
        broken = "; ".join(
            f"{c.name} is {c.value:.4g}, allowed up to {c.limit:.4g}" for c in self.conditions if not c.holds
        )
        return (
            f"no statement: lr {self.lr:.4g} is {self.lr / self.largest_lr:.3g} times the largest allowed, "
            f"{self.largest_lr:.4g} ({broken})"
        )


@dataclass(frozen=True, kw_only=True)
class FedDPOBound(Bound):
    """docs/theory, eq. (3.13)."""

    sampling: float
    staleness: float

    TERMS = ("optimisation", "noise", "sampling", "drift", "staleness")


@dataclass(frozen=True, kw_only=True)
class DecDPOBound(Bound):
    """docs/theory, eq. (4.10)."""

    consensus_noise: float
    consensus_heterogeneity: float

    TERMS = ("optimisation", "noise", "consensus_noise", "consensus_heterogeneity", "drift")


@dataclass(frozen=True, kw_only=True)
class Setting(ABC):
    """What a bound is stated for, apart from the step size and the number of rounds. Units as in `rates`."""

    smoothness: float
    delta: float
    noise: float
    heterogeneity: float
    agents: int
    local_steps: int = 1

    def __post_init__(self) -> None:
        positive("smoothness", self.smoothness)
        for name in ("delta", "noise", "heterogeneity"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: found {value}; allowed: a finite number from 0")
        for name in ("agents", "local_steps"):
            whole(name, getattr(self, name), 1)

    @abstractmethod
    def conditions(self, lr: float) -> tuple[Condition, ...]:
        """Every condition at this step size, as far as it can be computed."""

    @abstractmethod
    def parts(self, lr: float) -> tuple[float, dict[str, float]]:
        """u, where the term optimisation is u Delta / R, and the terms that stay however large R is.

        Asked only where the conditions hold.
        """

    @abstractmethod
    def bound(self, lr: float, rounds: int) -> Bound:
        """The bound after R = `rounds`. Raises `ValueError` for what is no step size or number of rounds."""

    def holds(self, lr: float) -> bool:
        """Whether every condition is fulfilled."""
        return all(c.holds for c in self.conditions(lr))

    def largest_lr(self) -> float:
        """The largest step size that fulfils every condition: all of them tighten as it grows."""
        return largest(self.holds, 1 / (self.smoothness * self.local_steps))

    def floor(self, lr: float) -> float:
        """What the bound does not fall below at this step size, however large R is."""
        return sum(self.parts(lr)[1].values())

    def terms(self, lr: float, rounds: int) -> dict[str, float]:
        """All terms by name; inf where the conditions do not hold."""
        if not self.holds(lr):
            return dict.fromkeys(("optimisation", *self.parts(self.largest_lr())[1]), math.inf)
        unit, rest = self.parts(lr)
        return {"optimisation": unit * self.delta / rounds, **rest}


@dataclass(frozen=True, kw_only=True)
class LocalSteps:
    """What E local steps bring into both bounds (docs/theory, eqs. 3.3 to 3.6), for one step size with x <= 1."""

    x: float
    """eta Lam E."""
    noise: float
    """nu >= 1: how the noise of a round exceeds that of E steps from one point."""
    drift_noise: float
    """What sigma^2 adds to Lam^2 (mean squared distance of the local iterates from their start)."""
    drift_gradient: float
    """d: what a unit of the mean squared gradient of the agents adds to it."""
    c: float
    """eta Lam (E - 1)."""

    @classmethod
    def of(cls, setting: Setting, lr: float) -> "LocalSteps":
        """At step size `lr`."""
        steps = setting.local_steps
        x, c = lr * setting.smoothness * steps, lr * setting.smoothness * (steps - 1)
        kappa = math.exp(2 * c) * (1 + 2 * c / 3)
        return cls(
            x=x,
            c=c,
            noise=1 + c * math.exp(c),
            drift_noise=kappa * c * lr * setting.smoothness * setting.noise / 2,
            drift_gradient=kappa * c * x * (2 * steps - 1) / (6 * steps),
        )


def largest(fulfilled: Callable[[float], bool], most: float) -> float:
    """The largest number up to `most` that is fulfilled, where all smaller ones are; from below, to rounding."""
    if fulfilled(most):
        return most
    low, high = 0.0, most
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if fulfilled(middle) else (low, middle)
    return low


def positive(name: str, value: float) -> None:
    """Raises `ValueError`."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: found {value}; allowed: a finite number above 0")


def whole(name: str, value: int, least: int, most: int | None = None) -> None:
    """Raises `ValueError`."""
    if int(value) != value or value < least or (most is not None and value > most):
        allowed = f"{least} to {most}" if most is not None else f"from {least}"
        raise ValueError(f"{name}: found {value!r}; allowed: a whole number {allowed}")
