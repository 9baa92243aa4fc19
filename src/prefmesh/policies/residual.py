"""What is folded into frozen layers beside adapters, for `policy.lora.mixing: residual` (FedEx-LoRA; see `mesh/residual.py`).

A layer's weight is W + scaling R in every pass but the reference's. R, (1, out, in) of each layer and one for all agents, is in Theta, so
that it is kept, resumed and evaluated as parameters are; nobody trains it.
"""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prefmesh.errors import InputError
from prefmesh.policies.base import Params
from prefmesh.policies.lora import StackedLoRA

END = ".residual"


def residuals(params: Params) -> Params:
    """R of every layer among these."""
    return {name: tensor for name, tensor in params.items() if name.endswith(END)}


def check(model: nn.Module, targets: list[str]) -> None:
    """Raise `InputError` for frozen weights whose rounding would lose what is added to them."""
    for name in targets:
        _, weight = _layer(model, name)
        if not weight.is_floating_point() or weight.dtype.itemsize < 4:
            kind = str(weight.dtype).removeprefix("torch.")
            raise InputError(
                f"policy.lora.mixing: residual, but the frozen weight of {name} is of {kind}, which would round away what is added to it; "
                "allowed: runtime.dtype float32 or float64 without load_in_4bit, or another mixing"
            )


def initial(model: nn.Module, targets: list[str]) -> Params:
    """R = 0, of the type of W."""
    found = {}
    for name in targets:
        layer, weight = _layer(model, name)
        found[name + END] = weight.new_zeros(1, layer.out_features, layer.in_features)
    return found


def folded_bytes(model: nn.Module, targets: list[str]) -> int:
    """What all W + scaling R take."""
    return sum(_layer(model, name)[1].nbytes for name in targets)


def folded(model: nn.Module, params: Params) -> Params:
    """`params` with W + scaling R, under the name of W, in place of R (agents, out, in), whose rows are one."""
    found = {}
    for name, tensor in params.items():
        if name.endswith(END):
            layer, weight = _layer(model, target := name.removesuffix(END))
            found[f"{target}.base.weight"] = torch.add(weight, _as(layer, tensor[0]), alpha=layer.scaling)
        else:
            found[name] = tensor
    return found


def merged(model: nn.Module, row: Params) -> dict[str, Tensor]:
    """All tensors of the plain model, by its names, with W + scaling (R + B A) in place of W. `row` (1, ...)."""
    inner = {f"{name.removesuffix(END)}.base.": f"{name.removesuffix(END)}." for name in residuals(row)}
    found = {}
    for name, tensor in model.state_dict().items():
        layer = next((layer for layer in inner if name.startswith(layer)), "")
        found[name.replace(layer, inner[layer], 1) if layer else name] = tensor
    for name in residuals(row):
        layer, weight = _layer(model, target := name.removesuffix(END))
        update = (
            row[name][0].double() + row[f"{target}.lora_B"][0].double() @ row[f"{target}.lora_A"][0].double()
        )
        found[f"{target}.weight"] = (weight.double() + layer.scaling * _as(layer, update)).to(weight.dtype)
    return found


def parted(model: nn.Module, weights: dict[str, Tensor], wanted: Params) -> dict[str, Tensor]:
    """The inverse of `merged`, as far as there is one: R holds all, and factors are those of `wanted` (1, ...), whose B is zero.

    What `weights` lacks is left out, and what is of another shape is left as it is. No axis of agents.
    """
    found = {name: tensor[0] for name, tensor in wanted.items() if not name.endswith(END)}
    for name in residuals(wanted):
        layer, base = _layer(model, target := name.removesuffix(END))
        weight = weights.get(f"{target}.weight")
        if weight is not None and weight.shape == base.shape:
            found[name] = _as(layer, (weight.to(base.device).double() - base.double()) / layer.scaling)
        elif weight is not None:
            found[name] = weight
    return found


def _layer(model: nn.Module, name: str) -> tuple[StackedLoRA, Tensor]:
    """An adapted layer, and W as it keeps it."""
    layer = model.get_submodule(name)
    assert isinstance(layer, StackedLoRA)
    return layer, layer.base.get_parameter("weight")


def _as(layer: StackedLoRA, matrix: Tensor) -> Tensor:
    """Between (out, in) and how W is kept, which in GPT-2 is (in, out)."""
    return matrix.mT if isinstance(layer.base, Conv1D) else matrix
