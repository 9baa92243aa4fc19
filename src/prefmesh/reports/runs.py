"""Run and sweep directories as they lie on disk, read for a report; nothing here recomputes a measure."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from prefmesh.errors import InputError

Row = dict[str, Any]
PERSONAL = (
    "local_only",
    "fine_tuning",
    "clustered",
    "ifca",
    "fed_soft",
    "ditto",
    "apfl",
    "fed_per",
    "collaboration_graph",
    "dec_ditto",
    "dec_apfl",
    "dec_per",
)
"""Methods whose result is each agent's own policy, for runs that have no summary yet."""

Kind = Literal["run", "compare", "study"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run directory. `summary` is empty while the run is going on (or after a kill)."""

    directory: Path
    config_text: str
    config: Row
    environment: Row
    metrics: tuple[Row, ...]
    agents: tuple[Row, ...]
    summary: Row
    topology: Row | None

    @property
    def method(self) -> str | None:
        return self.summary.get("method") or _table(self.config, "method").get("name")

    @property
    def name(self) -> str:
        return self.summary.get("name") or self.method or self.directory.name

    @property
    def seed(self) -> int | None:
        return self.summary.get("seed", self.config.get("seed"))

    @property
    def status(self) -> str:
        """`done`, `diverged`, `interrupted`, or `unfinished` where no summary was written."""
        return self.summary.get("status", "unfinished")

    @property
    def last_round(self) -> int | None:
        return self.metrics[-1].get("round") if self.metrics else None

    @property
    def planned_rounds(self) -> int | None:
        return _table(self.config, "method").get("rounds", self.summary.get("rounds"))

    @property
    def accuracy_key(self) -> str:
        """The accuracy that counts for this method: of the average model, or of each agent's own."""
        default = "own" if self.method in PERSONAL else "average"
        own = self.summary.get("headline", default) == "own"
        return "eval/own/rewards/accuracies" if own else "eval/rewards/accuracies"

    @property
    def ceiling(self) -> float | None:
        """The best accuracy to be expected where users' utilities are known: of one policy for all, or one for each."""
        kind = "own" if self.accuracy_key == "eval/own/rewards/accuracies" else "consensus"
        return value(_table(self.summary, "ceiling"), kind)

    @property
    def final_users(self) -> tuple[Row, ...]:
        """The rows of agents.jsonl at the last evaluation."""
        last = max((row["round"] for row in self.agents), default=None)
        return tuple(row for row in self.agents if row["round"] == last)

    def last(self, key: str) -> float | None:
        """The latest value of a metric: None where it was never measured, nan or inf where it was not finite."""
        for row in reversed(self.metrics):
            number = value(row, key)
            if number is not None:
                return number
        return value(_table(self.summary, "final"), key)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One line of a comparison: the same settings under several seeds, as far as they have been run."""

    name: str
    label: str
    x: float | None
    series: str | None
    """The study's curve it belongs to, where there are several."""
    overrides: Any
    runs: tuple[Run, ...]

    def same_data(self, other: "Variant") -> bool:
        """Whether it differs from another variant in the method alone (`method` and `method.…` among the overrides)."""
        return self._beside_method() == other._beside_method()

    def _beside_method(self) -> Row:
        overrides = self.overrides if isinstance(self.overrides, dict) else {}
        return {key: value for key, value in overrides.items() if key.partition(".")[0] != "method"}

    @property
    def accuracy_key(self) -> str:
        return self.runs[0].accuracy_key if self.runs else "eval/rewards/accuracies"


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a report shows. A single run is one variant with one run."""

    directory: Path
    kind: Kind
    title: str
    x_label: str | None
    seeds: tuple[int, ...]
    variants: tuple[Variant, ...]
    comparison: Row
    """A finished sweep's comparison.json: differences on the same held-out pairs; empty before that."""

    @property
    def runs(self) -> tuple[Run, ...]:
        return tuple(run for variant in self.variants for run in variant.runs)

    @property
    def folds(self) -> bool:
        """Whether the variants hold out other pairs each: no difference of them is paired, all together are a result."""
        return self.x_label == "fold"

    @property
    def missing(self) -> tuple[str, ...]:
        """Runs of the sweep that have not started, as `variant/seed_k`."""
        if self.kind == "run":
            return ()
        started = {run.directory for run in self.runs}
        expected = (f"{variant.name}/seed_{seed}" for variant in self.variants for seed in self.seeds)
        return tuple(name for name in expected if self.directory / name not in started)


class _SweepVariant(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)
    name: str
    label: str | None = None
    x: float | None = None
    series: str | None = None
    overrides: Any = None


class _SweepFile(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)
    title: str
    kind: Literal["compare", "study"]
    variants: list[_SweepVariant]
    seeds: list[int]
    x_label: str | None = None


def read_results(directory: Path) -> Results:
    """Read a run or a sweep.

    Raises:
        InputError: no such directory, neither a run nor a sweep, or a file in it that cannot be understood.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory; allowed: a run directory or a sweep directory")
    if (directory / "sweep.json").is_file():
        return _read_sweep(directory)
    if is_run(directory):
        run = read_run(directory)
        variant = Variant(name=run.name, label=run.name, x=None, series=None, overrides=None, runs=(run,))
        seeds = () if run.seed is None else (run.seed,)
        return Results(
            directory=directory,
            kind="run",
            title=run.name,
            x_label=None,
            seeds=seeds,
            variants=(variant,),
            comparison={},
        )
    raise InputError(
        f"{directory}: neither a run (config.yaml, metrics.jsonl) nor a sweep (sweep.json) is in this directory"
    )


def is_run(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("config.yaml", "metrics.jsonl"))


def read_run(directory: Path) -> Run:
    """Read one run directory, finished or not; files that are not there yet count as empty."""
    config_path = directory / "config.yaml"
    config_text = _text(config_path)
    try:
        config = yaml.safe_load(config_text) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{config_path}: found {_one_line(error)}; allowed: YAML") from None
    if not isinstance(config, dict):
        raise InputError(f"{config_path}: found {type(config).__name__}; allowed: a mapping")
    topology = _json_object(directory / "topology.json")
    return Run(
        directory=directory,
        config_text=config_text,
        config=config,
        environment=_json_object(directory / "environment.json"),
        metrics=_json_lines(directory / "metrics.jsonl"),
        agents=_json_lines(directory / "agents.jsonl"),
        summary=_json_object(directory / "summary.json"),
        topology=topology or None,
    )


def value(row: Mapping[str, Any], key: str) -> float | None:
    """A number of a row: None where missing, nan or inf where it was recorded as not finite.

    >>> value({"loss": 0.5}, "loss"), value({}, "loss")
    (0.5, None)
    >>> value({"loss": None, "loss/non_finite": "inf"}, "loss")
    inf
    """
    number = row.get(key)
    if number is None:
        kind = row.get(f"{key}/non_finite")
        return None if kind is None else (math.inf if kind == "inf" else math.nan)
    return float(number)


def _read_sweep(directory: Path) -> Results:
    path = directory / "sweep.json"
    try:
        sweep = _SweepFile.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "whole file"
        raise InputError(f"{path}: {where}: {_one_line(first['msg'])}") from None
    variants = []
    for described in sweep.variants:
        places = [directory / described.name / f"seed_{seed}" for seed in sweep.seeds]
        variants.append(
            Variant(
                name=described.name,
                label=described.label or described.name,
                x=described.x,
                series=described.series,
                overrides=described.overrides,
                runs=tuple(read_run(place) for place in places if is_run(place)),
            )
        )
    return Results(
        directory=directory,
        kind=sweep.kind,
        title=sweep.title,
        x_label=sweep.x_label,
        seeds=tuple(sweep.seeds),
        variants=tuple(variants),
        comparison=_json_object(directory / "comparison.json"),
    )


def _table(owner: Row, key: str) -> Row:
    found = owner.get(key)
    return found if isinstance(found, dict) else {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: found bytes that are not UTF-8 at {error.start}; allowed: UTF-8") from None


def _json_object(path: Path) -> Row:
    text = _text(path)
    if not text:
        return {}
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: found {_one_line(error)}; allowed: a JSON object") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: found {type(found).__name__}; allowed: a JSON object")
    return found


def _json_lines(path: Path) -> tuple[Row, ...]:
    lines = _text(path).split("\n")
    # A line without its newline is still being written (or was cut by a kill).
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}: row {number}: found {_one_line(error)}; allowed: a JSON object"
            ) from None
        if not isinstance(row, dict) or not isinstance(row.get("round"), int):
            raise InputError(f"{path}: row {number}: found no integer `round`; allowed: an object with one")
        rows.append(row)
    return tuple(rows)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
