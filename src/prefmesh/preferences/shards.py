"""Which agent holds which pairs: by user, IID, Dirichlet over a column, or of skewed sizes."""

import heapq
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from prefmesh.errors import InputError, unknown_name
from prefmesh.preferences.pairs import Pair
from prefmesh.preferences.settings import PreferencesSettings
from prefmesh.preferences.texts import column_names, column_value
from prefmesh.randomness import generator

Rows = Int[np.ndarray, " _"]
"""Indices into the pool (of any number: the axis is not tied to others)."""


def partition(pairs: Sequence[Pair], settings: PreferencesSettings, seed: int) -> list[Rows]:
    """Index arrays into `pairs` (ascending), one per agent: each pair in exactly one, none empty.

    Raises `InputError` where there are more agents than users (`by_user`) or than pairs, or no such column.
    """
    everything = np.arange(len(pairs))
    agents = agent_count(pairs, settings)
    return by_agent(assign(pairs, settings, seed, [everything]), everything, agents)


def agent_count(pairs: Sequence[Pair], settings: PreferencesSettings) -> int:
    """`preferences.agents`, or as many as users. Raises `InputError` for more agents than users or pairs."""
    users = len({pair.user for pair in pairs})
    agents = settings.agents or users
    if settings.partition == "by_user" and agents > users:
        raise InputError(
            f"preferences.agents: {agents}, but there are {users} users; allowed: 1 to {users}, or a partition that "
            "cuts across users (iid, dirichlet, size_skewed)"
        )
    if agents > len(pairs):
        raise InputError(
            f"preferences.agents: {agents}, but there are {len(pairs)} pairs; allowed: 1 to {len(pairs)}"
        )
    return agents


def assign(
    pairs: Sequence[Pair], settings: PreferencesSettings, seed: int, parts: Sequence[Rows]
) -> Int[np.ndarray, " pairs"]:
    """The agent of each pair, -1 for pairs in none of `parts`.

    Each part (training, held-out) is dealt for itself under one plan, so that an agent's share of both is the same:
    the same users, the same tastes, the same size. The first part leaves no agent empty.
    """
    first = [pairs[i] for i in parts[0]]
    agents = agent_count(first, settings)
    rng = generator(seed, "shards")
    agent_of = np.full(len(pairs), -1, dtype=np.int64)
    if settings.partition == "by_user":
        agent_of_user = _deal_users(Counter(pair.user for pair in first), agents, rng)
        # A user without a pair in the first part still belongs somewhere: to the agents in turn.
        others = dict.fromkeys(
            pair.user for part in parts[1:] for i in part if (pair := pairs[i]).user not in agent_of_user
        )
        agent_of_user |= {user: i % agents for i, user in enumerate(others)}
        for part in parts:
            agent_of[part] = [agent_of_user[pairs[i].user] for i in part]
        return agent_of
    if settings.partition == "dirichlet":
        assert settings.alpha is not None
        label = _labels(pairs, settings.column or "user")
        tastes = _tastes(
            label[np.concatenate(list(parts))], int(label.max()) + 1, agents, settings.alpha, rng
        )
        for part in parts:
            agent_of[part] = _deal_by_taste(label[part], tastes, rng)
        return agent_of
    shares = np.full(agents, 1 / agents)
    if settings.partition == "size_skewed":
        assert settings.size_exponent is not None
        shares = rng.permutation(_power_law(agents, settings.size_exponent))
    for number, part in enumerate(parts):
        sizes = _whole_sizes(shares, len(part), at_least=1 if number == 0 else 0)
        agent_of[part] = rng.permutation(np.repeat(np.arange(agents), sizes))
    return agent_of


def by_agent(agent_of: Int[np.ndarray, " pairs"], part: Rows, agents: int) -> list[Rows]:
    """The rows of each agent among `part`, ascending where `part` is."""
    owner = agent_of[part]
    order = np.argsort(owner, kind="stable")
    return np.split(part[order], np.searchsorted(owner[order], np.arange(1, agents)))


