"""Figures, tables and the HTML report, made from run and sweep directories alone."""

import os
import tempfile
from pathlib import Path

from prefmesh.reports.runs import Results, read_results

__all__ = ["Results", "read_results", "write_report"]


def write_report(directory: Path | str) -> Path:
    """Write `figures/*.svg`, `figures/*.png` and the self-contained `report.html` of a run or a sweep.

    Works on what is there: a run in progress, diverged or interrupted, and a sweep that is half done, say so at the
    top. Files are replaced one by one and whole, so that a reader never sees half a file.

    Returns:
        The path of `report.html`.

    Raises:
        InputError: the directory is missing or holds neither a run nor a sweep, or one of its files is damaged.
    """
    from prefmesh.reports.figures import draw
    from prefmesh.reports.html import render
    from prefmesh.reports.svg import figure_bytes

    results = read_results(Path(directory))
    drawn = [(plate, figure_bytes(plate.figure, "svg")) for plate in draw(results)]
    page = render(results, drawn)
    for plate, svg in drawn:
        replace_file(results.directory / "figures" / f"{plate.name}.svg", svg)
        replace_file(results.directory / "figures" / f"{plate.name}.png", figure_bytes(plate.figure, "png"))
    return replace_file(results.directory / "report.html", page.encode("utf-8", errors="replace"))


def replace_file(path: Path, content: bytes) -> Path:
    """Write a file whole or not at all, readable for everyone; its path."""
    path.parent.mkdir(exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)  # mkstemp's 0600 would hide the report from a web server
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    return path
