"""The command line. Everything heavy is imported inside a command, so that help comes at once."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from prefmesh.cli_bench import bench_commands
from prefmesh.cli_options import (
    AsJson,
    Out,
    Overrides,
    Plugins,
    Resume,
    Seeds,
    listed,
    load,
    load_plugins,
    new_run_directory,
    show_results,
)
from prefmesh.cli_run import run
from prefmesh.cli_theory import theory_commands

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # stack traces of sockets, for what we say in a line
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its hints are for callers of its own functions

app = typer.Typer(
    name="prefmesh",
    help="Align one language model by DPO with the preferences of many agents: pooled, federated or over a graph.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(bench_commands)
app.add_typer(theory_commands)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("prefmesh"))
        raise typer.Exit


app.command(short_help="Train one policy; leaves a run directory with a report.")(run)


@app.command(short_help="Centralized, FedDPO, DecDPO and local-only in one table.")
def compare(
    config: Annotated[
        Path | None, typer.Argument(help="The experiment's YAML file; not needed with --resume.")
    ] = None,
    out: Out = None,
    override: Overrides = None,
    seeds: Seeds = None,
    resume: Resume = None,
    plugin: Plugins = None,
    json: AsJson = False,
) -> None:
    """The paper's comparison: centralized, FedDPO (all, some), DecDPO and local-only, in one table and report.

    \b
    Example: prefmesh compare examples/town.yaml --seeds 0,1,2
    """
    from prefmesh.studies import comparison
    from prefmesh.sweep import asked

    load_plugins(plugin)
    wanted = _asked("compare", config, out, override, seeds, resume, asked)
    _sweep(lambda a: comparison(a.settings, a.seeds), wanted, json)


@app.command(short_help="One of the paper's ablations, over several seeds.")
def study(
    name: Annotated[
        str,
        typer.Argument(
            help="local-steps, participation, topology, staleness, heterogeneity, methods, lora-mixing, folds, or paper: the comparison and the "
            "paper's four ablations, with their figures on one page."
        ),
    ],
    config: Annotated[
        Path | None, typer.Argument(help="The experiment's YAML file; not needed with --resume.")
    ] = None,
    out: Out = None,
    override: Overrides = None,
    values: Annotated[
        str | None, typer.Option("--values", metavar="A,B,...", help="Instead of the study's own values.")
    ] = None,
    seeds: Seeds = None,
    resume: Resume = None,
    plugin: Plugins = None,
    json: AsJson = False,
) -> None:
    """One of the paper's ablations over several seeds: mean and standard deviation of every measure.

    \b
    Example: prefmesh study topology examples/town.yaml --values ring,star,complete
    Example: prefmesh study paper examples/town.yaml
    """
    from prefmesh import studies, sweep
    from prefmesh.errors import InputError
    from prefmesh.paper import paper_seeds

    load_plugins(plugin)
    if name == "paper":
        if values is not None:
            raise InputError(
                "--values: the paper's studies have values of their own; allowed: one study's name"
            )
        wanted = _asked(
            "study-paper", config, out, override, seeds, resume, lambda place: (paper_seeds(place), None)
        )
        _paper(wanted, json)
        return
    given = listed(values) if values else None
    wanted = _asked(f"study-{name}", config, out, override, seeds, resume, sweep.asked)
    _sweep(lambda a: studies.study(name, a.settings, a.seeds, given or a.values), wanted, json)


@app.command(short_help="A graph's mixing matrix, its spectrum, and a drawing.")
def topology(
    graph: Annotated[str, typer.Argument(help="A graph's name, such as ring, or YAML with options.")],
    agents: Annotated[int, typer.Option("--agents", "-n", help="How many nodes.")] = 8,
    weights: Annotated[
        str, typer.Option("--weights", "-w", help="How the mixing matrix is made.")
    ] = "metropolis",
    seed: Annotated[int, typer.Option("--seed", help="For random graphs.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="The drawing: .svg, .png or .pdf. Default: GRAPH-AGENTS.svg"
        ),
    ] = None,
    plugin: Plugins = None,
    json: AsJson = False,
) -> None:
    """A graph's mixing matrix: rho, spectral gap, eigenvalues, and a drawing.

    \b
    Example: prefmesh topology star --agents 8 --weights metropolis --json
    Example: prefmesh topology "{name: erdos_renyi, p: 0.3}" --agents 20
    """
    import yaml

    from prefmesh import terminal
    from prefmesh.errors import InputError
    from prefmesh.topology.build import build_mixing_matrix
    from prefmesh.topology.describe import description, table
    from prefmesh.topology.drawing import draw
    from prefmesh.topology.settings import GraphSettings

    load_plugins(plugin)
    try:
        given = GraphSettings.model_validate(yaml.safe_load(graph))
    except (yaml.YAMLError, ValueError):
        raise InputError(
            f"graph: found {graph!r}; allowed: a name, or YAML such as {{name: erdos_renyi, p: 0.3}}"
        ) from None
    mixing = build_mixing_matrix(given, weights, agents, seed, key_prefix="")
    if json:
        if out is not None:
            draw(mixing, out)
        terminal.print_json(description(mixing))
        return
    path = out or Path(f"{mixing.settings.name}-{agents}.svg")
    draw(mixing, path)
    terminal.out.print(table(mixing))
    terminal.said(path)


@app.command(short_help="What is in preference data, and how agents differ.")
def data(
    file: Annotated[
        str, typer.Argument(help="A data file, builtin:town, a hub id, or an experiment's YAML file.")
    ],
    override: Overrides = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", metavar="MODEL", help="Count tokens with this model's tokenizer."),
    ] = None,
    plugin: Plugins = None,
    json: AsJson = False,
) -> None:
    """What is in preference data: rows, users, lengths, disagreement, label noise, bad rows, how agents differ.

    Bad rows are counted and shown, not refused.

    \b
    Example: prefmesh data answers.jsonl --tokenizer builtin:tiny
    Example: prefmesh data examples/hh.yaml -o preferences.agents=2
    """
    from prefmesh import terminal
    from prefmesh.inspection import inspect_data
    from prefmesh.preferences.summary_tables import tables

    load_plugins(plugin)
    summary = inspect_data(file, list(override or []), tokenizer)
    if json:
        terminal.print_json(summary.to_json())
        return
    for table in tables(summary):
        terminal.out.print(table)


@app.command(short_help="Make a small reference policy from the data's own texts.")
def warmstart(
    data: Annotated[
        str, typer.Option("--data", metavar="FILE", help="Preference data in any form that `run` reads.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new directory for the model.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens of the byte-level BPE tokenizer.")] = 4096,
    width: Annotated[int, typer.Option(help="Hidden size.")] = 160,
    layers: Annotated[int, typer.Option(help="Transformer blocks.")] = 6,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 4,
    max_length: Annotated[
        int, typer.Option(help="Longest text in tokens; of a longer one the end is kept.")
    ] = 256,
    epochs: Annotated[int, typer.Option(help="Passes of language modelling over all texts.")] = 2,
    sft_epochs: Annotated[
        int, typer.Option(help="Passes of fine-tuning on chosen completions; 0 for none.")
    ] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    batch_tokens: Annotated[int, typer.Option(help="Tokens per step.")] = 4096,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    override: Overrides = None,
    plugin: Plugins = None,
    json: AsJson = False,
) -> None:
    """Make a small reference policy from the data's own texts: tokenizer, language model, SFT on chosen.

    For machines without a model hub. Leaves an ordinary Hugging Face directory. Of an experiment's YAML file only the
    training pairs are read, so that nothing held out is known to the reference.

    \b
    Example: prefmesh warmstart --data answers.jsonl --out models/own
    Example: prefmesh warmstart --data examples/hh.yaml --out models/hh
    """
    from dataclasses import asdict

    from prefmesh import terminal
    from prefmesh.config import validated
    from prefmesh.inspection import read_data
    from prefmesh.policies.warmstart import WarmstartSettings, warmstart

    load_plugins(plugin)
    given = {
        "vocab_size": vocab_size, "width": width, "layers": layers, "heads": heads, "max_length": max_length,
        "epochs": epochs, "sft_epochs": sft_epochs, "lr": lr, "batch_tokens": batch_tokens,
    }  # fmt: skip
    settings = validated(WarmstartSettings, given, "warmstart")
    pairs = read_data(data, list(override or []))
    with terminal.warmstart_progress() as progress:
        made = warmstart(pairs, out, settings, seed=seed, progress=progress)
    if json:
        terminal.print_json(asdict(made))
    else:
        terminal.out.print(
            f"{made.parameters:,} parameters, {made.vocab_size:,} tokens, from {made.texts:,} texts"
        )
        terminal.said(out)


@app.command(name="eval", short_help="A run's policy on other data, in all and per user.")
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    data: Annotated[
        str, typer.Option("--data", metavar="FILE", help="Preference data to judge the policy on.")
    ],
    override: Overrides = None,
    plugin: Plugins = None,
    json: AsJson = False,
) -> None:
    """A run's policy on other data: accuracy and margins, in all and per user.

    All pairs of a data file count: name one that the run was not trained on. Of an experiment's YAML file, those that
    it holds out.

    \b
    Example: prefmesh eval runs/first --data other.jsonl
    """
    from prefmesh import terminal
    from prefmesh.inspection import evaluate_run, evaluation_tables

    load_plugins(plugin)
    with terminal.progress() as listener:
        found = evaluate_run(run, data, list(override or []), listener("eval").stage)
    if json:
        terminal.print_json(found)
        return
    for table in evaluation_tables(found):
        terminal.out.print(table)


@app.command(short_help="Adapters for new users, from k pairs of each.")
def personalize(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    data: Annotated[
        str, typer.Option("--data", metavar="FILE", help="Preferences of users who were no part of the run.")
    ],
    pairs: Annotated[
        str, typer.Option("--pairs", metavar="K,K,...", help="How many pairs of each user to learn from.")
    ] = "1,4,16",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimiser steps of each user.")] = 10,
    lr: Annotated[float | None, typer.Option("--lr", help="Step size. Default: the run's.")] = None,
    out: Out = None,
    override: Overrides = None,
    plugin: Plugins = None,
    json: AsJson = False,
) -> None:
    """Cold start: an adapter for each new user from k pairs, judged on the user's other pairs.

    A user starts from the run's policy (of an agent or a group, where it has several) with the least loss on the k
    pairs, and trains as agents did. DIR keeps the adapters of the largest k.

    \b
    Example: prefmesh personalize runs/first --data new.jsonl --pairs 1,4,16
    """
    from prefmesh import terminal
    from prefmesh.errors import InputError
    from prefmesh.personalize import personal_tables
    from prefmesh.personalize import personalize as learn

    load_plugins(plugin)
    try:
        numbers = [int(number) for number in listed(pairs)]
    except ValueError:
        raise InputError(f"--pairs: found {pairs!r}; allowed: whole numbers separated by commas") from None
    directory = out or new_run_directory(f"{run.name}-personalize")
    with terminal.progress() as listener:
        say = listener("personalize").stage
        found = learn(run, data, list(override or []), directory, pairs=numbers, steps=steps, lr=lr, say=say)
    if json:
        terminal.print_json(found)
        return
    for table in personal_tables(found):
        terminal.out.print(table)
    terminal.said(directory)


@app.command(short_help="Write a directory's figures and report.html anew.")
def report(
    directory: Annotated[Path, typer.Argument(help="A run directory, or one of compare or study.")],
    json: AsJson = False,
) -> None:
    """Write figures and report.html anew, from what the directory holds.

    \b
    Example: prefmesh report runs/first
    """
    show_results(directory, json)


@app.command(short_help="What is installed, and what is missing for what.")
def doctor(json: AsJson = False) -> None:
    """What is installed, which devices there are, and what is missing for what.

    \b
    Example: prefmesh doctor
    """
    from prefmesh import terminal
    from prefmesh.doctor import examine, table

    found = examine()
    if json:
        terminal.print_json(found)
    else:
        terminal.out.print(table(found))


def main() -> None:
    """The `prefmesh` command."""
    from prefmesh.terminal import guarded

    sys.exit(guarded(lambda: app(standalone_mode=False, prog_name="prefmesh")))


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What several runs are asked for, with what a directory to resume remembers."""

    settings: Any
    seeds: list[int]
    values: list[str] | None
    directory: Path
    again: bool


