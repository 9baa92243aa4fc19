"""Cold start: an adapter for each user who was no part of a run, from k of the user's pairs.

    theta_u  <-  the run's policy with the least loss on u's k pairs      (the choice of IFCA, see `methods/ifca.py`)
    theta_u  <-  local_E(theta_u) on the k pairs                          (a round of `local_only` among the new users)

The k pairs are the first of a drawn order, so that a larger k adds to a smaller one. What is measured are the user's pairs
that no k draws and whose prompt none of those drawn has: the same for every k.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int

from prefmesh.algorithms import chunks
from prefmesh.algorithms.gradients import Problem
from prefmesh.algorithms.methods import Population
from prefmesh.algorithms.methods.local_only import LocalOnly, LocalOnlySettings
from prefmesh.algorithms.optimizers import OptimizerSettings
from prefmesh.algorithms.rounds import Learner
from prefmesh.algorithms.sampling import Sampler
from prefmesh.algorithms.state import share, take, without
from prefmesh.config import ExperimentConfig, validated
from prefmesh.errors import Diverged, InputError
from prefmesh.evaluation.statistics import clustered_interval
from prefmesh.inspection import finished_run, other_pairs, problem_of
from prefmesh.measure import HeldOut, score
from prefmesh.metrics import new_directory, read_lines, refuse_taken, write_json
from prefmesh.policies.base import Params
from prefmesh.policies.export import load_row
from prefmesh.policies.settings import CausalLMSettings
from prefmesh.preferences.census import number_of
from prefmesh.preferences.pairs import Pair
from prefmesh.preferences.texts import text_key
from prefmesh.randomness import generator
from prefmesh.run import save_row

if TYPE_CHECKING:
    from rich.table import Table

PAIRS = (1, 4, 16)
STEPS = 10


@dataclass(frozen=True, kw_only=True)
class Newcomer:
    """A new user's pairs: rows to learn from, in the order in which k takes them, and rows to be judged on."""

    user: str
    drawn: Int[np.ndarray, " most"]
    held_out: Int[np.ndarray, " rest"]
    prompts: tuple[str, ...]
    """Of the rows in `held_out`."""


def newcomers(pairs: Sequence[Pair], most: int, seed: int) -> list[Newcomer]:
    """Draws up to `most` pairs of each user; a user's draw does not depend on who else there is.

    Raises `InputError` where a user has nothing left to be judged on.
    """
    rows: dict[str, list[int]] = {}
    for i, pair in enumerate(pairs):
        rows.setdefault(pair.user, []).append(i)
    found = []
    for user, own in rows.items():
        order = generator(seed, "newcomer", number_of(user)).permutation(own)
        drawn, rest = order[:most], order[most:]
        known = {text_key(pairs[i].prompt) for i in drawn}
        held_out = np.array([i for i in rest if text_key(pairs[i].prompt) not in known], dtype=np.int64)
        if not len(held_out):
            raise InputError(
                f"--pairs: found {most}, but of the {len(own)} pairs of user {user} none of another prompt is left to judge by; allowed: "
                f"fewer, or without users of few pairs: -o preferences.min_pairs={most + 1}"
            )
        prompts = tuple(text_key(pairs[i].prompt) for i in held_out)
        found.append(Newcomer(user=user, drawn=drawn, held_out=held_out, prompts=prompts))
    return found


def policies_of(run: Path) -> dict[str, Path]:
    """Where a new user may start: the run's average policy, and one of each group's or else each agent's own."""
    groups = run / "groups.json"
    found = {"average": run / "policy"}
    own = [path for path in sorted((run / "adapters").glob("agent_*")) if path.is_dir()]
    if not groups.is_file():
        return found | {path.name: path for path in own}
    # In the order of agents, of whom each group's first stands for it.
    group = list(json.loads(groups.read_text(encoding="utf-8")).values())
    for path in own:
        found.setdefault(f"group {group[int(path.name.removeprefix('agent_'))]}", path)
    return found


