"""What every process may know of everybody's pairs: how many there are, and whose, in numbers. No texts."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from prefmesh.preferences.division import Agent, Division
from prefmesh.preferences.pairs import Pair
from prefmesh.preferences.texts import text_key

Gather = Callable[[Float[np.ndarray, "own columns"]], Float[np.ndarray, "all columns"]]
"""All processes' rows, in the order of their ranks."""


@dataclass(frozen=True, kw_only=True)
class HeldOutPairs:
    """All held-out pairs, agent by agent, and last those of nobody (where processes have pools of their own: of each process).

    `row`: its place in the pool. `agent`: -1 for nobody. `user`: a number in `Census.users`. `prompt`: equal for equal prompts.
    """

    row: Int[np.ndarray, " pairs"]
    agent: Int[np.ndarray, " pairs"]
    user: Int[np.ndarray, " pairs"]
    prompt: Int[np.ndarray, " pairs"]


@dataclass(frozen=True, kw_only=True)
class Census:
    """`pairs`: in the pool. `sizes`: training pairs of each agent. `names`: of agents. `users`: of everybody with a pair, in order
    of appearance.

    `agent_of_user`: of users whose training pairs all lie with one agent. `leakage`: see `Leakage.shares`.
    """

    pairs: int
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
            pairs=len(pairs),
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

    def joined(self, gather: Gather, rank: int) -> "Census":
        """Of all processes' pools, this being the one of process `rank`. Only numbers are told: names are made up, and prompts are
        equal only within a process."""
        held = self.held_out
        prompts, prompt = np.unique(held.prompt, return_inverse=True)
        own = [len(self.sizes), len(self.users), self.pairs, len(prompts), len(held.row)]
        told = gather(np.array([[*own, *self.leakage.values()]]))
        counts, leakage = told[:, : len(own)].astype(np.int64), told[:, len(own) :]
        agents, users, pairs, _, tested = counts.sum(0)
        # Each process counted from 0.
        first_agent, first_user, first_pair, first_prompt, _ = (np.cumsum(counts, axis=0) - counts).T

        def everybodys(columns: list[np.ndarray]) -> Int[np.ndarray, "columns rows"]:
            return gather(np.stack(columns, axis=1).astype(np.float64)).astype(np.int64).T

        row, agent, user, prompt = everybodys([held.row, held.agent, held.user, prompt])
        process = np.repeat(np.arange(len(counts)), counts[:, -1])
        (sizes,) = everybodys([self.sizes])
        number = {user: i for i, user in enumerate(self.users)}
        alone = np.array([(number[user], i) for user, i in self.agent_of_user.items()]).reshape(-1, 2)
        alone_user, alone_agent = everybodys(
            [alone[:, 0] + first_user[rank], alone[:, 1] + first_agent[rank]]
        )
        width = max(4, len(str(agents - 1)))
        names = tuple(
            f"user {k} of process {p}" for p, count in enumerate(counts[:, 1]) for k in range(count)
        )
        assert len(names) == users
        return Census(
            pairs=int(pairs),
            sizes=sizes,
            names=tuple(f"agent_{i:0{width}d}" for i in range(agents)),
            users=names,
            agent_of_user={names[u]: int(a) for u, a in zip(alone_user, alone_agent, strict=True)},
            held_out=HeldOutPairs(
                row=row + first_pair[process],
                agent=np.where(agent < 0, -1, agent + first_agent[process]),
                user=user + first_user[process],
                prompt=prompt + first_prompt[process],
            ),
            leakage={
                name: float(counts[:, -1] @ share / max(1, tested))
                for name, share in zip(self.leakage, leakage.T, strict=True)
            },
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
