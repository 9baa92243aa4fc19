"""JSON Lines that are only ever appended to, and JSON that is written whole or not at all."""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from prefmesh.errors import InputError


class JsonLines:
    """An append-only file of one JSON object per line; every line is flushed when written."""

    def __init__(self, path: Path, *, keep: int = 0):
        """Open `path`, cut to its first `keep` bytes: what a killed run wrote after its checkpoint is written again."""
        self.path = path
        self._file: BinaryIO = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
        self._file.truncate(keep)
        self._file.seek(keep)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line."""
        self._file.write((json.dumps(jsonable(record), ensure_ascii=False) + "\n").encode())
        self._file.flush()

    def sync(self) -> int:
        """Force what was written to the disk; the size in bytes, for a checkpoint to remember."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


class NoLines(JsonLines):
    """Where another process writes the file."""

    def __init__(self) -> None:
        """No file."""

    def append(self, record: Mapping[str, Any]) -> None:
        """Nothing."""

    def sync(self) -> int:
        """No bytes."""
        return 0

    def close(self) -> None:
        """Nothing."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a JSON Lines file (a killed writer may leave half a line at the end)."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def jsonable(record: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN: a non-finite number becomes null, and `<key>/non_finite` says which it was.

    >>> jsonable({"loss": float("nan"), "round": 3})
    {'loss': None, 'loss/non_finite': 'nan', 'round': 3}
    """
    out: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            out[key] = jsonable(value)
        elif isinstance(value, float) and not math.isfinite(value):
            out[key] = None
            out[f"{key}/non_finite"] = "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
        else:
            out[key] = value
    return out


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write `record` atomically."""
    write_text(path, json.dumps(jsonable(record), indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` so that a reader, or a crash, finds the whole old file or the whole new one."""
    part = path.with_name(f".{path.name}.part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def refuse_taken(directory: Path, *, otherwise: str) -> None:
    """Raise `InputError` where no new directory can be made; `otherwise` says what else is allowed."""
    if directory.exists():
        raise InputError(f"{directory}: exists already; allowed: a new directory, or {otherwise}")
    existing = next(path for path in directory.absolute().parents if path.exists())
    if not existing.is_dir():
        raise InputError(f"{directory}: {existing} is a file; allowed: a new directory")


def new_directory(directory: Path, write: Callable[[Path], None]) -> None:
    """Make a directory that appears with all that `write` puts into it, or not at all.

    Raises `InputError` where it cannot be made.
    """
    part = directory.with_name(f".{directory.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write(part)
        os.rename(part, directory)
    except OSError as error:
        raise InputError(
            f"{directory}: cannot be made ({error.strerror or error}); allowed: a new directory in a place that can be written to"
        ) from None