def personalize(
    run: Path,
    source: str,
    overrides: list[str],
    out: Path,
    *,
    pairs: Sequence[int] = PAIRS,
    steps: int = STEPS,
    lr: float | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Learn from each number of `pairs`, and leave the adapters of the largest in `out`, with the figures that are returned.

    Optimiser, loss and reference are the run's; the step size is constant, moments start anew, and a batch has at most k pairs.
    Raises `InputError` (nothing is written) or `Diverged`.
    """
    trained = _alone(finished_run(run))
    changes = {"schedule": "constant", "warmup_rounds": 0} | ({} if lr is None else {"lr": lr})
    optimizer = validated(OptimizerSettings, trained.optimizer.model_dump() | changes, "optimizer")
    _refuse_numbers(pairs, steps)
    refuse_taken(out, otherwise="no --out, for one that the time names")
    say("reading preferences")
    read = other_pairs(source, overrides)
    people = newcomers(read, max(pairs), trained.seed)
    problem = problem_of(trained, read, say)
    places = policies_of(run)
    say("scoring the run's policies")
    average = load_row(problem.policy, places["average"])
    drawn = np.stack([person.drawn for person in people])
    losses = _losses(problem, list(places.values()), drawn)
    before = [score(problem, average, person.held_out) for person in people]
    nothing = np.zeros(len(people), dtype=np.int64)
    found = {0: _Found(chosen=nothing, start=before, end=before)}
    theta: Params = {}
    for k in sorted(set(pairs)):
        say(f"learning from {k} pairs")
        chosen = losses[:, :, :k].mean(2).argmin(0)
        start = _rows(problem, list(places.values()), chosen)
        theta = learned(problem, optimizer, start, drawn[:, :k], steps=steps, seed=trained.seed)
        first = _each(problem, start, people) if len(places) > 1 else before
        found[k] = _Found(chosen=chosen, start=first, end=_each(problem, theta, people))
    names = list(places)
    result = {
        "run": str(run),
        "data": source,
        "seed": trained.seed,
        "steps": steps,
        "lr": optimizer.lr,
        "policies": names,
        "known": sorted({person.user for person in people} & _learned_from(run)),
        "figures": [_figures(k, one, before, people) for k, one in found.items()],
        "users": [
            {
                "user": person.user,
                "adapter": _place(i),
                "held_out": len(person.held_out),
                "figures": [one.of_user(k, i, names) for k, one in found.items()],
            }
            for i, person in enumerate(people)
        ],
    }

    def write(directory: Path) -> None:
        for i in range(len(people)):
            row = take(theta, np.array([i]))
            save_row(trained, problem.policy, row, directory / _place(i))
        write_json(directory / "personalize.json", result)

    new_directory(out, write)
    return result


def learned(
    problem: Problem,
    optimizer: OptimizerSettings,
    start: Params,
    drawn: Int[np.ndarray, "users pairs"],
    *,
    steps: int,
    seed: int,
) -> Params:
    """Where each user arrives who starts at a row of `start` (users, ...): a round of `local_only`. Raises `Diverged`."""
    users, k = drawn.shape
    if optimizer.batch_size != "full":
        optimizer = optimizer.model_copy(update={"batch_size": min(optimizer.batch_size, k)})
    settings = LocalOnlySettings(name="local_only", rounds=1, local_steps=steps)
    method = LocalOnly(settings, Population(weights=np.full(users, 1 / users), seed=seed))
    sampler = Sampler(list(drawn), optimizer, seed)
    fitting = chunks.fitting(problem, method, sampler.pairs_per_batch, problem.policy.tokens_per_pass)
    learner = Learner(
        problem=problem, method=method, optimizer=optimizer, sampler=sampler, agents_per_pass=fitting
    )
    state = learner.begin(take(without(start, problem.policy.residuals(start)), np.array([0])))
    state.theta = start
    state, measures = learner.round(state, 1, consensus=False)
    if not measures["parameters_finite"]:
        raise Diverged(
            f"--pairs {k}: a parameter stopped being finite within {steps} steps. Try a smaller --lr"
        )
    return state.theta


def personal_tables(found: dict[str, Any]) -> list["Table"]:
    """`personalize`'s figures for the terminal."""
    from rich.markup import escape
    from rich.table import Table

    users, choice = found["users"], len(found["policies"]) > 1
    who = f"{len(users)} new users" if len(users) > 1 else f"new user {users[0]['user']}"
    table = Table(title=escape(f"{found['run']}, {who}"))
    headers = ("pairs", "accuracy, % [95 %]", "gain, points [95 %]", "loss")
    for header in (*headers, *(["start, %"] if choice else [])):
        table.add_column(header, justify="right")

    def percent(mean: float, interval: list[float], sign: str = "") -> str:
        low, high = (f"{100 * end:{sign}.1f}" for end in interval)
        return f"{100 * mean:{sign}.1f} [{low}, {high}]"

    for line in found["figures"]:
        table.add_row(
            str(line["pairs"]),
            percent(line["accuracy"], line["accuracy_interval"]),
            percent(line["gain"], line["gain_interval"], "+") if line["pairs"] else "",
            f"{line['loss']:.4f}",
            *([f"{100 * line['start_accuracy']:.1f}"] if choice else []),
        )
    if found["known"]:
        table.caption = f"{len(found['known'])} of them bear names of users whom the run learned from"
    return [table]


@dataclass(frozen=True, kw_only=True)
class _Found:
    """For one k: which policy each user started from, and the user's held-out pairs there and at the end."""

    chosen: Int[np.ndarray, " users"]
    start: list[HeldOut]
    end: list[HeldOut]

    def of_user(self, k: int, i: int, names: list[str]) -> dict[str, Any]:
        """A user's figures."""
        start, end = self.start[i], self.end[i]
        return {
            "pairs": k,
            "start": names[self.chosen[i]],
            "start_accuracy": float(start.accuracy.mean()),
            "accuracy": float(end.accuracy.mean()),
            "loss": float(end.loss.mean()),
        }


def _figures(k: int, found: _Found, before: list[HeldOut], people: list[Newcomer]) -> dict[str, Any]:
    """Means over users; the gain is over k = 0."""
    accuracy = [one.accuracy for one in found.end]
    mean, low, high = _interval(accuracy, people)
    gain, worse, better = _interval(
        [after - one.accuracy for after, one in zip(accuracy, before, strict=True)], people
    )
    return {
        "pairs": k,
        "accuracy": mean,
        "accuracy_interval": [max(0.0, low), min(1.0, high)],
        "gain": gain,
        "gain_interval": [max(-1.0, worse), min(1.0, better)],
        "loss": float(np.mean([one.loss.mean() for one in found.end])),
        "start_accuracy": float(np.mean([one.accuracy.mean() for one in found.start])),
    }


def _interval(values: list[Float[np.ndarray, " _"]], people: list[Newcomer]) -> tuple[float, float, float]:
    """The mean over users and its 95 % interval: of further users; of further prompts where there is one user."""
    if len(people) == 1:
        return clustered_interval(values[0], people[0].prompts)
    return clustered_interval(np.array([own.mean() for own in values]), [one.user for one in people])


def _alone(config: ExperimentConfig) -> ExperimentConfig:
    """Who mixes with nobody trains both factors in every step, however the run mixed them; a frozen A stays frozen."""
    policy = config.policy
    if not isinstance(policy, CausalLMSettings) or policy.lora_mixing not in ("alternate", "product"):
        return config
    lora = policy.lora.model_copy(update={"mixing": "factors"})
    return config.model_copy(update={"policy": policy.model_copy(update={"lora": lora})})


def _learned_from(run: Path) -> set[str]:
    """Names of users whose pairs a run's agents hold, as far as they were measured."""
    return {line["user"] for line in read_lines(run / "agents.jsonl") if line["agent"] is not None}


def _refuse_numbers(pairs: Sequence[int], steps: int) -> None:
    if not pairs or min(pairs) < 1:
        raise InputError(f"--pairs: found {', '.join(map(str, pairs)) or 'none'}; allowed: numbers from 1 up")
    if steps < 1:
        raise InputError(f"--steps: found {steps}; allowed: 1 or more")


def _losses(
    problem: Problem, places: list[Path], drawn: Int[np.ndarray, "users most"]
) -> Float[np.ndarray, "policies users most"]:
    """Of the drawn pairs under each of the run's policies; where there is no choice, nobody asks."""
    if len(places) == 1:
        return np.zeros((1, *drawn.shape))
    rows = (load_row(problem.policy, place) for place in places)
    return np.stack([score(problem, row, drawn.reshape(-1)).loss.reshape(drawn.shape) for row in rows])


def _rows(problem: Problem, places: list[Path], chosen: Int[np.ndarray, " users"]) -> Params:
    """Each user's own copy of the chosen policy, (users, ...)."""
    which, place = np.unique(chosen, return_inverse=True)
    rows = [load_row(problem.policy, places[j]) for j in which]
    # Of policies with residuals a run has one.
    shared = {name: share(row, len(place)) for name, row in problem.policy.residuals(rows[0]).items()}
    own = without(rows[0], shared)
    return take({name: torch.cat([row[name] for row in rows]) for name in own}, place) | shared


def _each(problem: Problem, theta: Params, people: list[Newcomer]) -> list[HeldOut]:
    """Every user's held-out pairs under the user's own row."""
    return [score(problem, take(theta, np.array([i])), one.held_out) for i, one in enumerate(people)]


def _place(i: int) -> str:
    return f"adapters/user_{i:04d}"
