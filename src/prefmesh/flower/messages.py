"""What travels between server and sites: adapter-shaped tensors and named numbers, as Flower's records. Nothing else is sent.

From the server: the experiment's YAML, which agent a site is, everybody's numbers of pairs, the round, a row of parameters.
From a site: its name, versions, the base model's fingerprint, `Told` (counts of its pairs); rows; measures; its part of an evaluation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict  # type: ignore[import-not-found]

from prefmesh.algorithms.local_rule import STATS
from prefmesh.errors import InputError
from prefmesh.flower.site import Part
from prefmesh.measure import HeldOut
from prefmesh.policies.base import Params
from prefmesh.preferences.census import Told

MEASURES = (*STATS, "remembered")
PAIR = ("margin", "accuracy", "loss")


@dataclass(frozen=True, kw_only=True)
class Hello:
    """How a site introduces itself. `found`: what must be everybody's, by what it is."""

    name: str
    found: dict[str, str]
    told: Told
    data_bytes: int


# ---- to a site


def order(
    *, yaml: str, run: str, agent: int, sizes: list[int], round_: int, after: int, row: Params
) -> RecordDict:
    """To train or to evaluate."""
    told = {"yaml": yaml, "run": run, "agent": agent, "sizes": sizes, "round": round_, "after": after}
    return RecordDict({"order": ConfigRecord(told), "row": ArrayRecord(_plain(row))})


def question(yaml: str) -> RecordDict:
    """Who are you?"""
    return RecordDict({"order": ConfigRecord({"yaml": yaml})})


# ---- from a site


def hello(found: Hello) -> RecordDict:
    told = found.told
    return RecordDict(
        {
            "site": ConfigRecord({"name": found.name, **found.found}),
            "told": MetricRecord(
                {
                    "counts": told.counts.tolist(),
                    "leakage": told.leakage.tolist(),
                    "sizes": told.sizes.tolist(),
                    "held_out": told.held_out.reshape(-1).tolist(),
                    "alone": told.alone.reshape(-1).tolist(),
                    "data_bytes": found.data_bytes,
                }
            ),
        }
    )


def answer(row: Params, measures: Mapping[str, float], round_: int) -> RecordDict:
    numbers = {name: measures[name] for name in MEASURES}
    return RecordDict(
        {"row": ArrayRecord(_plain(row)), "measures": MetricRecord({**numbers, "round": round_})}
    )


def part(found: Part, round_: int) -> RecordDict:
    held = found.held_out
    losses, gradients = zip(*found.contributions, strict=True)
    numbers = {name: getattr(held, name).tolist() for name in PAIR}
    records: dict[str, Any] = {f"gradient_{k}": ArrayRecord(_plain(g)) for k, g in enumerate(gradients)}
    records["part"] = MetricRecord({"f": list(losses), "round": round_, **numbers})
    return RecordDict(records)


def refusal() -> RecordDict:
    """Why stays in the site's own log: an error may quote its data."""
    return RecordDict({"refused": ConfigRecord({"refused": True})})


# ---- as the server reads it: whatever is wrong becomes an `InputError` that says what


def read_hello(content: RecordDict) -> Hello:
    _refused(content)
    site, told = dict(content["site"]), content["told"]
    return Hello(
        name=str(site.pop("name")),
        found={key: str(value) for key, value in site.items()},
        told=Told(
            counts=np.array(told["counts"], dtype=np.int64),
            leakage=np.array(told["leakage"], dtype=np.float64),
            sizes=np.array(told["sizes"], dtype=np.int64),
            held_out=np.array(told["held_out"], dtype=np.int64).reshape(-1, 4),
            alone=np.array(told["alone"], dtype=np.int64).reshape(-1, 2),
        ),
        data_bytes=int(told["data_bytes"]),
    )


def read_answer(content: RecordDict, like: Params, asked: int) -> tuple[Params, dict[str, float]]:
    """Row and measures of the round that was `asked` for. Raises `InputError` for another round, and for tensors that are not
    those of `like`, or not finite."""
    _refused(content)
    numbers = _numbers(content, "measures", (*MEASURES, "round"))
    if (told := int(numbers["round"])) != asked:
        raise InputError(f"it answers round {told}; allowed: {asked}, as it was asked")
    return _params(content, "row", like), {name: float(numbers[name]) for name in MEASURES}


def read_part(content: RecordDict, like: Params, tested: int) -> Part:
    """A part of an evaluation, of `tested` held-out pairs. Raises `InputError` likewise."""
    _refused(content)
    numbers = _numbers(content, "part", ("f", "round", *PAIR))
    columns = {name: np.array(numbers[name], dtype=np.float64) for name in PAIR}
    for name, values in columns.items():
        if values.shape != (tested,):
            raise InputError(f"{name}: found {values.shape} numbers; allowed: {tested}, its held-out pairs")
    gradients = [_params(content, f"gradient_{k}", like) for k in range(len(numbers["f"]))]
    return Part(
        contributions=list(zip(map(float, numbers["f"]), gradients, strict=True)),
        held_out=HeldOut(rows=np.arange(tested), **columns),
    )


def row_of(content: RecordDict) -> Params:
    """A row as a site takes it from the server."""
    return dict(content["row"].to_torch_state_dict())


def _plain(row: Params) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in row.items()}


def _refused(content: RecordDict) -> None:
    if "refused" in content:
        raise InputError("the site refused (its own log says why)")


def _numbers(content: RecordDict, record: str, names: tuple[str, ...]) -> Mapping[str, Any]:
    if record not in content:
        raise InputError(f"{record}: missing")
    numbers = content[record]
    if missing := [name for name in names if name not in numbers]:
        raise InputError(f"{record}: {missing[0]} is missing")
    for name in names:
        if not np.isfinite(np.asarray(numbers[name], dtype=np.float64)).all():
            raise InputError(f"{record}: {name} is not finite")
    return numbers


def _params(content: RecordDict, record: str, like: Params) -> Params:
    if record not in content:
        raise InputError(f"{record}: missing")
    found = content[record].to_torch_state_dict()
    if set(found) != set(like):
        odd = sorted(set(found) ^ set(like))[0]
        raise InputError(f"{record}: tensor {odd!r} is {'unknown' if odd in found else 'missing'}")
    for name, tensor in like.items():
        other = found[name]
        if other.shape != tensor.shape or other.dtype != tensor.dtype:
            raise InputError(
                f"{record}: {name} is {tuple(other.shape)} of {other.dtype}; allowed: {tuple(tensor.shape)} of {tensor.dtype}"
            )
        if not bool(torch.isfinite(other).all()):
            raise InputError(f"{record}: {name} is not finite")
    return {name: found[name].to(tensor.device) for name, tensor in like.items()}
