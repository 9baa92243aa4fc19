from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefmesh.errors import InputError
from prefmesh.preferences.pairs import Pair
from prefmesh.preferences.settings import PreferencesSettings
from prefmesh.preferences.shards import _deal_by_taste, partition
from prefmesh.preferences.summary import total_variation

from .examples import Drawn, numbered, pair, pool, pools

KINDS = st.sampled_from(
    [
        {"partition": "by_user"},
        {"partition": "iid"},
        {"partition": "dirichlet", "alpha": 0.01},
        {"partition": "dirichlet", "alpha": 1e-9, "column": "colour"},
        {"partition": "dirichlet", "alpha": 1e6, "column": "colour"},
        {"partition": "size_skewed", "size_exponent": 2},
        {"partition": "size_skewed", "size_exponent": 0},
    ]
)


def settings(**given: object) -> PreferencesSettings:
    return PreferencesSettings(**given)  # pyright: ignore[reportArgumentType]


def as_lists(shards: list[np.ndarray]) -> list[list[int]]:
    return [shard.tolist() for shard in shards]


@given(pools(), KINDS, st.data())
def test_every_pair_goes_to_one_agent_and_no_agent_is_empty(
    drawn: Drawn, kind: dict, data: st.DataObject
) -> None:
    pairs = pool(drawn)
    users = len({pair.user for pair in pairs})
    most = users if kind["partition"] == "by_user" else len(pairs)
    agents = data.draw(st.one_of(st.none(), st.integers(1, most)))
    shards = as_lists(partition(pairs, settings(agents=agents, **kind), seed=3))
    assert len(shards) == (agents or users)
    assert all(shards)
    assert sorted(i for shard in shards for i in shard) == list(range(len(pairs)))
    assert all(a < b for shard in shards for a, b in pairwise(shard))
    assert shards == as_lists(partition(pairs, settings(agents=agents, **kind), seed=3))
    sizes = list(map(len, shards))
    if kind["partition"] in ("iid", "dirichlet") or kind.get("size_exponent") == 0:
        assert max(sizes) - min(sizes) <= 1
    if kind["partition"] == "by_user":  # whole users
        owners = [{pairs[i].user for i in shard} for shard in shards]
        assert sum(map(len, owners)) == users


def test_a_taste_of_which_next_to_nothing_is_left() -> None:
    """The least number that a computer knows, times 0.7, is itself."""
    label, least = np.array([0] * 3 + [1] * 5), np.nextafter(0.0, 1.0)
    for seed in range(5):
        agent_of = _deal_by_taste(label, np.array([[1.0, least, 0.0]]), np.random.default_rng(seed))
        assert agent_of.tolist() == [0] * 8


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "size_skewed"])
def test_another_seed_deals_otherwise(kind: str) -> None:
    given = {"dirichlet": {"alpha": 0.5}, "size_skewed": {"size_exponent": 1.0}}.get(kind, {})
    pairs = numbered(60, users=6)
    first, other = (
        as_lists(partition(pairs, settings(partition=kind, agents=5, **given), seed)) for seed in (0, 1)
    )
    assert first != other


def test_one_user_per_agent_in_order_of_appearance() -> None:
    pairs = [pair(user=user) for user in "cabca"]
    assert as_lists(partition(pairs, settings(), 0)) == [[0, 3], [1, 4], [2]]


def test_several_users_per_agent_are_balanced() -> None:
    # Users of 5, 4, 3, 3, 3 pairs: the largest first, to the smallest agent, gives 5+3 and 4+3+3 at best.
    pairs = [
        pair(user=user) for user, size in zip("abcde", (5, 4, 3, 3, 3), strict=True) for _ in range(size)
    ]
    sizes = [len(shard) for shard in partition(pairs, settings(agents=2), 0)]
    assert sorted(sizes) == [8, 10]


@given(pools(min_size=2), st.integers(0, 5), st.data())
def test_dealt_users_leave_agents_within_one_user_of_each_other(
    drawn: Drawn, seed: int, data: st.DataObject
) -> None:
    pairs = pool(drawn)
    users = Counter(pair.user for pair in pairs)
    agents = data.draw(st.integers(1, len(users)))
    sizes = [len(shard) for shard in partition(pairs, settings(agents=agents), seed)]
    if agents < len(users):
        assert max(sizes) - min(sizes) <= max(users.values())


