"""What every process may know of everybody's pairs: how many there are, and whose, in numbers. No texts."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from prefmesh.preferences.division import Agent, Division
from prefmesh.preferences.pairs import Pair
from prefmesh.preferences.splits import Leakage
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

    def prompts_of(self, rows: Int[np.ndarray, " some"]) -> Int[np.ndarray, " some"]:
        """Numbers of the prompts of these held-out rows, in the census' order: not all have figures where a site did not answer."""
        return self.held_out.prompt[np.isin(self.held_out.row, rows)]

    def told(self) -> "Told":
        """The numbers that may be known elsewhere."""
        held, number = self.held_out, {user: i for i, user in enumerate(self.users)}
        prompts, prompt = np.unique(held.prompt, return_inverse=True)
        alone = [(number[user], agent) for user, agent in self.agent_of_user.items()]
        return Told(
            counts=np.array(
                [len(self.sizes), len(self.users), self.pairs, len(prompts), len(held.row), len(alone)]
            ),
            leakage=np.array(list(self.leakage.values())),
            sizes=self.sizes,
            held_out=np.stack([held.row, held.agent, held.user, prompt], axis=1),
            alone=np.array(alone, dtype=np.int64).reshape(-1, 2),
        )

    @classmethod
    def of_sites(cls, sites: Sequence["Told"]) -> "Census":
        """Of pools that others hold. Names are made up, and prompts are equal only within a site."""
        counts = np.stack([site.counts for site in sites])
        agents, users, pairs, _, tested, _ = counts.sum(0)
        first_agent, first_user, first_pair, first_prompt, *_ = (np.cumsum(counts, axis=0) - counts).T
        row, agent, user, prompt = np.concatenate([site.held_out for site in sites]).T
        held_by = np.repeat(np.arange(len(sites)), counts[:, 4])
        alone_user, alone_agent = np.concatenate([site.alone for site in sites]).T
        alone_at = np.repeat(np.arange(len(sites)), counts[:, 5])
        names = tuple(f"user {k} of site {s}" for s, count in enumerate(counts[:, 1]) for k in range(count))
        assert len(names) == users
        width = max(4, len(str(agents - 1)))
        leakage = counts[:, 4] @ np.stack([site.leakage for site in sites]) / max(1, tested)
        return cls(
            pairs=int(pairs),
            sizes=np.concatenate([site.sizes for site in sites]),
            names=tuple(f"agent_{i:0{width}d}" for i in range(agents)),
            users=names,
            agent_of_user={
                names[u]: int(a)
                for u, a in zip(
                    alone_user + first_user[alone_at], alone_agent + first_agent[alone_at], strict=True
                )
            },
            held_out=HeldOutPairs(
                row=row + first_pair[held_by],
                agent=np.where(agent < 0, -1, agent + first_agent[held_by]),
                user=user + first_user[held_by],
                prompt=prompt + first_prompt[held_by],
            ),
            leakage=dict(zip(Leakage.NAMES, leakage.tolist(), strict=True)),
        )

    def joined(self, gather: Gather) -> "Census":
        """Of all processes' pools, this being the one of one of them."""
        told = self.told()
        counts = gather(told.counts[None].astype(np.float64)).astype(np.int64)
        leakage = gather(told.leakage[None])

        def everybodys(own: np.ndarray, lengths: Int[np.ndarray, " sites"]) -> list[np.ndarray]:
            return np.split(gather(own.astype(np.float64)).astype(np.int64), np.cumsum(lengths)[:-1])

        sizes = everybodys(told.sizes[:, None], counts[:, 0])
        held_out = everybodys(told.held_out, counts[:, 4])
        alone = everybodys(told.alone, counts[:, 5])
        return Census.of_sites(
            [
                Told(counts=c, leakage=share, sizes=n[:, 0], held_out=h, alone=a)
                for c, share, n, h, a in zip(counts, leakage, sizes, held_out, alone, strict=True)
            ]
        )


@dataclass(frozen=True, kw_only=True)
class Told:
    """All that a site says of its pool, in numbers that count from 0 at each site.

    `counts`: agents, users, pairs, prompts that are held out, held-out pairs, users whose training pairs lie with one agent.
    `held_out`: of each held-out pair its place, agent (-1: nobody), user and prompt. `alone`: those users with their agents.
    """

    counts: Int[np.ndarray, " six"]
    leakage: Float[np.ndarray, " four"]
    sizes: Int[np.ndarray, " agents"]
    held_out: Int[np.ndarray, "pairs 4"]
    alone: Int[np.ndarray, "users 2"]


def number_of(text: str) -> int:
    """A 63-bit number for a text: pairs of one prompt are told apart without keeping the text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _agent_of_user(pairs: Sequence[Pair], agents: Sequence[Agent]) -> dict[str, int]:
    found: dict[str, set[int]] = {}
    for i, agent in enumerate(agents):
        for row in agent.train:
            found.setdefault(pairs[row].user, set()).add(i)
    return {user: next(iter(of)) for user, of in sorted(found.items()) if len(of) == 1}
