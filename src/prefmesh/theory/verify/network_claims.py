"""Claims about the network: weights on its links, who sits where, and seconds (docs/theory, sections 6 and 7)."""

from typing import Any

import numpy as np

from prefmesh.algorithms.methods import Population
from prefmesh.algorithms.methods.dec_dpo import DecDPO, DecDPOSettings
from prefmesh.algorithms.methods.fed_dpo import FedDPO, FedDPOSettings
from prefmesh.randomness import generator
from prefmesh.theory import clock, laws, placement, simulate
from prefmesh.theory.problem import LogLinearProblem
from prefmesh.theory.verify.claim import Effort, Finding, Plot, Series, claim, furthest_from_one
from prefmesh.theory.verify.law_claims import users
from prefmesh.topology.build import build_mixing_matrix

AGENTS, LR = 10, 0.05
GRAPHS = ("path", "tree", "barbell", "grid")


@claim(
    "Fastest-mixing weights",
    "Weights that minimise rho also leave a smaller consensus error than Metropolis weights where users' disagreement lies in no "
    "particular order.",
    of="log-linear, own pairs, full batches",
    where="docs/theory, section 6.1",
)
def fastest_weights(effort: Effort) -> Finding:
    """Exact e under the fastest weights over e under Metropolis, the mean over problems; the graph where it is largest."""
    problems = [users(AGENTS, 0.5, effort.seed + k) for k in range(effort.pick(6, 20))]
    ratios = {}
    for graph in GRAPHS:
        fast, usual = (
            build_mixing_matrix(graph, weights, AGENTS, 0).matrix for weights in ("fastest", "metropolis")
        )
        ratios[graph] = np.array([_settled(p, fast) / _settled(p, usual) for p in problems])
    mean = {graph: float(found.mean()) for graph, found in ratios.items()}
    worst = max(mean, key=lambda graph: mean[graph])
    count = len(problems)
    return Finding(
        kind="at most",
        predicted=1.0,
        measured=mean[worst],
        error=float(ratios[worst].std(ddof=1) / np.sqrt(count)),
        note="Consensus error under fastest weights over that under Metropolis: "
        + ", ".join(f"{graph} {value:.2f}" for graph, value in mean.items())
        + f"; means over {count} problems of {AGENTS} users.",
        plot=Plot(
            x_label="problem",
            y_label="fastest / Metropolis",
            series=[
                Series(label="as Metropolis", x=[1, count], y=[1, 1]),
                *(
                    Series(label=graph, x=list(range(1, count + 1)), y=found.tolist(), kind="points")
                    for graph, found in ratios.items()
                ),
            ],
            log_y=True,
        ),
    )


@claim(
    "Seats by the law",
    "Seating users by the first-order law leaves a smaller consensus error than a random seating.",
    of="log-linear, own pairs, full batches",
    where="docs/theory, section 6.3",
)
def seats(effort: Effort) -> Finding:
    """Exact e of the chosen seats over the mean of random seats; the graph where it is largest."""
    problem, draws = users(AGENTS, 1.0, effort.seed), effort.pick(10, 40)
    star = problem.optimum()
    gradients = problem.agent_gradients(star)
    h = placement.disagreement_curvature(gradients, problem.agent_hessians(star))
    random = generator(effort.seed, "verify/seats")
    shares, errors, chosen, drawn = {}, {}, [], []
    for graph in GRAPHS:
        w = build_mixing_matrix(graph, "metropolis", AGENTS, 0).matrix.toarray()
        found = placement.place(w, gradients, LR, h, seed=effort.seed)
        chosen.append(_settled(problem, placement.seated(w, found.users)))
        others = np.array(
            [_settled(problem, placement.seated(w, random.permutation(AGENTS))) for _ in range(draws)]
        )
        drawn.append(others)
        shares[graph] = float(chosen[-1] / others.mean())
        errors[graph] = shares[graph] * float(others.std(ddof=1) / np.sqrt(draws) / others.mean())
    worst = max(shares, key=lambda graph: shares[graph])
    numbers = [float(i) for i in range(1, len(GRAPHS) + 1)]
    return Finding(
        kind="at most",
        predicted=1.0,
        measured=shares[worst],
        error=errors[worst],
        note="Consensus error of the chosen seats over the mean of random ones: "
        + ", ".join(f"{graph} {value:.2f}" for graph, value in shares.items())
        + f"; {draws} random seatings each.",
        plot=Plot(
            x_label=", ".join(f"{i:g} {graph}" for i, graph in zip(numbers, GRAPHS, strict=True)),
            y_label="consensus error",
            series=[
                Series(label="seats by the law", x=numbers, y=chosen, kind="points"),
                Series(
                    label="random seats",
                    x=[i + 0.05 for i in numbers for _ in range(draws)],
                    y=np.concatenate(drawn).tolist(),
                    kind="points",
                ),
            ],
            log_y=True,
        ),
    )


