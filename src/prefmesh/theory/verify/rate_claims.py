"""Claims about rates: bounds that must not be violated, and exponents (docs/theory, sections 3 and 4)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from prefmesh.randomness import generator
from prefmesh.theory import exponents, families, rates, simulate
from prefmesh.theory.exponents import TOLERANCE, Exponent
from prefmesh.theory.problem import LogLinearProblem
from prefmesh.theory.verify.claim import Effort, Finding, Plot, Series, claim
from prefmesh.topology.build import build_mixing_matrix


def exponent(measure: Callable[..., Exponent], effort: Effort) -> Finding:
    """The fitted slope against the claimed one."""
    found = measure(quick=effort.quick, seed=effort.seed)
    mean = found.measured.mean(0)
    seeds = len(found.measured)
    anchor = np.exp(np.log(mean).mean() - found.claimed * np.log(found.against).mean())
    line = anchor * found.against**found.claimed
    return Finding(
        kind="exponent",
        predicted=found.claimed,
        measured=found.fitted,
        error=(found.interval[1] - found.interval[0]) / 2 / 1.96,
        tolerance=TOLERANCE,
        note=f"95 % interval of the slope: {found.interval[0]:.3f} to {found.interval[1]:.3f}.",
        plot=Plot(
            x_label=found.name.split(" against ")[1],
            y_label=found.name.split(" against ")[0],
            series=[
                Series(label=f"slope {found.claimed:g}", x=found.against.tolist(), y=line.tolist()),
                Series(
                    label=f"measured, {seeds} seeds" if seeds > 1 else "exact",
                    x=found.against.tolist(),
                    y=mean.tolist(),
                    error=(found.measured.std(0, ddof=1) / np.sqrt(seeds)).tolist() if seeds > 1 else None,
                    kind="points",
                ),
            ],
            log_x=True,
            log_y=True,
        ),
    )


OWN, SHARED, ONE = (
    "log-linear, own pairs",
    "log-linear, shared pairs",
    "log-linear, one user's pairs at all agents",
)

for _measure, _name, _statement, _of, _source, _where in (
    (
        exponents.drift_against_lr_on_own_pairs, "Drift against eta, own pairs",
        "FedDPO's fixed point leaves theta* in proportion to eta where users judge pairs of their own.", OWN, "prefmesh", "3.18",
    ),
    (
        exponents.drift_against_lr_on_shared_pairs, "Drift against eta, shared pairs",
        "It leaves theta* as eta squared where users judge the same pairs, since they share one Hessian.", SHARED, "prefmesh", "3.19",
    ),
    (
        exponents.drift_against_local_steps_on_own_pairs, "Drift against E - 1, own pairs",
        "The drift grows in proportion to E - 1.", OWN, "paper", "3.18",
    ),
    (
        exponents.drift_against_local_steps_on_shared_pairs, "Drift against (E - 1)(2E - 1), shared pairs",
        "On shared pairs it grows in proportion to (E - 1)(2E - 1), so as E squared.", SHARED, "prefmesh", "3.19",
    ),
    (
        exponents.drift_against_heterogeneity_on_own_pairs, "Drift against zeta, own pairs",
        "The drift grows in proportion to zeta.", OWN, "paper", "3.18",
    ),
    (
        exponents.drift_against_heterogeneity_on_shared_pairs, "Drift against zeta, shared pairs",
        "On shared pairs it grows as zeta squared.", SHARED, "prefmesh", "3.19",
    ),
    (
        exponents.noise_floor_against_participation, "Noise floor against S",
        "Linear speed-up: where users agree, what noise leaves of the squared gradient norm falls as 1/S.", ONE, "paper", "3.13",
    ),
    (
        exponents.noise_floor_against_lr, "Noise floor against eta",
        "It grows in proportion to eta.", ONE, "paper", "3.13",
    ),
    (
        exponents.staleness_against_age, "Staleness against q_max",
        "What staleness adds to the noise floor grows in proportion to q_max.", ONE, "paper", "3.13",
    ),
    (
        exponents.consensus_error_against_lr, "Consensus error against eta",
        "The consensus error of DecDPO grows as eta squared.", f"{OWN}, ring of 8", "paper", "4.8",
    ),
    (
        exponents.rounds_against_eps_without_noise, "Rounds against 1/eps, full batches",
        "Without noise, as many rounds as 1/eps bring the mean squared gradient norm to eps.", ONE, "paper", "3.17",
    ),
    (
        exponents.rounds_against_eps_with_noise, "Rounds against 1/eps, minibatches",
        "With noise, and eta chosen for eps, it takes as many rounds as 1/eps squared.", ONE, "paper", "3.17",
    ),
):  # fmt: skip
    claim(_name, _statement, of=_of, source=_source, where=f"docs/theory, eq. ({_where})")(  # type: ignore[arg-type]
        partial(exponent, _measure)
    )


@dataclass(frozen=True, kw_only=True)
class _Case:
    """A random setting, with its problem and the constants of its region."""

    problem: LogLinearProblem
    lr_share: float
    local_steps: int
    participation: int
    staleness: int
    graph: str


def _cases(effort: Effort, count: int) -> list[_Case]:
    random = generator(effort.seed, "verify/bounds")
    cases = []
    for _ in range(count):
        agents = 2 * int(random.integers(2, 6))
        kind, spread = random.integers(0, 3), float(random.uniform(0.25, 1))
        seed = int(random.integers(2**31))
        made = [
            lambda a=agents, s=seed: families.one_user(a, seed=s),
            lambda a=agents, s=seed, h=spread: families.shared_pairs(h, agents=a, seed=s),
            lambda a=agents, s=seed, h=spread: families.own_pairs(h, agents=a, seed=s),
        ][kind]()
        cases.append(
            _Case(
                problem=made,
                lr_share=float(random.choice([0.1, 0.5, 1.0])),
                local_steps=int(random.choice([1, 2, 4, 8])),
                participation=int(random.integers(1, agents + 1)),
                staleness=int(random.choice([0, 2, 5])),
                graph=str(random.choice(["path", "ring", "star", "complete", "tree"])),
            )
        )
    return cases


START = 1.5
"""Every coordinate of theta_0, away from the optimum."""
BATCH, ROUNDS = 2, 60


def _used(effort: Effort, method: str) -> Finding:
    """The largest share of the bound that the mean squared gradient norm reached, over random settings."""
    shares, seeds = [], 4
    for case in _cases(effort, effort.pick(6, 40)):
        n, dim = case.problem.num_agents, case.problem.dim
        start = np.full(dim, START)
        common: dict[str, float] = {"local_steps": case.local_steps}
        if method == "fed_dpo":
            own = {"participation": case.participation, "staleness": case.staleness}
            common |= own
            members = [simulate.Member(case.problem, "fed_dpo", own, seed=s) for s in range(seeds)]
        else:
            w = build_mixing_matrix(case.graph, "metropolis", n, 0)
            common |= {"rho": w.rho}
            members = [simulate.Member(case.problem, "dec_dpo", mixing=(w.matrix,))] * seeds
        # The largest step size of any constants depends on the smoothness alone, not on the region.
        setting = {"fed_dpo": rates.FedDPO, "dec_dpo": rates.DecDPO}[method]
        guess = rates.constants(case.problem, region=start[None], batch_size=BATCH)
        lr = case.lr_share * setting(**guess, **common).largest_lr()  # type: ignore[arg-type]
        ensemble = simulate.Ensemble(
            members, lr, rounds=ROUNDS, local_steps=case.local_steps, batch_size=BATCH, seed=effort.seed
        )
        sizes = np.diff(ensemble.agents)[:, None]
        visited = np.array(
            [np.add.reduceat(t, ensemble.agents[:-1], axis=0) / sizes for t in ensemble.run(start)]
        )
        region = visited.reshape(-1, dim)
        found = rates.constants(case.problem, region=np.concatenate([start[None], region]), batch_size=BATCH)
        bound = setting(**found, **common).bound(lr, ROUNDS)  # type: ignore[arg-type]
        assert bound.holds, bound.message
        squares = case.problem.grad_norm_sq(visited[:ROUNDS].reshape(-1, dim))
        shares.append(float(squares.mean()) / bound.total)
    ordered = np.sort(shares)
    return Finding(
        kind="at most",
        predicted=1.0,
        measured=float(ordered[-1]),
        note=f"{len(ordered)} random settings at 0.1, 0.5 and 1 of the largest step size; half of them use less than "
        f"{np.median(ordered):.3f} of the bound.",
        plot=Plot(
            x_label="settings, sorted",
            y_label="share of the bound",
            series=[
                Series(label="the bound", x=[1, len(ordered)], y=[1, 1]),
                Series(
                    label="measured", x=list(range(1, len(ordered) + 1)), y=ordered.tolist(), kind="points"
                ),
            ],
            log_y=True,
        ),
    )


claim(
    "FedDPO's bound",
    "The mean squared gradient norm of FedDPO, with local steps, sampling and staleness, stays below the bound.",
    of="log-linear, three families",
    where="docs/theory, eq. (3.13)",
    source="paper",
)(partial(_used, method="fed_dpo"))
claim(
    "DecDPO's bound",
    "The mean squared gradient norm of DecDPO's average model, with local steps, stays below the bound.",
    of="log-linear, three families, five graphs",
    where="docs/theory, eq. (4.10)",
    source="paper",
)(partial(_used, method="dec_dpo"))
