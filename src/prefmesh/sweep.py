"""Several variants of one experiment over several seeds, run one after the other into one directory."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from prefmesh.config import ExperimentConfig
from prefmesh.errors import Diverged, InputError
from prefmesh.evaluation.statistics import accuracy_interval, clustered_interval
from prefmesh.interruption import Interrupted
from prefmesh.metrics import new_directory, refuse_taken, write_json, write_text
from prefmesh.run import Listener, resume, run
from prefmesh.studies import Sweep, Variant


def run_sweep(
    config: ExperimentConfig,
    sweep: Sweep,
    out: Path,
    *,
    listener: Callable[[str], Listener],
    again: bool = False,
) -> None:
    """Run everything into `out/<variant>/seed_<k>/`. A run that diverges is a result; the others go on.

    `again`: go on with a sweep in `out`, leaving finished runs as they are. Raises `InputError` before anything runs.
    """
    jobs = [
        (variant, seed, config.replace({**variant.changes, "seed": seed}))
        for variant in sweep.variants
        for seed in sweep.seeds
    ]
    described = {
        "title": sweep.title,
        "kind": sweep.kind,
        "x_label": sweep.x_label,
        "seeds": list(sweep.seeds),
        "values": list(sweep.values) if sweep.values else None,
        "variants": [
            {"name": v.name, "label": v.label, "x": v.x, "series": v.series, "overrides": dict(v.changes)}
            for v in sweep.variants
        ],
    }
    path = out / "sweep.json"
    if again:
        asked(out)
        if json.loads(path.read_text(encoding="utf-8")) != described:
            raise InputError(
                f"{out}: found another sweep; allowed: the same config, values and seeds as before"
            )
    else:
        refuse_taken(out, otherwise="--resume to go on with a sweep")

        def begin(directory: Path) -> None:
            write_json(directory / "sweep.json", described)
            write_text(directory / "config.yaml", config.to_yaml())

        new_directory(out, begin)
    # Seeds outside, variants inside: the variants of a seed share data and reference.
    for variant, seed, changed in sorted(jobs, key=lambda job: job[1]):
        where = out / variant.name / f"seed_{seed}"
        heard = listener(f"{variant.label}, seed {seed}" if len(sweep.seeds) > 1 else variant.label)
        try:
            if (where / "config.yaml").is_file():
                resume(where, config=changed, listener=heard, name=variant.name)
            else:
                run(changed, where, listener=heard, name=variant.name)
        except Diverged as error:
            heard.stage(str(error))
        except Interrupted as error:
            raise Interrupted(
                f"{where}: {str(error).partition(';')[0]}; go on with the same command and --resume {out}"
            ) from None
        except InputError:
            if not again and not any(out.glob("*/seed_*")):
                shutil.rmtree(out)  # refused before anything ran: nothing half-written stays
            raise
    write_json(out / "comparison.json", paired_differences(out, sweep))


def asked(out: Path) -> tuple[list[int], list[str] | None]:
    """Seeds and values that the sweep in `out` was started with. Raises `InputError` where there is none."""
    path = out / "sweep.json"
    if not path.is_file():
        raise InputError(
            f"{out}: no sweep to resume (it has no sweep.json); allowed: a directory of compare or study"
        )
    described = json.loads(path.read_text(encoding="utf-8"))
    return described["seeds"], described["values"]


def paired_differences(out: Path, sweep: Sweep) -> dict[str, Any]:
    """Accuracy of each variant minus the first one's on the same held-out pairs, with 95 % intervals clustered by prompt.

    Per variant `difference`, `low`, `high`, `pairs`, `seeds`; variants whose held-out pairs are others are left out.
    Pooled over all variants, `accuracy`, `low`, `high`: for folds, every pair counts once.
    """
    found = {
        variant.name: {
            seed: load_file(path)
            for seed in sweep.seeds
            if (path := out / variant.name / f"seed_{seed}" / "held_out.safetensors").is_file()
        }
        for variant in sweep.variants
    }
    base = found[sweep.variants[0].name]
    differences = {}
    for variant in sweep.variants[1:]:
        if not _same_data(variant, sweep.variants[0]):
            continue
        both = [
            (base[seed], mine)
            for seed, mine in found[variant.name].items()
            if seed in base and np.array_equal(base[seed]["rows"], mine["rows"])
        ]
        if not both:
            continue
        values = np.concatenate([mine["accuracy"] - theirs["accuracy"] for theirs, mine in both])
        mean, low, high = clustered_interval(values, np.concatenate([mine["prompt"] for _, mine in both]))
        differences[variant.name] = {
            "difference": mean,
            "low": low,
            "high": high,
            "pairs": len(values),
            "seeds": len(both),
        }
    runs = [run for seeds in found.values() for run in seeds.values()]
    pooled = None
    if sweep.kind == "study" and runs:
        mean, low, high = accuracy_interval(
            np.concatenate([run["accuracy"] for run in runs]), np.concatenate([run["prompt"] for run in runs])
        )
        pooled = {
            "accuracy": mean,
            "low": low,
            "high": high,
            "pairs": sum(len(run["accuracy"]) for run in runs),
        }
    return {"baseline": sweep.variants[0].name, "differences": differences, "pooled": pooled}


def _same_data(one: Variant, other: Variant) -> bool:
    """Whether two variants differ in their method alone."""
    return _beside_method(one) == _beside_method(other)


def _beside_method(variant: Variant) -> dict[str, Any]:
    return {key: value for key, value in variant.changes.items() if key != "method"}
