"""What a config says about messages: a list of stages, each a name or a mapping of a name and its settings."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny, ValidationError

from prefmesh.compression.base import COMPRESSORS, Compressor, Form
from prefmesh.errors import InputError, unknown_name

Chain = tuple[Compressor, ...]
"""Stages in the order in which a sender applies them; none: messages go as they are."""


def parse_chain(raw: Any, where: str = "method.compression") -> Chain:
    """A chain from plain YAML values. Raises `InputError`, with the config key `where`, for what makes no chain.

    >>> parse_chain([{"name": "top_k", "share": 0.01}, "int8"])
    (TopK(share=0.01), Int8())
    >>> parse_chain([{"name": "top_k", "share": 0}])
    Traceback (most recent call last):
    prefmesh.errors.InputError: method.compression.0.share: found 0; allowed: greater than 0
    """
    if isinstance(raw, str) or not isinstance(raw, Sequence):
        raise InputError(
            f"{where}: found {raw!r}; allowed: a list of stages, such as [{{name: top_k, share: 0.01}}, int8]"
        )
    chain = tuple(_stage(item, f"{where}.{i}") for i, item in enumerate(raw))
    for i, (before, stage) in enumerate(pairwise(chain), start=1):
        if before.sends == Form.CODES:
            raise InputError(
                f"{where}.{i}: {stage.name} follows {before.name}, which leaves codes; allowed: {before.name} as the last stage"
            )
        if before.sends < stage.takes:
            raise InputError(
                f"{where}.{i}: {stage.name} follows {before.name}, which leaves no matrices; allowed: {stage.name} before it"
            )
    return chain


ChainSettings = Annotated[tuple[SerializeAsAny[Compressor], ...], BeforeValidator(parse_chain)]
"""The type of a field of settings that holds a chain."""


def _stage(raw: Any, where: str) -> Compressor:
    if isinstance(raw, Compressor):
        return raw
    given = {"name": raw} if isinstance(raw, str) else raw
    if not isinstance(given, Mapping) or "name" not in given:
        raise InputError(f"{where}: found {raw!r}; allowed: a name, or a mapping such as {{name: int8}}")
    options = {key: value for key, value in given.items() if key != "name"}
    if not isinstance(given["name"], str) or given["name"] not in COMPRESSORS:
        raise unknown_name(f"{where}.name", str(given["name"]), COMPRESSORS)
    cls = COMPRESSORS[given["name"]]
    for key in options:
        if key not in cls.model_fields:
            raise unknown_name(f"{where}.{key}", str(key), ["name", *cls.model_fields], kind="key")
    try:
        return cls(**options)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join([where, *map(str, first["loc"])])
        if first["type"] == "missing":
            raise InputError(f"{path}: missing; {given['name']} has no usual one") from None
        said = first.get("ctx", {}).get("error") or first["msg"].replace("Input should be", "allowed:")
        raise InputError(f"{path}: found {first['input']!r}; {said}") from None
