"""The experiment's model as transformers and PEFT give it, for those who do not use our passes."""

import warnings
from typing import Any

import torch
from torch import nn

from prefmesh.algorithms.methods.base import Method
from prefmesh.algorithms.methods.fed_dpo import FedDPO
from prefmesh.errors import InputError
from prefmesh.experiment import Experiment
from prefmesh.policies import lora
from prefmesh.policies.causal_lm import CausalLMPolicy
from prefmesh.policies.loading import model_source
from prefmesh.policies.quiet import quiet


def language_model(experiment: Experiment) -> CausalLMPolicy:
    """The policy. Raises `InputError` where it is no language model."""
    policy = experiment.policy
    if not isinstance(policy, CausalLMPolicy):
        raise InputError("--against: policy.model log_linear found; allowed: a language model")
    if experiment.config.policy.load_in_4bit:  # type: ignore[union-attr]
        raise InputError("--against: policy.load_in_4bit found; allowed: false")
    return policy


def sits_out(method: Method) -> bool:
    """Whether some agent skips a round or begins it from an older model, which no rival does."""
    return isinstance(method, FedDPO) and bool(
        method.settings.staleness or len(method.participants(1)) < method.agents
    )


def plain_model(experiment: Experiment, *, adapter: bool) -> nn.Module:
    """Loaded anew, without dropout; with `adapter`, PEFT's, started at the same factors as ours."""
    from transformers import AutoModelForCausalLM

    policy = language_model(experiment)
    source = model_source(experiment.config.policy.model)
    with quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=policy.dtype)
    model = without_dropout(loaded.to(policy.device))
    if not adapter:
        return model
    from peft import get_peft_model

    config = lora.peft_config(policy.model, policy.lora_settings, policy.targets, base=source)
    config.inference_mode = False
    with warnings.catch_warnings():
        # PEFT asks for a name that transformers 5 deprecates.
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = get_peft_model(model, config)  # type: ignore[arg-type]
    start_adapter(wrapped, experiment)
    return wrapped.eval()


def start_adapter(wrapped: nn.Module, experiment: Experiment) -> None:
    """Give PEFT's factors the values that ours start with. Raises where the two adapt other layers."""
    given = lora.peft_state({name: tensor[0] for name, tensor in experiment.start.items()})
    own = {name.replace(".default", ""): p for name, p in wrapped.named_parameters() if "lora_" in name}
    if own.keys() != given.keys():
        raise RuntimeError(f"PEFT adapts other layers: {sorted(own.keys() ^ given.keys())[:3]}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(given[name])


def without_dropout(model: nn.Module) -> nn.Module:
    """Policy and reference must not differ by chance; trainers that call `train()` would bring dropout back."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()
