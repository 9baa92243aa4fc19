"""Writes docs/config.md from the settings classes: every key with its type, its default and its meaning.

    python scripts/config_reference.py            write it
    python scripts/config_reference.py --check    exit 1 where the committed page is not what would be written

A key's meaning is the docstring under its field, or the sentence of its class's docstring that begins with the key's
name and a colon.
"""

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import prefmesh.topology.graphs  # noqa: F401 - registers the graphs
from prefmesh.algorithms.methods import METHODS, MethodSettings
from prefmesh.algorithms.optimizers import OptimizerSettings
from prefmesh.compression import COMPRESSORS, ChainSettings
from prefmesh.config import ExperimentConfig, RuntimeSettings
from prefmesh.evaluation.settings import EvaluationSettings
from prefmesh.objectives import LOSSES, ObjectiveSettings
from prefmesh.policies.lora import LoraSettings
from prefmesh.policies.settings import CausalLMSettings, LogLinearSettings
from prefmesh.preferences.settings import ColumnSettings, PreferencesSettings
from prefmesh.preferences.town import TownSettings
from prefmesh.settings import Settings
from prefmesh.topology.registry import GRAPHS
from prefmesh.topology.settings import GraphSettings
from prefmesh.topology.weights import WEIGHTS

PAGE = Path(__file__).parents[1] / "docs" / "config.md"

INTRODUCTION = """\
# Every key of a config

*Written by `scripts/config_reference.py` from the settings classes; a test keeps it current.*

An experiment is a YAML file. A key that is left out has its default. Any key can be changed on the command line, by its
path: `-o method.local_steps=8`. The value is YAML, too: `-o 'policy.lora={r: 4}'`. A key that does not exist, a value
of another type and a combination that makes no sense are refused before any work starts, with the key's path, what was
found and what is allowed.

`config.yaml` in a run directory is the config with all defaults written out.
"""

