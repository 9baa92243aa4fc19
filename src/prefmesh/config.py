"""The experiment's description: YAML <-> frozen, typed settings, checked before anything is loaded."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml
from pydantic import Field, SerializeAsAny, ValidationError

from prefmesh.algorithms.methods import METHODS, MethodSettings
from prefmesh.algorithms.methods.q_fed_avg import QFedAvgSettings
from prefmesh.algorithms.optimizers import OptimizerSettings
from prefmesh.errors import InputError, unknown_name
from prefmesh.evaluation.settings import EvaluationSettings
from prefmesh.objectives import ObjectiveSettings, traits
from prefmesh.policies.settings import CausalLMSettings, LogLinearSettings, PolicySettings
from prefmesh.preferences.settings import PreferencesSettings
from prefmesh.settings import Settings

if TYPE_CHECKING:
    import torch


class RuntimeSettings(Settings):
    """Where and how it runs; nothing here changes results beyond rounding (`wire`: to half precision).

    `agents_per_pass`: agents that share a forward pass; none means as many as fit and, where a run is long enough for it, as
    were measured to be fastest. `threads`: torch's; none leaves them. `checkpoints_kept`: how many of the newest stay.
    """

    device: str = "auto"
    """`auto` (a GPU where there is one), `cpu`, or a device by torch's name."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Of the frozen model and of full fine-tuning; adapters on a `bfloat16` base stay in float32."""
    gradient_checkpointing: bool = False
    """Keep only the input of each layer, and compute the rest again in the backward pass: less memory, a third more time."""
    processes: int = Field(default=1, ge=1)
    """That share the agents, each hosting a block of them. `prefmesh run` starts them on this machine; under torchrun it is their number."""
    wire: Literal["same", "bfloat16", "float16"] = "same"
    """In which type parameters travel between processes; `same`: as they are computed with. Half of the bytes, and rounding."""
    timeout: float | int = Field(default=600, gt=0)
    """Seconds that a process waits for the others before it gives up."""
    threads: int | None = Field(default=None, ge=1)
    agents_per_pass: int | None = Field(default=None, ge=1)
    memory_gb: float | None = Field(default=None, gt=0)
    """GiB that a run may take of the device; passes are cut to what the model and the agents leave. None: passes of a sixteenth."""
    checkpoint_every: int = Field(default=10, ge=1)
    """Rounds between checkpoints."""
    checkpoints_kept: int = Field(default=2, ge=1)

    def wire_dtype(self) -> "torch.dtype | None":
        """`wire` as torch's type; none: as parameters are."""
        import torch

        return None if self.wire == "same" else getattr(torch, self.wire)

    def torch_device(self) -> str:
        """The device by torch's name. Raises `InputError` for one that is not there."""
        import torch

        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(
                f"runtime.device: {self.device!r} is not here ({str(error).splitlines()[0]}); allowed: auto, cpu, or a device that torch sees"
            ) from None
        return self.device


