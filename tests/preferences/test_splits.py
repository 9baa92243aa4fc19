from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefmesh.errors import InputError
from prefmesh.preferences.pairs import Pair
from prefmesh.preferences.splits import SplitBy, groups_of, leakage, split

from .examples import Drawn, numbered, pair, pool, pools

BY = st.sampled_from(["prompt", "completion", "user"])


@given(pools(), BY, st.integers(2, 6), st.integers(0, 3))
def test_over_all_folds_each_pair_is_held_out_once_and_no_group_is_cut(
    drawn: Drawn, by: SplitBy, folds: int, seed: int
) -> None:
    pairs = pool(drawn)
    sizes = np.bincount(groups_of(pairs, by))
    if len(sizes) < folds or (folds > 2 and sizes.max() > len(pairs) / 2):
        with pytest.raises(InputError, match=r"^evaluation\.held_out"):
            split(pairs, 1 / folds, by, seed=seed)
        return
    times = np.zeros(len(pairs), dtype=int)
    loads = []
    for fold in range(folds):
        found = split(pairs, 1 / folds, by, fold, seed)
        assert found.folds == folds
        assert sorted([*found.train, *found.held_out]) == list(range(len(pairs)))
        times[found.held_out] += 1
        loads.append(len(found.held_out))
        # what the split is by is on one side only
        seen = found.leakage
        if by == "user":
            assert seen.user == 0
        else:
            assert seen.prompt == seen.prompt_and_completion == 0
        if by == "completion":
            assert seen.completion == 0
    assert (times == 1).all()
    # Dealing the largest first to the emptiest: no two folds differ by more than the largest group.
    assert max(loads) - min(loads) <= sizes.max()
    assert min(loads) > 0


def test_folds_of_equal_groups_are_equal() -> None:
    pairs = numbered(103)
    loads = [len(split(pairs, 0.1, fold=fold).held_out) for fold in range(10)]
    assert Counter(loads) == {10: 7, 11: 3}


@pytest.mark.parametrize(("held_out", "folds"), [(0.4, 2), (0.15, 6), (0.3, 3)])
def test_a_share_that_is_no_simple_fraction_is_held_out_as_asked(held_out: float, folds: int) -> None:
    pairs = numbered(200)
    parts = [split(pairs, held_out, fold=fold).held_out for fold in range(folds)]
    assert {len(part) for part in parts} == {round(200 * held_out)}
    assert len(set(np.concatenate(parts).tolist())) == folds * round(200 * held_out)  # disjoint


def test_the_seed_decides_and_nothing_else() -> None:
    pairs = numbered(50)
    first, again, other = (split(pairs, 0.2, seed=seed).held_out.tolist() for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_nothing_held_out() -> None:
    found = split(numbered(3), 0.0)
    assert found.train.tolist() == [0, 1, 2]
    assert found.held_out.tolist() == []
    assert set(found.leakage.shares().values()) == {0.0}


@pytest.mark.parametrize(
    ("held_out", "fold", "message"),
    [
        (0.6, 0, r"evaluation\.held_out: 0\.6; allowed: 0 \(none\) to 0\.5"),
        (-0.1, 0, r"evaluation\.held_out: -0\.1"),
        (0.25, 4, r"evaluation\.fold: 4; allowed: 0 to 3"),
        (0.0, 1, r"evaluation\.fold: 1; allowed: 0 to 0"),
    ],
)
def test_impossible_splits(held_out: float, fold: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        split(numbered(20), held_out, fold=fold)


def test_one_group_that_swallows_the_pool_is_refused_with_the_figure() -> None:
    # "yes" is an answer to 8 of 10 prompts: by completion these belong together.
    pairs = [pair(f"p{i}", " yes", f" no{i}") for i in range(8)] + [
        pair(f"q{i}", f" a{i}", f" b{i}") for i in range(2)
    ]
    with pytest.raises(InputError, match=r"by completion, one group .* holds 8 of 10 pairs \(80\.0%\)"):
        split(pairs, 0.34, "completion")
    assert len(split(pairs, 0.34, "prompt").held_out) in (3, 4)
    with pytest.raises(
        InputError, match=r"10 folds of whole groups by completion, .* only 3 groups; .* 8 of 10 pairs"
    ):
        split(pairs, 0.1, "completion")
    # for two folds a large group is half of a split
    assert sorted(len(split(pairs, 0.5, "completion", fold).held_out) for fold in (0, 1)) == [2, 8]


def test_components_join_through_any_shared_text() -> None:
    pairs = [
        pair("p", " a", " b"),
        pair("p", " c", " d"),  # the prompt of 0
        pair("q", " d", " e"),  # an answer of 1
        pair("r", " f", " g"),
        pair(" f", " h", " i"),  # a prompt that reads like an answer joins nothing
    ]
    assert groups_of(pairs, "completion").tolist() == [0, 0, 0, 1, 2]
    assert groups_of(pairs, "prompt").tolist() == [0, 0, 1, 2, 3]


def test_conversations_are_grouped_by_what_is_said() -> None:
    asked = ({"role": "user", "content": "hi"},)
    pairs = [
        Pair(
            prompt=asked,
            chosen=({"role": "a", "content": x},),
            rejected=({"role": "a", "content": y},),
            user="u",
        )
        for x, y in (("1", "2"), ("3", "4"))
    ]
    pairs.append(pair())
    assert groups_of(pairs, "prompt").tolist() == [0, 0, 1]


def test_leakage_counts_held_out_pairs() -> None:
    pairs = [
        pair("p", " a", " b", "u"),
        pair("q", " c", " d", "v"),
        pair("p", " x", " y", "w"),  # its prompt
        pair("r", " y", " a", "w"),  # one of its answers, under another prompt
        pair("q", " d", " z", "u"),  # its user, prompt, and an answer to that prompt
        pair("s", " s", " t", "v"),  # its user
        pair("s", " p", " q", "n"),  # nothing: prompts are no answers
    ]
    found = leakage(pairs, np.array([0, 1]), np.arange(2, 7))
    assert (found.held_out, found.prompt, found.completion, found.prompt_and_completion, found.user) == (
        5,
        2,
        2,
        1,
        2,
    )
    assert found.shares() == {"prompt": 0.4, "completion": 0.4, "prompt_and_completion": 0.2, "user": 0.4}