SECTIONS: list[tuple[str, str, type[Settings]]] = [
    ("preferences", "preferences", PreferencesSettings),
    ("preferences.columns", "preferences.columns", ColumnSettings),
    ("preferences.town", "preferences.town", TownSettings),
    ("policy, a language model", "policy", CausalLMSettings),
    ("policy.lora", "policy.lora", LoraSettings),
    ("policy, log-linear", "policy", LogLinearSettings),
    ("objective", "objective", ObjectiveSettings),
    ("method, every method", "method", MethodSettings),
    *((f"method, {name}", "method", cls.Settings) for name, cls in METHODS.items()),
    ("optimizer", "optimizer", OptimizerSettings),
    ("evaluation", "evaluation", EvaluationSettings),
    ("runtime", "runtime", RuntimeSettings),
]


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION, *_seed()]
    for title, prefix, cls in SECTIONS:
        parts += [f"## {title}", *_section(prefix, cls)]
    parts += ["## Losses", "`objective.loss_type`:", _registered(LOSSES, lambda function: function)]
    parts += [
        "## Graphs",
        "`method.graph`: a name, or a mapping of a name and options, such as `{name: erdos_renyi, p: 0.3}`.",
        _registered(GRAPHS, lambda family: family.function, lambda family: _options(family.options)),
    ]
    parts += [
        "## Weights",
        "`method.weights`: how the mixing matrix W is made from the graph.",
        _registered(WEIGHTS, lambda rule: rule.function),
    ]
    parts += [
        "## Compression",
        "`method.compression`: a list of stages, each a name, or a mapping of a name and options.",
        _registered(COMPRESSORS, lambda stage: stage, _options),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _seed() -> list[str]:
    field = ExperimentConfig.model_fields["seed"]
    return [
        "## seed",
        _table([("`seed`", _allowed(field), _default(field), "Of everything that is random.")]),
    ]


def _section(prefix: str, cls: type[Settings]) -> list[str]:
    """What the class's docstring says of the whole, and its keys."""
    general, said = described(cls)
    shown = {
        name: field
        for name, field in cls.model_fields.items()
        if cls is MethodSettings
        or not issubclass(cls, MethodSettings)
        or name not in MethodSettings.model_fields
    }
    rows = [
        (f"`{prefix}.{name}`", _allowed(field), _default(field), said.get(name, ""))
        for name, field in shown.items()
    ]
    return [part for part in (general, _table(rows) if rows else "") if part]


def described(cls: type[Settings]) -> tuple[str, dict[str, str]]:
    """What a class's docstring says of the whole, and what it or the fields' own docstrings say of each key."""
    text = re.sub(r"\s*\n(?!\n)\s*", " ", inspect.cleandoc(cls.__doc__ or "").replace("\n\n", "\0")).replace(
        "\0", "\n\n"
    )
    names = "|".join(cls.model_fields)
    said = {
        match[1]: _sentence(match[2])
        for match in re.finditer(rf"`({names})`: (.*?)(?=\s+`(?:{names})`: |\n\n|$)", text)
    }
    general = re.sub(rf"`({names})`: (.*?)(?=\s+`(?:{names})`: |\n\n|$)", "", text).strip()
    return general, said | _field_docstrings(cls)


def _field_docstrings(cls: type[Settings]) -> dict[str, str]:
    """The docstrings under fields, of this class and those above it."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not issubclass(base, Settings) or base is Settings:
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                found[field.target.id] = _sentence(" ".join(inspect.cleandoc(text.value.value).split()))
    return found


def _sentence(text: str) -> str:
    text = text.strip().rstrip(";")
    if re.match(r"[a-z]{2}", text):  # a word, no symbol such as q_max
        text = text[0].upper() + text[1:]
    return text if text.endswith((".", ")")) else text + "."


def _registered(
    registry: Mapping[str, Any],
    function_of: Callable[[Any], Callable[..., Any]],
    options: Callable[[Any], str] | None = None,
) -> str:
    """A registry's names with the docstrings of their functions."""
    rows = []
    for name, entry in sorted(registry.items()):
        text = " ".join(inspect.cleandoc(function_of(entry).__doc__ or "").split())
        rows.append((f"`{name}`", *([options(entry)] if options else []), text))
    return _table(rows, ("name", *(["options"] if options else []), "meaning"))


def _options(settings: type[BaseModel]) -> str:
    def shown(name: str, field: FieldInfo) -> str:
        if field.is_required():
            return f"`{name}` (needed)"
        return f"`{name}`" if field.default is None else f"`{name}` ({_default(field)})"

    return ", ".join(shown(name, field) for name, field in settings.model_fields.items())


def _table(
    rows: list[tuple[str, ...]], headers: tuple[str, ...] = ("key", "allowed", "default", "meaning")
) -> str:
    lines = [headers, tuple("---" for _ in headers), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True)
    if value is None or value == ():
        return "none"
    if isinstance(value, GraphSettings):
        return f"`{value}`"
    if isinstance(value, Settings):
        return "as below"
    return "`" + yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip() + "`"


def _allowed(field: FieldInfo) -> str:
    """In words: the type, and the bounds that the field sets."""
    bounds = []
    for rule in field.metadata:
        for key, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
            if (bound := getattr(rule, key, None)) is not None:
                bounds.append(f"{sign} {bound:g}")
    return " ".join([_type(field.annotation), ", ".join(bounds)]).strip()


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(
            dict.fromkeys(_type(argument) for argument in arguments if argument is not NoneType)
        )
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if annotation == get_args(ChainSettings)[0]:
        return "list of stages"
    if origin is list:
        return f"list of {_type(arguments[0])}s"
    if origin is dict:
        return "mapping"
    if annotation is GraphSettings:
        return "name or mapping"
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return "mapping"
    names = {int: "whole number", float: "number", str: "text", bool: "`true`, `false`"}
    assert annotation is not PydanticUndefined
    return names[annotation]


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(0 if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page() else 1)
    PAGE.write_text(page(), encoding="utf-8")
