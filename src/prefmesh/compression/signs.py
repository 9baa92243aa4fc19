"""One bit for each entry: its sign, at the tensor's mean magnitude."""

from typing import ClassVar

import torch

from prefmesh.compression.base import Compressor, Digits, Form, Sent, compressor
from prefmesh.compression.layout import Layout, Params, Spec, rowwise, working
from prefmesh.compression.seeds import Seeds


@compressor("sign")
class Sign(Compressor):
    """C(x) = (||x||_1 / d) sign(x), for each tensor. Karimireddy et al. 2019, Lemma 8.

    With sign(0) = 1 too, ||C(x) - x||^2 = ||x||^2 - ||x||_1^2 / d, so delta = ||x||_1^2 / (d ||x||^2): 2/pi of a normal x,
    and 1/d in the worst case, of one entry that is not zero. Biased. Coded as d bits and a scale of 4 bytes.
    """

    sends: ClassVar[Form] = Form.CODES

    def sent(self, layout: Layout) -> Sent:
        """Scales, and bits."""
        scales = {name: Spec((1,), torch.float32) for name in layout}
        return Sent(scales, {name: Digits(spec.numbers, 1) for name, spec in layout.items()})

    def reduce(self, values: Params, seeds: Seeds) -> tuple[Params, Params]:
        """A tensor that is not finite has a scale that is not."""
        flat = {name: rowwise(tensor) for name, tensor in values.items()}
        # Added up in float64, and so the same in float32 in whatever order.
        scales = {
            name: x.abs().mean(1, keepdim=True, dtype=torch.float64).to(torch.float32)
            for name, x in flat.items()
        }
        return scales, {name: (x >= 0).to(torch.uint8) for name, x in flat.items()}

    def restore(self, values: Params, aside: Params, layout: Layout) -> Params:
        """Signs times scales."""
        restored = {}
        for name, spec in layout.items():
            flat = (2 * aside[name].to(working(spec.dtype)) - 1) * values[name]
            restored[name] = flat.to(spec.dtype).reshape(len(flat), *spec.shape)
        return restored

    def contraction(self, layout: Layout) -> float:
        """1/d of the largest tensor, the worst case."""
        return 1 / max(spec.numbers for spec in layout.values())
