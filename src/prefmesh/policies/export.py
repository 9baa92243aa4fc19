"""A trained policy as others load it: a PEFT adapter or a full Hugging Face model."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from prefmesh.errors import InputError
from prefmesh.policies import lora, residual
from prefmesh.policies.base import Params, Policy
from prefmesh.policies.causal_lm import CausalLMPolicy
from prefmesh.policies.quiet import quiet


def save_policy(
    policy: CausalLMPolicy, row: Params, directory: Path, *, base: str, rank: int | None = None
) -> None:
    """Write one model `row` (1, ...) to `directory`, replacing it whole; `base` is where the frozen model was loaded from.

    LoRA: `adapter_config.json` and `adapter_model.safetensors`, as `peft` and vLLM load them. Full, and LoRA with residuals, which is
    merged: `config.json` and `model.safetensors`. The tokenizer goes along. `rank`: components of the adapter that are in use; none:
    all.
    """
    single = {name: tensor[0].detach().cpu() for name, tensor in (policy.frozen_factors | row).items()}

    def write(to: Path) -> None:
        if policy.residuals(row):
            _save_merged(policy, row, to)
        elif policy.train == "lora":
            settings = policy.lora_settings.of_rank(rank) if rank else policy.lora_settings
            config = lora.peft_config(policy.model, settings, policy.targets, base=base)
            config.save_pretrained(str(to))
            _sort_targets(to / "adapter_config.json")
            factors = lora.held(single, settings.r)
            save_file(lora.peft_state(factors), to / "adapter_model.safetensors", metadata={"format": "pt"})
        else:
            _save_full(policy, single, to)
        policy.tokenizer.save_pretrained(str(to))

    replace_directory(directory, write)


def save_tensors(row: Params, directory: Path) -> None:
    """Write a row (1, ...) of a policy that has no format of its own: `policy.safetensors`."""
    single = {name: tensor[0].detach().cpu().contiguous() for name, tensor in row.items()}
    replace_directory(directory, lambda to: save_file(single, to / "policy.safetensors"))


def replace_directory(directory: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new directory beside it, then put that in its place: never a half-written one."""
    part = directory.with_name(f"{directory.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write(part)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(part, directory)


def _sort_targets(path: Path) -> None:
    """PEFT writes its set of target modules in an order that differs between processes: make it one."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save_full(policy: CausalLMPolicy, single: Params, to: Path) -> None:
    """The frozen model's state with the trained weights in place; tied names stay out, as transformers ties them on loading."""
    state = policy.model.state_dict()
    trained = {state[name].data_ptr() for name in single}
    rest = {name: tensor for name, tensor in state.items() if tensor.data_ptr() not in trained}
    with quiet():
        policy.model.save_pretrained(str(to), state_dict=rest | single)


def _save_merged(policy: CausalLMPolicy, row: Params, to: Path) -> None:
    """The plain model, with all that was learned added to its layers."""
    with quiet():
        policy.model.save_pretrained(str(to), state_dict=residual.merged(policy.model, row))


def load_row(policy: Policy, directory: Path) -> Params:
    """The inverse of `save_policy` and `save_tensors`: one row (1, ...) of the same policy. Smaller ranks are padded with zeros; of a
    merged policy all is in R, and adapters are as at the start.

    Raises `InputError` for a directory whose tensors are not this policy's.
    """
    wanted = policy.initial(seed=0)
    if not isinstance(policy, CausalLMPolicy):
        files, name_of = ["policy.safetensors"], str
    elif policy.train == "lora" and not policy.residuals(wanted):
        files, name_of = ["adapter_model.safetensors"], lora.from_peft_name
    else:
        there = sorted(path.name for path in directory.glob("model*.safetensors"))
        files, name_of = there or ["model.safetensors"], str
    found: Params = {}
    for file in files:
        if not (directory / file).is_file():
            raise InputError(f"{directory / file}: no such file; allowed: a policy that prefmesh saved")
        found |= {name_of(name): tensor for name, tensor in load_file(directory / file).items()}
    if isinstance(policy, CausalLMPolicy) and policy.residuals(wanted):
        found = residual.parted(policy.model, found, wanted)
    elif isinstance(policy, CausalLMPolicy) and policy.train == "lora" and policy.lora_settings.ranks:
        most = policy.lora_settings.r
        found = {
            name: t if name in policy.frozen_factors else lora.padded(name, t, most)
            for name, t in found.items()
        }
    for name, tensor in wanted.items():
        if name not in found or found[name].shape != tensor.shape[1:]:
            has = tuple(found[name].shape) if name in found else "nothing"
            raise InputError(
                f"{directory}: {name}: found {has}; allowed: a tensor of shape {tuple(tensor.shape[1:])}"
            )
    for name, tensor in getattr(policy, "frozen_factors", {}).items():
        # An adapter of a smaller rank has the first rows of A.
        if name not in found or not torch.equal(found[name], tensor[0, : len(found[name])].cpu()):
            raise InputError(
                f"{directory}: {name}: found another frozen factor; allowed: that of this policy and seed"
            )
    return {name: found[name].unsqueeze(0).to(tensor) for name, tensor in wanted.items()}
