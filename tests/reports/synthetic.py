"""Run and sweep directories of exactly the schema that experiments write, made from simple formulas.

Every number has a closed form or a seeded draw, so that tests can say what a report must show.
"""

import json
import math
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import yaml

LN2 = math.log(2)
METHODS = {
    "centralized": {"final": 0.79, "bytes": 0, "label": "Centralized"},
    "fed_full": {"final": 0.785, "bytes": 2_000_000, "label": "FedDPO, all"},
    "fed_partial": {"final": 0.77, "bytes": 1_000_000, "label": "FedDPO, S = 4"},
    "dec_ring": {"final": 0.76, "bytes": 1_500_000, "label": "DecDPO, ring"},
    "local_only": {"final": 0.70, "bytes": 0, "label": "Local only"},
}


def topology(name: str = "ring", agents: int = 8) -> dict[str, Any]:
    """topology.json of a graph with Metropolis weights, as `prefmesh topology --json` prints it."""
    build = {
        "ring": nx.cycle_graph,
        "star": lambda n: nx.star_graph(n - 1),
        "path": nx.path_graph,
        "complete": nx.complete_graph,
    }
    graph = build[name](agents)
    matrix = np.zeros((agents, agents))
    for i, j in graph.edges:
        matrix[i, j] = matrix[j, i] = 1 / (1 + max(graph.degree[i], graph.degree[j]))
    matrix += np.diag(1 - matrix.sum(axis=1))
    eigenvalues = np.sort(np.linalg.eigvalsh(matrix))[::-1]
    rho = float(np.abs(eigenvalues[1:]).max())
    return {
        "graph": name,
        "agents": agents,
        "weights": "metropolis",
        "edges": [list(edge) for edge in graph.edges],
        "rho": rho,
        "spectral_gap": 1 - rho,
        "one_minus_rho_squared": 1 - rho**2,
        "eigenvalues": eigenvalues.tolist(),
        "mixing_matrix": matrix.tolist(),
    }


def metrics(
    *,
    rounds: int = 40,
    every: int = 5,
    final: float = 0.76,
    bytes_per_round: int = 1_500_000,
    consensus: float = 1e-3,
    kl: bool = True,
    shift: float = 0.0,
) -> list[dict[str, Any]]:
    """metrics.jsonl: accuracy rises from one half to `final` + `shift` at the last round, exponentially."""
    rows = []
    for r in range(rounds + 1):
        progress = (1 - math.exp(-4 * r / rounds)) / (1 - math.exp(-4))
        row: dict[str, Any] = {"round": r}
        if r:
            row["loss"] = LN2 - 0.3 * progress + 0.02 * math.sin(7 * r + 100 * shift)
            row["rewards/accuracies"] = 0.5 + 0.3 * progress
            row["rewards/margins"] = 1.2 * progress
        row["lr"] = 2e-4
        row["consensus_error_before_mixing"] = consensus * progress * 4
        row["consensus_error"] = consensus * progress * math.exp(-r / rounds)
        row["lora/mixing_error"] = 0.1 * math.exp(-r / rounds)
        row["bytes_sent"] = bytes_per_round if r else 0
        row["bytes_sent_total"] = bytes_per_round * r
        row["seconds"] = 0.5
        if r % every == 0 or r == rounds:
            row["train_loss"] = LN2 - (0.28 + shift) * progress
            row["grad_norm_sq"] = 0.4 * math.exp(-6 * r / rounds) * (1 + 5 * shift)
            row["eval/loss"] = LN2 - 0.22 * progress
            row["eval/rewards/accuracies"] = 0.5 + (final + shift - 0.5) * progress
            row["eval/rewards/margins"] = (1.1 + shift) * progress
            row["eval/accuracy_worst_tenth"] = 0.5 + (final + shift - 0.62) * progress
            row["eval/users/loss_gap"] = 0.15 * progress
            row["eval/own/rewards/accuracies"] = 0.5 + (final + shift - 0.49) * progress
            if kl:
                row["eval/kl"] = 6 * progress**2
                row["eval/kl_stderr"] = 0.2
                row["eval/win_rate"] = 0.5 + 0.34 * progress
        rows.append(row)
    return rows


def few_metrics(rounds: int = 40, evaluated: int = 40) -> list[dict[str, Any]]:
    """Accuracy alone, at the first and the last of `evaluated` rounds: one figure, so that a report is quick."""
    kept = ("round", "seconds", "eval/rewards/accuracies")
    rows = metrics(rounds=rounds, every=evaluated)[: evaluated + 1]
    return [{key: row[key] for key in kept if key in row} | {"bytes_sent_total": 0} for row in rows]


def agents(
    *, users: int = 40, rounds: int = 40, accuracy: float = 0.76, seed: int = 0
) -> list[dict[str, Any]]:
    """agents.jsonl: users whose true accuracies differ a little, seen through binomial noise."""
    rng = np.random.default_rng(seed)
    rows = []
    for r, level in ((0, 0.5), (rounds, accuracy)):
        pairs = rng.integers(20, 60, size=users)
        truth = np.clip(level + 0.05 * rng.standard_normal(users), 0, 1)
        found = rng.binomial(pairs, truth) / pairs
        rows += [
            {
                "round": r,
                "agent": u // 5,
                "agent_name": f"agent_{u // 5:04d}",
                "user": f"resident_{u:03d}",
                "pairs": int(pairs[u]),
                "accuracy": float(found[u]),
                "margin": float(2 * found[u] - 1),
                "own_accuracy": float(found[u]),
                "win_rate": 0.8,
            }
            for u in range(users)
        ]
    return rows


