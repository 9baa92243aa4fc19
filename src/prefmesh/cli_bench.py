"""The command that measures speed. Merged into `prefmesh` by `cli.py`."""

from pathlib import Path
from typing import Annotated

import typer

from prefmesh.cli_options import AsJson, Config, Overrides, Plugins, load, load_plugins

bench_commands = typer.Typer(rich_markup_mode=None)


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
    plugin: Plugins = None,
    json: AsJson = False,
) -> None:
    """Measure an experiment's rounds: pairs and tokens per second, share of the machine's peak, memory, and others on the same work.

    \b
    Example: prefmesh bench examples/town.yaml --against peft --against single
    """
    from prefmesh import terminal
    from prefmesh.bench.benchmark import bench as measure
    from prefmesh.bench.benchmark import table
    from prefmesh.bench.contest import Schedule

    load_plugins(plugin)
    settings = load(config, override)
    with terminal.progress() as listener:
        say = listener("bench").stage
        found = measure(settings, against or [], Schedule(turns=turns, rounds=rounds), trace=profile, say=say)
    if json:
        terminal.print_json(found)
        return
    for shown in table(found):
        terminal.out.print(shown)
