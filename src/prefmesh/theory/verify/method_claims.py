"""Claims about where methods end with full batches, and how fast they get there (docs/theory, section 5.9).

Left out are methods of which rounds differ by chance (fed_buff, async_gossip), and those that have no one policy or another objective.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np

from prefmesh.theory import laws
from prefmesh.theory.convergence import Convergence, RoundMap, converge
from prefmesh.theory.problem import LogLinearProblem, Rows
from prefmesh.theory.verify.claim import Effort, Finding, Plot, Series, claim, furthest_from_one
from prefmesh.theory.verify.law_claims import metropolis, users

AGENTS, E = 6, 4
GAMMA = 0.5
"""CHOCO's consensus step."""
HALF = [{"name": "top_k", "share": 0.5}]
ONE_WAY = {"name": "erdos_renyi", "p": 0.4, "directed": True}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A method with its settings; `corrected`: whether it is to end at the optimum."""

    name: str
    lr: float
    local_steps: int = 1
    momentum: float = 0.0
    corrected: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


CASES: dict[str, Case] = {
    "centralized": Case(name="centralized", lr=0.5, corrected=True),
    "FedDPO, E = 4": Case(name="fed_dpo", lr=0.2, local_steps=E),
    "FedProx, E = 4, mu = 1": Case(name="fed_prox", lr=0.2, local_steps=E, settings={"mu": 1.0}),
    "FedAvgM, E = 4": Case(
        name="fed_opt", lr=0.2, local_steps=E, settings={"server": "momentum", "server_lr": 0.5, "beta1": 0.5}
    ),
    "FedNova, E_i = 1 to 4": Case(name="fed_nova", lr=0.2, local_steps=E, settings={"least_local_steps": 1}),
    "SCAFFOLD, E = 4": Case(name="scaffold", lr=0.2, local_steps=E, corrected=True),
    "DecDPO": Case(name="dec_dpo", lr=0.5),
    "push-sum, directed": Case(name="push_sum", lr=0.5, settings={"graph": ONE_WAY}),
    "gradient tracking": Case(name="gradient_tracking", lr=0.5, corrected=True),
    "gradient tracking, E = 4": Case(name="gradient_tracking", lr=0.1, local_steps=E, corrected=True),
    "momentum tracking": Case(name="momentum_tracking", lr=0.25, momentum=0.5, corrected=True),
    "exact diffusion": Case(name="exact_diffusion", lr=0.5, corrected=True),
    "exact diffusion, E = 4": Case(name="exact_diffusion", lr=0.2, local_steps=E),
    "EXTRA": Case(name="extra", lr=0.5, corrected=True),
    "FedDPO, EF21, E = 4": Case(name="fed_dpo", lr=0.2, local_steps=E, settings={"compression": HALF}),
    "SCAFFOLD, EF21, E = 4": Case(
        name="scaffold", lr=0.2, local_steps=E, corrected=True, settings={"compression": HALF}
    ),
    "DecDPO, CHOCO": Case(name="dec_dpo", lr=0.5, settings={"compression": HALF, "consensus_step": GAMMA}),
    "gradient tracking, CHOCO": Case(
        name="gradient_tracking",
        lr=0.3,
        corrected=True,
        settings={"compression": HALF, "consensus_step": 0.3},
    ),
}
"""Gossip is on a ring, unless it says `directed`; local steps are 1, unless it says E. Compression keeps half of the entries."""


@cache
def problem(seed: int) -> LogLinearProblem:
    """Six users with tastes of their own."""
    return users(AGENTS, 1.0, seed)


@cache
def way(label: str, seed: int) -> Convergence:
    """A case's way to its limit. Top-k takes other entries as differences turn: compressed rounds have no Jacobian."""
    case = CASES[label]
    made = RoundMap(
        problem(seed), case.name, case.settings, lr=case.lr, local_steps=case.local_steps, momentum=case.momentum
    )  # fmt: skip
    return converge(problem(seed), made, smooth="compression" not in case.settings)


def expected_limit(label: str, seed: int) -> Rows:
    """Where a case is to end: at the optimum, or at the fixed point that Newton finds (section 5.1)."""
    case, of = CASES[label], problem(seed)
    if case.corrected:
        return np.tile(of.optimum(), (AGENTS, 1))
    if case.name == "dec_dpo":
        w, gamma = metropolis("ring", AGENTS), GAMMA if case.settings else 1.0
        return laws.dec_dpo_fixed_point(of, (1 - gamma) * np.eye(AGENTS) + gamma * w, case.lr)
    return np.tile(laws.fed_dpo_fixed_point(of, case.lr, case.local_steps), (AGENTS, 1))


