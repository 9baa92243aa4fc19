"""Gradient checkpointing: of every layer only the input is kept, and the rest is computed once more in the backward pass.

transformers' own does not fit: stacked parameters are in place only while `functional_call` runs, and packed rows are read only
within a `Reader`; both are over when the backward pass begins. Here both are put back in place for it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from prefmesh.policies import packing
from prefmesh.policies.packing import Reader


def recompute(model: nn.Module, reader: Reader) -> int:
    """Make the model's layers keep nothing but their input, in place; how many layers there are."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.forward = _Forgetful(layer, reader)
    return len(layers)


class _Forgetful:
    """A layer's forward pass, under checkpointing where gradients are wanted."""

    def __init__(self, layer: nn.Module, reader: Reader):
        self.own: Callable[..., Any] = layer.forward
        self.layer, self.reader = layer, reader

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.own(*args, **kwargs)
        # Whatever is in the layer's places now: stacked factors, one agent's weights, the frozen ones.
        tensors = {f"layer.{name}": tensor for name, tensor in self._tensors()}
        body = _Body(self.layer, self.own)
        reading = packing.CURRENT.get()

        def again() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            return nullcontext(), self.reader(reading.packed) if reading else nullcontext()

        return checkpoint(
            lambda *inputs: functional_call(body, tensors, inputs, kwargs),
            *args,
            use_reentrant=False,
            context_fn=again,
            preserve_rng_state=False,  # nothing is drawn: dropout is off
        )

    def _tensors(self) -> list[tuple[str, torch.Tensor]]:
        return [*self.layer.named_parameters(), *self.layer.named_buffers()]


class _Body(nn.Module):
    """So that `functional_call` finds the layer's places, and not its forgetful forward."""

    def __init__(self, layer: nn.Module, own: Callable[..., Any]):
        super().__init__()
        self.layer, self.own = layer, own

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.own(*args, **kwargs)
