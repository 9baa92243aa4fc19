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

SETTINGS: dict[str, Any] = {"fed_dpo": rates.FedDPO, "dec_dpo": rates.DecDPO}
GRAPHS = ("path", "ring", "star", "complete", "tree", "barbell", "erdos_renyi")
CONSTANTS: dict[str, Any] = {
    "smoothness": 2.0,
    "delta": 3.0,
    "noise": 0.7,
    "heterogeneity": 0.4,
    "agents": 10,
}


# ---- random problems

LR = 1.0
"""All problems of a group run side by side, so at one step size: features are scaled to make it what is wanted of each."""


def users(kind: str, dim: int, agents: int, random: np.random.Generator) -> list[np.ndarray]:
    """`one`: all agents hold the same; `shared`: the same pairs, own answers; `own`: own pairs, of own sizes."""
    pairs = int(random.integers(8, 30))
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
        shards = list(np.where(wrong[:, :, None], -x, x))
        try:
            LogLinearProblem(shards, 1.0).optimum()
        except NoOptimum:
            continue
        return shards


def settled_users(kind: str, dim: int, agents: int, random: np.random.Generator) -> list[np.ndarray]:
    """The same kinds, balanced so that theta* = 0: a start there has Delta = 0, and only the other terms are left."""
    pairs = int(random.integers(8, 30))
    x = random.normal(size=(agents, pairs, dim))
    if kind == "one":
        return [np.concatenate([x[0], -x[0]])] * agents
    if kind == "own":
        c = random.normal(size=(agents, dim)) * random.uniform(0, 1.5)
        scale = random.uniform(0.3, 2, agents)
        return [
            np.concatenate([a * own, -a * own]) + b for own, a, b in zip(x, scale, c - c.mean(0), strict=True)
        ]
    # Every second user answers the opposite of the one before; who is left over answers everything both ways.
    shards = []
    for _ in range(agents // 2):
        answered = x[0] * random.choice([-1, 1], size=(pairs, 1))
        shards += [answered, -answered]
    return shards + [np.concatenate([x[0], -x[0]])] * (agents % 2)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One random problem: what was measured, with standard errors over seeds, and what was promised."""

    grad_norm_sq: float
    grad_norm_sq_se: float
    consensus_error: float
    consensus_error_se: float
    bound: Bound


def random_group(method: str, number: int, size: int) -> list[Case]:
    """`size` random problems of one dimension, E, R and batch size; everything else is drawn for each.

    Groups of odd numbers start at the optimum.
    """
    random = generator(number, f"bounds of {method}")
    dim, local_steps = int(random.integers(2, 7)), int(random.choice([1, 2, 4, 8]))
    rounds, batch_size = int(random.integers(20, 120)), [None, 1, 4][random.integers(3)]
    beta = float(random.choice([0.5, 1.0, 2.0]))
    offset = random.normal(size=dim) * float(random.integers(2))
    made = users
    if number % 2:
        offset, made = np.zeros(dim), settled_users
    problems, settings, members = [], [], []
    for _ in range(size):
        agents = int(random.integers(2, 13))
        shards = made(str(random.choice(["one", "shared", "own"])), dim, agents, random)
        setting: dict[str, Any] = {"agents": agents, "local_steps": local_steps}
        own, mixing, drawn = None, None, False
        if method == "fed_dpo":
            own = {
                "participation": int(random.integers(1, agents + 1)),
                "staleness": int(random.choice([0, 1, 2, 5])),
                "staleness_schedule": str(random.choice(["uniform", "max"])),
            }
            setting |= {name: own[name] for name in ("participation", "staleness")}
            drawn = own["participation"] < agents or (
                own["staleness"] > 0 and own["staleness_schedule"] == "uniform"
            )
        else:
            w = build_mixing_matrix(str(random.choice(GRAPHS)), "metropolis", agents, seed=number)
            setting["rho"], mixing = w.rho, (w.matrix,)
        # Smoothness goes with the square of the features, the largest step size with its inverse.
        smoothness = LogLinearProblem(shards, beta).smoothness()
        none = {"smoothness": smoothness, "delta": 0.0, "noise": 0.0, "heterogeneity": 0.0}
        allowed = SETTINGS[method](**none, **setting).largest_lr()
        wanted = float(random.choice([0.999999, 0.5, 0.1])) * allowed
        problem = LogLinearProblem([shard * math.sqrt(wanted / LR) for shard in shards], beta)
        problems.append(problem)
        settings.append(setting)
        seeds = 6 if drawn or batch_size else 1
        members.append([simulate.Member(problem, method, own, mixing, seed) for seed in range(seeds)])

    flat = [member for seeds in members for member in seeds]
    ensemble = simulate.Ensemble(
        flat, LR, rounds=rounds, local_steps=local_steps, batch_size=batch_size, seed=number
    )
    every = np.array([np.array(theta) for theta in ensemble.run(offset)][:-1])  # rounds 0..R-1
    cases, member = [], 0
    for problem, setting, seeds in zip(problems, settings, members, strict=True):
        first, member = ensemble.agents[member], member + len(seeds)
        theta = every[:, first : ensemble.agents[member]].reshape(rounds, len(seeds), setting["agents"], dim)
        average = theta.mean(2)
        squares = problem.grad_norm_sq(average.reshape(-1, dim)).reshape(rounds, len(seeds)).mean(0)
        errors = np.square(theta - average[:, :, None]).sum(3).mean((0, 2))
        found = rates.constants(problem, region=average.reshape(-1, dim), batch_size=batch_size)
        cases.append(
            Case(
                grad_norm_sq=float(squares.mean()),
                grad_norm_sq_se=standard_error(squares),
                consensus_error=float(errors.mean()),
                consensus_error_se=standard_error(errors),
                bound=getattr(rates, method)(**found | setting, lr=LR, rounds=rounds),
            )
        )
    return cases


def standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def check(method: str, groups: int, size: int) -> list[Case]:
    cases = [case for number in range(groups) for case in random_group(method, number, size)]
    for case in cases:
        assert case.bound.holds, case.bound.message
        # Expectations are bounded; means over seeds are off by their standard error, and 1e-20 is rounding.
        assert case.grad_norm_sq - 3 * case.grad_norm_sq_se <= case.bound.total + 1e-20, case
        assert case.consensus_error - 3 * case.consensus_error_se <= case.bound.consensus_error + 1e-20, case
    return cases


@pytest.mark.parametrize("method", ["fed_dpo", "dec_dpo"])
def test_no_random_problem_violates_its_bound(method):
    check(method, groups=4, size=3)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fed_dpo", "dec_dpo"])
def test_none_of_500_random_problems_violates_its_bound(method, capsys):
    cases = check(method, groups=25, size=10)
    by_term = defaultdict(list)
    for case in cases:
        if case.grad_norm_sq > 1e-20:
            name = max(case.bound.terms, key=lambda name: case.bound.terms[name])
            by_term[name].append(case.bound.total / case.grad_norm_sq)
    with capsys.disabled():
        print(f"\n{method}: bound / measured, by the largest term")
        for name, ratios in by_term.items():
            low, *quartiles = np.quantile(ratios, [0, 0.25, 0.5, 0.75])
            shown = ", ".join(f"{q:.3g}" for q in quartiles)
            print(f"  {name:25s} {len(ratios):4d} problems; quartiles {shown}; least {low:.3g}")
        ratios = [c.bound.consensus_error / c.consensus_error for c in cases if c.consensus_error > 1e-20]
        if ratios:
            print(
                f"  consensus error: {len(ratios)} problems; median {np.median(ratios):.3g}; least {min(ratios):.3g}"
            )


# ---- limits whose value is known


def test_one_step_each_gives_the_classical_bounds():
    """E = 1, S = N: 2 Delta/(eta R) + Lam eta sigma^2/N, for eta <= 1/Lam (docs/theory, section 3.5)."""
    lr, rounds = 0.2, 50
    bound = rates.fed_dpo(**CONSTANTS, lr=lr, rounds=rounds)
    assert bound.terms == pytest.approx(
        {
            "optimisation": 2 * 3 / (lr * rounds),
            "noise": 2 * lr * 0.7 / 10,
            "sampling": 0,
            "drift": 0,
            "staleness": 0,
        }
    )
    assert bound.largest_lr == pytest.approx(1 / 2)
    # gamma_S = (10 - 4) / (4 * 9) for S = 4
    sampled = rates.fed_dpo(**CONSTANTS, lr=lr, rounds=rounds, participation=4)
    assert sampled.sampling == pytest.approx(2 * lr * 0.4 * 6 / 36)
    assert sampled.noise == pytest.approx(2 * lr * 0.7 / 4)


def test_one_step_on_a_graph():
    """docs/theory, section 4.3, E = 1: the consensus part is (alpha + w zeta)^2 / (1 - w)^2."""
    lr, rho = 0.01, 0.8
    bound = rates.dec_dpo(**CONSTANTS, lr=lr, rounds=50, rho=rho)
    w = 2 * lr * rho / (1 - rho)
    alpha = 2 * lr * math.sqrt(0.9 * rho**2 / (1 - rho**2) * 0.7)
    error = ((alpha + w * math.sqrt(0.4)) / (2 * (1 - w))) ** 2
    assert bound.consensus_error == pytest.approx(error)
    assert bound.consensus_noise + bound.consensus_heterogeneity == pytest.approx(4 * error)
    assert bound.drift == 0
    assert bound.largest_lr == pytest.approx((1 - rho) / (2 * 2 * rho))


def test_perfect_mixing_is_full_participation():
    lr = 0.01
    graph = rates.dec_dpo(**CONSTANTS, lr=lr, rounds=50, rho=0.0, local_steps=8)
    server = rates.fed_dpo(**CONSTANTS, lr=lr, rounds=50, local_steps=8)
    for name in ("optimisation", "noise", "drift"):
        assert graph.terms[name] == pytest.approx(server.terms[name])
    assert graph.total == pytest.approx(server.total)
    assert graph.largest_lr == pytest.approx(server.largest_lr)
    assert graph.consensus_error == 0


def test_small_steps_have_the_drift_and_staleness_that_section_3_5_states():
    lr, steps = 1e-6, 5
    local = rates.fed_dpo(**CONSTANTS, lr=lr, rounds=1, local_steps=steps)
    assert local.drift == pytest.approx(4 * lr**2 * 4 * (0.7 / 2 + 9 * 0.4 / 6), rel=1e-3)
    stale = rates.fed_dpo(**CONSTANTS, lr=lr, rounds=1, staleness=7)
    assert stale.staleness == pytest.approx(lr * 2 * 7 * stale.noise, rel=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 5, 50])
def test_the_steps_that_section_3_and_4_call_enough_are_allowed(steps):
    for staleness in (0, 1, 3, 30):
        for participation in (1, 2, 9, 10):
            made = rates.FedDPO(
                **CONSTANTS, local_steps=steps, participation=participation, staleness=staleness
            )
            assert made.holds(0.4 / (2 * steps * (1 + 3 * staleness)))
    for rho in (0.0, 0.3, 0.9, 0.999):
        made = rates.DecDPO(**CONSTANTS, local_steps=steps, rho=rho)
        assert made.holds(0.15 / (2 * steps * max(1, rho / (3 * (1 - rho)))))


# ---- conditions, rounds, constants


def test_a_step_size_beyond_the_largest_has_no_bound_and_says_by_how_much():
    at = rates.fed_dpo(**CONSTANTS, lr=0.5, rounds=10)
    assert at.holds
    assert at.message == "holds: lr 0.5, allowed up to 0.5"
    beyond = rates.fed_dpo(**CONSTANTS, lr=1.5, rounds=10)
    assert not beyond.holds
    assert beyond.total == math.inf
    assert (
        beyond.message
        == "no statement: lr 1.5 is 3 times the largest allowed, 0.5 (eta Lam E is 3, allowed up to 1)"
    )
    mixing = rates.dec_dpo(**CONSTANTS, lr=0.2, rounds=10, rho=0.9)
    assert "rho / (1 - rho) (mixing) is 3.6, allowed up to 0.5" in mixing.message
    assert mixing.consensus_error == math.inf
    stale = rates.fed_dpo(**CONSTANTS, lr=0.3, rounds=10, staleness=2)
    assert "(staleness) is" in stale.message


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("fed_dpo", {}),
        ("fed_dpo", {"local_steps": 4, "participation": 3, "staleness": 2}),
        ("dec_dpo", {"rho": 0.9, "local_steps": 2}),
    ],
)
def test_rounds_to_eps_are_the_fewest(method, own):
    bound = getattr(rates, method)
    found = rates.rounds_to(0.05, method, **CONSTANTS, **own)
    assert found.bound.total <= 0.05
    assert bound(**CONSTANTS, **own, lr=found.lr, rounds=found.rounds - 1).total > 0.05
    # No other step size does with fewer, seen on a grid.
    grid = np.geomspace(found.lr / 30, found.bound.largest_lr, 200)
    fewest = min(
        (r for lr in grid if (r := rates.rounds_to(0.05, method, lr=lr, **CONSTANTS, **own).rounds)),
        default=math.inf,
    )
    assert found.rounds <= fewest


def test_the_best_step_size_is_the_closed_form_for_small_eps():
    """docs/theory, eqs. (3.16) and (3.17)."""
    eps, c1 = 1e-4, 2 * 0.7 / 10
    found = rates.rounds_to(eps, "fed_dpo", **CONSTANTS)
    assert found.lr == pytest.approx(eps / (2 * c1), rel=1e-3)
    assert found.rounds == pytest.approx(8 * 3 * c1 / eps**2, rel=1e-3)
    quiet = CONSTANTS | {"noise": 0.0}
    c2 = 4 * 3 * 7 * 0.4 / 6  # Lam^2 (E - 1)(2E - 1) zeta^2 / 6, E = 4
    found = rates.rounds_to(1e-6, "fed_dpo", **quiet, local_steps=4)
    assert found.lr == pytest.approx(math.sqrt(1e-6 / (3 * c2)), rel=1e-2)
    assert found.rounds == pytest.approx(3 * 3 * math.sqrt(3 * c2) / (4 * 1e-9), rel=1e-2)


def test_what_cannot_be_reached_is_said():
    found = rates.rounds_to(1e-3, "fed_dpo", lr=0.1, **CONSTANTS)  # the noise alone is 0.014
    assert found.rounds is None
    assert found.message == (
        "impossible: at lr 0.1 the bound stays above 0.014 in any number of rounds, eps is 0.001"
    )
    assert "no statement" in rates.rounds_to(1e-3, "fed_dpo", lr=5.0, **CONSTANTS).message
    assert rates.rounds_to(1e-3, "fed_dpo", **CONSTANTS | {"delta": 0.0}).rounds == 1


def test_constants_are_those_of_the_problem():
    random = np.random.default_rng(3)
    problem = LogLinearProblem(users("own", 4, 5, random), 0.7)
    region = random.normal(size=(7, problem.dim))
    found = rates.constants(problem, region=region, batch_size=3)
    assert found["noise"] == pytest.approx(max(problem.gradient_noise(theta, 3) for theta in region))
    assert found["heterogeneity"] == pytest.approx(max(problem.heterogeneity(theta) for theta in region))
    assert found["smoothness"] == problem.smoothness()
    assert found["delta"] == pytest.approx(problem.loss(region[0]) - problem.loss(problem.optimum()))
    assert found["agents"] == 5
    assert rates.constants(problem, region=region, batch_size=None)["noise"] == 0


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("smoothness", 0.0, "a finite number above 0"),
        ("delta", -1.0, "a finite number from 0"),
        ("noise", math.nan, "a finite number from 0"),
        ("heterogeneity", math.inf, "a finite number from 0"),
        ("lr", 0.0, "a finite number above 0"),
        ("rounds", 0, "a whole number from 1"),
        ("agents", 0, "a whole number from 1"),
        ("local_steps", 0, "a whole number from 1"),
        ("participation", 11, "a whole number 1 to 10"),
        ("staleness", -1, "a whole number from 0"),
    ],
)
def test_numbers_that_are_none_are_refused(name, value, allowed):
    with pytest.raises(ValueError, match=rf"^{name}: found {value}; allowed: {allowed}$"):
        rates.fed_dpo(**CONSTANTS | {"lr": 0.1, "rounds": 10} | {name: value})


def test_other_refusals():
    with pytest.raises(ValueError, match=r"^rho: found 1.0; allowed: from 0 to below 1$"):
        rates.dec_dpo(**CONSTANTS, lr=0.1, rounds=1, rho=1.0)
    with pytest.raises(ValueError, match=r"^eps: found 0.0"):
        rates.rounds_to(0.0, "fed_dpo", **CONSTANTS)
    with pytest.raises(ValueError, match=r"^optimizer: found 'adamw'; no statement for it"):
        rates.require_sgd("adamw")
    rates.require_sgd("sgd")
