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

theory = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="What can be proved and predicted, and whether it holds.",
)
theory_commands.add_typer(theory, name="theory")


@theory.callback()
def _theory() -> None:
    """What can be proved and predicted, and whether it holds."""


@theory.command(short_help="Check every claim of the theory by experiment.")
def verify(
    quick: Annotated[bool, typer.Option("--quick", help="Shorter experiments: about a minute.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="WORDS", help="Claims whose name contains this; may be repeated."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of all experiments.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="For page, figures and JSON. Default: runs/verify-TIME"),
    ] = None,
    json: AsJson = False,
) -> None:
    """Check every claim, the paper's and ours, by experiment: predicted, measured, ratio, verdict.

    Leaves a page with a figure per claim. A claim that fails is shown as failing, with what was seen instead; the exit
    code is 0 all the same, since a refuted claim is a result.

    \b
    Example: prefmesh theory verify --quick
    Example: prefmesh theory verify --only bound --only fixed
    """
    from prefmesh import terminal
    from prefmesh.metrics import new_directory, refuse_taken, write_json
    from prefmesh.theory.verify import Effort
    from prefmesh.theory.verify import verify as check
    from prefmesh.theory.verify.page import table, write_page

    directory = out or new_run_directory("verify")
    refuse_taken(directory, otherwise="a new directory")
    with terminal.progress() as listener:
        bar = listener("claims")

        def say(done: int, total: int, name: str) -> None:
            bar.progress.update(bar.task, total=total, completed=done, state=name)

        found = check(Effort(quick=quick, seed=seed), only, say=say)
    new_directory(directory, lambda made: write_json(made / "verify.json", found.to_json()))
    page = write_page(found, directory)
    if json:
        terminal.print_json(found.to_json() | {"page": str(page)})
        return
    terminal.out.print(table(found))
    terminal.said(page)


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
