"""Each message's own randomness, which depends on nothing else that is sent with it."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from prefmesh.randomness import derived_seed, generator

Seeds = Sequence[int]
"""One for each agent of a pass: an agent's message is the same whether it is made alone or with others."""


def message_seeds(seed: int, purpose: str, round_: int, agents: Int[np.ndarray, " some"]) -> list[int]:
    """Of the messages that `agents` send in this round; `purpose` tells apart the messages of one agent and round.

    >>> both = message_seeds(0, "gossip", 3, np.array([5, 8]))
    >>> both[1:] == message_seeds(0, "gossip", 3, np.array([8]))
    True
    """
    return [derived_seed(seed, f"compression/{purpose}", round_, agent) for agent in agents.tolist()]


def stage_seeds(seeds: Seeds, stage: int) -> list[int]:
    """What one stage of a chain (from 0) draws from, independent of what the others do."""
    return [derived_seed(seed, "stage", stage) for seed in seeds]


def uniform(seeds: Seeds, numbers: int) -> Float[np.ndarray, "agents numbers"]:
    """Each agent's draws from [0, 1)."""
    rows = np.empty((len(seeds), numbers), dtype=np.float32)
    for row, seed in zip(rows, seeds, strict=True):
        generator(seed, "uniform").random(out=row, dtype=np.float32)
    return rows


def normal(seeds: Seeds, numbers: int) -> Float[np.ndarray, "agents numbers"]:
    """Each agent's standard normal draws."""
    rows = np.empty((len(seeds), numbers), dtype=np.float32)
    for row, seed in zip(rows, seeds, strict=True):
        generator(seed, "normal").standard_normal(out=row, dtype=np.float32)
    return rows


def positions(seeds: Seeds, of: int, count: int) -> Int[np.ndarray, "agents count"]:
    """Each agent's `count` different positions below `of`, every such set equally likely, ascending."""
    rows = np.empty((len(seeds), count), dtype=np.int64)
    for row, seed in zip(rows, seeds, strict=True):
        row[:] = np.sort(generator(seed, "positions").choice(of, count, replace=False, shuffle=False))
    return rows
