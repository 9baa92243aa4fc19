"""From a pool of pairs to agents: split first, so that what is held out is held out for everybody, then deal."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from prefmesh.errors import InputError
from prefmesh.preferences.pairs import Pair
from prefmesh.preferences.settings import PreferencesSettings
from prefmesh.preferences.shards import Rows, agent_count, assign, by_agent
from prefmesh.preferences.splits import Leakage, Split, SplitBy, split


@dataclass(frozen=True, kw_only=True)
class Agent:
    """What one agent holds: indices into the pool, ascending, and whose pairs they are."""

    name: str
    users: tuple[str, ...]
    train: Rows
    held_out: Rows


@dataclass(frozen=True, kw_only=True)
class Division:
    """The pool, split and dealt. Every pair is in exactly one agent's `train` or `held_out`, or in
    `unassigned_held_out` (pairs of held-out users, who belong to no agent)."""

    agents: list[Agent]
    unassigned_held_out: Rows
    split: Split
    users_without_train: tuple[str, ...]
    users_without_held_out: tuple[str, ...]

    def part(self, first: int, last: int) -> tuple["Division", Rows]:
        """What a process keeps that hosts agents `first` to `last` - 1, and the rows of the pool that its pairs are, in order.

        Pairs of nobody go to the process of the last agent.
        """
        agents = self.agents[first:last]
        nobodys = self.unassigned_held_out if last == len(self.agents) else self.unassigned_held_out[:0]
        kept = np.sort(np.concatenate([*(rows for a in agents for rows in (a.train, a.held_out)), nobodys]))

        def place(rows: Rows) -> Rows:
            return np.searchsorted(kept, rows)

        moved = [replace(a, train=place(a.train), held_out=place(a.held_out)) for a in agents]
        return replace(self, agents=moved, unassigned_held_out=place(nobodys)), kept

    @property
    def leakage(self) -> Leakage:
        """What held-out pairs share with training pairs of any agent."""
        return self.split.leakage


def divide(
    pairs: Sequence[Pair],
    settings: PreferencesSettings,
    *,
    held_out: int | float,
    by: SplitBy = "prompt",
    fold: int = 0,
    seed: int,
) -> Division:
    """Splits the whole pool, then deals both sides to agents: what is held out is held out for every agent.

    Raises `InputError` where either cannot be done (see `split`, `partition`), or where an agent has no training pair.
    """
    sides = split(pairs, held_out, by, fold, seed)
    dealt = [sides.train] if by == "user" else [sides.train, sides.held_out]
    pool = np.concatenate(dealt)
    if settings.partition == "by_user" and settings.agents in (None, len({pairs[i].user for i in pool})):
        _refuse_users_without_train(pairs, pool, sides)
    agents = agent_count([pairs[i] for i in sides.train], settings)
    agent_of = assign(pairs, settings, seed, dealt)
    shards = [by_agent(agent_of, part, agents) for part in dealt]
    nothing = np.arange(0)
    users = [
        tuple(dict.fromkeys(pairs[i].user for part in shards for i in part[agent])) for agent in range(agents)
    ]
    alone = settings.partition == "by_user" and all(len(names) == 1 for names in users)
    width = max(4, len(str(agents - 1)))
    training, tested = ({pairs[i].user for i in side} for side in (sides.train, sides.held_out))
    everyone = dict.fromkeys(pair.user for pair in pairs)
    return Division(
        agents=[
            Agent(
                name=users[agent][0] if alone else f"agent_{agent:0{width}d}",
                users=users[agent],
                train=shards[0][agent],
                held_out=shards[1][agent] if len(shards) > 1 else nothing,
            )
            for agent in range(agents)
        ],
        unassigned_held_out=sides.held_out if by == "user" else nothing,
        split=sides,
        users_without_train=tuple(user for user in everyone if user not in training),
        users_without_held_out=tuple(user for user in everyone if user not in tested),
    )


def _refuse_users_without_train(pairs: Sequence[Pair], pool: Rows, sides: Split) -> None:
    training = {pairs[i].user for i in sides.train}
    without = [user for user in dict.fromkeys(pairs[i].user for i in pool) if user not in training]
    if without:
        named = ", ".join(without[:3]) + (", ..." if len(without) > 3 else "")
        raise InputError(
            f"preferences.agents: one per user, but all pairs of {len(without)} users ({named}) are held out; raise "
            "preferences.min_pairs, lower evaluation.held_out, or set preferences.agents so that users share an agent"
        )
