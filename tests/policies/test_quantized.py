"""A base in 4 bits: the float model of its rounded weights, with adapters as ever."""

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from prefmesh.algorithms.gradients import Problem, loss_and_gradient
from prefmesh.config import ExperimentConfig
from prefmesh.errors import InputError
from prefmesh.objectives import ObjectiveSettings
from prefmesh.policies.causal_lm import CausalLMPolicy
from prefmesh.policies.export import save_policy
from prefmesh.policies.loading import load_policy
from prefmesh.policies.settings import CausalLMSettings
from tests import models, problems
from tests.runs import TINY

functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes: extra quantized")

# Llama's Linear layers, and GPT-2's Conv1D, whose weight lies the other way round.
FAMILIES = ["llama", "gpt2"]


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request, tmp_path_factory):
    where = tmp_path_factory.mktemp(request.param)
    models.model(request.param).save_pretrained(where)
    models.tokenizer().save_pretrained(where)
    return where


def policy(directory, *, in_4bit: bool, dtype: str = "float32") -> CausalLMPolicy:
    settings = CausalLMSettings(model=str(directory), load_in_4bit=in_4bit, lora=problems.LORA)
    found = load_policy(settings, device="cpu", dtype=dtype)
    assert isinstance(found, CausalLMPolicy)
    return found


def dequantized(directory, quantized: CausalLMPolicy) -> CausalLMPolicy:
    """In float32, with the weights that the 4-bit model stands for."""
    plain = policy(directory, in_4bit=False)
    changed = 0
    for name, parameter in quantized.model.named_parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            weight = functional.dequantize_4bit(parameter.data, state)
            layer = plain.model.get_submodule(name.removesuffix(".weight"))
            # Conv1D: (in, out).
            plain.model.get_parameter(name).data.copy_(weight.t() if isinstance(layer, Conv1D) else weight)
            changed += 1
    assert changed > 4
    return plain


def factors(on: CausalLMPolicy, agents: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(agents, *tensor.shape[1:], generator=generator) * 0.3
        for name, tensor in on.initial(0).items()
    }


def test_it_is_the_model_of_its_rounded_weights(directory) -> None:
    """Log-probabilities and every agent's gradients, agents of unequal lengths in one packed pass."""
    quantized = policy(directory, in_4bit=True)
    assert quantized.packs
    plain = dequantized(directory, quantized)
    data = plain.encode(models.pairs(6))
    theta, rows = factors(quantized, 2), np.arange(6).reshape(2, 3)
    weights = torch.full(rows.shape, 1 / 3)
    found = []
    for on in (quantized, plain):
        reference = torch.stack(on.reference_log_probs(data, np.arange(6)[None]), -1)[0]
        problem = Problem(policy=on, data=data, reference=reference, objective=ObjectiveSettings())
        losses, gradient, _ = loss_and_gradient(problem, theta, rows, weights)
        found.append((reference, losses, *gradient.values()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_frozen_layers_take_less_and_differ(directory) -> None:
    quantized, plain = (policy(directory, in_4bit=yes) for yes in (True, False))
    layers = [p for p in quantized.model.parameters() if p.dtype == torch.uint8]
    floats = [p for p in quantized.model.parameters() if p.dtype != torch.uint8]
    numbers = sum(p.numel() for p in plain.model.parameters()) - sum(p.numel() for p in floats)
    assert sum(p.numel() for p in layers) == numbers // 2  # two in a byte
    assert quantized.frozen_bytes == numbers // 2 + sum(p.nbytes for p in floats)
    assert quantized.fingerprint() != plain.fingerprint()
    assert all(t.dtype == torch.float32 for t in quantized.initial(0).values())


# PEFT asks for a name that transformers 5 deprecates.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_its_adapter_loads_on_the_float_model(directory, tmp_path) -> None:
    quantized = policy(directory, in_4bit=True)
    row = factors(quantized, 1)
    save_policy(quantized, row, tmp_path / "adapter", base=str(directory))
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(directory), str(tmp_path / "adapter")
    )
    ids = torch.arange(2, 12)[None]
    plain = policy(directory, in_4bit=False)
    with torch.no_grad():
        expected = plain._run(row, "forward", input_ids=ids).logits
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": {"train": "full"}}, "policy: load_in_4bit freezes the weights"),
        ({"runtime": {"dtype": "float64"}}, r"policy\.load_in_4bit: runtime\.dtype float64 found"),
    ],
)
def test_refusals(changes, message) -> None:
    raw = {**TINY, "policy": {"model": "builtin:tiny", "load_in_4bit": True, **changes.get("policy", {})}}

    def loaded() -> object:
        settings = ExperimentConfig.parse({**raw, "runtime": changes.get("runtime", {})})
        return load_policy(settings.policy, device="cpu", dtype=settings.runtime.dtype)

    with pytest.raises(InputError, match=message):
        loaded()


def test_without_the_library_it_is_refused(directory, monkeypatch) -> None:
    monkeypatch.setattr("prefmesh.policies.loading.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'prefmesh\[quantized\]'"):
        policy(directory, in_4bit=True)
