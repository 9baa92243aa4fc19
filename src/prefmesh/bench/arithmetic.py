"""How much arithmetic a step of DPO needs, by formula, and how much a pass does, by counting.

Needed, in floating point operations (a multiplication and an addition are two), for T tokens that the model reads once (a
prompt and both completions, each without its last token) and P tokens that are predicted:

    every linear layer    2 in out T forward; as much again for the gradient of its input where that depends on something
                          trained; as much again for the gradient of its weight where that is trained
    adapter of rank r     3 * 2 r (in + out) T
    attention, a layer    4 heads head_dim V forward and twice that backward, V = the sum over tokens of how many they see
    the head              2 width vocabulary P forward, and the same for the gradient of its input (and of its weight)

Norms, activations, softmax and the optimiser are left out: they multiply no matrices. Dense models only.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prefmesh.policies.base import Params
from prefmesh.policies.causal_lm import CausalLMPolicy
from prefmesh.policies.lora import StackedLoRA, features
from prefmesh.preferences.tokens import Ragged, TokenPairs


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """Operations per token read, per pair (query, key) of attention, and per token predicted, forward and backward."""

    token: float | int
    seen: float | int
    predicted: float | int

    @classmethod
    def of(cls, policy: CausalLMPolicy, row: Params) -> "Arithmetic":
        """Of a training step from `row` (1, ...)."""
        model = policy.model
        head: Any = model.get_output_embeddings()
        full = policy.train == "full"
        differentiated = _with_gradient(policy, row)
        each = 0.0
        for name, module in _linear(model):
            if module is not head:
                each += 2 * _size(module) * (1 + (name in differentiated) + full)
        for name in policy.targets:
            layer = model.get_submodule(name)
            assert isinstance(layer, StackedLoRA)
            each += 6 * layer.lora_A.shape[1] * (layer.in_features + layer.out_features)
        config = model.config.get_text_config()
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        attention = 12 * config.num_hidden_layers * config.num_attention_heads * width
        return cls(token=each, seen=attention, predicted=2 * head.weight.numel() * (2 + full))

    def needed(self, data: TokenPairs, rows: Int[np.ndarray, " pairs"]) -> float | int:
        """Operations of a step on these pairs."""
        tokens = seen = predicted = 0
        for i in rows.tolist():
            prompt, completions = len(data.prompt[i]), (len(data.chosen[i]), len(data.rejected[i]))
            tokens += prompt + sum(completions) - 2
            # The token at position t sees t + 1, itself included; completions begin where the prompt ended.
            seen += prompt * (prompt + 1) // 2
            seen += sum((c - 1) * prompt + (c - 1) * c // 2 for c in completions)
            predicted += sum(completions)
        return self.token * tokens + self.seen * seen + self.predicted * predicted


def _linear(model: nn.Module) -> list[tuple[str, nn.Module]]:
    from transformers.pytorch_utils import Conv1D

    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]


def _size(module: nn.Module) -> int:
    """Of its weight, which a quantised layer holds in fewer numbers."""
    return math.prod(features(module))


def _with_gradient(policy: CausalLMPolicy, row: Params) -> set[str]:
    """Layers whose input depends on something trained, as autograd sees it in a small pass."""
    found: set[str] = set()

    def noting(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def note(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if inputs[0].requires_grad:
                found.add(name)

        return note

    hooks = [module.register_forward_pre_hook(noting(name)) for name, module in _linear(policy.model)]
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in row.items()}
    try:
        policy.log_probs(
            leaves, TokenPairs(Ragged.of([[1, 2]]), Ragged.of([[3, 4]]), Ragged.of([[5, 6]])), np.array([[0]])
        )
    finally:
        for hook in hooks:
            hook.remove()
    return found


def done(work: Callable[[], object]) -> float | int:
    """Floating point operations of the matrix products that `work()` makes, counted by torch."""
    known = {}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # what torch's counter does not know of CPUs
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        known = {
            torch.ops.mkldnn._linear_pointwise: _product,
            attention: _attention,
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        }
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        work()
    return float(counter.get_total_flops())


Shape = Sequence[int]


def _product(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Scores and what they weigh, of all padded places."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward(gradient: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """The scores once more, and two products for each of the two."""
    return 2 * math.prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])
