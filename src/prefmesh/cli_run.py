"""`prefmesh run`: in this process, in several that it starts, or as one of several that a launcher started."""

from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from prefmesh.cli_options import (
    AsJson,
    Out,
    Overrides,
    Plugins,
    Processes,
    Resume,
    load,
    load_plugins,
    new_run_directory,
    repeated,
    show_results,
)
from prefmesh.errors import InputError


def run(
    config: Annotated[
        Path | None, typer.Argument(help="The experiment's YAML file; not needed with --resume.")
    ] = None,
    out: Out = None,
    override: Overrides = None,
    resume: Resume = None,
    processes: Processes = None,
    restarts: Annotated[
        int,
        typer.Option(
            "--restarts", metavar="N", min=0, help="Go on up to N times after a process was killed."
        ),
    ] = 0,
    plugin: Plugins = None,
    json: AsJson = False,
) -> None:
    """Train one policy and leave a run directory with it, its metrics and a report.

    Under torchrun, on one machine or many, its processes share the agents.

    \b
    Example: prefmesh run examples/town.yaml -o method.local_steps=8
    Example: prefmesh run examples/town.yaml --processes 2
    Example: torchrun --nproc-per-node 2 -m prefmesh run examples/town.yaml --out runs/two
    """
    from prefmesh import run as running
    from prefmesh import terminal
    from prefmesh.mesh.torch_group import join, launched

    load_plugins(plugin)
    started = launched()
    given, directory = _asked(config, out, override, resume, started or processes)
    if started and out is None and resume is None:
        raise InputError("--out: missing; allowed with several processes: the same directory for all of them")
    settings = given or running.config_of(directory)
    limit, device = settings.runtime.timeout, settings.runtime.torch_device()
    if settings.runtime.processes > 1 and not started:
        # Not typer's Exit: its callers would say once more what the processes have said.
        raise SystemExit(_launch(settings, config, directory, override, resume, restarts, plugin, json))
    if processes not in (None, settings.runtime.processes):
        raise InputError(
            f"--processes: {processes}, but the run in {directory} has {settings.runtime.processes}; allowed: as many, or no --processes"
        )
    if restarts:
        raise InputError(
            "--restarts: only several processes are started again; allowed: --processes K with it"
        )
    with closing(join(limit, device)) as group:
        with terminal.progress(shown=group.rank == 0) as listener:
            if resume is not None:
                running.resume(directory, config=given, listener=listener(directory.name), group=group)
            else:
                running.run(settings, directory, listener=listener(settings.method.name), group=group)
        if group.rank == 0:
            show_results(directory, json)


def _asked(
    config: Path | None,
    out: Path | None,
    override: list[str] | None,
    resume: Path | None,
    processes: int | None,
) -> tuple[Any, Path]:
    """The config that was given, none where a run goes on with its own, and the run directory."""
    if out is not None and resume is not None:
        raise InputError("--out names a new directory; --resume goes on in its own: one of the two")
    if config is not None:
        given = load(config, override, processes)
        return given, resume or out or new_run_directory(f"{config.stem}-{given.method.name}")
    if resume is None:
        raise InputError("no config was given; allowed: prefmesh run CONFIG, or prefmesh run --resume DIR")
    if override:
        raise InputError("-o changes a config; --resume goes on with the one in the run directory")
    return None, resume


def _launch(
    settings: Any,
    config: Path | None,
    directory: Path,
    override: list[str] | None,
    resume: Path | None,
    restarts: int,
    plugin: list[Path] | None,
    json: bool,
) -> int:
    """The same command in each of the processes; their exit code."""
    from prefmesh.launch import launch
    from prefmesh.metrics import refuse_taken

    if resume is None:
        refuse_taken(directory, otherwise="--resume to go on with a run")
    arguments = ["run", *([str(config)] if config else []), "--resume" if resume else "--out", str(directory)]
    arguments += [*repeated("-o", override), *repeated("--plugin", plugin)]
    count, limit = settings.runtime.processes, settings.runtime.timeout
    return launch(count, [*arguments, *(["--json"] if json else [])], restarts=restarts, limit=limit)
