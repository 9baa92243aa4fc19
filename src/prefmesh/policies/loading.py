"""From a config's words to a policy."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from prefmesh.errors import InputError
from prefmesh.policies import builtin
from prefmesh.policies.base import Policy
from prefmesh.policies.causal_lm import CausalLMPolicy
from prefmesh.policies.features import hashed_ngrams
from prefmesh.policies.log_linear import LogLinearPolicy
from prefmesh.policies.quiet import quiet
from prefmesh.policies.settings import CausalLMSettings, LogLinearSettings, PolicySettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_policy(
    settings: PolicySettings, *, device: str, dtype: str, checkpointing: bool = False, seed: int = 0
) -> Policy:
    """Build the policy; `device` is torch's name, `dtype` the precision of the frozen model, the rest as in `CausalLMPolicy`.

    Raises `InputError` for a model that is not there, has no tokenizer, or that no LoRA target matches.
    """
    if isinstance(settings, LogLinearSettings):
        return LogLinearPolicy(_features(settings), dtype=getattr(torch, dtype), device=device)
    source = model_source(settings.model)
    model, tokenizer = _load(source, settings, dtype, device)
    return CausalLMPolicy(
        model,
        tokenizer,
        train=settings.train,
        lora_settings=settings.lora,
        max_length=settings.max_length,
        checkpointing=checkpointing,
        seed=seed,
    )


def model_source(model: str) -> str:
    """The directory or hub id behind a config's `policy.model`."""
    kind, _, name = model.partition(":")
    if kind == "builtin" and name:
        return str(builtin.path(name))
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(
                f"policy.model: {model}: found a directory without config.json; allowed: a Hugging Face model directory"
            )
        if not any((path / file).is_file() for file in TOKENIZER_FILES):
            raise InputError(
                f"policy.model: {model}: found a model directory without tokenizer; allowed: one of {', '.join(TOKENIZER_FILES)} in it"
            )
        return str(path.resolve())
    if path.is_file() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise InputError(
            f"policy.model: {model}: no such directory; allowed: builtin:tiny, a model directory, or a hub id"
        )
    return model


def _load(
    source: str, settings: CausalLMSettings, dtype: str, device: str
) -> "tuple[Any, PreTrainedTokenizerBase]":
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = _in_4bit(dtype, device) if settings.load_in_4bit else {}
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=getattr(torch, dtype), output_loading_info=True, **options
            )
            model, found = loaded
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"policy.model: {settings.model}: could not be loaded ({first})") from error
    if missing := sorted(found["missing_keys"]):
        # transformers would draw them at random: a reference that nobody trained.
        raise InputError(
            f"policy.model: {settings.model}: {len(missing)} of its weights are not there ({missing[0]}{', ...' if missing[1:] else ''}); "
            "allowed: a model with all of them"
        )
    if not options:
        return model.to(device), tokenizer
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with AVX512-BF16 a pass without gradients would pack the weights anew, in a way that later ones with
            # gradients misread.
            module.support_avx512bf16_for_cpu = False
    return model, tokenizer


def _in_4bit(dtype: str, device: str) -> dict[str, Any]:
    """What transformers is told so that linear layers are quantised while they are read, but for the head."""
    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise InputError(
            "policy.load_in_4bit: bitsandbytes is not installed; allowed: pip install 'prefmesh[quantized]'"
        )
    if dtype == "float64":
        raise InputError("policy.load_in_4bit: runtime.dtype float64 found; allowed: bfloat16, float32")
    # NF4 with quantised scales: what QLoRA (Dettmers et al. 2023) trains on.
    wanted = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    return {"quantization_config": wanted, "device_map": device}


def _features(settings: LogLinearSettings) -> Any:
    if settings.features == "attributes":
        from prefmesh.preferences.town import attributes

        return attributes
    return lambda texts: hashed_ngrams(texts, settings.dim)
