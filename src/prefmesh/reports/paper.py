"""The paper's figures on one page: true gradient norms, losses and accuracies of the comparison and the four ablations."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from prefmesh.reports import replace_file
from prefmesh.reports.figures import METRICS, Plate, curve_plates
from prefmesh.reports.html import fill, shown, state_lines
from prefmesh.reports.runs import read_results
from prefmesh.reports.style import house_style
from prefmesh.reports.svg import figure_bytes

SHOWN = ("grad_norm_sq", "loss", "accuracy")


def write_paper_page(directory: Path, parts: Sequence[str], *, config: str) -> Path:
    """Write `index.html` and `figures/` of a directory whose sub-directories `parts` hold a sweep each; the page's path."""
    sections = []
    for part in parts:
        results = read_results(directory / part)
        with house_style():
            plates: list[Plate] = [
                dataclasses.replace(plate, name=f"{part}_{plate.name}")
                for metric in METRICS
                if metric.name in SHOWN
                for plate in curve_plates(results, metric, "rounds", standard_error=True)
            ]
            drawn = [(plate, figure_bytes(plate.figure, "svg")) for plate in plates]
            for plate, svg in drawn:
                replace_file(directory / "figures" / f"{plate.name}.svg", svg)
                replace_file(directory / "figures" / f"{plate.name}.png", figure_bytes(plate.figure, "png"))
        sections.append(
            {
                "name": part,
                "title": results.title,
                "state": state_lines(results),
                "figures": [shown(plate, svg) for plate, svg in drawn],
                "link": f"{part}/report.html",
            }
        )
    page = fill("paper.html.jinja", sections=sections, config=config)
    return replace_file(directory / "index.html", page.encode("utf-8", errors="replace"))
