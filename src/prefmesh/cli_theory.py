"""The commands of theory: what can be known before a run. Merged into `prefmesh` by `cli.py`."""

from pathlib import Path
from typing import Annotated

import typer

from prefmesh.cli_options import (
    AsJson,
    Config,
    Out,
    Overrides,
    Plugins,
    load,
    load_plugins,
    new_run_directory,
)

theory_commands = typer.Typer(rich_markup_mode=None)


@theory_commands.command(short_help="The theory's constants, on this policy and data.")
def landscape(
    config: Config,
    out: Out = None,
    override: Overrides = None,
    rounds: Annotated[
        int | None,
        typer.Option("--rounds", metavar="R", help="Rounds of the run to follow. Default: up to 6"),
    ] = None,
    pairs: Annotated[
        int | None,
        typer.Option("--pairs", metavar="N", help="Pairs of each agent to take gradients over."),
    ] = None,
    plugin: Plugins = None,
    json: AsJson = False,
) -> None:
    """Smoothness, noise, heterogeneity, groups of agents, and loss slices.

    Follows the first rounds of the config's own run, and measures on the way. Leaves figures and landscape.json.

    \b
    Example: prefmesh landscape examples/town.yaml --rounds 6
    """
    from prefmesh import terminal
    from prefmesh.errors import InputError
    from prefmesh.experiment import prepare
    from prefmesh.metrics import new_directory, refuse_taken, write_json
    from prefmesh.theory.landscape import measure
    from prefmesh.theory.landscape_figures import save_figures
    from prefmesh.theory.landscape_tables import as_json, remarks, tables

    load_plugins(plugin)
    settings = load(config, override)
    planned = settings.method.rounds
    if rounds is not None and not 0 <= rounds <= planned:
        raise InputError(f"--rounds: found {rounds}; allowed: 0 to {planned} (method.rounds)")
    if pairs is not None and pairs < 2:
        raise InputError(f"--pairs: found {pairs}; allowed: at least 2")
    directory = out or new_run_directory(f"{config.stem}-landscape")
    refuse_taken(directory, otherwise="no --out, for one that is named by the time")
    with terminal.progress() as listener:
        bar = listener("landscape")
        found = measure(
            prepare(settings, bar.stage),
            rounds=min(6, planned) if rounds is None else rounds,
            pairs=pairs,
            listener=bar,
        )
        bar.stage("figures")
    said = as_json(found)

    def fill(place: Path) -> None:
        said["figures"] = [str(directory / path.name) for path in save_figures(found, place)]
        write_json(place / "landscape.json", said)

    new_directory(directory, fill)
    if json:
        terminal.print_json(said)
        return
    for table in tables(found):
        terminal.out.print(table)
    for remark in remarks(found):
        terminal.said(remark)
    terminal.said(directory)
