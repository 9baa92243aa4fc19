"""Checkpoints that are whole or not there: safetensors for the state, JSON beside it as the mark that it is complete."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefmesh.errors import InputError
from prefmesh.metrics import write_json

NAME = re.compile(r"round_(\d{6,})\.json")
ANY_FILE = re.compile(r"\.?round_(\d{6,})\..+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What stands beside the tensors (with a hash of its own): the round they belong to, their hash, the config's, and how long the logs were."""

    round: int
    config: str
    sha256: str
    log_bytes: dict[str, int]
    bytes_sent_total: int
    seconds: float


def save(
    directory: Path,
    tensors: dict[str, Tensor],
    *,
    round_: int,
    config: str,
    log_bytes: dict[str, int],
    bytes_sent_total: int,
    seconds: float,
    keep: int,
) -> None:
    """Write a checkpoint, then drop all but the newest `keep`. Killed at any moment, the ones before remain."""
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"round_{round_:06d}.safetensors"
    part = target.with_suffix(".part")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part)
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    digest = _sha256(part)
    os.replace(part, target)
    record = Checkpoint(
        round=round_,
        config=config,
        sha256=digest,
        log_bytes=log_bytes,
        bytes_sent_total=bytes_sent_total,
        seconds=seconds,
    )
    mark = asdict(record)
    write_json(target.with_suffix(".json"), mark | {"mark_sha256": _mark_sha256(mark)})
    _keep_only(directory, _rounds(directory)[:keep])


def load(
    directory: Path, *, config: str, at_most: int | None = None
) -> tuple[Checkpoint, dict[str, Tensor]] | None:
    """The newest checkpoint (of round `at_most` or before) that is undamaged; none when there is none.

    Raises `InputError` when it belongs to another config.
    """
    for round_ in _rounds(directory):
        if at_most is not None and round_ > at_most:
            continue
        path = directory / f"round_{round_:06d}.safetensors"
        try:
            mark = dict(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
            unharmed = mark.pop("mark_sha256") == _mark_sha256(mark)
            record = Checkpoint(**mark)
            whole = unharmed and record.round == round_ and _sha256(path) == record.sha256
            tensors = load_file(path) if whole else None
        except (OSError, ValueError, TypeError, KeyError, SafetensorError):
            continue
        if tensors is None:
            continue
        if record.config != config:
            raise InputError(
                f"{path}: found a checkpoint of another config (its hash is {record.config}, this config's {config}); "
                "allowed: the config that the run was started with"
            )
        return record, tensors
    return None


def forget_newer(directory: Path, *, than: int, keep: int) -> None:
    """Remove what is newer than the checkpoint that was loaded (it is damaged, and must not count among those kept), and
    what a writer that was killed did not come to drop: all but the newest `keep`."""
    _keep_only(directory, [round_ for round_ in _rounds(directory) if round_ <= than][:keep])
    # safetensors writes under a name of this form first; a kill in the middle leaves it.
    for place in (directory, directory.parent):
        for scrap in place.glob(".tmp??????"):
            scrap.unlink(missing_ok=True)


def newest_round(directory: Path) -> int | None:
    """The newest round that has a checkpoint."""
    return next(iter(_rounds(directory)), None)


def _rounds(directory: Path) -> list[int]:
    """Rounds that have a mark, newest first."""
    if not directory.is_dir():
        return []
    return sorted((int(m[1]) for m in map(NAME.fullmatch, os.listdir(directory)) if m), reverse=True)


def _keep_only(directory: Path, rounds: list[int]) -> None:
    """Remove all files of other rounds, those that a killed writer left included."""
    if not directory.is_dir():
        return
    others = [
        path
        for path in directory.iterdir()
        if (m := ANY_FILE.fullmatch(path.name)) and int(m[1]) not in rounds
    ]
    # The marks go first, so that what is left is never taken for a checkpoint.
    for path in sorted(others, key=lambda path: path.suffix != ".json"):
        path.unlink(missing_ok=True)


def _mark_sha256(mark: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(mark, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
