"""What a config says about the policy."""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from prefmesh.mesh import Ranks
from prefmesh.policies.lora import LoraSettings
from prefmesh.settings import Settings


class CausalLMSettings(Settings):
    """A causal language model: `builtin:tiny`, a directory, or a Hugging Face id.

    `train`: LoRA adapters (`lora`) or all weights (`full`). `max_length`: tokens of prompt and completion together;
    longer prompts are cut on the left, the same for both completions.
    """

    model: str = "builtin:tiny"
    """`builtin:tiny`, a Hugging Face model directory, or a hub id."""
    train: Literal["lora", "full"] = "lora"
    lora: LoraSettings = Field(default_factory=LoraSettings)
    """The adapters, where `train` is `lora`."""
    load_in_4bit: bool = False
    """Keep the frozen linear layers in 4 bits (NF4, bitsandbytes), as QLoRA does; adapters stay in float32. The 4-bit model is the
    reference, too. Needs the extra `quantized`."""
    max_length: int = Field(default=512, ge=8)

    @model_validator(mode="after")
    def _lora_is_used(self) -> "CausalLMSettings":
        if self.train == "full" and self.lora != LoraSettings():
            raise ValueError("lora has no meaning with train full; allowed: leave it out, or train lora")
        if self.train == "full" and self.load_in_4bit:
            raise ValueError("load_in_4bit freezes the weights that train full trains; allowed: train lora")
        if self.lora.mixing == "residual" and self.load_in_4bit:
            raise ValueError(
                "load_in_4bit: true, but lora.mixing residual adds to the frozen layers; allowed: false, or another mixing"
            )
        return self

    @property
    def lora_mixing(self) -> str | None:
        """How adapters are averaged; none without adapters."""
        return self.lora.mixing if self.train == "lora" else None

    @property
    def lora_ranks(self) -> Ranks | None:
        """Of agents' adapters; none: equal, or no adapters."""
        return Ranks(of=np.array(self.lora.ranks), most=self.lora.r) if self.lora.ranks is not None else None


class LogLinearSettings(Settings):
    """A linear model of features of the completion: `attributes` (the built-in town's) or `hashed` words (`dim` buckets)."""

    model: Literal["log_linear"] = "log_linear"
    """Exact and convex: the instrument for methods, not for texts."""
    features: Literal["attributes", "hashed"] = "hashed"
    """`attributes`: read off the built-in town's texts; `hashed`: words and word pairs of any text."""
    dim: int = Field(default=256, ge=1)
    """Buckets of `hashed`."""

    lora_mixing: ClassVar[None] = None
    lora_ranks: ClassVar[None] = None

    @model_validator(mode="after")
    def _dim_is_used(self) -> "LogLinearSettings":
        if self.features == "attributes" and self.dim != 256:
            raise ValueError("dim has no meaning with features attributes: the town has as many as it has")
        return self


PolicySettings = CausalLMSettings | LogLinearSettings
