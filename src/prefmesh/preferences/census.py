"""What every process may know of everybody's pairs: how many there are, and whose, in numbers. No texts."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from prefmesh.preferences.division import Agent, Division
from prefmesh.preferences.pairs import Pair
from prefmesh.preferences.texts import text_key


@dataclass(frozen=True, kw_only=True)
class HeldOutPairs:
    """All held-out pairs, agent by agent, and last those of nobody.

    `row`: its place in the pool. `agent`: -1 for nobody. `user`: a number in `Census.users`. `prompt`: equal for equal prompts.
    """

    row: Int[np.ndarray, " pairs"]
    agent: Int[np.ndarray, " pairs"]
    user: Int[np.ndarray, " pairs"]
    prompt: Int[np.ndarray, " pairs"]


@dataclass(frozen=True, kw_only=True)
class Census:
    """`sizes`: training pairs of each agent. `names`: of agents. `users`: of everybody with a pair, in order of appearance.

    `agent_of_user`: of users whose training pairs all lie with one agent. `leakage`: see `Leakage.shares`.
    """

    sizes: Int[np.ndarray, " agents"]
    names: tuple[str, ...]
    users: tuple[str, ...]
    agent_of_user: dict[str, int]
    held_out: HeldOutPairs
    leakage: dict[str, float]

    @classmethod
    def of(cls, pairs: Sequence[Pair], division: Division) -> "Census":
        """By looking at the pairs themselves."""
        users = tuple(dict.fromkeys(pair.user for pair in pairs))
        number = {user: i for i, user in enumerate(users)}
        held = [*(agent.held_out for agent in division.agents), division.unassigned_held_out]
        row = np.concatenate(held)
        owners = [*range(len(division.agents)), -1]
        return cls(
            sizes=np.array([len(agent.train) for agent in division.agents]),
            names=tuple(agent.name for agent in division.agents),
            users=users,
            agent_of_user=_agent_of_user(pairs, division.agents),
            held_out=HeldOutPairs(
                row=row,
                agent=np.repeat(owners, [len(part) for part in held]),
                user=np.array([number[pairs[i].user] for i in row], dtype=np.int64),
                prompt=np.array([number_of(text_key(pairs[i].prompt)) for i in row], dtype=np.int64),
            ),
            leakage=division.leakage.shares(),
        )


def number_of(text: str) -> int:
    """A 63-bit number for a text: pairs of one prompt are told apart without keeping the text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _agent_of_user(pairs: Sequence[Pair], agents: Sequence[Agent]) -> dict[str, int]:
    found: dict[str, set[int]] = {}
    for i, agent in enumerate(agents):
        for row in agent.train:
            found.setdefault(pairs[row].user, set()).add(i)
    return {user: next(iter(of)) for user, of in sorted(found.items()) if len(of) == 1}
