"""Bounds against simulation on random problems, against closed forms in their limits, and against bad input."""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from prefmesh.randomness import generator
from prefmesh.theory import LogLinearProblem, rates, simulate
from prefmesh.theory.bounds import Bound
from prefmesh.theory.problem import NoOptimum
from prefmesh.topology.build import build_mixing_matrix

GRAPHS = ("path", "ring", "star", "complete", "tree", "barbell", "erdos_renyi")
CONSTANTS: dict[str, Any] = {
    "smoothness": 2.0,
    "delta": 3.0,
    "noise": 0.7,
    "heterogeneity": 0.4,
    "agents": 10,
}


# ---- random problems


def users(kind: str, agents: int, random: np.random.Generator) -> LogLinearProblem:
    """`one`: all agents hold the same; `shared`: the same pairs, own answers; `own`: own pairs, of own sizes."""
    dim, pairs = int(random.integers(2, 7)), int(random.integers(8, 30))
    beta = float(random.choice([0.5, 1.0, 2.0]))
    while True:
        taste = random.normal(size=dim) + random.uniform(0, 3) * random.normal(size=(agents, dim))
        x = random.normal(size=(agents, pairs, dim))
        if kind == "own":
            x *= random.uniform(0.3, 2, (agents, 1, 1))
        else:
            x[:] = x[0]
        wrong = np.einsum("npd,nd->np", x, taste) + random.logistic(size=(agents, pairs)) < 0
        if kind == "one":
            wrong[:] = wrong[0]
        problem = LogLinearProblem(list(np.where(wrong[:, :, None], -x, x)), beta)
        try:
            problem.optimum()
        except NoOptimum:
            continue
        return problem


@dataclass(frozen=True, kw_only=True)
class Case:
    """One random problem: what was measured, with its standard error over seeds, and what was promised."""

    grad_norm_sq: float
    grad_norm_error: float
    consensus: float
    consensus_deviation: float
    bound: Bound


def random_case(method: str, number: int) -> Case:
    random = generator(number, f"bounds of {method}")
    agents, local_steps = int(random.integers(2, 13)), int(random.choice([1, 2, 4, 8]))
    problem = users(str(random.choice(["one", "shared", "own"])), agents, random)
    batch_size = [None, 1, 4][random.integers(3)]
    rounds = int(random.integers(20, 120))
    share = float(random.choice([1.0, 0.5, 0.1]))
    start = problem.optimum()
    if random.random() < 0.5:
        start = start + random.normal(size=problem.dim)
    setting: dict[str, Any] = {"agents": agents, "local_steps": local_steps}
    if method == "fed_dpo":
        setting["participation"] = int(random.integers(1, agents + 1))
        setting["staleness"] = int(random.choice([0, 1, 2, 5]))
        schedule = str(random.choice(["uniform", "max"]))
        drawn = setting["participation"] < agents or (setting["staleness"] > 0 and schedule == "uniform")
        own = {
            "participation": setting["participation"],
            "staleness": setting["staleness"],
            "staleness_schedule": schedule,
        }
        mixing = None
        made: Any = rates.FedDPO
    else:
        w = build_mixing_matrix(str(random.choice(GRAPHS)), "metropolis", agents, seed=number)
        setting["rho"] = w.rho
        own, drawn, mixing = None, False, (w.matrix,)
        made = rates.DecDPO
    smooth = {"smoothness": problem.smoothness(), "delta": 0.0, "noise": 0.0, "heterogeneity": 0.0}
    lr = share * made(**smooth, **setting).largest_lr()

    seeds = 6 if drawn or batch_size else 1
    members = [simulate.Member(problem, method, own, mixing=mixing, seed=seed) for seed in range(seeds)]
    ensemble = simulate.Ensemble(
        members, lr, rounds=rounds, local_steps=local_steps, batch_size=batch_size, seed=number
    )
    every = np.array([theta.reshape(seeds, agents, -1) for theta in ensemble.run(start)][:-1])
    average = every.mean(2)  # (rounds, seeds, d)
    squares = problem.grad_norm_sq(average.reshape(-1, problem.dim)).reshape(rounds, seeds).mean(0)
    consensus = np.square(every - average[:, :, None]).sum(3).mean((0, 2))
    found = rates.constants(problem, region=average.reshape(-1, problem.dim), batch_size=batch_size)
    bound = getattr(rates, method)(**found | setting, lr=lr, rounds=rounds)

    def error(values: np.ndarray) -> float:
        return float(values.std(ddof=1) / math.sqrt(seeds)) if seeds > 1 else 0.0

    return Case(
        grad_norm_sq=squares.mean(),
        grad_norm_error=error(squares),
        consensus=consensus.mean(),
        consensus_deviation=error(consensus),
        bound=bound,
    )


def check(method: str, numbers: range) -> list[Case]:
    cases = [random_case(method, number) for number in numbers]
    for number, case in zip(numbers, cases, strict=True):
        assert case.bound.holds, (number, case.bound.message)
        # The expectation is bounded; the mean over seeds is off by its standard error, and 1e-20 is rounding.
        assert case.grad_norm_sq - 3 * case.grad_norm_error <= case.bound.total + 1e-20, (number, case)
        assert case.consensus - 3 * case.consensus_deviation <= case.bound.consensus_error + 1e-20, (
            number,
            case,
        )
    return cases


@pytest.mark.parametrize("method", ["fed_dpo", "dec_dpo"])
def test_no_random_problem_violates_its_bound(method):
    check(method, range(12))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fed_dpo", "dec_dpo"])
def test_none_of_500_random_problems_violates_its_bound(method, capsys):
    cases = check(method, range(250))
    by_term = defaultdict(list)
    for case in cases:
        if case.grad_norm_sq > 1e-20:  # below, all is rounding: one user, started at the optimum
            name = max(case.bound.terms, key=lambda name: case.bound.terms[name])
            by_term[name].append(case.bound.total / case.grad_norm_sq)
    with capsys.disabled():
        print(f"\n{method}: bound / measured, by the largest term")
        for name, ratios in by_term.items():
            q = np.quantile(ratios, [0, 0.25, 0.5, 0.75])
            print(f"  {name:25s} {len(ratios):4d} cases, median {q[2]:7.3g}, least {q[0]:7.3g}, quartiles {q[1]:.3g} {q[3]:.3g}")
        errors = [c.bound.consensus_error / c.consensus for c in cases if c.consensus > 1e-25]
        if errors:
            print(f"  consensus error: median {np.median(errors):.3g}, least {min(errors):.3g}, {len(errors)} cases")
