"""The same mathematics in faster operations: what a loaded model is given before it is used.

On this side of a model's own code, so that any architecture made of `nn.Linear` or GPT-2's `Conv1D` gains.
"""

import math
import os
from typing import Any

# torch and oneDNN keep a compiled product for each shape that they met, by default 1,024 of them, some 0.2 MB each. Batches
# of texts rarely repeat a shape, so a few serve as well (read at the first product; figures: benchmarks/README.md).
os.environ.setdefault("LRU_CACHE_CAPACITY", "32")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.pytorch_utils import Conv1D

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether torch was built with oneDNN's product."""


def _intel() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return any(line.startswith("vendor_id") and "GenuineIntel" in line for line in file)
    except OSError:
        return False


PREFERRED = ONEDNN and not (torch.backends.mkl.is_available() and _intel())
"""Whether it is the faster one for float32: MKL leaves AVX-512 unused on processors that are not Intel's, and wins on Intel's
(figures: benchmarks/README.md). By the maker and not by trying, so that every run on a machine rounds alike."""


LEAST_PRODUCT = 5 * 10**7
"""Multiplications from which on oneDNN's product is worth making: for every number of rows that it has not met lately it compiles one,
some 0.5 ms, in which MKL has done as many (figures: benchmarks/README.md)."""


def quicken(model: nn.Module) -> None:
    """Swap layers, in place, for ones that compute the same (to rounding); parameters and their names stay.

    Linear layers take the faster of the two products that torch carries (`PREFERRED`). GPT-2's "new" GELU is written out in
    eight operations, each of which keeps its result for the backward pass.
    """
    for name, module in list(model.named_modules()):
        if type(module) in _FASTER and ONEDNN:
            module.__class__ = _FASTER[type(module)]
        elif type(module) in (NewGELUActivation, GELUTanh):
            model.set_submodule(name, GELU())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b with `weight` (out, in), by oneDNN where it serves these tensors and the product is large enough."""
    small = x.numel() * weight.shape[0] < LEAST_PRODUCT
    if small or not serves(x.device, x.dtype) or weight.dtype != x.dtype:
        return nn.functional.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias)  # type: ignore[no-any-return]
    return product(x, weight, bias)


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `product` is the faster one there."""
    return PREFERRED and device.type == "cpu" and dtype == torch.float32


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b by oneDNN, without a derivative."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """oneDNN's product has no derivative of its own in torch; it is two more such products.

    They are differentiable in their turn (Hessian-vector products go through here).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # A frozen weight needs no inputs kept.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        flat = gradient.flatten(0, -2)
        for_weight = None
        if needs_weight:
            # Laid out in memory as the weight is, which may be the transpose of one that is stored (in, out).
            a, b = flat.t(), x.flatten(0, -2).t()
            for_weight = linear(a, b, None) if weight.is_contiguous() else linear(b, a, None).t()
        return (
            linear(gradient, weight.t(), None) if needs_x else None,
            for_weight,
            flat.sum(0) if needs_bias else None,
        )


