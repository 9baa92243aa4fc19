"""LoRA whose factors carry a leading agent axis: the frozen product runs once for the rows of all agents.

Names, targets and initialisation are PEFT's (Hu et al. 2021): W x + scaling B A x with A of shape (agents, r, in),
B of shape (agents, out, r), A drawn, B zero, so that every agent starts at the reference.
"""

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from prefmesh.errors import InputError
from prefmesh.policies import kernels, packing
from prefmesh.policies.base import Params
from prefmesh.randomness import torch_seeded
from prefmesh.settings import Settings

if TYPE_CHECKING:
    from peft import LoraConfig


class LoraSettings(Settings):
    """PEFT's names. `target_modules`: names, one regular expression or `all-linear`; none means PEFT's default for the model."""

    r: int = Field(default=8, ge=1)
    """Rank."""
    lora_alpha: float = Field(default=16, gt=0)
    """The update is scaled by alpha / r."""
    target_modules: list[str] | str | None = None
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead."""
    mixing: Literal["factors", "freeze_a", "alternate", "product", "residual"] = "factors"
    """What agents average. `factors`: A and B, each for itself, which is not the average of the models. `freeze_a`: B alone, A being
    everybody's and never trained (FFA-LoRA). `alternate`: B in odd rounds and A in even ones (RoLoRA). `product`: B A, of which the
    best approximation of rank r is kept. `residual`: A and B, each for itself, and what that leaves of B A is folded into the frozen
    layers (FedEx-LoRA; a server's alone)."""
    ranks: list[int] | None = None
    """Of each agent's adapter, from 1 to r, for devices of unequal strength; none: r for all. The scaling is that of r for all."""

    @model_validator(mode="after")
    def _ranks_are_within(self) -> "LoraSettings":
        for rank in self.ranks or []:
            if not 1 <= rank <= self.r:
                raise ValueError(f"ranks holds {rank}; allowed: 1 to {self.r}, which is r")
        if self.ranks is not None and self.mixing == "residual":
            raise ValueError(
                "ranks: found some, but with mixing residual all adapters are of rank r; allowed: none"
            )
        return self

    @property
    def scaling(self) -> float:
        """alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA (Kalajdzievski 2023)."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)

    def of_rank(self, rank: int) -> "LoraSettings":
        """An adapter of so many components and the same scaling."""
        alpha = self.scaling * (rank**0.5 if self.use_rslora else rank)
        return self.model_copy(update={"r": rank, "lora_alpha": alpha, "ranks": None})


class StackedLoRA(nn.Module):
    """A frozen linear layer plus one low-rank update per agent.

    Rows come agent by agent, equally many each. With zero agents, the layer is the frozen one. Where A is frozen, it is the layer's
    own (1, r, in), and all agents' tokens pass it together.
    """

    def __init__(self, base: nn.Module, in_features: int, out_features: int, settings: LoraSettings):
        super().__init__()
        self.base = base
        self.in_features, self.out_features = in_features, out_features
        self.scaling = settings.scaling
        weight = next(base.parameters())
        # Places for the stacked factors, which arrive by functional_call.
        self.lora_A = nn.Buffer(weight.new_empty(0, settings.r, in_features), persistent=False)
        self.lora_B = nn.Buffer(weight.new_empty(0, out_features, settings.r), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """base(x) + scaling x A^T B^T; x of shape (agents * rows, ..., in), or a row in which agents have unequal parts."""
        y = self.base(x)
        agents = self.lora_B.shape[0]
        if agents == 0:
            return y
        # Factors may be kept in a higher precision than the frozen base: multiply in theirs.
        x = x.to(self.lora_A.dtype)
        reading = packing.CURRENT.get()
        uneven = reading.packed.agents if reading and agents > 1 else None
        rows = uneven.pad(x.flatten(0, -2)) if uneven else x
        rows = rows.reshape(agents, -1, self.in_features)
        a = self.lora_A.expand(agents, -1, -1)
        if y.dtype == rows.dtype and not uneven:
            onto = y.view(agents, -1, self.out_features)
            return kernels.low_rank(rows, a, self.lora_B, self.scaling, onto).view_as(y)
        # Zero where nothing is, which keeps padding out of both factors' gradients.
        scale = uneven.held.view(agents, 1, -1).to(x.dtype) * self.scaling if uneven else self.scaling
        update = kernels.low_rank(rows, a, self.lora_B, scale).flatten(0, 1)
        if uneven:
            update = uneven.unpad(update)
        return y + update.view_as(y).to(y.dtype)


def inject(model: nn.Module, settings: LoraSettings) -> list[str]:
    """Replace the targeted linear layers by `StackedLoRA`, in place; the names of the replaced modules.

    Raises `InputError` when nothing matches, or when a match is no linear layer.
    """
    targets = _matches(model, settings)
    for name in targets:
        parent, _, leaf = name.rpartition(".")
        base = model.get_submodule(name)
        in_features, out_features = features(base)
        if settings.mixing == "product" and settings.r > min(in_features, out_features):
            raise InputError(
                f"policy.lora.r: {settings.r}, but {name} is {in_features} to {out_features} wide; allowed with mixing product: at most "
                f"{min(in_features, out_features)}"
            )
        setattr(model.get_submodule(parent), leaf, StackedLoRA(base, in_features, out_features, settings))
    return targets


def initial_factors(model: nn.Module, targets: list[str], seed: int) -> Params:
    """One row of factors as PEFT starts them: A kaiming-uniform with a = sqrt(5), B zero; always drawn in float32."""
    params: Params = {}
    with torch_seeded(seed, "lora"):
        for name in targets:
            layer = model.get_submodule(name)
            assert isinstance(layer, StackedLoRA)
            a = torch.empty(layer.lora_A.shape[1:], dtype=torch.float32)
            nn.init.kaiming_uniform_(a, a=5**0.5)
            params[f"{name}.lora_A"] = a.unsqueeze(0)
            params[f"{name}.lora_B"] = torch.zeros(1, *layer.lora_B.shape[1:])
    return params


def freeze_a(model: nn.Module, factors: Params) -> None:
    """Put A into the layers, for good: B is left to train (FFA-LoRA: Sun et al. 2024, arXiv 2403.12313)."""
    for name, tensor in factors.items():
        layer, _, factor = name.rpartition(".")
        if factor == "lora_A":
            model.get_submodule(layer).lora_A = nn.Buffer(tensor, persistent=False)


def peft_config(model: nn.Module, settings: LoraSettings, targets: list[str], *, base: str) -> "LoraConfig":
    """The same adapter as PEFT describes it: layer names without their path where these mean the same layers."""
    from peft import LoraConfig, TaskType
    from peft.tuners.tuners_utils import check_target_module_exists
    from transformers.pytorch_utils import Conv1D

    short = sorted({name.rpartition(".")[2] for name in targets})
    as_short = LoraConfig(target_modules=short)
    meant = {name for name, _ in model.named_modules() if check_target_module_exists(as_short, name)}
    layers = [model.get_submodule(name) for name in targets]
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base,
        inference_mode=True,
        r=settings.r,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        use_rslora=settings.use_rslora,
        # GPT-2's Conv1D stores its weight as (in, out); a quantised layer remembers what it was.
        fan_in_fan_out=any(
            isinstance(layer, StackedLoRA)
            and issubclass(getattr(layer.base, "source_cls", type(layer.base)), Conv1D)
            for layer in layers
        ),
        target_modules=short if meant == set(targets) else sorted(targets),
    )


def peft_state(row: Params) -> dict[str, Tensor]:
    """One agent's factors under PEFT's key names. `row` holds tensors without the agent axis."""
    return {f"base_model.model.{name}.weight": tensor.contiguous() for name, tensor in row.items()}


def held(row: Params, rank: int) -> Params:
    """The first `rank` components of one agent's factors, which are without the agent axis."""
    return {name: t[:rank] if name.endswith("lora_A") else t[:, :rank] for name, t in row.items()}


def padded(name: str, tensor: Tensor, rank: int) -> Tensor:
    """A factor without the agent axis, with zeros up to `rank` components."""
    if name.endswith("lora_A"):
        return F.pad(tensor, (0, 0, 0, max(0, rank - tensor.shape[0])))
    return F.pad(tensor, (0, max(0, rank - tensor.shape[1])))


def from_peft_name(key: str) -> str:
    """The name in Theta of a PEFT key: the inverse of `peft_state`'s naming."""
    return key.removeprefix("base_model.model.").removesuffix(".weight")


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    out_features, in_features = int(module.nf), int(module.nx)  # type: ignore[arg-type]  # Conv1D
    return in_features, out_features


def _matches(model: nn.Module, settings: LoraSettings) -> list[str]:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    from transformers.pytorch_utils import Conv1D

    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    head = model.get_output_embeddings()  # type: ignore[operator]
    linear -= {name for name, module in model.named_modules() if module is head}
    wanted = settings.target_modules
    if wanted is None:
        model_type = model.config.model_type  # type: ignore[union-attr]
        wanted = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type, "all-linear")  # type: ignore[arg-type]
    if wanted == "all-linear":
        return sorted(linear)
    config = LoraConfig(target_modules=wanted)
    found = [name for name, _ in model.named_modules() if check_target_module_exists(config, name)]
    if found and set(found) <= linear:
        return found
    leaves = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
    problem = (
        "matches no module"
        if not found
        else f"matches {sorted(set(found) - linear)[0]!r}, which is no linear layer"
    )
    raise InputError(
        f"policy.lora.target_modules: {wanted!r} {problem}; linear layers of this model: {leaves}, or all-linear"
    )
