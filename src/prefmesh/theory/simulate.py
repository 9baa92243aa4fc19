"""Simulations: the algorithms that train language models, on a log-linear problem.

There is no second implementation: a problem becomes a log-linear policy with its encoded pairs, and `Learner` runs the
rounds. Several members (other seeds, mixing matrices, or problems of one width) run side by side in one stacked pass.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import block_diag, csr_array

from prefmesh.algorithms.gradients import Problem
from prefmesh.algorithms.methods import METHODS, Method, Population
from prefmesh.algorithms.methods.dec_dpo import DecDPO, DecDPOSettings
from prefmesh.algorithms.optimizers import OptimizerSettings
from prefmesh.algorithms.rounds import Learner
from prefmesh.algorithms.sampling import Sampler
from prefmesh.algorithms.state import State
from prefmesh.errors import unknown_name
from prefmesh.objectives import ObjectiveSettings
from prefmesh.policies.base import Params
from prefmesh.policies.log_linear import FeaturePairs, LogLinearPolicy
from prefmesh.theory.problem import LogLinearProblem, Rows, check_batch_size

Matrix = Float[np.ndarray, "agents agents"] | csr_array


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """What a simulation went through, from round 0.

    `average` (rounds + 1, d), `grad_norm_sq` of the global loss there, `consensus_error` e = (1/N) sum_i ||theta_i - mean||^2
    after mixing. `final`: (N, d), or (d,) where all agents share one model.
    """

    average: Float[np.ndarray, "points dim"]
    grad_norm_sq: Float[np.ndarray, " points"]
    consensus_error: Float[np.ndarray, " points"]
    final: np.ndarray


def method(
    problem: LogLinearProblem,
    name: str,
    *,
    lr: float,
    rounds: int,
    local_steps: int = 1,
    batch_size: int | None = None,
    momentum: float = 0.0,
    seed: int = 0,
    theta0: np.ndarray | None = None,
    **settings: Any,
) -> Trajectory:
    """Any registered method with SGD; `settings` are the keys of a config's `method`. `batch_size` None: full shards; else drawn with
    replacement.

    Raises `InputError` for an unknown method, `ValueError` for settings that it does not take.
    """
    if name not in METHODS:
        raise unknown_name("name", name, METHODS)
    return _trajectory(
        Member(problem, name, settings, seed=seed), lr, rounds, local_steps, batch_size, theta0, momentum
    )


def fed_dpo(
    problem: LogLinearProblem,
    lr: float,
    rounds: int,
    local_steps: int = 1,
    participation: int | None = None,
    staleness: int = 0,
    batch_size: int | None = None,
    seed: int = 0,
    theta0: np.ndarray | None = None,
) -> Trajectory:
    """FedDPO with plain SGD (docs/theory, eq. (3.1)). `batch_size` None: full shards; else drawn with replacement."""
    return method(
        problem, "fed_dpo", lr=lr, rounds=rounds, local_steps=local_steps, batch_size=batch_size, seed=seed, theta0=theta0,
        participation=participation, staleness=staleness,
    )  # fmt: skip


def dec_dpo(
    problem: LogLinearProblem,
    mixing_matrix: Matrix | Sequence[Matrix],
    lr: float,
    rounds: int,
    local_steps: int = 1,
    batch_size: int | None = None,
    seed: int = 0,
    theta0: np.ndarray | None = None,
) -> Trajectory:
    """DecDPO with plain SGD (docs/theory, eq. (4.1)). A sequence of matrices is a period: round r uses number r - 1."""
    member = Member(problem, "dec_dpo", mixing=period(mixing_matrix, problem.num_agents), seed=seed)
    return _trajectory(member, lr, rounds, local_steps, batch_size, theta0)


@dataclass(frozen=True)
class Member:
    """One simulation of an ensemble: a method on a problem, with its settings or, for DecDPO, its period of matrices."""

    problem: LogLinearProblem
    name: str
    settings: dict[str, Any] | None = None
    mixing: tuple[csr_array, ...] | None = None
    seed: int = 0

    def method(self, rounds: int, local_steps: int) -> Method:
        """The registered method itself."""
        population = Population(
            weights=np.full(self.problem.num_agents, 1 / self.problem.num_agents), seed=self.seed
        )
        common = {"name": self.name, "rounds": rounds, "local_steps": local_steps}
        if self.mixing is not None:
            return _GivenMixing(DecDPOSettings(**common), population, self.mixing)  # type: ignore[arg-type]
        made = METHODS[self.name]
        settings = made.Settings(**common | (self.settings or {}))
        settings.check(self.problem.num_agents)
        return made(settings, population)


class Ensemble:
    """Members that run side by side, one stacked pass a step. `thetas()` after `begin` and after every `round`."""

    def __init__(
        self,
        members: Sequence[Member],
        lr: float,
        *,
        rounds: int,
        local_steps: int = 1,
        batch_size: int | None = None,
        momentum: float = 0.0,
        seed: int = 0,
    ):
        if not 0 < lr < 1e38:
            raise ValueError(f"lr: found {lr}; allowed: above 0 and below 1e38")
        check_batch_size(batch_size)
        if rounds < 1 or local_steps < 1:
            raise ValueError(f"rounds, local_steps: found {rounds}, {local_steps}; allowed: at least 1 each")
        self.members = list(members)
        first = members[0].problem
        if any(m.problem.dim != first.dim or m.problem.beta != first.beta for m in members):
            raise ValueError(
                "members: found problems of unequal width or beta; allowed: one width and beta for all"
            )
        shards = [shard for member in members for shard in member.problem.delta_features]
        optimizer = OptimizerSettings(
            name="sgd",
            lr=lr,
            momentum=momentum,
            batch_size=batch_size or "full",
            sampling="with_replacement" if batch_size else "shuffle",
        )
        pairs = np.concatenate(shards)
        ends = np.cumsum([len(shard) for shard in shards])
        rows = np.split(np.arange(len(pairs)), ends[:-1])
        self.agents = np.cumsum([0, *(member.problem.num_agents for member in members)])
        self.learner = Learner(
            problem=_as_trained(pairs, first.beta),
            method=_together(self.members, rounds, local_steps),
            optimizer=optimizer,
            sampler=Sampler(rows, optimizer, seed),
            agents_per_pass=len(shards),
        )
        self.rounds = rounds

    def run(self, theta0: np.ndarray | None = None) -> Iterator[Float[np.ndarray, "agents dim"]]:
        """All agents' parameters, members one after the other: at the start (`theta0` (d,) or zero), then after every round.

        The arrays are views that the next round changes. Raises `FloatingPointError` where they stop being finite.
        """
        dim = self.members[0].problem.dim
        start = np.zeros(dim) if theta0 is None else np.asarray(theta0, dtype=np.float64)
        if start.shape != (dim,) or not np.isfinite(start).all():
            raise ValueError(f"theta0: found shape {start.shape}; allowed: ({dim},), finite")
        state = self.learner.begin({"theta": torch.from_numpy(start.copy())[None]})
        yield self.learner.method.policies(state)["theta"].numpy()
        for round_ in range(1, self.rounds + 1):
            state, measures = self.learner.round(state, round_)
            if not measures["parameters_finite"]:
                raise FloatingPointError(
                    f"lr: the parameters stopped being finite in round {round_}; try a smaller one"
                )
            yield self.learner.method.policies(state)["theta"].numpy()


def _together(members: Sequence[Member], rounds: int, local_steps: int) -> Method:
    """One method for all members; matrices that are given become one block-diagonal matrix, which is one product."""
    if len(members) == 1:
        return members[0].method(rounds, local_steps)
    given = [member.mixing for member in members if member.mixing is not None]
    if len(given) < len(members):
        return _Side([member.method(rounds, local_steps) for member in members])
    length = int(np.lcm.reduce([len(period) for period in given]))
    blocks = tuple(
        csr_array(block_diag([period[r % len(period)] for period in given], format="csr"))
        for r in range(length)
    )
    agents = blocks[0].shape[0]
    settings = DecDPOSettings(name="dec_dpo", rounds=rounds, local_steps=local_steps)
    return _GivenMixing(settings, Population(weights=np.full(agents, 1 / agents), seed=0), blocks)


def _trajectory(
    member: Member,
    lr: float,
    rounds: int,
    local_steps: int,
    batch_size: int | None,
    theta0: np.ndarray | None,
    momentum: float = 0.0,
) -> Trajectory:
    ensemble = Ensemble(
        [member],
        lr,
        rounds=rounds,
        local_steps=local_steps,
        batch_size=batch_size,
        momentum=momentum,
        seed=member.seed,
    )
    average = np.empty((rounds + 1, member.problem.dim))
    error = np.empty(rounds + 1)
    theta = np.empty(0)
    for r, theta in enumerate(ensemble.run(theta0)):
        average[r], error[r] = theta.mean(0), consensus_error(theta)
    shared = theta.strides[0] == 0
    if shared:  # the mean over equal rows would round
        average[-1] = theta[0]
    return Trajectory(
        average=average,
        grad_norm_sq=member.problem.grad_norm_sq(average),
        consensus_error=error,
        final=theta[0].copy() if shared else theta.copy(),
    )


def stationary_consensus_errors(
    ensemble: Ensemble, *, burn_in: int, batches: int, theta0: np.ndarray | None = None
) -> Float[np.ndarray, "members batches"]:
    """Each member's e, averaged over `batches` equal stretches of the rounds after the first `burn_in`.

    Stretches that are long against the memory of the process are nearly independent: their spread gives the error.
    Raises `ValueError` where fewer rounds than batches are left.
    """
    length = (ensemble.rounds - burn_in) // batches
    if length < 1:
        raise ValueError(
            f"burn_in: found {burn_in} of {ensemble.rounds} rounds; allowed: at least {batches} rounds fewer, one per batch"
        )
    first, size = ensemble.agents[:-1], np.diff(ensemble.agents)
    sums = np.zeros((len(size), batches))
    for r, theta in enumerate(ensemble.run(theta0)):
        batch = (r - burn_in - 1) // length
        if 0 <= batch < batches:
            mean = np.add.reduceat(theta, first, axis=0) / size[:, None]
            apart = np.square(theta - np.repeat(mean, size, axis=0)).sum(1)
            sums[:, batch] += np.add.reduceat(apart, first) / size
    return sums / length


def consensus_error(theta: Rows) -> float:
    """e = (1/N) sum_i ||theta_i - mean||^2."""
    if theta.strides[0] == 0:
        return 0.0
    return float(np.square(theta - theta.mean(0)).sum(1).mean())


def _as_trained(delta: Float[np.ndarray, "pairs dim"], beta: float) -> Problem:
    """What `Learner` trains on: h = x^T theta, the reference at the origin."""
    dim = delta.shape[1]
    policy = LogLinearPolicy(lambda texts: np.zeros((len(texts), dim)))
    chosen = torch.from_numpy(np.ascontiguousarray(delta))
    data = FeaturePairs.of(chosen, torch.zeros_like(chosen))
    reference = torch.zeros(len(delta), 2, dtype=torch.float64)
    return Problem(policy=policy, data=data, reference=reference, objective=ObjectiveSettings(beta=beta))


def period(
    matrices: Matrix | Sequence[Matrix], agents: int, name: str = "mixing_matrix"
) -> tuple[csr_array, ...]:
    """One or several mixing matrices, checked: (N, N), finite, doubly stochastic. Raises `ValueError`."""
    if (isinstance(matrices, np.ndarray) and matrices.ndim == 2) or hasattr(matrices, "tocsr"):
        matrices = [matrices]  # type: ignore[list-item]
    found = []
    for matrix in matrices:
        w: csr_array = csr_array(matrix, dtype=np.float64)  # type: ignore[call-overload]
        if w.shape != (agents, agents):
            raise ValueError(
                f"{name}: found shape {w.shape}; allowed: ({agents}, {agents}), one row per agent"
            )
        if not np.isfinite(w.data).all():
            raise ValueError(f"{name}: found non-finite entries; allowed: finite weights")
        for axis, kind in ((1, "row"), (0, "column")):
            sums = w.sum(axis=axis)
            worst = int(np.abs(sums - 1).argmax())
            if abs(sums[worst] - 1) > 1e-10:
                raise ValueError(
                    f"{name}: {kind} {worst} sums to {sums[worst]:.12g}; allowed: a doubly stochastic matrix, all sums 1"
                )
        found.append(w)
    if not found:
        raise ValueError(f"{name}: found no matrix; allowed: at least one")
    return tuple(found)


class _GivenMixing(DecDPO):
    """DecDPO whose matrices are given, one after the other and again from the first."""

    def __init__(self, settings: DecDPOSettings, population: Population, mixing: tuple[csr_array, ...]):
        Method.__init__(self, settings, population)
        self._mixing = mixing

    def matrix(self, round_: int) -> csr_array:
        """W of this round (from 1)."""
        return self._mixing[(round_ - 1) % len(self._mixing)]


class _Side(Method):
    """Methods side by side: their agents are stacked one after the other, and each mixes its own."""

    def __init__(self, methods: Sequence[Method]):
        self.methods = list(methods)
        self.offset = np.cumsum([0, *(m.agents for m in methods)])
        agents = int(self.offset[-1])
        super().__init__(methods[0].settings, Population(weights=np.full(agents, 1 / agents), seed=0))
        self.states: list[State] = []

    def begin(self, row: Params) -> State:
        """Each method's own state stays with it; theta is theirs, stacked."""
        self.states = [m.begin({name: t.clone() for name, t in row.items()}) for m in self.methods]
        return State.of(self._stacked(), shards=self.agents)

    def participants(self, round_: int) -> Int[np.ndarray, " active"]:
        """Everybody's."""
        return np.concatenate(
            [m.participants(round_) + o for m, o in zip(self.methods, self.offset, strict=False)]
        )

    def start(self, state: State, round_: int, agents: Int[np.ndarray, " some"]) -> Params:
        """Where each method starts its own."""
        found = [m.start(own, round_, here - o) for m, own, o, here in self._parts(agents)]
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    def mix(self, state: State, round_: int, agents: Int[np.ndarray, " active"], end: Params) -> State:
        """Each method mixes its own."""
        place = 0
        for k, (m, own, o, here) in enumerate(self._parts(agents)):
            part = {name: t[place : place + len(here)] for name, t in end.items()}
            self.states[k] = m.mix(own, round_, here - o, part)
            place += len(here)
        state.theta = self._stacked()
        return state

    def bytes_sent(self, round_: int, *, model_bytes: int, data_bytes: int) -> int:
        """Nothing is sent in a simulation."""
        return 0

    def _parts(self, agents: Int[np.ndarray, " some"]) -> Iterator[tuple[Method, State, int, np.ndarray]]:
        bounds = np.searchsorted(agents, self.offset)
        for k, m in enumerate(self.methods):
            yield m, self.states[k], int(self.offset[k]), agents[bounds[k] : bounds[k + 1]]

    def _stacked(self) -> Params:
        return {name: torch.cat([own.theta[name] for own in self.states]) for name in self.states[0].theta}
