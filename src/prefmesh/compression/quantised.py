"""Whole numbers instead of entries, rounded up or down at random so that the mean is right: QSGD's scheme.

Alistarh et al. 2017, Section 3.1, with each tensor's largest magnitude in place of its norm and s levels on each side:

    C(x)_i = (||x||_inf / s) xi_i,    xi_i = floor(y_i) or floor(y_i) + 1,    E xi_i = y_i = s x_i / ||x||_inf

An entry's variance is (||x||_inf / s)^2 p (1 - p), p being the fraction of y_i. As p (1 - p) <= 1/4 and <= |y_i|, and as
||x||_inf <= ||x||_2 and ||x||_1 <= sqrt(d) ||x||_2,

    E||C(x) - x||^2 <= omega ||x||^2,    omega = min(d / (4 s^2), sqrt(d) / s)

(their Lemma 3.1, less a factor of 4). It is a bound for the worst x, one large entry among small ones: for a tensor
of many entries omega >= 1 and no contraction is promised, though that of usual ones is far better.
"""

from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor

from prefmesh.compression.base import Compressor, Digits, Form, Sent, compressor
from prefmesh.compression.layout import Layout, Params, Spec, layout_of, rowwise, width, working
from prefmesh.compression.seeds import Seeds, uniform


class Quantised(Compressor):
    """Each entry in `bits` bits, and for each tensor a scale of 4 bytes, ||x||_inf in float32, rounded up.

    Of entries in less than float32 the receiver's own rounding to their type comes on top.
    """

    sends: ClassVar[Form] = Form.CODES
    bits: ClassVar[int]

    @property
    def levels(self) -> int:
        """s: numbers are -s ... s, which leaves one code unused."""
        return 2 ** (self.bits - 1) - 1

    def sent(self, layout: Layout) -> Sent:
        """Scales, and codes."""
        scales = {name: Spec((1,), torch.float32) for name in layout}
        return Sent(scales, {name: Digits(spec.numbers, self.bits) for name, spec in layout.items()})

    def reduce(self, values: Params, seeds: Seeds) -> tuple[Params, Params]:
        """A tensor that is not finite has a scale that is not: all of it is read as NaN."""
        scales, codes, place = {}, {}, 0
        drawn = torch.from_numpy(uniform(seeds, width(layout_of(values))))
        for name, tensor in values.items():
            flat = rowwise(tensor)
            flat = flat.to(working(flat.dtype))
            scales[name] = _at_least(flat.abs().amax(1, keepdim=True))
            y = flat / torch.where(scales[name] == 0, 1, scales[name]).to(flat.dtype) * self.levels
            y = torch.where(y.isfinite(), y, 0)
            down = y.floor()
            u = drawn[:, place : place + flat.shape[1]].to(flat)
            # Compared, not added: y + u may round up to the next whole number.
            codes[name] = (down + (u < y - down) + self.levels).to(torch.uint8)
            place += flat.shape[1]
        return scales, codes

    def restore(self, values: Params, aside: Params, layout: Layout) -> Params:
        """Codes times scales."""
        restored = {}
        for name, spec in layout.items():
            dtype = working(spec.dtype)
            y = aside[name].to(dtype) - self.levels
            flat = y * (values[name].to(dtype) / self.levels)
            restored[name] = flat.to(spec.dtype).reshape(len(flat), *spec.shape)
        return restored

    def variance(self, layout: Layout) -> float:
        """The largest omega of any tensor."""
        s = self.levels
        return max(min(spec.numbers / (4 * s**2), sqrt(spec.numbers) / s) for spec in layout.values())


def _at_least(scale: Tensor) -> Tensor:
    """In float32, rounded up."""
    near = scale.to(torch.float32)
    return torch.where(near.to(scale.dtype) < scale, near.nextafter(torch.full_like(near, torch.inf)), near)


@compressor("int8")
class Int8(Quantised):
    """s = 127: a byte for each entry. A contraction is promised for tensors of less than 64,516 entries."""

    bits: ClassVar[int] = 8


@compressor("int4")
class Int4(Quantised):
    """s = 7: half a byte for each entry. A contraction is promised for tensors of less than 196 entries."""

    bits: ClassVar[int] = 4