def _asked(
    name: str,
    config: Path | None,
    out: Path | None,
    override: list[str] | None,
    seeds: str | None,
    resume: Path | None,
    remembered: Callable[[Path], tuple[list[int], list[str] | None]],
) -> _Asked:
    from prefmesh.errors import InputError

    if out is not None and resume is not None:
        raise InputError("--out names a new directory; --resume goes on in its own: one of the two")
    if config is None and resume is not None:
        # A sweep keeps the config that it varies.
        config = resume / "config.yaml"
    if config is None:
        raise InputError(
            f"no config was given; an example: prefmesh {name.replace('-', ' ', 1)} examples/town.yaml"
        )
    settings = load(config, override)
    if settings.runtime.processes > 1:
        raise InputError(
            f"runtime.processes: {settings.runtime.processes}, but only prefmesh run shares agents among processes; allowed: 1"
        )
    # What was asked for at the start need not be said again.
    before, values = remembered(resume) if resume is not None else (None, None)
    usual = "0" if name == "compare" else "0,1,2"
    seeds = seeds or (usual if before is None else ",".join(map(str, before)))
    try:
        numbers = [int(seed) for seed in listed(seeds)]
    except ValueError:
        raise InputError(f"--seeds: found {seeds!r}; allowed: whole numbers separated by commas") from None
    if not numbers or len(set(numbers)) < len(numbers):
        raise InputError(f"--seeds: found {seeds!r}; allowed: at least one seed, each once")
    return _Asked(
        settings=settings,
        seeds=numbers,
        values=values,
        directory=resume or out or new_run_directory(f"{config.stem}-{name}"),
        again=resume is not None,
    )


def _sweep(make: Callable[[_Asked], Any], wanted: _Asked, json: bool) -> None:
    from prefmesh import terminal
    from prefmesh.sweep import run_sweep

    with terminal.progress() as listener:
        run_sweep(wanted.settings, make(wanted), wanted.directory, listener=listener, again=wanted.again)
    show_results(wanted.directory, json)


def _paper(wanted: _Asked, json: bool) -> None:
    from prefmesh import terminal
    from prefmesh.paper import run_paper

    with terminal.progress() as listener:
        page = run_paper(
            wanted.settings, wanted.directory, wanted.seeds, listener=listener, again=wanted.again
        )
    if json:
        terminal.print_json({"directory": str(wanted.directory), "page": str(page)})
    else:
        terminal.said(page)


if __name__ == "__main__":
    main()
