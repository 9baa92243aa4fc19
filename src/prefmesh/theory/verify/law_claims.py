"""Claims about where the algorithms settle: fixed points, stationary laws, and what the gap does not tell (docs/theory, section 5)."""

import numpy as np
from scipy.stats import spearmanr

from prefmesh.randomness import generator
from prefmesh.theory import laws, simulate
from prefmesh.theory.problem import LogLinearProblem, NoOptimum
from prefmesh.theory.verify.claim import Effort, Finding, Plot, Series, claim, furthest_from_one
from prefmesh.topology.build import build_mixing_matrix

DIM, PAIRS, BATCH = 3, 24, 2
GRAPHS = ("path", "ring", "star", "tree", "barbell")


def users(agents: int, heterogeneity: float, seed: int) -> LogLinearProblem:
    """Users with tastes of their own on pairs of their own; smoothness 1, curvature at the optimum not far below it."""
    random = generator(seed, "verify/users")
    while True:
        taste = random.normal(size=DIM) / 2 + heterogeneity * random.normal(size=(agents, DIM))
        x = random.normal(size=(agents, PAIRS, DIM))
        wrong = np.einsum("npd,nd->np", x, taste) + random.logistic(size=(agents, PAIRS)) < 0
        shards = np.where(wrong[:, :, None], -x, x)
        scale = LogLinearProblem(list(shards), 1.0).smoothness() ** -0.5
        found = LogLinearProblem(list(scale * shards), 1.0)
        try:
            if found.strong_convexity(found.optimum()) > 0.15:
                return found
        except NoOptimum:
            pass


def metropolis(graph: str, agents: int) -> np.ndarray:
    """W (agents, agents), dense; of a directed graph, which Metropolis does not know, with equal weights."""
    weights = "uniform" if graph == "exponential" else "metropolis"
    return build_mixing_matrix(graph, weights, agents, 0).matrix.toarray()


@claim(
    "FedDPO's fixed point",
    "With full batches and all agents, FedDPO ends at the fixed point of theta = mean_i M_i^E(theta), for E = 1, 4 and 16.",
    of="log-linear, own pairs",
    where="docs/theory, section 5.2",
)
def fixed_point(effort: Effort) -> Finding:
    """The largest distance of a long simulation's end from the fixed point that Newton finds."""
    problem, worst, shift = users(6, 1.0, effort.seed), 0.0, []
    for local_steps in (1, 4, 16):
        lr = 0.5 / local_steps
        law = laws.fed_dpo_fixed_point(problem, lr, local_steps)
        end = simulate.fed_dpo(problem, lr, 400, local_steps).final
        worst = max(worst, float(np.linalg.norm(end - law)))
        shift.append(float(np.linalg.norm(law - problem.optimum())))
    return Finding(
        kind="at most",
        predicted=1e-10,
        measured=worst,
        note=f"The fixed points are {shift[0]:.1e}, {shift[1]:.2g} and {shift[2]:.2g} away from the optimum.",
    )


@claim(
    "FedDPO's stationary covariance",
    "With S < N participants, local steps and minibatches, the server's model scatters as the law says (trace).",
    of="log-linear, own pairs",
    where="docs/theory, section 5.3",
)
def fed_covariance(effort: Effort) -> Finding:
    """S = 3 of 8, E = 2, minibatches of 2: trace of the covariance over rounds and seeds."""
    problem, lr, local_steps, s = users(8, 0.5, effort.seed), 0.05, 2, 3
    rounds, burn_in, seeds = effort.pick(1500, 6000), 300, effort.pick(16, 24)
    law = laws.fed_dpo_stationary(problem, lr, local_steps, s, BATCH)
    members = [simulate.Member(problem, "fed_dpo", {"participation": s}, seed=k) for k in range(seeds)]
    ensemble = simulate.Ensemble(
        members, lr, rounds=burn_in + rounds, local_steps=local_steps, batch_size=BATCH, seed=effort.seed
    )
    visited = np.array([theta[ensemble.agents[:-1]] for theta in ensemble.run(problem.optimum())])[burn_in:]
    # About the mean of all seeds: a seed's own mean would hide the slow part of the scatter.
    traces = np.square(visited - visited.mean((0, 1))).sum(2).mean(0)
    return Finding(
        kind="equal",
        predicted=float(np.trace(law.covariance)),
        measured=float(traces.mean()),
        error=float(traces.std(ddof=1) / np.sqrt(seeds)),
        tolerance=0.05,
    )


