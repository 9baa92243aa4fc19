"""A stage of a chain: what it takes, what it sends on, and what it puts aside.

    reduce : values        ->  values sent on, numbers put aside
    restore: both of these ->  values, as the receiver reads them

The next stage reduces the values that were sent on; what is put aside (positions, codes, a seed) travels as it is.
A new one is a class under `@compressor("name")`, whose fields are its settings.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, TypeVar

from pydantic import model_serializer

from prefmesh.compression.layout import Layout, Params
from prefmesh.compression.seeds import Seeds
from prefmesh.errors import InputError
from prefmesh.settings import Settings


class Form(IntEnum):
    """What values are, the more can be done with them the higher: tensors with shapes, a vector, or scales of codes."""

    CODES = 0
    VECTOR = 1
    TENSORS = 2


@dataclass(frozen=True, slots=True)
class Digits:
    """`count` whole numbers from 0 below 2^`bits`, one after the other."""

    count: int
    bits: int

    @property
    def bytes(self) -> int:
        """What they take, filled up to a whole byte."""
        return (self.count * self.bits + 7) // 8


@dataclass(frozen=True, slots=True)
class Sent:
    """Of one agent: the `values` that are sent on, and the numbers that are put `aside`."""

    values: Layout
    aside: dict[str, Digits]


class Compressor(Settings):
    """One stage. All methods are pure; an agent's result depends on its own row and seed alone.

    (But for the rounding of sums: a library may add up in another order where there are more rows.)
    """

    name: ClassVar[str]
    """Under which it is registered."""
    takes: ClassVar[Form] = Form.VECTOR
    """The least that it can work on."""
    sends: ClassVar[Form]
    """What it sends on. After codes, a chain ends."""
    selects: ClassVar[bool] = False
    """Whether what is sent on are entries as they were, so that errors in them are orthogonal to what was left out."""

    @abstractmethod
    def sent(self, layout: Layout) -> Sent:
        """What `reduce` makes of values of this layout, known before there are any."""

    @abstractmethod
    def reduce(self, values: Params, seeds: Seeds) -> tuple[Params, Params]:
        """The values that are sent on, and the numbers that are put aside, each (agents, count); as `sent` says.

        Values that are not finite stay visible: what is restored is not finite either. `values` are not written to.
        """

    @abstractmethod
    def restore(self, values: Params, aside: Params, layout: Layout) -> Params:
        """C(x), of the shapes and types of `layout`, from what arrived alone."""

    def variance(self, layout: Layout) -> float | None:
        """omega in E C(x) = x, E||C(x) - x||^2 <= omega ||x||^2; none: it is biased."""
        return None

    def contraction(self, layout: Layout) -> float | None:
        """delta in E||C(x) - x||^2 <= (1 - delta) ||x||^2, 0 < delta <= 1, for every x; none: theory has none.

        Unbiased ones contract by 1 - omega where omega < 1. (Divided by 1 + omega all would, by 1 / (1 + omega):
        Richtárik et al. 2021. They are not divided here.)
        """
        omega = self.variance(layout)
        return 1 - omega if omega is not None and omega < 1 else None

    @model_serializer(mode="wrap")
    def _as_written(self, fields: Callable[[Any], dict[str, Any]]) -> str | dict[str, Any]:
        """The name alone where there are no settings."""
        options = fields(self)
        return {"name": self.name, **options} if options else self.name


COMPRESSORS: dict[str, type[Compressor]] = {}

C = TypeVar("C", bound=type[Compressor])


def compressor(name: str) -> Callable[[C], C]:
    """Register a stage under its name in the config. Raises `InputError` for a name that is taken."""

    def register(cls: C) -> C:
        if name in COMPRESSORS:
            raise InputError(f"compressor: the name {name!r} is taken")
        cls.name = name
        COMPRESSORS[name] = cls
        return cls

    return register
