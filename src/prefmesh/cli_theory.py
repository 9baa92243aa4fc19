"""The commands of theory: what can be known before a run. Merged into `prefmesh` by `cli.py`."""

import os
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
)
theory_commands.add_typer(theory, name="theory")


@theory.callback(short_help="What can be proved and predicted, and whether it holds.")
def _theory() -> None:
    """What can be proved and predicted, and whether it holds.

    \b
    Example: prefmesh theory verify --quick
    """


@theory.command(short_help="Check every claim of the theory by experiment.")
def verify(
    quick: Annotated[bool, typer.Option("--quick", help="Shorter experiments: about a minute.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="WORDS", help="Claims whose name contains this; may be repeated."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of all experiments.")] = 0,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", metavar="J", min=1, help="Experiments at once. Default: one per processor."),
    ] = None,
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
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with terminal.progress() as listener:
        bar = listener("claims")

        def say(done: int, total: int, name: str) -> None:
            bar.progress.update(bar.task, total=total, completed=done, state=name)

        found = check(Effort(quick=quick, seed=seed), only, jobs=jobs or cpus, say=say)
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


@theory_commands.command(short_help="Which settings reach a target loss soonest, and a config of them.")
def plan(
    config: Config,
    target_loss: Annotated[float, typer.Option("--target-loss", help="Loss to reach, in nats.")],
    bandwidth: Annotated[
        float, typer.Option("--bandwidth", help="Bytes per second of an agent's link, each way.")
    ],
    step_seconds: Annotated[
        float, typer.Option("--step-seconds", help="Seconds of a local step on the config's batch.")
    ],
    latency: Annotated[float, typer.Option("--latency", help="Seconds that a message takes at least.")] = 0.0,
    server_bandwidth: Annotated[
        float | None,
        typer.Option(
            "--server-bandwidth", help="Bytes per second of the server's link. Default: an agent's."
        ),
    ] = None,
    compute: Annotated[
        str,
        typer.Option("--compute", help="How steps' seconds scatter: constant, exponential or lognormal."),
    ] = "constant",
    check: Annotated[
        bool,
        typer.Option("--check", help="Simulate the plan's neighbours and say how far from the best it is."),
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the plan's config: a new YAML file.")
    ] = None,
    override: Overrides = None,
    plugin: Plugins = None,
    json: AsJson = False,
) -> None:
    """Method, E, S, lr, batch and graph that reach a loss soonest on given machines, with reasons and a config to run.

    Exact on the log-linear policy, where the best settings are simulated; for other policies a rough guide.

    \b
    Example: prefmesh plan own.yaml --target-loss 0.6 --bandwidth 1e6 --step-seconds 0.1
    """
    from prefmesh import terminal
    from prefmesh.errors import InputError
    from prefmesh.theory.clock import Devices, Links
    from prefmesh.theory.planning import make_plan
    from prefmesh.theory.planning_tables import check_lines, plan_lines

    load_plugins(plugin)
    if out is not None and out.exists():
        raise InputError(f"{out}: exists already; allowed: a new file")
    settings = load(config, override)
    try:
        devices = Devices(seconds_per_step=step_seconds, distribution=compute)
        links = Links(
            bandwidth=bandwidth,
            latency=latency,
            server_bandwidth=bandwidth if server_bandwidth is None else server_bandwidth,
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    with terminal.progress() as listener:
        found = make_plan(settings, target_loss, devices, links, check=check, say=listener("plan").stage)
    if out is not None:
        out.write_text(found.config.to_yaml(), encoding="utf-8")
    if json:
        terminal.print_json(found.to_json())
        return
    terminal.out.print(plan_lines(found))
    if check:
        terminal.out.print(check_lines(found))
    if out is not None:
        terminal.said(out)