@claim(
    "DecDPO's stationary consensus error",
    "E[e] is the bias of the fixed point and the scatter of the Lyapunov equation, on every graph; here the worst ratio.",
    of="log-linear, own pairs, eta Lam = 0.05, E = 1",
    where="docs/theory, section 5.4",
)
def dec_consensus(effort: Effort) -> Finding:
    """Five graphs at two heterogeneities."""
    return _consensus(effort, [(graph, h) for graph in GRAPHS[: effort.pick(3, 5)] for h in (0.25, 1.0)], 1)


@claim(
    "The law with local steps",
    "The same with four local steps between mixings.",
    of="log-linear, own pairs, eta Lam = 0.05, E = 4",
    where="docs/theory, section 5.4",
)
def dec_consensus_with_local_steps(effort: Effort) -> Finding:
    """Three graphs."""
    return _consensus(effort, [(graph, 0.5) for graph in GRAPHS[: effort.pick(2, 3)]], 4)


@claim(
    "The law of graphs that change",
    "The same where two graphs are used in turn: the mean over the rounds of the period.",
    of="log-linear, own pairs, eta Lam = 0.05, E = 1",
    where="docs/theory, section 5.4",
)
def dec_consensus_of_a_period(effort: Effort) -> Finding:
    """Pairs of graphs, one after the other."""
    pairs = [("ring", "star"), ("path", "exponential")]
    return _consensus(effort, [(" then ".join(pair), 0.5) for pair in pairs], 1)


def _consensus(effort: Effort, settings: list[tuple[str, float]], local_steps: int) -> Finding:
    """Simulated over predicted for graphs ("a then b": a period) at heterogeneities; the one furthest from 1."""
    agents, lr, replicas, burn_in = 12, 0.05, 8, 600 // local_steps
    members, predicted = [], []
    for k, (graphs, h) in enumerate(settings):
        problem = users(agents, h, effort.seed + k)
        matrices = [metropolis(graph, agents) for graph in graphs.split(" then ")]
        members += [simulate.Member(problem, "dec_dpo", mixing=simulate.period(matrices, agents))] * replicas
        law = laws.dec_dpo_stationary(problem, matrices, lr, BATCH, local_steps)
        predicted.append(law.consensus_error)
    ensemble = simulate.Ensemble(
        members, lr, rounds=burn_in + effort.pick(1500, 6000) // local_steps, local_steps=local_steps, batch_size=BATCH, seed=effort.seed
    )  # fmt: skip
    errors = simulate.stationary_consensus_errors(ensemble, burn_in=burn_in, batches=3)
    errors = errors.reshape(len(settings), -1)
    mean, error = errors.mean(1), errors.std(1, ddof=1) / np.sqrt(errors.shape[1])
    return furthest_from_one(
        predicted,
        mean.tolist(),
        error.tolist(),
        [f"{graphs} at heterogeneity {h:g}" for graphs, h in settings],
        tolerance=effort.pick(5, 3) / 100,
        axes=("predicted consensus error", "consensus error"),
        names=("the law", "simulated"),
    )


@claim(
    "Large steps need the minibatch's Hessian",
    "At eta Lam = 0.5 the law with the random Hessian of the minibatch is within 12 % of simulation; that of first order is not.",
    of="log-linear, own pairs, ring of 12",
    where="docs/theory, section 5.4",
)
def large_steps(effort: Effort) -> Finding:
    """Simulated over predicted against eta Lam, for the law of first order and the one with the Hessian term."""
    agents, replicas, burn_in = 12, 16, 300
    problem, w = users(agents, 0.5, effort.seed), metropolis("ring", 12)
    steps = [0.1, 0.25, 0.5] if effort.quick else [0.05, 0.1, 0.25, 0.5, 0.75, 1.0]
    seen, error, first, better = [], [], [], []
    for lr in steps:
        members = [simulate.Member(problem, "dec_dpo", mixing=simulate.period(w, agents))] * replicas
        ensemble = simulate.Ensemble(
            members, lr, rounds=burn_in + effort.pick(900, 3000), batch_size=BATCH, seed=effort.seed
        )
        errors = simulate.stationary_consensus_errors(ensemble, burn_in=burn_in, batches=3)
        seen.append(float(errors.mean()))
        error.append(float(errors.mean(1).std(ddof=1) / np.sqrt(replicas)))
        first.append(laws.dec_dpo_stationary(problem, w, lr, BATCH, hessian_noise=False).consensus_error)
        better.append(laws.dec_dpo_stationary(problem, w, lr, BATCH).consensus_error)
    at = steps.index(0.5)

    def over(law: list[float]) -> list[float]:
        return [s / p for s, p in zip(seen, law, strict=True)]

    return Finding(
        kind="equal",
        predicted=better[at],
        measured=seen[at],
        error=error[at],
        tolerance=0.12,
        note=f"First order alone: simulated / predicted = {seen[at] / first[at]:.3f} at 0.5.",
        plot=Plot(
            x_label="eta Lam",
            y_label="simulated / predicted",
            series=[
                Series(label="1", x=[steps[0], steps[-1]], y=[1, 1]),
                Series(label="first order", x=steps, y=over(first), kind="points"),
                Series(
                    label="with the minibatch's Hessian",
                    x=steps,
                    y=over(better),
                    error=[e / p for e, p in zip(error, better, strict=True)],
                    kind="points",
                ),
            ],
        ),
    )