def _settled(problem: LogLinearProblem, w: simulate.Matrix) -> float:
    """The consensus error at which full batches come to rest (exact, section 5.1, and no simulation)."""
    return simulate.consensus_error(laws.dec_dpo_fixed_point(problem, w, LR))


@claim(
    "Seconds of a federated round",
    "With random compute times and two slow devices, the event clock's mean round takes the closed form's seconds.",
    of="FedDPO, S of 10, exponential and log-normal times",
    where="docs/theory, eq. (7.2)",
)
def federated_seconds(effort: Effort) -> Finding:
    """Simulated over predicted, S = 2, 5, 10 and two distributions: the one furthest from 1."""
    rounds = effort.pick(10_000, 40_000)
    step = np.where(np.arange(AGENTS) < 2, 0.5, 0.1)  # two slow devices
    links, size = clock.Links(bandwidth=1e7, latency=0.02), 1e6
    common: dict[str, Any] = {"rounds": rounds, "local_steps": 3}
    seen, predicted, error, labels = [], [], [], []
    for distribution in ("exponential", "lognormal"):
        devices = clock.Devices(seconds_per_step=step, distribution=distribution)
        for s in (2, 5, AGENTS):
            method = FedDPO(
                FedDPOSettings(name="fed_dpo", participation=s, **common), _population(effort.seed)
            )
            lengths = np.diff(clock.round_ends(method, devices, links, size, effort.seed))
            seen.append(float(lengths.mean()))
            error.append(float(lengths.std(ddof=1) / np.sqrt(rounds)))
            predicted.append(clock.federated_seconds(method, devices, links, size))
            labels.append(f"S = {s}, {distribution}")
    return furthest_from_one(
        predicted,
        seen,
        error,
        labels,
        tolerance=0.03,
        axes=("predicted seconds a round", "clock's seconds a round"),
        names=("closed form", "event clock"),
    )


@claim(
    "Seconds of a gossip round",
    "In constant time, a round of gossip takes the largest mean over the graph's cycles: a slow link delays its neighbours, and in the "
    "long run all.",
    of="DecDPO, five graphs, one slow link and unequal devices",
    where="docs/theory, eq. (7.5)",
)
def gossip_seconds(effort: Effort) -> Finding:
    """Simulated over predicted; the graph furthest from 1. No randomness but in the devices' speeds."""
    rounds = 400
    step = generator(effort.seed, "verify/devices").uniform(0.05, 0.5, size=AGENTS)
    devices = clock.Devices(seconds_per_step=step)
    links = clock.Links(bandwidth=1e7, latency=0.02, slow={(0, 1): 10.0})
    common: dict[str, Any] = {"rounds": rounds, "local_steps": 3}
    seen, predicted = [], []
    graphs = ("path", "ring", "star", "tree", "complete")
    for graph in graphs:
        method = DecDPO(
            DecDPOSettings.model_validate({"name": "dec_dpo", "graph": graph, **common}),
            _population(effort.seed),
        )
        ends = clock.round_ends(method, devices, links, 1e6, effort.seed)
        seen.append(float(ends[-1] - ends[rounds // 2]) / (rounds - rounds // 2))
        predicted.append(clock.gossip_seconds(method, devices, links, 1e6)[0])
    return furthest_from_one(
        predicted, seen, [0.0] * len(graphs), list(graphs), tolerance=0.005,
        axes=("predicted seconds a round", "clock's seconds a round"), names=("closed form", "event clock"),
    )  # fmt: skip


def _population(seed: int) -> Population:
    return Population(weights=np.full(AGENTS, 1 / AGENTS), seed=seed)