def test_users_of_equal_size_are_mixed_by_the_seed() -> None:
    # The first half of the users is of one kind; dealt in order of appearance they would alternate the same way always.
    pairs = numbered(40, users=40)
    first, other = (as_lists(partition(pairs, settings(agents=4), seed)) for seed in (0, 1))
    assert first != other
    assert [len(shard) for shard in first] == [10] * 4


def variations(pairs: list[Pair], shards: list[np.ndarray], column: str) -> list[float]:
    values = [str(pair.columns[column]) for pair in pairs]
    return [total_variation([values[i] for i in shard], values) for shard in shards]


def test_dirichlet_goes_from_one_label_to_the_pools_proportions() -> None:
    # 4 labels in shares 1/2, 1/4, 1/8, 1/8 over 4,000 pairs; 20 agents of 200 pairs.
    labels = ([0] * 4 + [1] * 2 + [2, 3]) * 500
    pairs = numbered(4000, label=labels)
    far, middle, near = (
        variations(
            pairs,
            partition(pairs, settings(partition="dirichlet", alpha=alpha, column="label", agents=20), 0),
            "label",
        )
        for alpha in (1e-4, 1.0, 1e7)
    )
    # IID draws of 200 from 4 labels: the mean distance is about sqrt(2/pi) sum_k sqrt(p(1-p)/200)/2 = 0.047
    assert np.mean(near) < 0.07
    assert np.mean(near) < np.mean(middle) < np.mean(far)
    # One label each as long as labels last: distance 1 - p, between 1/2 and 7/8. The last agents take what is left.
    assert np.median(far) >= 0.45


def test_dirichlet_with_a_small_alpha_gives_few_labels_per_agent() -> None:
    pairs = numbered(400, label=[i % 4 for i in range(400)])
    shards = partition(pairs, settings(partition="dirichlet", alpha=1e-6, column="label", agents=2), 5)
    # Two agents of 200 with one favourite among four labels of 100: it is used up, then the rest in proportion.
    for shard in shards:
        counts = Counter(pairs[i].columns["label"] for i in shard)
        assert max(counts.values()) >= 50


def test_dirichlet_needs_its_column_in_every_pair() -> None:
    pairs = [pair(domain="x"), pair()]
    given = {"partition": "dirichlet", "alpha": 1.0, "agents": 1}
    with pytest.raises(InputError, match=r"^preferences\.column: 'domain' is missing in 1 of 2 pairs"):
        partition(pairs, settings(column="domain", **given), 0)
    with pytest.raises(
        InputError, match=r"^preferences\.column: unknown name 'domian'; did you mean 'domain'"
    ):
        partition(pairs, settings(column="domian", **given), 0)


def test_sizes_follow_the_power_law() -> None:
    pairs = numbered(1000)
    shards = partition(pairs, settings(partition="size_skewed", size_exponent=1.0, agents=4), 0)
    # Shares 1, 1/2, 1/3, 1/4 of 25/12, of the 996 pairs above one each: 478.08, 239.04, 159.36, 119.52.
    assert sorted(map(len, shards), reverse=True) == [479, 240, 160, 121]


def test_iid_shards_are_shuffled() -> None:
    shards = partition(numbered(100), settings(partition="iid", agents=2), 0)
    # A half of 0..99 has mean 49.5 and standard deviation 29 / sqrt(50) / sqrt(2) = 2.9; the halves as they stand: 24.5
    assert all(40 < shard.mean() < 59 for shard in shards)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"agents": 4}, r"^preferences\.agents: 4, but there are 3 users; allowed: 1 to 3"),
        (
            {"agents": 10, "partition": "iid"},
            r"^preferences\.agents: 10, but there are 9 pairs; allowed: 1 to 9",
        ),
    ],
)
def test_more_agents_than_there_is_work_for(given: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        partition(numbered(9, users=3), settings(**given), 0)