def write_run(
    directory: Path,
    *,
    name: str = "dec_dpo",
    method: str = "dec_dpo",
    status: str | None = "done",
    seed: int = 0,
    rows: list[dict[str, Any]] | None = None,
    people: list[dict[str, Any]] | None = None,
    graph: dict[str, Any] | None = None,
    ceiling: dict[str, float] | None = None,
    rounds: int = 40,
) -> Path:
    """A run directory; `status` None leaves summary.json out, as while a run goes on."""
    rows = metrics(rounds=rounds) if rows is None else rows
    people = agents(rounds=rounds, seed=seed) if people is None else people
    directory.mkdir(parents=True)
    config = {
        "seed": seed,
        "method": {"name": method, "rounds": rounds, "local_steps": 3},
        "optimizer": {"lr": 2e-4},
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    environment = {
        "python": "3.11.4",
        "torch": "2.13.0",
        "hardware": {"cpu": "a processor", "cores": 2},
        "seed": seed,
    }
    (directory / "environment.json").write_text(json.dumps(environment))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "agents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in people))
    if graph is not None:
        (directory / "topology.json").write_text(json.dumps(graph))
    if status is not None:
        evaluated = [row for row in rows if "eval/rewards/accuracies" in row]
        headline = "own" if method == "local_only" else "average"
        key = "eval/own/rewards/accuracies" if headline == "own" else "eval/rewards/accuracies"
        accuracy = (evaluated[-1].get(key) if evaluated else None) or 0.5
        summary = {
            "name": name,
            "method": method,
            "status": status,
            "seed": seed,
            "rounds": rounds,
            "agents": 8,
            "users": 40,
            "held_out_pairs": 5000,
            "final": {k: v for k, v in (evaluated[-1] if evaluated else {}).items() if k.startswith("eval/")},
            "ceiling": ceiling,
            "bytes_sent_total": rows[-1]["bytes_sent_total"] if rows else 0,
            "seconds": 20.0,
            "accuracy_interval": [accuracy - 0.012, accuracy + 0.012],
            "headline": headline,
            "leakage": {"held_out_prompts_in_training": 0.0, "held_out_completions_in_training": 0.031},
        }
        (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def write_compare(directory: Path, *, seeds: tuple[int, ...] = (0, 1, 2), skip: tuple[str, ...] = ()) -> Path:
    """The paper's comparison; runs named in `skip` (`variant/seed_k`) have not started."""
    ceiling = {"own": 0.852, "consensus": 0.806}
    for name, spec in METHODS.items():
        for seed in seeds:
            if f"{name}/seed_{seed}" in skip:
                continue
            shift = 0.01 * (seed - 1) * (1 if name == "fed_full" else 0.6)
            write_run(
                directory / name / f"seed_{seed}",
                name=name,
                method={"fed_full": "fed_dpo", "fed_partial": "fed_dpo", "dec_ring": "dec_dpo"}.get(
                    name, name
                ),
                seed=seed,
                rows=metrics(
                    final=spec["final"],
                    bytes_per_round=spec["bytes"],
                    consensus={"dec_ring": 1e-3, "local_only": 0.05}.get(name, 0.0),
                    shift=shift,
                ),
                people=agents(accuracy=spec["final"], seed=seed),
                graph=topology() if name == "dec_ring" else None,
                ceiling=ceiling,
            )
    sweep = {
        "title": "Centralized, federated and decentralized DPO on the town",
        "kind": "compare",
        "variants": [
            {"name": name, "label": spec["label"], "x": None, "overrides": {"method.name": name}}
            for name, spec in METHODS.items()
        ],
        "seeds": list(seeds),
    }
    (directory / "sweep.json").write_text(json.dumps(sweep))
    return directory


def write_study(
    directory: Path,
    *,
    rows: list[dict[str, Any]] | None = None,
    people: list[dict[str, Any]] | None = None,
    xs: tuple[float | None, ...] = (1, 2, 4, 8),
    labels: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (0, 1, 2),
) -> Path:
    """A study of local steps (numbers) or, with None for every x, of graphs (categories)."""
    labels = labels or tuple(f"E = {x:g}" for x in xs)
    names = [f"v{i}" for i in range(len(xs))]
    for i, name in enumerate(names):
        for seed in seeds:
            write_run(
                directory / name / f"seed_{seed}",
                name=name,
                seed=seed,
                rows=rows or metrics(final=0.70 + 0.02 * i, consensus=1e-4 * 4**i, shift=0.01 * (seed - 1)),
                people=people,
                graph=topology(labels[i]) if labels[i] in ("ring", "star", "path", "complete") else None,
                ceiling={"own": 0.85, "consensus": 0.85 - 0.02 * i},
            )
    sweep = {
        "title": "Study: local steps" if xs[0] is not None else "Study: topology",
        "kind": "study",
        "variants": [
            {"name": n, "label": label, "x": x, "overrides": {"method.local_steps": x}}
            for n, label, x in zip(names, labels, xs, strict=True)
        ],
        "seeds": list(seeds),
        "x_label": "local steps E" if xs[0] is not None else "graph",
    }
    (directory / "sweep.json").write_text(json.dumps(sweep))
    return directory
