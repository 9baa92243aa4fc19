"""report.html: one file, no network, light and dark, from phone to desk."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from prefmesh.reports import tables
from prefmesh.reports.figures import Plate, variant_users
from prefmesh.reports.pareto import advice
from prefmesh.reports.people import ENOUGH_USERS
from prefmesh.reports.runs import Results, Row, Run, Variant, value
from prefmesh.reports.series import binomial_null, tenth, worst_tenth
from prefmesh.reports.svg import inline_svg

MOST_USERS_LISTED = 20
SECTIONS = {
    "study": "What the study varies",
    "trade": "What is traded",
    "training": "Training",
    "users": "Users",
    "graph": "Graph",
}


def fill(template: str, **context: Any) -> str:
    """A page from one of this room's templates."""
    environment = Environment(
        loader=PackageLoader("prefmesh.reports", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**context)


def render(results: Results, drawn: Sequence[tuple[Plate, bytes]]) -> str:
    """The page, from results and their figures as SVG."""
    rows = tables.summary_rows(results)
    differences = tables.difference_rows(results)
    columns, compared = tables.shown_columns(rows), tables.shown_columns(differences)
    return fill(
        "report.html.jinja",
        results=results,
        spread=any(
            row[column.key] and row[column.key]["std"] is not None for row in rows for column in columns
        ),
        interval=any(row["accuracy"] and row["accuracy"].get("low") is not None for row in rows),
        state=state_lines(results),
        advice=advice(results),
        pooled=tables.pooled_accuracy(results),
        columns=columns,
        rows=[
            {
                "label": row["label"],
                "status": tables.status_words(row),
                "cells": [tables.write_cell(column, row[column.key]) for column in columns],
            }
            for row in rows
        ],
        absent=[column.header.partition(" (")[0] for column in tables.COLUMNS if column not in columns],
        versus=differences[0]["versus"] if differences else None,
        difference_headers=[tables.difference_header(column) for column in compared],
        difference_rows=[
            {
                "label": row["label"],
                "cells": [tables.write_difference(column, row[column.key]) for column in compared],
                "seeds": max((row[column.key]["n"] for column in compared if row[column.key]), default=0),
            }
            for row in differences
        ],
        figures={section: figures_of(section, drawn) for section in SECTIONS},
        sections=SECTIONS,
        noise=[row for variant in results.variants if (row := noise_row(variant)) is not None],
        worst=[group for variant in results.variants if (group := worst_users(variant)) is not None],
        held_out=held_out_rows(results),
        runs=run_rows(results),
        config=config_text(results),
        environment=environment_rows(results),
    )


def figures_of(section: str, drawn: Sequence[tuple[Plate, bytes]]) -> list[Row]:
    return [shown(plate, svg) for plate, svg in drawn if plate.section == section]


def shown(plate: Plate, svg: bytes) -> Row:
    """A figure as the templates take it."""
    return {
        "title": plate.title,
        "caption": plate.caption,
        # Trusted: made by our own XML serialiser, which escapes labels.
        "svg": Markup(inline_svg(svg, name=plate.name, title=plate.title, description=plate.description)),
    }


def state_lines(results: Results) -> list[str]:
    """What a reader must know first: which runs are not done, and why."""
    lines = []
    for run in results.runs:
        place = (
            "" if results.kind == "run" else f"{run.directory.relative_to(results.directory).as_posix()}: "
        )
        reached = "before its first round" if run.last_round is None else f"at round {run.last_round}"
        if run.last_round is not None and run.planned_rounds is not None:
            reached += f" of {run.planned_rounds}"
        if run.status == "diverged":
            lines.append(
                f"{place}diverged: the loss or the parameters stopped being finite; stopped {reached}. "
                "The last good checkpoint was kept."
            )
        elif run.status == "interrupted":
            lines.append(f"{place}interrupted {reached}; `prefmesh run --resume` continues it.")
        elif run.status == "unfinished":
            lines.append(f"{place}in progress or killed, {reached}.")
        elif run.status != "done":
            lines.append(f"{place}{run.status}, {reached}.")
    if results.missing:
        lines.append(f"Not started yet: {', '.join(results.missing)}.")
    return lines


def noise_row(variant: Variant) -> Row | None:
    """The worst tenth beside what noise alone would give, where there are users enough."""
    group = variant_users(variant)
    if group is None or len(group.accuracy) < ENOUGH_USERS:
        return None
    low, high = np.quantile(worst_tenth(binomial_null(group)), [0.025, 0.975])
    found = float(worst_tenth(group.accuracy))
    return {
        "label": variant.label,
        "users": f"{len(group.accuracy):,}",
        "found": f"{tables.percent(found)} %",
        "noise": f"{tables.percent(low)} to {tables.percent(high)} %",
        "reading": "lower than noise" if found < low else "higher than noise" if found > high else "as noise",
    }


def worst_users(variant: Variant) -> Row | None:
    """The users of the worst tenth, worst first, seeds together."""
    key = "own_accuracy" if variant.accuracy_key.startswith("eval/own") else "accuracy"
    found = [
        (number, run.seed, row)
        for run in variant.runs
        for row in run.final_users
        if (number := value(row, key)) is not None and number == number
    ]
    if not found:
        return None
    found.sort(key=lambda entry: (entry[0], str(entry[2].get("user"))))
    count = tenth(len(found))
    listed = [
        {
            "user": row.get("user", tables.MISSING),
            "agent": row.get("agent_name", row.get("agent", tables.MISSING)),
            "seed": tables.MISSING if seed is None else seed,
            "pairs": row.get("pairs", tables.MISSING),
            "accuracy": _percent_or_missing(row, "accuracy"),
            "own_accuracy": _percent_or_missing(row, "own_accuracy"),
            "win_rate": _percent_or_missing(row, "win_rate"),
        }
        for _, seed, row in found[: min(count, MOST_USERS_LISTED)]
    ]
    return {
        "label": variant.label,
        "users": listed,
        "unlisted": count - len(listed),
        "win_rate": any(user["win_rate"] != tables.MISSING for user in listed),
        "seeds": len({seed for _, seed, _ in found}) > 1,
    }


def _percent_or_missing(row: Row, key: str) -> str:
    number = value(row, key)
    if number is None:
        return tables.MISSING
    return f"{tables.percent(number)} %" if abs(number) < float("inf") else tables.NOT_FINITE


def held_out_rows(results: Results) -> list[tuple[str, str]]:
    """What was held out, and the measured leak of it into training: of the first run that says so."""
    run = next((run for run in results.runs if run.summary), None)
    if run is None:
        return []
    names = {"agents": "agents", "users": "users", "held_out_pairs": "held-out pairs"}
    rows = [
        (label, _show(run.summary[key])) for key, label in names.items() if run.summary.get(key) is not None
    ]
    leakage = run.summary.get("leakage") or {}
    return rows + [(key.replace("_", " "), _show(found)) for key, found in leakage.items()]


def run_rows(results: Results) -> list[Row]:
    """The runs of a sweep, with a link to their own report where there is one."""
    if results.kind == "run":
        return []
    return [
        {
            "label": variant.label,
            "seed": tables.MISSING if run.seed is None else run.seed,
            "status": run.status,
            "round": tables.MISSING if run.last_round is None else run.last_round,
            "link": _relative_link(results.directory, run),
            "overrides": _show_overrides(variant.overrides),
        }
        for variant in results.variants
        for run in variant.runs
    ]


def _relative_link(directory: Path, run: Run) -> str | None:
    if not (run.directory / "report.html").is_file():
        return None
    return quote((run.directory / "report.html").relative_to(directory).as_posix())


def _show_overrides(overrides: object) -> str:
    if not overrides:
        return tables.MISSING
    if isinstance(overrides, dict):
        return ", ".join(f"{key}={_show(found)}" for key, found in overrides.items())
    if isinstance(overrides, list):
        return ", ".join(map(_show, overrides))
    return _show(overrides)


def config_text(results: Results) -> str:
    """The first run's config; each run keeps its own in config.yaml."""
    return next((run.config_text for run in results.runs if run.config_text), "")


def environment_rows(results: Results) -> list[tuple[str, str]]:
    """environment.json of the first run that has one, flat; where runs differ, all that was found."""
    flat = [dict(_flatten(run.environment)) for run in results.runs if run.environment]
    rows = []
    for key in dict.fromkeys(key for found in flat for key in found):
        shown = list(dict.fromkeys(found.get(key, tables.MISSING) for found in flat))
        rows.append((key, shown[0] if len(shown) == 1 else f"differs between runs: {'; '.join(shown[:4])}"))
    return rows


def _flatten(owner: Row, prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, found in owner.items():
        if isinstance(found, dict):
            rows += _flatten(found, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", _show(found)))
    return rows


def _show(found: object) -> str:
    if found is None:
        return tables.MISSING
    if isinstance(found, bool | list):
        return json.dumps(found, ensure_ascii=False)
    if isinstance(found, dict):
        return yaml.safe_dump(found, default_flow_style=True, width=10_000, sort_keys=False).strip()
    if isinstance(found, float):
        return tables.plain_number(found) if abs(found) < float("inf") else tables.NOT_FINITE
    return f"{found:,}" if isinstance(found, int) else str(found)
