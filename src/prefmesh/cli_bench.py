"""The command that measures speed. Merged into `prefmesh` by `cli.py`."""

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from prefmesh.cli_options import AsJson, Config, Overrides, Plugins, Processes, load, load_plugins, repeated

bench_commands = typer.Typer(rich_markup_mode=None)
LONGEST_TURN = 24 * 3600
"""Seconds that processes wait for the one that does a rival's rounds."""


@bench_commands.command(short_help="How fast this machine does an experiment's rounds.")
def bench(
    config: Config,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            metavar="NAME",
            help="Measure others in turn: single (ours, one agent a pass), peft, naive (loops over models), trl, flower (its simulation engine); may be repeated.",
        ),
    ] = None,
    turns: Annotated[int, typer.Option("--turns", min=1, help="Of each, after one that warms up.")] = 5,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds a turn.")] = 2,
    profile: Annotated[
        Path | None,
        typer.Option("--profile", metavar="FILE.json", help="Write a trace of one round (chrome://tracing)."),
    ] = None,
    override: Overrides = None,
    processes: Processes = None,
    plugin: Plugins = None,
    json: AsJson = False,
) -> None:
    """Measure an experiment's rounds: pairs and tokens per second, share of the machine's peak, memory, and others on the same work.

    Others are given all threads of the processes that share our agents.

    \b
    Example: prefmesh bench examples/town.yaml --against peft --against single
    Example: prefmesh bench examples/town.yaml --against peft --processes 2
    """
    from prefmesh import terminal
    from prefmesh.bench.benchmark import bench as measure
    from prefmesh.bench.benchmark import table
    from prefmesh.bench.contest import Schedule
    from prefmesh.launch import launch
    from prefmesh.mesh.torch_group import join, launched

    load_plugins(plugin)
    started = launched()
    settings = load(config, override, started or processes)
    if settings.runtime.processes > 1 and not started:
        arguments = ["bench", str(config), "--turns", str(turns), "--rounds", str(rounds)]
        arguments += [
            *repeated("--against", against),
            *repeated("-o", override),
            *repeated("--plugin", plugin),
        ]
        arguments += [*(["--profile", str(profile)] if profile else []), *(["--json"] if json else [])]
        raise SystemExit(launch(settings.runtime.processes, arguments, limit=settings.runtime.timeout))
    with (
        closing(join(LONGEST_TURN, settings.runtime.torch_device())) as group,
        terminal.progress(shown=group.rank == 0) as listener,
    ):
        found = measure(
            settings,
            against or [],
            Schedule(turns=turns, rounds=rounds),
            trace=profile,
            say=listener("bench").stage,
            group=group,
        )
    if group.rank > 0:
        return
    if json:
        terminal.print_json(found)
        return
    for shown in table(found):
        terminal.out.print(shown)
