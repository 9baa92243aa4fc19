"""The commands of theory: what can be known before a run. Merged into `prefmesh` by `cli.py`."""

from pathlib import Path
from typing import Annotated

import typer

from prefmesh.cli_options import AsJson, Config, Overrides, Plugins, load, load_plugins

theory_commands = typer.Typer(rich_markup_mode=None)


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
