"""The same mathematics in faster operations: what a loaded model is given before it is used.

On this side of a model's own code, so that any architecture made of `nn.Linear` or GPT-2's `Conv1D` gains.
"""

import os
from typing import Any

# torch and oneDNN keep a compiled product for each shape that they met, by default 1,024 of them, some 0.2 MB each. Batches
# of texts rarely repeat a shape, so a few serve as well (read at the first product; figures: benchmarks/README.md).
os.environ.setdefault("LRU_CACHE_CAPACITY", "32")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def quicken(model: nn.Module) -> None:
    """Swap layers, in place, for ones that compute the same (to rounding); parameters and their names stay.

    torch's own float32 products on a CPU go to MKL, which leaves AVX-512 unused on processors that are not Intel's;
    oneDNN, which torch carries too, takes what there is (`benchmarks/README.md` has figures). GPT-2's "new" GELU is
    written out in eight operations, each of which keeps its result for the backward pass.
    """
    for name, module in list(model.named_modules()):
        if type(module) in _FASTER and ONEDNN:
            module.__class__ = _FASTER[type(module)]
        elif type(module) is NewGELUActivation:
            model.set_submodule(name, nn.GELU(approximate="tanh"))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b with `weight` (out, in), by oneDNN where it serves these tensors."""
    if x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32:
        return nn.functional.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias)  # type: ignore[no-any-return]
    return _product(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """oneDNN's product has no derivative of its own in torch; it is two more such products.

    They are differentiable in their turn (Hessian-vector products go through here).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # A frozen weight needs no inputs kept.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _product(x, weight, bias)

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


HEAD_BLOCK_BYTES = 2**26
"""Logits at a time."""


def frozen_head_log_probs(
    hidden: Float[Tensor, "positions width"],
    weight: Float[Tensor, "vocabulary width"],
    bias: Float[Tensor, " vocabulary"] | None,
    targets: Int[Tensor, " positions"],
) -> Float[Tensor, " positions"]:
    """log softmax(W h + b)[target] in nats (at least in float32), differentiable in `hidden` alone.

    Logits exist for a block of positions at a time and none are kept: what the backward pass needs is a vector of
    `width` numbers a position, d log p(target) / d h = W[target] - sum_v p(v) W[v], and that is taken on the way.
    """
    return _HeadLogProbs.apply(hidden, weight, bias, targets)  # type: ignore[no-any-return]


class _HeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        precise = torch.promote_types(hidden.dtype, torch.float32)
        log_probs = hidden.new_empty(len(hidden), dtype=precise)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size = max(1, HEAD_BLOCK_BYTES // (weight.shape[0] * precise.itemsize))
        for start in range(0, len(hidden), size):
            here = slice(start, start + size)
            every = linear(hidden[here], weight, bias).log_softmax(1, dtype=precise)
            log_probs[here] = every.gather(1, targets[here, None])[:, 0]
            if slope is not None:
                slope[here] = _slope(every.exp_(), weight, targets[here])
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
            slope = _slope(probs, weight, targets)
        return (slope * gradients[0][:, None]).to(hidden.dtype), None, None, None


def _slope(probs: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """W[target] - sum_v p(v) W[v]."""
    return weight[targets] - linear(probs.to(weight.dtype), weight.t(), None)


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
