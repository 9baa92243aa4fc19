"""DecDPO's stationary law against simulation: 10 graphs x 3 heterogeneities, 8 to 32 agents.

Each setting is simulated by the training algorithm itself, `REPLICAS` times side by side; the standard error is that of
means over batches of 1,000 rounds. Features are scaled so that the smoothness is 1. Rows are written as they come, and
the ratio is drawn against the step size at the end.

    python benchmarks/stationary_law.py
    python benchmarks/stationary_law.py --step 0.05 --local-steps 4 --rounds 2000
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import machine
import numpy as np

from prefmesh.reports import style
from prefmesh.reports.svg import figure_bytes
from prefmesh.theory import LogLinearProblem, laws
from prefmesh.theory.problem import NoOptimum
from prefmesh.theory.simulate import Ensemble, Member, period, stationary_consensus_errors
from prefmesh.topology.build import build_mixing_matrix

GRAPHS = {
    "path": 8,
    "ring": 12,
    "star": 8,
    "barbell": 10,
    "grid": 16,
    "hypercube": 16,
    "exponential": 12,
    "random_regular": 32,
    "tree": 15,
    "erdos_renyi": 20,
}
HETEROGENEITIES = (0.0, 0.5, 2.0)
DIM, PAIRS, BATCH, BATCH_ROUNDS, REPLICAS = 3, 24, 2, 1000, 4
CURVATURE = 0.15
LAWS = "first_order", "hessian_noise", "gaussian"
NAMES = "first order in the step", "with the minibatch's Hessian", "Gaussian closure"
# Step, E, rounds, burn-in. Larger steps forget sooner, and are asked to less.
SETTINGS = (
    *((step, local_steps, 20_000, 4_000) for local_steps in (1, 4) for step in (0.01, 0.05)),
    *((step, 1, 5_000, 500) for step in (0.1, 0.2, 0.5, 1.0)),
)


def problem(agents: int, heterogeneity: float, seed: int) -> LogLinearProblem:
    """Users with tastes `heterogeneity` apart; with 0, they judge the same pairs alike. Smoothness 1.

    Drawn again until the curvature at the optimum is at least `CURVATURE`: the burn-in starts at theta = 0.
    """
    random = np.random.default_rng(seed)
    while True:
        common = random.normal(size=DIM) / 2
        shared, answers = random.normal(size=(PAIRS, DIM)), random.logistic(size=PAIRS)
        shards = []
        for _ in range(agents):
            x, noise = shared, answers
            if heterogeneity:
                x, noise = random.normal(size=(PAIRS, DIM)), random.logistic(size=PAIRS)
            taste = common + heterogeneity * random.normal(size=DIM)
            shards.append(np.where((x @ taste + noise > 0)[:, None], x, -x))
        scale = LogLinearProblem(shards, 1.0).smoothness() ** -0.5
        found = LogLinearProblem([x * scale for x in shards], 1.0)
        try:
            if found.strong_convexity(found.optimum()) >= CURVATURE:
                return found
        except NoOptimum:
            continue


def simulated(members: list[Member], step: float, local_steps: int, rounds: int, burn_in: int) -> np.ndarray:
    """Consensus errors (members, batches): means over batches of rounds after the burn-in."""
    ensemble = Ensemble(
        members, step, rounds=burn_in + rounds, local_steps=local_steps, batch_size=BATCH, seed=1
    )
    return stationary_consensus_errors(
        ensemble, burn_in=burn_in, batches=max(1, rounds // BATCH_ROUNDS), theta0=np.zeros(DIM)
    )


def compared(step: float, local_steps: int, rounds: int, burn_in: int, replicas: int) -> dict[str, Any]:
    """Every graph and heterogeneity at one step size."""
    settings = [(graph, het) for graph in GRAPHS for het in HETEROGENEITIES]
    members, predicted, bias_share = [], [], []
    for k, (graph, het) in enumerate(settings):
        agents = GRAPHS[graph]
        own = problem(agents, het, seed=k)
        w = build_mixing_matrix(
            graph, "uniform" if graph == "exponential" else "metropolis", agents, 0
        ).matrix
        members += [Member(own, "dec_dpo", mixing=period(w, agents))] * replicas
        law = laws.dec_dpo_stationary(own, w, step, BATCH, local_steps)
        first_order = laws.dec_dpo_stationary(own, w, step, BATCH, local_steps, hessian_noise=False)
        gaussian = laws.dec_dpo_gaussian(own, w, step, BATCH, local_steps)
        bias_share.append(law.bias / law.consensus_error)
        predicted.append([found.consensus_error for found in (first_order, law, gaussian)])
    started = time.perf_counter()
    error = simulated(members, step, local_steps, rounds, burn_in).reshape(len(settings), -1)
    seconds = time.perf_counter() - started
    mean, standard_error = error.mean(1), error.std(1, ddof=1) / np.sqrt(error.shape[1])
    ratios = mean[:, None] / np.array(predicted)
    rows = [
        {
            "graph": graph,
            "agents": GRAPHS[graph],
            "heterogeneity": het,
            "bias_share": bias_share[k],
            "simulated": mean[k],
            "standard_error": standard_error[k] / mean[k],
        }
        | {f"simulated_over_{law}": float(ratios[k, i]) for i, law in enumerate(LAWS)}
        for k, (graph, het) in enumerate(settings)
    ]
    return {
        "step": step,
        "local_steps": local_steps,
        "rounds": rounds,
        "replicas": replicas,
        "seconds": seconds,
        "range": {law: [float(ratios[:, i].min()), float(ratios[:, i].max())] for i, law in enumerate(LAWS)},
        "largest_standard_error": float(max(row["standard_error"] for row in rows)),
        "rows": rows,
    }


def drawn(found: list[dict[str, Any]], path: Path) -> None:
    """Simulated / predicted against eta Lam, E = 1: the median over settings, and their range as bars."""
    found = sorted((one for one in found if one["local_steps"] == 1), key=lambda one: one["step"])
    steps = np.array([one["step"] for one in found])
    with style.house_style():
        figure, axes = style.new_figure("DecDPO's stationary consensus error", rows_below=3)
        entries = []
        for i, law in enumerate(LAWS):
            ratios = np.array([[row[f"simulated_over_{law}"] for row in one["rows"]] for one in found])
            middle = np.median(ratios, axis=1)
            look = style.line_style(i)
            handle, *_ = axes.errorbar(
                steps * 1.03 ** (i - 1), middle, yerr=[middle - ratios.min(1), ratios.max(1) - middle], capsize=2, **look
            )  # fmt: skip
            entries.append((handle, NAMES[i]))
        axes.set(xscale="log", xlabel="lr times smoothness", ylabel="simulated / predicted")
        axes.set_xticks(steps, [f"{step:g}" for step in steps])
        axes.minorticks_off()
        style.add_legend(figure, entries)
        path.write_bytes(figure_bytes(figure, "svg"))


def main() -> None:
    """Compare, print, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--step", type=float, help="lr times the smoothness: this setting alone, not stored")
    parser.add_argument("--local-steps", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20_000)
    parser.add_argument("--burn-in", type=int, default=4_000)
    arguments = parser.parse_args()
    alone = [(arguments.step, arguments.local_steps, arguments.rounds, arguments.burn_in)]
    found = []
    for step, local_steps, rounds, burn_in in alone if arguments.step else SETTINGS:
        found.append(compared(step, local_steps, rounds, burn_in, REPLICAS))
        for row in found[-1]["rows"]:
            print(json.dumps(row))
        print(json.dumps({k: v for k, v in found[-1].items() if k != "rows"}), flush=True)
        if not arguments.step:
            machine.store("stationary_law", {"machine": machine.describe(), "settings": found})
    if not arguments.step:
        drawn(found, machine.RESULTS / "stationary_law.svg")


if __name__ == "__main__":
    main()