def _deal_users(sizes: Counter[str], agents: int, rng: np.random.Generator) -> dict[str, int]:
    """One user per agent in order of appearance, or whole users dealt to fewer agents: the largest first (ties in
    shuffled order, so that users who stand together in a file do not end up together), each to the smallest agent."""
    users = list(sizes)
    if len(users) == agents:
        return {user: agent for agent, user in enumerate(users)}
    shuffled = [users[i] for i in rng.permutation(len(users))]
    heap = [(0, agent) for agent in range(agents)]
    agent_of_user: dict[str, int] = {}
    for user in sorted(shuffled, key=lambda user: -sizes[user]):
        load, agent = heap[0]
        heapq.heapreplace(heap, (load + sizes[user], agent))
        agent_of_user[user] = agent
    return agent_of_user


def _labels(pairs: Sequence[Pair], column: str) -> Int[np.ndarray, " pairs"]:
    values = [column_value(pair, column) for pair in pairs]
    if None in values:
        names = column_names(list(pairs))
        if column not in names:
            raise unknown_name("preferences.column", column, names)
        raise InputError(
            f"preferences.column: {column!r} is missing in {values.count(None)} of {len(values)} pairs"
        )
    return np.unique(np.array(values), return_inverse=True)[1].astype(np.int64)


def _tastes(
    label: Int[np.ndarray, " rows"], labels: int, agents: int, alpha: float, rng: np.random.Generator
) -> Float[np.ndarray, "agents labels"]:
    """Each agent's proportions of labels, q_i ~ Dir(alpha p) with p the pool's proportions (Hsu, Qi and Brown,
    arXiv:1909.06335, section 2): alpha -> infinity gives q_i = p, alpha -> 0 one label per agent."""
    present = np.bincount(label, minlength=labels)
    tastes = np.zeros((agents, labels))
    tastes[:, present > 0] = rng.dirichlet(alpha * present[present > 0] / present.sum(), size=agents)
    return tastes


def _deal_by_taste(
    label: Int[np.ndarray, " rows"], tastes: Float[np.ndarray, "agents labels"], rng: np.random.Generator
) -> Int[np.ndarray, " rows"]:
    """Agents of equal size (to one row) draw rows in turn, without replacement, a label by their taste each time.

    Labels that are used up drop out of a taste; a taste with nothing left takes what is left in proportion. Drawing
    in turn, where Hsu et al. fill one agent after the other, spreads that over all agents instead of the last ones.
    """
    agents, labels = tastes.shape
    shuffled = rng.permutation(len(label))
    stacks = [list(shuffled[label[shuffled] == k]) for k in range(labels)]
    left = np.array([len(stack) for stack in stacks], dtype=np.float64)
    turns = np.concatenate(
        [rng.permutation(agents) for _ in range(-(-len(label) // agents))] or [np.arange(0)]
    )
    agent_of = np.empty(len(label), dtype=np.int64)
    for agent, uniform in zip(turns[: len(label)], rng.random(len(label)), strict=True):
        weights = np.cumsum(tastes[agent] * (left > 0))
        if weights[-1] <= 0:
            weights = np.cumsum(left)
        # Shares and not sums: what is left of a taste may be so little that its product with a number below 1 is itself.
        k = int(np.searchsorted(weights / weights[-1], uniform, side="right"))
        agent_of[stacks[k].pop()] = agent
        left[k] -= 1
    return agent_of


def _power_law(agents: int, exponent: float) -> Float[np.ndarray, " agents"]:
    sizes = np.arange(1, agents + 1) ** -float(exponent)
    return sizes / sizes.sum()


def _whole_sizes(
    shares: Float[np.ndarray, " agents"], total: int, at_least: int
) -> Int[np.ndarray, " agents"]:
    """Whole numbers that sum to `total`, nearest to the shares (largest remainders) above `at_least` each."""
    exact = shares * (total - at_least * len(shares))
    sizes = np.floor(exact).astype(np.int64)
    short = total - at_least * len(shares) - int(sizes.sum())
    sizes[np.argsort(sizes - exact, kind="stable")[:short]] += 1
    return sizes + at_least