@claim(
    "Rates of methods",
    "With full batches, distances to a method's limit fall each round by the largest modulus of the eigenvalues of the round's Jacobian "
    "there, without those of 1 that belong to what no round changes.",
    of="log-linear, own pairs, six users",
    where="docs/theory, section 5.9",
)
def rates(effort: Effort) -> Finding:
    """Nats a round, fitted to simulations and from the Jacobian; every method, over problems."""
    smooth = [label for label, case in CASES.items() if "compression" not in case.settings]
    predicted, seen, error, labels, off, each = [], [], [], [], [], []
    for seed in range(effort.seed, effort.seed + effort.pick(1, 3)):
        for label in smooth:
            found = way(label, seed)
            of = found.predicted
            assert of is not None
            if of.kept_moved > 1e-8:
                raise ArithmeticError(f"{label}: what J says is kept moved by {of.kept_moved:.2g}")
            predicted.append(of.rate)
            seen.append(found.rate)
            error.append(found.rate_error)
            off.append(abs(found.rate / of.over_the_window - 1))
            labels.append(f"{label}, seed {seed}")
            if seed == effort.seed:
                each.append(f"{label}: {found.rate:.4f} ({of.rate:.4f})")
    found = furthest_from_one(
        predicted, seen, error, labels, tolerance=0.02,
        axes=("predicted rate (nats a round)", "fitted rate"), names=("largest eigenvalue", "simulated"),
    )  # fmt: skip
    bent = f"Over the rounds of the fit, all of J together give the slope to within {max(off):.1e}."
    return replace(
        found, note=f"{found.note} {bent} Fitted (predicted), seed {effort.seed}: {'; '.join(each)}."
    )


SHOWN = (
    "FedDPO, E = 4",
    "DecDPO",
    "SCAFFOLD, E = 4",
    "gradient tracking",
    "momentum tracking",
    "exact diffusion",
    "EXTRA",
)


@claim(
    "Limits of methods: the optimum",
    "With full batches, SCAFFOLD and gradient tracking (with any E), momentum tracking, exact diffusion and EXTRA (E = 1) end at the "
    "optimum of f, also where messages are compressed.",
    of="log-linear, own pairs, six users",
    where="docs/theory, section 5.9",
)
def optimum(effort: Effort) -> Finding:
    """The largest distance that any agent of any corrected method is left at; ways to the optimum, and two that end before it."""
    corrected = [label for label, case in CASES.items() if case.corrected]
    off = [float(way(label, effort.seed).to_optimum[-1]) for label in corrected]
    shown = {label: way(label, effort.seed).to_optimum for label in SHOWN}
    length = max(map(len, shown.values()))
    return Finding(
        kind="at most",
        predicted=1e-9,
        measured=max(off),
        note=f"{len(corrected)} settings, distances of agents' models to theta* (root mean square) from all at 0. "
        + "; ".join(f"{label} ends {way(label, effort.seed).to_optimum[-1]:.2g} away" for label in SHOWN[:2])
        + ".",
        plot=Plot(
            x_label="rounds",
            y_label="distance to the optimum of f",
            series=[
                # At rest for good: the curve goes on where others still move.
                Series(label=label, x=np.arange(float(length)).tolist(), y=_held(y, length))
                for label, y in shown.items()
            ],
            log_y=True,
        ),
    )


def _held(y: np.ndarray, length: int) -> Sequence[float]:
    return np.pad(y, (0, length - len(y)), mode="edge").tolist()


BIASED = (
    "FedDPO, E = 4",
    "FedAvgM, E = 4",
    "FedDPO, EF21, E = 4",
    "exact diffusion, E = 4",
    "DecDPO",
    "DecDPO, CHOCO",
)


@claim(
    "Limits of methods: the bias",
    "With full batches FedDPO, also with the server's momentum and with EF21, and exact diffusion with E > 1 end at the fixed point "
    "of FedDPO; DecDPO ends at its own, and with CHOCO at that of (1 - gamma) I + gamma W.",
    of="log-linear, own pairs, six users",
    where="docs/theory, eqs. (5.1) and (5.3)",
)
def bias(effort: Effort) -> Finding:
    """The largest distance of a simulation's end from the fixed point that Newton finds."""
    ends = {label: way(label, effort.seed) for label in BIASED}
    off = [np.abs(found.limit - expected_limit(label, effort.seed)).max() for label, found in ends.items()]
    return Finding(
        kind="at most",
        predicted=1e-9,
        measured=float(max(off)),
        note="Distances to the optimum: "
        + ", ".join(f"{label} {found.to_optimum[-1]:.3g}" for label, found in ends.items())
        + ".",
    )
