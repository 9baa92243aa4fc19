"""Held-out splits that do not leak, and the leakage that is left, measured.

Groups of pairs go to one side whole. A split by prompt keeps a prompt's text on one side, whoever judged it; by
completion it keeps every text on one side, prompt or answer; by user it keeps a user on one side.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Int

from prefmesh.errors import InputError
from prefmesh.preferences.pairs import Pair
from prefmesh.preferences.texts import text_key
from prefmesh.randomness import generator

SplitBy = Literal["prompt", "completion", "user"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Leakage:
    """How many held-out pairs share something with training pairs (exact texts)."""

    NAMES: ClassVar = ("prompt", "completion", "prompt_and_completion", "user")

    held_out: int
    prompt: int
    """... whose prompt is a training pair's prompt."""
    completion: int
    """... of whose two answers at least one is an answer in a training pair, under whatever prompt."""
    prompt_and_completion: int
    """... of which at least one answer is seen in training under the same prompt."""
    user: int
    """... whose user has training pairs."""

    def shares(self) -> dict[str, float]:
        """The counts as shares of the held-out pairs (0 where none is held out)."""
        return {name: getattr(self, name) / max(self.held_out, 1) for name in self.NAMES}


@dataclass(frozen=True, kw_only=True)
class Split:
    """Indices into the pool, ascending; every pair is on one side. Fold `fold` of `folds` (0 of 0: nothing held out)."""

    train: Int[np.ndarray, " train"]
    held_out: Int[np.ndarray, " held_out"]
    by: SplitBy
    fold: int
    folds: int
    groups: int
    """How many groups there were to deal."""
    leakage: Leakage


def split(
    pairs: Sequence[Pair], held_out: int | float, by: SplitBy = "prompt", fold: int = 0, seed: int = 0
) -> Split:
    """Holds out one fold of that share (see `folds_of`); over all folds each pair is held out once, but for those in none.

    Groups are shuffled by the seed and dealt, large ones first, to the fold that is emptiest so far. `held_out`
    0 holds out nothing. Raises `InputError` where that cannot be done: too few groups, or one group with more than
    half of all pairs (for more than two folds).
    """
    if not 0 <= held_out <= 0.5:
        raise InputError(f"evaluation.held_out: {held_out}; allowed: 0 (none) to 0.5")
    folds, rest = folds_of(held_out)
    if not 0 <= fold < max(folds, 1):
        raise InputError(f"evaluation.fold: {fold}; allowed: 0 to {max(folds, 1) - 1} (held_out {held_out})")
    group = groups_of(pairs, by)
    sizes = np.bincount(group)
    if folds:
        bins = [held_out] * folds + [rest] * (rest > 0)
        _check_groups(sizes, by, len(bins))
        out = _deal(sizes, bins, seed)[group] == fold
    else:
        out = np.zeros(len(pairs), dtype=bool)
    train, held = np.flatnonzero(~out), np.flatnonzero(out)
    return Split(
        train=train,
        held_out=held,
        by=by,
        fold=fold,
        folds=folds,
        groups=len(sizes),
        leakage=leakage(pairs, train, held),
    )


def folds_of(held_out: int | float) -> tuple[int, float]:
    """How many disjoint folds of this share there are, and the share of pairs that is in none and always trained on.

    >>> folds_of(0.2), folds_of(0.33), folds_of(0)
    ((5, 0.0), (3, 0.0), (0, 0.0))
    >>> folds, rest = folds_of(0.4)
    >>> folds, round(rest, 12)
    (2, 0.2)
    """
    if not held_out:
        return 0, 0.0
    nearest = round(1 / held_out)
    if abs(1 / held_out - nearest) < 0.05:  # 0.33 is a third
        return nearest, 0.0
    folds = int(1 / held_out)
    return folds, 1 - folds * held_out


def groups_of(pairs: Sequence[Pair], by: SplitBy) -> Int[np.ndarray, " pairs"]:
    """The group of each pair, numbered from 0 in order of appearance (for `completion`: connected components)."""
    if by == "prompt":
        return _numbered([text_key(pair.prompt) for pair in pairs])
    if by == "user":
        return _numbered([pair.user for pair in pairs])
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    # Nodes are pairs and texts; a pair is joined to its prompt and to both answers.
    texts = [("prompt", text_key(pair.prompt)) for pair in pairs]
    texts += [("answer", text_key(side)) for pair in pairs for side in (pair.chosen, pair.rejected)]
    node = _numbered(texts) + len(pairs)
    pair = np.concatenate([np.arange(len(pairs)), np.repeat(np.arange(len(pairs)), 2)])
    size = int(node.max()) + 1
    graph = coo_array((np.ones(len(node), dtype=np.int8), (pair, node)), shape=(size, size))
    _, component = connected_components(graph, directed=False)
    return _numbered(component[: len(pairs)].tolist())


def _numbered(keys: Sequence[object]) -> Int[np.ndarray, " keys"]:
    number: dict[object, int] = {}
    return np.array([number.setdefault(key, len(number)) for key in keys], dtype=np.int64)


def _check_groups(sizes: Int[np.ndarray, " groups"], by: SplitBy, folds: int) -> None:
    total, largest = int(sizes.sum()), int(sizes.max())
    if len(sizes) < folds:
        raise InputError(
            f"evaluation.held_out: {folds} folds of whole groups by {by}, but there are only {len(sizes)} groups; "
            f"the largest holds {largest} of {total} pairs"
        )
    if folds > 2 and largest > total / 2:
        raise InputError(
            f"evaluation.held_out: by {by}, one group of pairs that belong together holds {largest} of {total} pairs "
            f"({largest / total:.1%}), so no {folds} folds of about equal size exist; allowed: another way to split"
        )


def _deal(
    sizes: Int[np.ndarray, " groups"], shares: Sequence[float], seed: int
) -> Int[np.ndarray, " groups"]:
    """The fold of each group: largest first (ties in shuffled order), each to the fold that is emptiest for its share."""
    shuffled = generator(seed, "split").permutation(len(sizes))
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    fold_of = np.empty(len(sizes), dtype=np.int64)
    heap = [(0.0, fold) for fold in range(len(shares))]
    for group in order:
        load, fold = heap[0]
        heapq.heapreplace(heap, (load + float(sizes[group]) / shares[fold], fold))
        fold_of[group] = fold
    return fold_of


def leakage(
    pairs: Sequence[Pair], train: Int[np.ndarray, " train"], held_out: Int[np.ndarray, " held_out"]
) -> Leakage:
    """What held-out pairs share with training pairs, for any split (indices into `pairs`)."""
    seen = _Keys([pairs[i] for i in train])
    held = [pairs[i] for i in held_out]
    prompts = [text_key(pair.prompt) for pair in held]
    answers = [(text_key(pair.chosen), text_key(pair.rejected)) for pair in held]
    return Leakage(
        held_out=len(held),
        prompt=sum(prompt in seen.prompts for prompt in prompts),
        completion=sum(any(side in seen.completions for side in sides) for sides in answers),
        prompt_and_completion=sum(
            any((prompt, side) in seen.both for side in sides)
            for prompt, sides in zip(prompts, answers, strict=True)
        ),
        user=sum(pair.user in seen.users for pair in held),
    )


class _Keys:
    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.prompts = {text_key(pair.prompt) for pair in pairs}
        self.both = {
            (text_key(pair.prompt), text_key(side)) for pair in pairs for side in (pair.chosen, pair.rejected)
        }
        self.completions = {completion for _, completion in self.both}
        self.users = {pair.user for pair in pairs}
