"""Which loss, or which sum of losses, and how agents' losses make up the global one."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from prefmesh.errors import unknown_name
from prefmesh.objectives.registry import LOSSES, Option, traits, using
from prefmesh.settings import Settings

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


class ObjectiveSettings(Settings):
    """Which loss (names are TRL's), and how the agents' losses make up the global one.

    `weights`: f = sum_i w_i f_i with w_i = 1/N (`uniform`) or n_i/n (`by_size`); batches, aggregation and
    `grad_norm_sq` all use the same choice.
    `label_smoothing`: the assumed share of flipped answers (`sigmoid`: conservative DPO; `robust`, `aot`, `aot_unpaired`;
    `exo_pair`, which needs it, for instance 0.001).
    """

    loss_type: str | list[str] = "sigmoid"
    """A loss by TRL's name for it, or a list of losses that are added up, such as `[sigmoid, sft]`."""
    loss_weights: list[float] | None = None
    """What each loss of the list is multiplied by. None: 1."""
    beta: float = Field(default=0.1, gt=0)
    """How strongly the policy is held to the reference."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    discopop_tau: float = Field(default=0.05, gt=0)
    """The temperature of `discopop`."""
    f_divergence_type: Divergence = "reverse_kl"
    """How the distance to the reference is measured; only `reverse_kl`, DPO's own, fits every loss."""
    f_alpha_divergence_coef: float = 0.5
    """Alpha of `alpha_divergence`: 0 is `forward_kl`, 1 is `reverse_kl`."""
    weights: Literal["uniform", "by_size"] = "uniform"

    @property
    def losses(self) -> list[tuple[str, float]]:
        """Each loss and what it is multiplied by."""
        names = [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type
        return list(zip(names, self.loss_weights or [1.0] * len(names), strict=True))

    @property
    def names(self) -> list[str]:
        """The losses that are added up."""
        return [name for name, _ in self.losses]

    @property
    def plain_dpo(self) -> bool:
        """Whether it is -log sigmoid(beta h) and nothing else."""
        alone = self.losses == [("sigmoid", 1.0)]
        return alone and not self.label_smoothing and self.f_divergence_type == "reverse_kl"

    @field_validator("loss_type", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"found {value!r}; allowed: the name of a loss, or a list of names")
        for name in names:
            if name not in LOSSES:
                raise unknown_name("objective.loss_type", name, LOSSES)
            if names.count(name) > 1:
                raise ValueError(f"{name!r} found twice; allowed: each loss once, with its loss_weights")
        return value

    @model_validator(mode="after")
    def _weights_fit(self) -> "ObjectiveSettings":
        if self.loss_weights is None:
            return self
        count = 1 if isinstance(self.loss_type, str) else len(self.loss_type)
        if len(self.loss_weights) != count:
            raise ValueError(
                f"loss_weights {self.loss_weights} found for {count} in loss_type; allowed: one number for each loss"
            )
        if any(weight <= 0 for weight in self.loss_weights):
            raise ValueError(f"loss_weights {self.loss_weights} found; allowed: numbers above 0")
        return self

    @model_validator(mode="after")
    def _options_are_used(self) -> "ObjectiveSettings":
        self._refuse_unused("label_smoothing", 0)
        self._refuse_unused("discopop_tau", 0.05)
        if "exo_pair" in self.names and not self.label_smoothing:
            raise ValueError(
                "label_smoothing 0 leaves exo_pair without bound; allowed: above 0, such as 0.001"
            )
        return self

    @model_validator(mode="after")
    def _divergence_is_used(self) -> "ObjectiveSettings":
        if self.f_alpha_divergence_coef != 0.5 and self.f_divergence_type != "alpha_divergence":
            raise ValueError(
                f"f_alpha_divergence_coef {self.f_alpha_divergence_coef:g} has no meaning for f_divergence_type "
                f"{self.f_divergence_type}; allowed: 0.5, or f_divergence_type alpha_divergence"
            )
        self._refuse_unused("f_divergence_type", "reverse_kl")
        if self.f_divergence_type != "reverse_kl":
            allowed = [*using("f_divergence_type"), "sft"]  # the last of which knows no reference
            for name in self.names:
                if name not in allowed:
                    raise ValueError(
                        f"f_divergence_type {self.f_divergence_type} has no meaning for loss_type {name!r}; "
                        f"allowed: reverse_kl, or the losses {', '.join(allowed)}"
                    )
        return self

    def _refuse_unused(self, option: Option, default: int | float | str) -> None:
        value = getattr(self, option)
        if value != default and not any(option in traits(name).uses for name in self.names):
            shown = repr(self.loss_type) if isinstance(self.loss_type, str) else self.loss_type
            raise ValueError(
                f"{option} {value} has no meaning for loss_type {shown}; "
                f"allowed: {default}, or one of the losses {', '.join(using(option))}"
            )