class ExperimentConfig(Settings):
    """Everything that a run depends on; two runs of one config give the same numbers."""

    seed: int = Field(default=0, ge=0)
    preferences: PreferencesSettings
    policy: PolicySettings
    objective: ObjectiveSettings
    method: SerializeAsAny[MethodSettings]
    optimizer: OptimizerSettings
    evaluation: EvaluationSettings
    runtime: RuntimeSettings

    @classmethod
    def parse(cls, raw: Mapping[Any, Any]) -> "ExperimentConfig":
        """From plain YAML values. Raises `InputError` with the key's path."""
        _refuse_unknown(raw, cls.model_fields, "")
        parts: dict[str, Any] = {
            key: _section(key, raw.get(key)) for key in cls.model_fields if key != "seed"
        }
        config = validated(cls, {"seed": raw.get("seed", 0), **parts}, "")
        config.check()
        return config

    @classmethod
    def from_yaml(cls, text: str) -> "ExperimentConfig":
        """The inverse of `to_yaml`."""
        return cls.parse(yaml.safe_load(text))

    def check(self) -> None:
        """What one section says must fit the others. Raises `InputError`."""
        if (agents := self.known_agents) is not None:
            self.method.check(agents)
            if self.runtime.processes > agents:
                raise InputError(
                    f"runtime.processes: {self.runtime.processes}, more than there are agents; allowed: 1 to {agents}"
                )
        if self.runtime.wire != "same" and self.runtime.processes == 1:
            raise InputError(
                f"runtime.wire: {self.runtime.wire}, but nothing travels in one process; allowed: same, or more runtime.processes"
            )
        if self.policy.lora_mixing == "residual" and self.runtime.dtype == "bfloat16":
            raise InputError(
                "runtime.dtype: bfloat16 would round away what policy.lora.mixing residual adds to the frozen layers; allowed: float32, float64"
            )
        if isinstance(self.method, QFedAvgSettings):
            self._check_losses_have_powers(self.method)
        if isinstance(self.policy, LogLinearSettings):
            if self.policy.features == "attributes" and not self.preferences.simulated:
                raise InputError(
                    "policy.features: attributes are read off the built-in town's texts; allowed here: hashed"
                )
            if self.runtime.gradient_checkpointing:
                raise InputError("runtime.gradient_checkpointing: log_linear has no layers; allowed: false")
            self._check_margins_suffice()
        elif self.evaluation.samples and self.evaluation.max_new_tokens >= self.policy.max_length:
            raise InputError(
                f"evaluation.max_new_tokens: {self.evaluation.max_new_tokens} leaves no room for a prompt; "
                f"allowed: less than policy.max_length, {self.policy.max_length}"
            )

    def _check_losses_have_powers(self, method: QFedAvgSettings) -> None:
        """q-FedAvg takes powers of losses, and an update over lr for a gradient."""
        if "robust" in self.objective.names and self.objective.label_smoothing:
            raise InputError(
                "objective.loss_type: robust may be below 0, of which q_fed_avg knows no power; allowed: losses of at least 0, such as "
                "sigmoid"
            )
        if method.q and method.lipschitz is None and self.optimizer.name == "adamw":
            raise InputError(
                "method.lipschitz: none is 1/lr, for gradients, but adamw's updates are not of a gradient's length; allowed with it: a "
                "number, 0 for steps as long as updates are (or optimizer.name sgd)"
            )

    def _check_margins_suffice(self) -> None:
        """A log-linear policy knows log-probabilities up to a constant per prompt, and no lengths."""
        for name in self.objective.names:
            if "lengths" in traits(name).needs:
                raise InputError(
                    f"objective.loss_type: {name} divides by completion lengths, which log_linear does not have"
                )
            if "likelihoods" in traits(name).needs:
                raise InputError(
                    f"objective.loss_type: {name} takes each answer's log-probability, of which log_linear knows only "
                    "differences; allowed: losses of the margin, such as sigmoid"
                )
        if self.objective.f_divergence_type != "reverse_kl":
            raise InputError(
                f"objective.f_divergence_type: {self.objective.f_divergence_type} takes each answer's log-probability, of "
                "which log_linear knows only differences; allowed: reverse_kl"
            )

    @property
    def known_agents(self) -> int | None:
        """How many agents there will be, where that is known before the data is read."""
        if not self.preferences.shared and self.runtime.processes > 1:
            return None
        return self.preferences.agents or (
            self.preferences.town_settings.users if self.preferences.simulated else None
        )

    def plain(self) -> dict[str, Any]:
        """As plain YAML values; `parse` of them gives the same config."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """As YAML, defaults written out."""
        return yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True)

    def hash(self) -> str:
        """Identifies everything that results depend on."""
        plain = self.plain()
        return hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=8).hexdigest()

    def replace(self, changes: Mapping[str, Any]) -> "ExperimentConfig":
        """With some keys changed, by dotted path; a changed `method` replaces that section whole."""
        raw = self.plain()
        for path, value in changes.items():
            _put(raw, path, value)
        return type(self).parse(raw)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read a YAML file and apply `key.path=value` overrides, whose values are YAML too.

    Raises `InputError`: no such file, not YAML, a key given twice, and everything that `ExperimentConfig.parse` refuses.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{path}: no such file; allowed: an experiment's YAML file")
    try:
        raw = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML ({_yaml_problem(error)})") from None
    if not isinstance(raw, dict):
        raise InputError(
            f"{path}: found {_kind(raw)}; allowed: a mapping with keys {', '.join(ExperimentConfig.model_fields)}"
        )
    return parse_with_overrides(raw, overrides, where=f"{path}: ")


def parse_with_overrides(
    raw: dict[Any, Any], overrides: Sequence[str], *, where: str = ""
) -> ExperimentConfig:
    """`ExperimentConfig.parse` of `raw`, which stays as it is, after applying `key.path=value` overrides."""
    raw = deepcopy(raw)
    changes = dict(map(_change, overrides))
    for section, kind in (("method", "name"), ("policy", "model")):
        new = changes.get(f"{section}.{kind}")
        if (
            isinstance(new, str)
            and isinstance(raw.get(section), dict)
            and (section != "method" or new in METHODS)
        ):
            # Another method or kind of policy than the file's: settings that it does not have go with the old one.
            fields = _settings_class(section, {kind: new}).model_fields
            raw[section] = {key: value for key, value in raw[section].items() if key in fields}
    for key, value in changes.items():
        _put(raw, key, value)
    try:
        return ExperimentConfig.parse(raw)
    except InputError as error:
        raise InputError(f"{where}{error}") from None


def _change(override: str) -> tuple[str, Any]:
    """`key.path=value` as key and value."""
    key, sign, value = override.partition("=")
    if not sign or not key.strip():
        raise InputError(f"-o {override}: found no key=value; an example: -o method.local_steps=8")
    try:
        return key.strip(), yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise InputError(f"-o {override}: the value is not YAML ({_yaml_problem(error)})") from None


T = TypeVar("T", bound=Settings)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats (`2e-4` is a number) and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", node.value[i][0].start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _section(key: str, raw: Any) -> Settings:
    if raw is None:
        raw = {}
    if not isinstance(raw, Mapping):
        raise InputError(f"{key}: found {_kind(raw)}; allowed: a mapping")
    return validated(_settings_class(key, raw), raw, key)


def _settings_class(key: str, raw: Mapping[Any, Any]) -> type[Settings]:
    """Which settings describe a section; a method's and a policy's depend on what they name."""
    if key == "method":
        name = raw.get("name")
        if name is None:
            raise InputError(f"method.name: missing; allowed: {', '.join(sorted(METHODS))}")
        if not isinstance(name, str) or name not in METHODS:
            raise unknown_name("method.name", str(name), METHODS)
        return METHODS[name].Settings
    if key == "policy":
        return LogLinearSettings if raw.get("model") == "log_linear" else CausalLMSettings
    return {
        "preferences": PreferencesSettings,
        "objective": ObjectiveSettings,
        "optimizer": OptimizerSettings,
        "evaluation": EvaluationSettings,
        "runtime": RuntimeSettings,
    }[key]


def validated(cls: type[T], raw: Mapping[Any, Any], prefix: str) -> T:
    """A section's settings; pydantic's first complaint becomes an `InputError` that begins with the key's path under `prefix`."""
    _refuse_unknown([key for key in raw if not isinstance(key, str)], cls.model_fields, f"{prefix}.")
    try:
        return cls(**raw)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join([*([prefix] if prefix else []), *map(str, first["loc"])])
        if first["type"] == "extra_forbidden":
            fields = _fields_at(cls, first["loc"][:-1])
            raise unknown_name(path, str(first["loc"][-1]), fields, kind="key") from None
        inner = first.get("ctx", {}).get("error")
        if isinstance(inner, InputError):
            raise inner from None
        if inner is not None:
            raise InputError(f"{path}: {inner}") from None
        message = first["msg"][0].lower() + first["msg"][1:]
        found = "nothing" if first["type"] == "missing" else repr(first["input"])
        raise InputError(f"{path}: found {found}; {message.replace('input should be', 'allowed:')}") from None


def _refuse_unknown(keys: Iterable[Any], fields: Mapping[str, Any], prefix: str) -> None:
    for key in keys:
        if key not in fields:
            raise unknown_name(f"{prefix}{key}", str(key), fields, kind="key")


def _fields_at(cls: type[Settings], path: Sequence[Any]) -> list[str]:
    """The keys that are allowed at a path inside a section."""
    for key in path:
        annotation = cls.model_fields[str(key)].annotation
        nested = [
            t
            for t in (annotation, *getattr(annotation, "__args__", ()))
            if isinstance(t, type) and issubclass(t, Settings)
        ]
        if not nested:
            break
        cls = nested[0]
    return list(cls.model_fields)


def _put(raw: dict[Any, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        inner = raw.setdefault(key, {})
        if inner is None:
            inner = raw[key] = {}
        if not isinstance(inner, dict):
            raise InputError(f"-o {path}: {key} holds {_kind(inner)}, not keys")
        raw = inner
    raw[last] = value


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {value!r}"


def _yaml_problem(error: yaml.YAMLError) -> str:
    """What is wrong, and in which row."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return str(error).strip().splitlines()[0]
    return f"row {mark.line + 1}: {getattr(error, 'problem', error)}"
