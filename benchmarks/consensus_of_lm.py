"""The modal law of the consensus error on a language model: predicted from gradients, against what DecDPO shows.

The built-in policy with LoRA, plain SGD with a constant step, 8 residents of the town, five graphs. The law (docs/theory,
section 5.5, with curvature left out: lr h << 1 - lambda) needs the agents' gradients at one model only: their inner
products give what each mode of W carries, the traces of their covariances give the noise. It is read at the average model
of the ring's run in the middle of the rounds that are measured; each graph's e is the mean over the second half.

    python benchmarks/consensus_of_lm.py
"""

import argparse
import json
from typing import Any

import machine
import numpy as np
from scipy.stats import spearmanr

GRAPHS = ("path", "ring", "star", "barbell", "hypercube")
BATCH = 8


def config(graph: str, rounds: int, lr: float) -> Any:
    """DecDPO on the town."""
    from prefmesh.config import ExperimentConfig

    return ExperimentConfig.parse(
        {
            "preferences": {
                "source": "builtin:town",
                "agents": 8,
                "town": {"users": 8, "pairs_per_user": 200, "heterogeneity": 1.0, "temperature": 0.4},
            },
            "policy": {"model": "builtin:tiny", "lora": {"r": 4, "lora_alpha": 8}},
            "objective": {"beta": 0.1},
            "method": {"name": "dec_dpo", "rounds": rounds, "local_steps": 1, "graph": graph},
            "optimizer": {"name": "sgd", "lr": lr, "batch_size": BATCH, "sampling": "with_replacement"},
            "evaluation": {"held_out": 0.1, "samples": 0},
        }
    )


def followed(graph: str, rounds: int, lr: float) -> tuple[np.ndarray, Any, Any]:
    """e of every round, the average model at three quarters of the rounds, and the experiment."""
    from prefmesh.experiment import prepare
    from prefmesh.policies.base import average

    experiment = prepare(config(graph, rounds, lr))
    state = experiment.learner.begin(experiment.start)
    errors, middle = [], None
    for round_ in range(1, rounds + 1):
        state, measures = experiment.learner.round(state, round_)
        errors.append(measures["consensus_error"])
        if round_ == 3 * rounds // 4:
            middle = {name: tensor.clone() for name, tensor in average(state.theta).items()}
    return np.array(errors), middle, experiment


def predicted(experiment: Any, moments: Any, graph: str, lr: float) -> tuple[float, float]:
    """Bias and variance of e, mode by mode."""
    from prefmesh.topology.build import build_mixing_matrix

    w = build_mixing_matrix(graph, "metropolis", 8, experiment.config.seed).matrix.toarray()
    eigenvalues, vectors = np.linalg.eigh(w)
    lam, u = eigenvalues[:-1], vectors[:, :-1]  # the last is the mean's, 1
    pull = np.einsum("ik,ij,jk->k", u, moments.unbiased, u).clip(min=0)
    noise = np.square(u).T @ moments.gradient_noises(BATCH)
    bias = np.sum(np.square(lam * lr / (1 - lam)) * pull) / 8
    variance = np.sum(np.square(lam * lr) * noise / (1 - lam**2)) / 8
    return float(bias), float(variance)


def main() -> None:
    """Follow the five graphs, compare, and write the result."""
    from prefmesh.randomness import generator
    from prefmesh.theory.constants import gradient_moments

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=160)
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--no-store", action="store_true", help="print, and write no result")
    arguments = parser.parse_args()
    seen, moments, experiment = {}, None, None
    for graph in sorted(GRAPHS, key=lambda name: name != "ring"):
        errors, middle, experiment = followed(graph, arguments.rounds, arguments.lr)
        seen[graph] = float(errors[arguments.rounds // 2 :].mean())
        if moments is None:
            moments = gradient_moments(
                experiment.learner.problem,
                middle,
                [agent.train for agent in experiment.division.agents],
                np.full(8, 1 / 8),
                pairs=None,
                random=generator(0, "benchmark moments"),
            )
    rows = []
    for graph, error in seen.items():
        bias, variance = predicted(experiment, moments, graph, arguments.lr)
        rows.append(
            {
                "graph": graph,
                "simulated": error,
                "predicted": bias + variance,
                "bias_share": bias / (bias + variance),
                "simulated_over_predicted": error / (bias + variance),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    order = spearmanr([r["predicted"] for r in rows], [r["simulated"] for r in rows]).statistic
    result = {
        "machine": machine.describe(),
        "rounds": arguments.rounds,
        "lr": arguments.lr,
        "rank_correlation": float(order),
        "rows": rows,
    }
    print(json.dumps(result, indent=2))
    if not arguments.no_store:
        machine.store("consensus_of_lm", result)


if __name__ == "__main__":
    main()
