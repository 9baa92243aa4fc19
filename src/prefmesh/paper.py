"""All of the paper's experiments on one config: the comparison and the four ablations, and a page of their figures."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from prefmesh import reports
from prefmesh.config import ExperimentConfig
from prefmesh.errors import InputError
from prefmesh.metrics import new_directory, refuse_taken, write_json, write_text
from prefmesh.reports.paper import write_paper_page
from prefmesh.run import Listener
from prefmesh.studies import Sweep, comparison, study
from prefmesh.sweep import run_sweep

GRAPHS = ("path", "ring", "star", "complete")
"""The paper's own; a study of graphs alone has more."""


def parts(config: ExperimentConfig, seeds: Sequence[int]) -> dict[str, Sweep]:
    """What is run, by the name of its sub-directory."""
    return {
        "compare": comparison(config, seeds),
        "local-steps": study("local-steps", config, seeds),
        "participation": study("participation", config, seeds),
        "topology": study("topology", config, seeds, GRAPHS),
        "staleness": study("staleness", config, seeds),
    }


def run_paper(
    config: ExperimentConfig,
    out: Path,
    seeds: Sequence[int],
    *,
    listener: Callable[[str], Listener],
    again: bool = False,
) -> Path:
    """Run everything into `out/<part>/`, each with its report; the path of `index.html`.

    `again`: go on with what was started in `out`. Raises `InputError` before anything runs.
    """
    made = parts(config, seeds)
    if again:
        if paper_seeds(out) != list(seeds):
            raise InputError(f"{out}: started with seeds {paper_seeds(out)}; allowed: the same")
    else:
        refuse_taken(out, otherwise="--resume to go on with it")

        def begin(directory: Path) -> None:
            write_json(directory / "paper.json", {"seeds": list(seeds), "parts": list(made)})
            write_text(directory / "config.yaml", config.to_yaml())

        new_directory(out, begin)
    for part, sweep in made.items():
        where = out / part
        run_sweep(config, sweep, where, listener=listener, again=(where / "sweep.json").is_file())
        reports.write_report(where)
    return write_paper_page(out, list(made), config=config.to_yaml())


def paper_seeds(out: Path) -> list[int]:
    """The seeds that `out` was started with. Raises `InputError` where nothing was started."""
    path = out / "paper.json"
    if not path.is_file():
        raise InputError(
            f"{out}: nothing to resume (it has no paper.json); allowed: a directory of study paper"
        )
    return json.loads(path.read_text(encoding="utf-8"))["seeds"]
