"""Looking at data, and at a run's policy on other data, outside of any training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prefmesh.algorithms.gradients import Problem
from prefmesh.config import ExperimentConfig, load_config, parse_with_overrides
from prefmesh.errors import InputError
from prefmesh.evaluation.scores import log_probs
from prefmesh.evaluation.statistics import accuracy_interval, group_means, worst_tenth
from prefmesh.experiment import load_pairs, policy_of
from prefmesh.measure import score
from prefmesh.policies.export import load_row
from prefmesh.policies.loading import model_source
from prefmesh.policies.reference import reference_log_probs
from prefmesh.preferences.division import Division, divide
from prefmesh.preferences.pairs import Pair
from prefmesh.preferences.summary import CountTokens, Summary, summarize
from prefmesh.preferences.texts import text_key

if TYPE_CHECKING:
    from rich.table import Table

CONFIG_SUFFIXES = (".yaml", ".yml")


def data_config(source: str, overrides: list[str], *, skip_bad_rows: bool = False) -> ExperimentConfig:
    """An experiment's YAML file as it is, or the default experiment on a data file, `builtin:town` or a hub id."""
    if source.endswith(CONFIG_SUFFIXES):
        return load_config(source, overrides)
    preferences: dict[str, Any] = {"source": source}
    if skip_bad_rows and source != "builtin:town":
        preferences["on_bad_row"] = "skip"
    return parse_with_overrides({"preferences": preferences, "method": {"name": "centralized"}}, overrides)


def read_data(source: str, overrides: list[str]) -> list[Pair]:
    """The pairs of a data file, or the training pairs of an experiment: what it holds out stays unread."""
    config = data_config(source, overrides)
    pairs = load_pairs(config.preferences, config.seed)[0]
    if not source.endswith(CONFIG_SUFFIXES):
        return pairs
    return [pairs[i] for agent in _division(config, pairs).agents for i in agent.train]


def _division(config: ExperimentConfig, pairs: list[Pair]) -> Division:
    wanted = config.evaluation
    return divide(
        pairs, config.preferences, held_out=wanted.held_out, by=wanted.by, fold=wanted.fold, seed=config.seed
    )


def inspect_data(source: str, overrides: list[str], tokenizer: str | None) -> Summary:
    """What `prefmesh data` shows; how agents differ only where a config or an override says that there are agents."""
    config = data_config(source, overrides, skip_bad_rows=True)
    pairs, report, _ = load_pairs(config.preferences, config.seed)
    division = None
    if source.endswith(CONFIG_SUFFIXES) or any(override.startswith("preferences.") for override in overrides):
        division = _division(config, pairs)
    return summarize(
        pairs,
        read=report,
        division=division,
        column=config.preferences.column or "user",
        count_tokens=_counter(tokenizer) if tokenizer else None,
    )


def finished_run(run: Path) -> ExperimentConfig:
    """The config of a run that has come to its end. Raises `InputError` where there is none."""
    if not (run / "config.yaml").is_file() or not (run / "policy").is_dir():
        raise InputError(
            f"{run}: no finished run (config.yaml and policy/ are not both there); allowed: a run directory"
        )
    return load_config(run / "config.yaml")


def other_pairs(source: str, overrides: list[str]) -> list[Pair]:
    """All pairs of a data file; of an experiment's YAML file those that it holds out, where it does."""
    config = data_config(source, overrides)
    pairs = load_pairs(config.preferences, config.seed)[0]
    if source.endswith(CONFIG_SUFFIXES) and config.evaluation.held_out:
        return [pairs[i] for i in _division(config, pairs).split.held_out]
    return pairs


def problem_of(trained: ExperimentConfig, pairs: list[Pair], say: Callable[[str], None]) -> Problem:
    """A run's policy, reference and loss on pairs that come from elsewhere."""
    policy = policy_of(trained)
    say("reference log-probabilities")
    data = policy.encode(pairs)
    reference = reference_log_probs(policy, data, lambda p, d: log_probs(p, None, d, np.arange(len(d))))
    return Problem(policy=policy, data=data, reference=reference, objective=trained.objective)