def _placed(effort: Effort) -> tuple[LogLinearProblem, dict[str, np.ndarray]]:
    """Users of two minds who alternate along the graphs' order of nodes: a path's fast modes carry them, a star's slow ones."""
    random = generator(effort.seed, "verify/two minds")
    sides = np.where(np.arange(8) % 2, 1.0, -1.0)
    problem = laws.users_along(sides, random.normal(size=(6, DIM)) + 1.0, beta=1.0)
    return problem, {graph: metropolis(graph, 8) for graph in GRAPHS}


@claim(
    "The spectral gap orders graphs",
    "The paper: the consensus error is governed by 1 - rho^2, so a graph with a larger gap has the smaller one.",
    of="log-linear, shared pairs, neighbours of opposite minds",
    where="docs/theory, section 5.6",
    source="paper",
)
def gap_orders(effort: Effort) -> Finding:
    """Rank correlation of 1/(1 - rho^2) with the simulated error over graphs."""
    return _order(effort, by_law=False)


@claim(
    "The law orders graphs",
    "The stationary law orders the same graphs as simulation does, also where the gap does not.",
    of="log-linear, shared pairs, neighbours of opposite minds",
    where="docs/theory, section 5.6",
)
def law_orders(effort: Effort) -> Finding:
    """Rank correlation of the predicted with the simulated error over graphs."""
    return _order(effort, by_law=True)


def _order(effort: Effort, *, by_law: bool) -> Finding:
    problem, graphs = _placed(effort)
    lr, burn_in = 0.1 / problem.smoothness(), 500
    members = [
        simulate.Member(problem, "dec_dpo", mixing=simulate.period(w, 8))
        for w in graphs.values()
        for _ in range(8)
    ]
    ensemble = simulate.Ensemble(members, lr, rounds=burn_in + 1500, batch_size=8, seed=effort.seed)
    errors = simulate.stationary_consensus_errors(ensemble, burn_in=burn_in, batches=1)
    errors = errors.reshape(len(graphs), -1)
    seen, error = errors.mean(1), errors.std(1, ddof=1) / np.sqrt(8)
    rho = np.array([np.linalg.norm(w - 1 / 8, ord=2) for w in graphs.values()])
    names = list(graphs)
    predicted = (
        np.array([laws.dec_dpo_stationary(problem, w, lr, 8).consensus_error for w in graphs.values()])
        if by_law
        else 1 / (1 - rho**2)
    )
    order = np.argsort(predicted)
    return Finding(
        kind="order",
        predicted=1.0,
        measured=float(spearmanr(predicted, seen).statistic),
        tolerance=1e-9,
        note="From the smallest predicted error up, simulated: "
        + ", ".join(f"{names[i]} {seen[i]:.2e} (1 - rho^2 = {1 - rho[i] ** 2:.3f})" for i in order)
        + ".",
        plot=Plot(
            x_label="predicted consensus error" if by_law else "1 / (1 - rho^2)",
            y_label="simulated consensus error",
            series=[
                Series(
                    label=names[i],
                    x=[float(predicted[i])],
                    y=[float(seen[i])],
                    error=[float(error[i])],
                    kind="points",
                )
                for i in order
            ],
            log_x=True,
            log_y=True,
        ),
    )
