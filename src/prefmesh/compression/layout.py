"""Shapes and types of one agent's tensors, from which alone follows what a message costs; tensors laid side by side."""

from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

Params = dict[str, Tensor]
"""Named tensors, each with a leading axis of agents."""


@dataclass(frozen=True, slots=True)
class Spec:
    """One agent's tensor: `shape` without the axis of agents."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numbers(self) -> int:
        """How many entries it has."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """What it takes as it is."""
        return self.numbers * self.dtype.itemsize


Layout = dict[str, Spec]
"""Of named tensors, in their order."""


def layout_of(params: Params) -> Layout:
    """Of one agent's row of `params`, whose values are not looked at (tensors on torch's `meta` device will do)."""
    return {name: Spec(tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in params.items()}


def agents_of(params: Params) -> int:
    """How many rows there are."""
    return next(iter(params.values())).shape[0]


def width(layout: Layout) -> int:
    """d: all entries of one agent."""
    return sum(spec.numbers for spec in layout.values())


def rowwise(tensor: Tensor) -> Float[Tensor, "agents numbers"]:
    """A vector for each agent."""
    return tensor.reshape(tensor.shape[0], prod(tensor.shape[1:]))


def side_by_side(params: Params) -> Float[Tensor, "agents d"]:
    """All of an agent's tensors as one vector."""
    return torch.cat([rowwise(tensor) for tensor in params.values()], dim=1)


def common_dtype(layout: Layout) -> torch.dtype:
    """Of that vector: the one to which all are promoted."""
    dtypes = [spec.dtype for spec in layout.values()]
    common = dtypes[0]
    for dtype in dtypes[1:]:
        common = torch.promote_types(common, dtype)
    return common


def apart(flat: Float[Tensor, "agents d"], layout: Layout) -> Params:
    """The inverse of `side_by_side`."""
    parts = flat.split([spec.numbers for spec in layout.values()], dim=1)
    return {
        name: part.to(spec.dtype).reshape(len(flat), *spec.shape)
        for (name, spec), part in zip(layout.items(), parts, strict=True)
    }


def working(dtype: torch.dtype) -> torch.dtype:
    """In which precision to compute with entries of this type: in float32 at least."""
    return torch.promote_types(dtype, torch.float32)
