"""What is saved, loaded by plain peft and transformers: the same log-probabilities."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefmesh.errors import InputError
from prefmesh.policies.base import Params
from prefmesh.policies.causal_lm import CausalLMPolicy
from prefmesh.policies.export import load_row, save_policy
from prefmesh.policies.lora import LoraSettings
from tests import models, problems
from tests.equivalence import naive

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PAIRS = 5


def moved(policy: CausalLMPolicy) -> Params:
    """Parameters away from the reference in every number."""
    torch.manual_seed(0)
    return {name: t + 0.05 * torch.randn_like(t) for name, t in policy.initial(0).items()}


def log_probs(policy: CausalLMPolicy, row: Params) -> tuple[np.ndarray, object]:
    data = policy.encode(models.pairs(PAIRS))
    with torch.no_grad():
        both = policy.log_probs(row, data, np.arange(PAIRS)[None])
    return torch.stack(both, -1)[0].numpy(), data


def plain_log_probs(model: torch.nn.Module, data) -> np.ndarray:
    with torch.no_grad():
        return np.array(
            [
                [
                    float(naive.sequence_log_prob(model, data.prompt[i], side[i]))
                    for side in (data.chosen, data.rejected)
                ]
                for i in range(PAIRS)
            ]
        )


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gpt2", LoraSettings(r=3, lora_alpha=5)),
        ("gpt2", LoraSettings(r=2, target_modules="all-linear")),
        ("llama", LoraSettings(r=2, lora_alpha=7, use_rslora=True)),
        ("qwen2", LoraSettings(r=2, target_modules=["q_proj", "down_proj"])),
        ("llama", LoraSettings(r=2, target_modules=r".*layers\.1\..*(q_proj|up_proj)")),
    ],
    ids=["gpt2", "gpt2 all-linear", "llama rslora", "qwen2 by name", "llama by expression"],
)
def test_an_adapter_loads_with_plain_peft(family, settings, tmp_path) -> None:
    from peft import AutoPeftModelForCausalLM, PeftModel

    base = tmp_path / "base"
    models.model(family).save_pretrained(base)
    models.tokenizer().save_pretrained(base)
    policy = problems.causal_lm("lora", family, lora_settings=settings)
    row = moved(policy)
    expected, data = log_probs(policy, row)
    save_policy(policy, row, tmp_path / "policy", base=str(base))

    adapted = PeftModel.from_pretrained(models.model(family), tmp_path / "policy").eval()
    assert np.abs(plain_log_probs(adapted, data) - expected).max() <= 1e-5 * np.abs(expected).max()
    automatic = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    assert np.abs(plain_log_probs(automatic, data) - expected).max() <= 1e-5 * np.abs(expected).max()
    assert AutoTokenizer.from_pretrained(tmp_path / "policy")("w1 w2")["input_ids"] == [4, 5]
    # Away from the reference: an adapter that was not loaded at all would show.
    assert np.abs(plain_log_probs(models.model(family), data) - expected).max() > 0.01

    assert problems.apart(load_row(policy, tmp_path / "policy"), row) == 0


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_a_full_model_loads_with_plain_transformers(family, tmp_path) -> None:
    policy = problems.causal_lm("full", family)
    row = moved(policy)
    expected, data = log_probs(policy, row)
    before = plain_log_probs(models.model(family), data)
    save_policy(policy, row, tmp_path / "policy", base="unused")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    assert np.abs(plain_log_probs(loaded, data) - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(before - expected).max() > 0.01
    assert problems.apart(load_row(policy, tmp_path / "policy"), row) == 0
    # Saving left the frozen reference as it was (its layers go through other kernels: to rounding).
    assert np.abs(plain_log_probs(policy.model, data) - before).max() <= 1e-6 * np.abs(before).max()


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_adapters_with_residuals_are_saved_merged(family, tmp_path) -> None:
    """Plain transformers, and ourselves, read the model that was: all that was learned is in its weights."""
    settings = LoraSettings(r=2, lora_alpha=3, mixing="residual", target_modules="all-linear")
    policy = problems.causal_lm("lora", family, lora_settings=settings)
    row = moved(policy)
    expected, data = log_probs(policy, row)
    for part in (".lora_B", ".residual"):
        without = {name: tensor * (not name.endswith(part)) for name, tensor in row.items()}
        assert np.abs(log_probs(policy, without)[0] - expected).max() > 0.01
    save_policy(policy, row, tmp_path / "policy", base="unused")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    assert np.abs(plain_log_probs(loaded, data) - expected).max() <= 1e-5 * np.abs(expected).max()
    again = load_row(policy, tmp_path / "policy")
    assert list(again) == list(row)
    assert np.abs(log_probs(policy, again)[0] - expected).max() <= 1e-5 * np.abs(expected).max()
    other = problems.causal_lm("lora", family, lora_settings=LoraSettings(r=2))
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: no such file"):
        load_row(other, tmp_path / "policy")
    with pytest.raises(InputError, match=r"/model\.safetensors: no such file"):
        load_row(policy, tmp_path / "nowhere")


def test_a_row_of_another_policy_is_refused(tmp_path) -> None:
    narrow = problems.causal_lm("lora", lora_settings=LoraSettings(r=2))
    save_policy(narrow, narrow.initial(0), tmp_path / "policy", base="unused")
    wide = problems.causal_lm("lora", lora_settings=LoraSettings(r=3))
    with pytest.raises(InputError, match=r"lora_A: found \(2, 32\); allowed: a tensor of shape \(3, 32\)"):
        load_row(wide, tmp_path / "policy")
    with pytest.raises(InputError, match="no such file"):
        load_row(wide, tmp_path / "nowhere")