def evaluate_run(run: Path, source: str, overrides: list[str], say: Callable[[str], None]) -> dict[str, Any]:
    """A run's policy on `source`: accuracy with its interval, margins and loss, in all and per user.

    All pairs of a data file count; of an experiment's YAML file those that it holds out, where it does.
    The policy is the average model; where the run kept an adapter per user, `own_accuracy` is that user's own adapter's.
    """
    trained = finished_run(run)
    say("reading preferences")
    pairs = other_pairs(source, overrides)
    problem = problem_of(trained, pairs, say)
    policy = problem.policy
    rows = np.arange(len(pairs))
    say("scoring")
    found = score(problem, load_row(policy, run / "policy"), rows)
    mean, low, high = accuracy_interval(found.accuracy, [text_key(pair.prompt) for pair in pairs])
    users = np.array([pair.user for pair in pairs])
    accuracy, margin = group_means(found.accuracy, users), group_means(found.margin, users)
    own = _own_accuracies(run, problem, users)
    beta = trained.objective.beta
    return {
        "run": str(run),
        "data": source,
        "pairs": len(pairs),
        "accuracy": mean,
        "accuracy_interval": [low, high],
        "accuracy_worst_tenth": worst_tenth([value for value, _ in accuracy.values()]),
        "margin": beta * float(found.margin.mean()),
        "loss": float(found.loss.mean()),
        "users": [
            {"user": user, "pairs": count, "accuracy": value, "margin": beta * margin[user][0]}
            | ({"own_accuracy": own[user]} if user in own else {})
            for user, (value, count) in accuracy.items()
        ],
    }


def evaluation_tables(found: dict[str, Any]) -> list["Table"]:
    """`evaluate_run`'s figures for the terminal: in all, and per user from the worst up (the first 30)."""
    from rich.markup import escape
    from rich.table import Table

    def percent(value: float) -> str:
        return f"{100 * value:.1f} %"

    whole = Table(title=escape(f"{found['run']} on {found['data']}"))
    for header in ("pairs", "accuracy", "95 % interval", "worst tenth of users", "margin", "loss"):
        whole.add_column(header, justify="right")
    low, high = found["accuracy_interval"]
    interval = f"{percent(low)} to {percent(high)}"
    whole.add_row(
        str(found["pairs"]), percent(found["accuracy"]), interval, percent(found["accuracy_worst_tenth"]),
        f"{found['margin']:.4f}", f"{found['loss']:.4f}",
    )  # fmt: skip
    ranked = sorted(found["users"], key=lambda user: user["accuracy"])
    users = Table(
        title="users" if len(ranked) <= 30 else f"the 30 lowest of {len(ranked)} users (all with --json)"
    )
    own = any("own_accuracy" in user for user in ranked)
    for header in ("user", "pairs", "accuracy", "margin", *(["own adapter"] if own else [])):
        users.add_column(header, justify="left" if header == "user" else "right")
    for user in ranked[:30]:
        more = [percent(user["own_accuracy"]) if "own_accuracy" in user else "-"] if own else []
        users.add_row(
            escape(user["user"]),
            str(user["pairs"]),
            percent(user["accuracy"]),
            f"{user['margin']:.4f}",
            *more,
        )
    return [whole, users]


def _own_accuracies(run: Path, problem: Problem, users: np.ndarray) -> dict[str, float]:
    """Accuracy of each user's own adapter on that user's pairs, for users whose training pairs all lay with one agent."""
    path = run / "adapters" / "users.json"
    agent_of = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = {}
    for user in np.unique(users):
        directory = run / "adapters" / f"agent_{agent_of.get(str(user), -1):04d}"
        if directory.is_dir():
            row = load_row(problem.policy, directory)
            found[str(user)] = float(score(problem, row, np.flatnonzero(users == user)).accuracy.mean())
    return found


def _counter(model: str) -> CountTokens:
    """Counts tokens with a model's own tokenizer."""
    from transformers import AutoTokenizer

    source = model_source(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InputError(f"--tokenizer {model}: could not be loaded ({str(error).splitlines()[0]})") from None
    return lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])  # type: ignore[arg-type]
