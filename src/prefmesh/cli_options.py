"""What the commands' options have in common, and how their words become parts."""

from pathlib import Path
from typing import Annotated, Any

import typer

Config = Annotated[Path, typer.Argument(help="The experiment's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("-o", "--override", metavar="KEY=VALUE", help="Change a key: -o method.local_steps=8"),
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="A new directory. Default: runs/NAME-TIME")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Plugins = Annotated[
    list[Path] | None,
    typer.Option("--plugin", metavar="FILE", help="Python file that registers a graph, loss or method."),
]
Processes = Annotated[
    int | None,
    typer.Option("--processes", "-p", metavar="K", min=1, help="Share the agents among K processes here."),
]
Seeds = Annotated[
    str | None,
    typer.Option("--seeds", metavar="A,B,...", help="Seeds to run. Default: 0 for compare, 0,1,2 for study."),
]
Resume = Annotated[
    Path | None, typer.Option("--resume", metavar="DIR", help="Go on with what was started in DIR.")
]


def load(config: Path, override: list[str] | None, processes: int | None = None) -> Any:
    """The experiment; `processes`: how many were asked for, or started; none: as many as it says."""
    from prefmesh.config import load_config

    shared = [f"runtime.processes={processes}"] if processes else []
    return load_config(config, [*(override or []), *shared])


def repeated(option: str, values: list[str] | list[Path] | None) -> list[str]:
    """The words that give an option so often, for a command that is started again in several processes."""
    return [word for value in values or [] for word in (option, str(value))]


def load_plugins(files: list[Path] | None) -> None:
    from prefmesh.plugins import load_plugin

    for file in files or []:
        load_plugin(file)


def listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def new_run_directory(name: str) -> Path:
    from datetime import datetime

    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def show_results(directory: Path, json: bool) -> None:
    """Write the report, then the table and the report's path, or JSON."""
    from prefmesh import terminal
    from prefmesh.reports import write_report
    from prefmesh.reports.pareto import advice
    from prefmesh.reports.runs import read_results
    from prefmesh.reports.tables import as_json, difference_tables, pooled_accuracy, summary_tables

    path = write_report(directory)
    results = read_results(directory)
    if json:
        terminal.print_json(as_json(results) | {"advice": advice(results), "report": str(path)})
        return
    for table in (
        *summary_tables(results, terminal.out.width),
        *difference_tables(results, terminal.out.width),
    ):
        terminal.out.print(table)
    for line in advice(results):
        terminal.said(line)
    if (pooled := pooled_accuracy(results)) is not None:
        terminal.said(pooled)
    terminal.said(path)