class GELU(nn.Module):
    """GELU's tanh form, x sigmoid(2 u), u = sqrt(2/pi) (x + 0.044715 x^3)."""

    def forward(self, x: Tensor) -> Tensor:
        """By the sigmoid on a CPU, where torch's takes a fifth of its tanh's time (figures: benchmarks/README.md)."""
        # Half precision would round between the operations.
        if x.device.type != "cpu" or x.dtype.itemsize < 4:
            return nn.functional.gelu(x, approximate="tanh")
        return _GELU.apply(x)  # type: ignore[no-any-return]


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        slope = 2 * math.sqrt(2 / math.pi)
        return (x * x).mul_(0.044715 * slope).add_(slope).mul_(x).sigmoid_().mul_(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # type: ignore[override]
        return torch.ops.aten.gelu_backward(gradients[0], ctx.saved_tensors[0], approximate="tanh")


def low_rank(
    x: Float[Tensor, "agents rows in"],
    a: Float[Tensor, "agents r in"],
    b: Float[Tensor, "agents out r"],
    scale: Float[Tensor, "agents 1 rows"] | float,
    onto: Float[Tensor, "agents rows out"] | None = None,
) -> Float[Tensor, "agents rows out"]:
    """`onto` + scale x A^T B^T of every agent.

    The narrow side of each product and of its derivatives stands where BLAS is fast: r numbers a row would fill no vector register.
    """
    return _LowRank.apply(x, a, b, scale, onto)  # type: ignore[no-any-return]


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, scale: Tensor | float, onto: Tensor | None
    ) -> Tensor:
        low = torch.bmm(a, x.mT).mul_(scale)
        ctx.scale = scale
        ctx.save_for_backward(x, a, b, low)
        return torch.bmm(low.mT, b.mT) if onto is None else torch.baddbmm(onto, low.mT, b.mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = gradients
        x, a, b, low = ctx.saved_tensors
        if torch.is_grad_enabled():
            # This gradient will be differentiated itself: autograd must see what `low` depends on.
            low = torch.bmm(a, x.mT) * ctx.scale
        needs_x, needs_a, needs_b, _, needs_onto = ctx.needs_input_grad
        inner = torch.bmm(b.mT, gradient.mT) * ctx.scale
        return (
            torch.bmm(inner.mT, a) if needs_x else None,
            torch.bmm(inner, x) if needs_a else None,
            torch.bmm(low, gradient).mT if needs_b else None,
            None,
            gradient if needs_onto else None,
        )


HEAD_TOKENS = 4096
"""Columns of logits at a time: few enough that they stay in a processor's cache while they are used."""
HEAD_POSITIONS = 4096
"""Rows of logits at a time."""


def frozen_head_log_probs(
    hidden: Float[Tensor, "positions width"],
    weight: Float[Tensor, "vocabulary width"],
    bias: Float[Tensor, " vocabulary"] | None,
    targets: Int[Tensor, " positions"],
) -> Float[Tensor, " positions"]:
    """log softmax(W h + b)[target] in nats (at least in float32), differentiable in `hidden` alone.

    Logits exist for a block of positions and of the vocabulary at a time, and none are kept: what the backward pass needs is a
    vector of `width` numbers a position, d log p(target) / d h = W[target] - sum_v p(v) W[v], and that is taken on the way, the
    sums over the vocabulary being rescaled when the blocks are joined (as in Milakov and Gimelshein 2018).
    """
    return _HeadLogProbs.apply(hidden, weight, bias, targets)  # type: ignore[no-any-return]


class _HeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        precise = torch.promote_types(hidden.dtype, torch.float32)
        log_probs = hidden.new_empty(len(hidden), dtype=precise)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), HEAD_POSITIONS):
            here = slice(start, start + HEAD_POSITIONS)
            log_probs[here], mean = _over_vocabulary(
                hidden[here], weight, bias, targets[here], precise, slope is not None
            )
            if slope is not None:
                slope[here] = weight[targets[here]] - mean
        ctx.save_for_backward(hidden, weight, bias, targets, slope)
        return log_probs

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, None, None, None]:
        hidden, weight, bias, targets, slope = ctx.saved_tensors
        if torch.is_grad_enabled():
            # This gradient will be differentiated itself: take it where autograd sees how it depends on `hidden`.
            probs = linear(hidden, weight, bias).softmax(1, dtype=gradients[0].dtype)
            slope = weight[targets] - linear(probs.to(weight.dtype), weight.t(), None)
        return (slope * gradients[0][:, None]).to(hidden.dtype), None, None, None


def _over_vocabulary(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    precise: torch.dtype,
    with_mean: bool,
) -> tuple[Tensor, Tensor]:
    """log p(target) (positions,) and sum_v p(v) W[v] (positions, width; empty unless asked for), in one pass."""
    top = hidden.new_full((len(hidden),), -torch.inf, dtype=precise)
    sums, target = torch.zeros_like(top), torch.zeros_like(top)
    mean = hidden.new_zeros((len(hidden), hidden.shape[1] if with_mean else 0), dtype=precise)
    for start in range(0, len(weight), HEAD_TOKENS):
        block = weight[start : start + HEAD_TOKENS]
        logits = linear(hidden, block, None if bias is None else bias[start : start + HEAD_TOKENS]).to(
            precise
        )
        column = (targets - start).clamp(0, len(block) - 1)
        target = torch.where(column == targets - start, logits.gather(1, column[:, None])[:, 0], target)
        above = torch.maximum(top, logits.amax(1))
        before, weights = (top - above).exp_(), logits.sub_(above[:, None]).exp_()
        sums = sums * before + weights.sum(1)
        if with_mean:
            mean.mul_(before[:, None]).add_(linear(weights.to(weight.dtype), block.t(), None))
        top = above
    return target - top - sums.log(), mean.div_(sums[:, None])


class OneDNNLinear(nn.Linear):
    """`nn.Linear`, by oneDNN."""

    def forward(self, input: Tensor) -> Tensor:
        """x W^T + b."""
        return linear(input, self.weight, self.bias)


class OneDNNConv1D(Conv1D):
    """GPT-2's linear layer, whose weight is (in, out), by oneDNN."""

    def forward(self, x: Tensor) -> Tensor:
        """x W + b."""
        return linear(x, self.weight.t(), self.bias)


_FASTER: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: OneDNNLinear, Conv1D: OneDNNConv1D}
