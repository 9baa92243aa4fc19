"""The same training written plainly: one model per agent, one sequence per forward pass, torch.optim, a dense W.

Shares with the package the encoded tokens and which pairs a step sees; nothing else.
"""

import copy
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from prefmesh.policies.base import Params
from prefmesh.preferences.tokens import TokenPairs
from tests import models, problems


def sequence_log_prob(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    """log pi(completion | prompt) in nats: no batch, no padding, no cache."""
    ids = torch.tensor([prompt + completion])
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    picked = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return picked[len(prompt) - 1 :].sum()


def margin(model: nn.Module, data: TokenPairs, row: int) -> Tensor:
    """log pi(y_w|x) - log pi(y_l|x)."""
    prompt = data.prompt[row]
    return sequence_log_prob(model, prompt, data.chosen[row]) - sequence_log_prob(
        model, prompt, data.rejected[row]
    )


def dpo_loss(
    model: nn.Module,
    reference: nn.Module,
    data: TokenPairs,
    rows: np.ndarray,
    weights: np.ndarray,
    beta: float,
) -> Tensor:
    """sum_j weights_j (-log sigmoid(beta h_j)); pairs of weight 0 are not looked at."""
    total = torch.zeros((), dtype=next(model.parameters()).dtype)
    for row, weight in zip(rows.tolist(), weights.tolist(), strict=True):
        if weight:
            with torch.no_grad():
                ref = margin(reference, data, row)
            total = total - weight * F.logsigmoid(beta * (margin(model, data, row) - ref))
    return total


def peft_model(row: Params, family: str, dtype: str) -> nn.Module:
    """PEFT's model with the adapter `row` (1, ...) of the package, on the same tiny base."""
    base = models.model(family, dtype=dtype)
    names = {name.rpartition(".")[0] for name in row}
    config = LoraConfig(
        r=problems.LORA.r,
        lora_alpha=int(problems.LORA.lora_alpha),
        lora_dropout=0.0,
        target_modules=sorted(names),
        fan_in_fan_out=family == "gpt2",
        task_type="CAUSAL_LM",
    )
    made = get_peft_model(base, config).to(getattr(torch, dtype)).eval()
    with torch.no_grad():
        for name, parameter in trained(made).items():
            parameter.copy_(row[name][0])
    assert set(trained(made)) == set(row)
    return made


def full_model(row: Params, family: str, dtype: str) -> nn.Module:
    """Plain transformers with all weights from `row` (1, ...)."""
    made = copy.deepcopy(models.model(family, dtype=dtype)).requires_grad_()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(row[name][0])
    return made


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimiser changes, under the package's names."""
    return {
        name.removeprefix("base_model.model.").removesuffix(".default.weight")
        if ".default." in name
        else name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def optimizer(kind: dict, model: nn.Module) -> torch.optim.Optimizer:
    """torch's own, with the same settings."""
    parameters = list(trained(model).values())
    if kind["name"] == "sgd":
        return torch.optim.SGD(parameters, lr=kind["lr"], momentum=kind.get("momentum", 0.0))
    return torch.optim.AdamW(parameters, lr=kind["lr"], weight_decay=kind.get("weight_decay", 0.0))


def stack(all_models: list[nn.Module]) -> Params:
    """Theta (agents, ...) of the agents' models."""
    each = [trained(model) for model in all_models]
    return {name: torch.stack([one[name].detach() for one in each]) for name in each[0]}


def rows_of(theta: Params) -> Iterator[Params]:
    """Theta's agents as rows (1, ...)."""
    for i in range(len(next(iter(theta.values())))):
        yield {name: tensor[i : i + 1] for name, tensor in theta.items()}
