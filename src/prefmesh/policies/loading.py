"""From a config's words to a policy."""

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


def load_policy(settings: PolicySettings, *, device: str, dtype: str, checkpointing: bool = False) -> Policy:
    """Build the policy; `device` is torch's name, `dtype` the precision of the frozen model, `checkpointing` as in `CausalLMPolicy`.

    Raises `InputError` for a model that is not there, has no tokenizer, or that no LoRA target matches.
    """
    if isinstance(settings, LogLinearSettings):
        return LogLinearPolicy(_features(settings), dtype=getattr(torch, dtype), device=device)
    source = model_source(settings.model)
    model, tokenizer = _load(source, settings, dtype)
    return CausalLMPolicy(
        model.to(device),
        tokenizer,
        train=settings.train,
        lora_settings=settings.lora,
        max_length=settings.max_length,
        checkpointing=checkpointing,
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


def _load(source: str, settings: CausalLMSettings, dtype: str) -> "tuple[Any, PreTrainedTokenizerBase]":
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=getattr(torch, dtype), output_loading_info=True
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
    return model, tokenizer


def _features(settings: LogLinearSettings) -> Any:
    if settings.features == "attributes":
        from prefmesh.preferences.town import attributes

        return attributes
    return lambda texts: hashed_ngrams(texts, settings.dim)
