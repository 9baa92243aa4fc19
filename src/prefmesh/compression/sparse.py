"""Few entries of an agent's vector, all of its tensors side by side: the largest ones, or any.

Both keep k = ceil(share d) of d entries as they are, at least one, and contract by delta = k / d.
"""

from fractions import Fraction
from math import ceil
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from prefmesh.compression.base import Compressor, Digits, Form, Sent, compressor
from prefmesh.compression.layout import Layout, Params, Spec, apart, common_dtype, side_by_side, width
from prefmesh.compression.seeds import Seeds, positions


def kept(share: float, of: int) -> int:
    """k: this share of `of` entries, rounded up; `share` is meant as the decimal number that it is written as.

    >>> kept(0.07, 100), kept(0.001, 100)
    (7, 1)
    """
    return ceil(Fraction(repr(share)) * of)


@compressor("top_k")
class TopK(Compressor):
    """The k entries of largest magnitude; of equal ones, the first. Stich et al. 2018, Def. 2.1 and 2.2.

    ||x - C(x)||^2 <= (1 - k/d) ||x||^2: those left out are the smallest d - k, below the average.
    Coded as the values in order and, whichever is less, a bitmap of d bits or k positions of ceil(log2 d) bits.
    """

    sends: ClassVar[Form] = Form.VECTOR
    selects: ClassVar[bool] = True

    share: float = Field(gt=0, le=1)
    """k/d, before rounding up."""

    def sent(self, layout: Layout) -> Sent:
        """k values, and where they were."""
        d = width(layout)
        k = kept(self.share, d)
        return Sent({"values": Spec((k,), common_dtype(layout))}, _where(k, d))

    def reduce(self, values: Params, seeds: Seeds) -> tuple[Params, Params]:
        """Numbers that are not finite count as the largest."""
        flat = side_by_side(values)
        agents, d = flat.shape
        k = kept(self.share, d)
        mask = largest(flat, k)
        index = mask.nonzero()[:, 1].reshape(agents, k)
        aside = {"positions": index} if "positions" in _where(k, d) else {"bitmap": mask.to(torch.uint8)}
        return {"values": flat.gather(1, index)}, aside

    def restore(self, values: Params, aside: Params, layout: Layout) -> Params:
        """Zero elsewhere."""
        sent = values["values"]
        flat = sent.new_zeros(len(sent), width(layout))
        if "positions" in aside:
            flat.scatter_(1, aside["positions"], sent)
        else:
            flat.masked_scatter_(aside["bitmap"].bool(), sent)
        return apart(flat, layout)

    def contraction(self, layout: Layout) -> float:
        """k/d."""
        d = width(layout)
        return kept(self.share, d) / d


def _where(k: int, d: int) -> dict[str, Digits]:
    """How it is said which k of d entries are meant: whatever is less."""
    places, bitmap = Digits(k, (d - 1).bit_length()), Digits(d, 1)
    return {"positions": places} if places.bytes < bitmap.bytes else {"bitmap": bitmap}


def largest(flat: Float[Tensor, "agents d"], k: int) -> Bool[Tensor, "agents d"]:
    """Where each row's k largest magnitudes are: exactly k, of equal ones the first; NaN counts as infinite."""
    size = flat.abs()
    size = torch.where(size.isnan(), torch.inf, size)
    least = size.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    mask = size >= least
    if bool((mask.sum(1) > k).any()):
        # The library's own choice among equal ones depends on the kernel, which depends on the number of rows.
        above = size > least
        equal = size == least
        room = k - above.sum(1, keepdim=True)
        mask = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= room))
    return mask


@compressor("random_k")
class RandomK(Compressor):
    """k entries, every choice of them equally likely. Stich et al. 2018, Def. 2.1 and 2.2.

    As they are, which is biased and contracts: E||x - C(x)||^2 = (1 - k/d) ||x||^2. `unbiased`: times d/k, so that
    E C(x) = x with omega = d/k - 1. Coded as the values and the seed of 8 bytes from which positions follow.
    """

    sends: ClassVar[Form] = Form.VECTOR
    selects: ClassVar[bool] = True

    share: float = Field(gt=0, le=1)
    """k/d, before rounding up."""
    unbiased: bool = False

    def sent(self, layout: Layout) -> Sent:
        """k values and a seed."""
        k = kept(self.share, width(layout))
        return Sent({"values": Spec((k,), common_dtype(layout))}, {"seed": Digits(1, 64)})

    def reduce(self, values: Params, seeds: Seeds) -> tuple[Params, Params]:
        """Where a vector is not finite anywhere, all that is sent of it is NaN: the entry itself may be left out."""
        flat = side_by_side(values)
        index = self._positions(seeds, flat)
        finite = flat.isfinite().all(1, keepdim=True)
        sent = torch.where(finite, flat.gather(1, index), torch.nan)
        seed = torch.tensor(list(seeds), dtype=torch.int64, device=flat.device)
        return {"values": sent}, {"seed": seed.reshape(-1, 1)}

    def restore(self, values: Params, aside: Params, layout: Layout) -> Params:
        """Zero elsewhere."""
        sent = values["values"]
        flat = sent.new_zeros(len(sent), width(layout))
        index = self._positions(aside["seed"].flatten().tolist(), flat)
        if self.unbiased:
            sent = sent * (flat.shape[1] / index.shape[1])
        return apart(flat.scatter_(1, index, sent), layout)

    def _positions(self, seeds: Seeds, flat: Float[Tensor, "agents d"]) -> Tensor:
        d = flat.shape[1]
        return torch.from_numpy(positions(seeds, d, kept(self.share, d))).to(flat.device)

    def variance(self, layout: Layout) -> float | None:
        """d/k - 1 of the unbiased version."""
        d = width(layout)
        return d / kept(self.share, d) - 1 if self.unbiased else None

    def contraction(self, layout: Layout) -> float | None:
        """k/d, unless it is unbiased."""
        d = width(layout)
        return super().contraction(layout) if self.unbiased else kept(self.share, d) / d
