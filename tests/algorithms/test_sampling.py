"""Which pairs each step sees: every pair once an epoch, whoever asks, in whatever order, however often."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefmesh.algorithms.optimizers import OptimizerSettings
from prefmesh.algorithms.sampling import Sampler
from tests import problems

sizes_of_shards = st.lists(st.integers(1, 12), min_size=1, max_size=5)


def sampler(sizes, seed: int = 0, **settings) -> Sampler:
    # Rows that are not their own positions: 100, 101, ...
    return Sampler([shard + 100 for shard in problems.shards(sizes)], OptimizerSettings(**settings), seed)


@given(sizes_of_shards, st.integers(1, 5), st.integers(0, 99))
def test_every_epoch_visits_each_pair_once(sizes, batch, seed) -> None:
    made = sampler(sizes, seed, batch_size=batch)
    for i, shard in enumerate(made_shards(sizes)):
        steps = 3 * len(shard)  # 3 * batch whole epochs
        rows, weights = made.draw(1, np.array([i]), np.array([0]), steps)
        assert rows.shape == weights.shape == (1, steps, batch)
        assert (weights == 1 / batch).all()
        for epoch in rows.reshape(-1, len(shard)):
            assert sorted(epoch) == list(shard)


def made_shards(sizes) -> list[np.ndarray]:
    return [shard + 100 for shard in problems.shards(sizes)]


@given(sizes_of_shards, st.integers(1, 4), st.integers(1, 3), st.data())
def test_rounds_go_on_where_the_last_one_stopped(sizes, batch, steps, data) -> None:
    """Three rounds of E steps are one draw of 3 E steps; agents that sat out have drawn less."""
    made = sampler(sizes, batch_size=batch)
    everyone = np.arange(len(sizes))
    drawn = np.array([data.draw(st.integers(0, 20)) for _ in sizes])
    whole, _ = made.draw(1, everyone, drawn, 3 * steps)
    parts = [made.draw(round_, everyone, drawn + (round_ - 1) * steps, steps)[0] for round_ in (1, 2, 3)]
    assert (whole == np.concatenate(parts, axis=1)).all()


@pytest.mark.parametrize("settings", [{}, {"sampling": "with_replacement"}, {"batch_size": "full"}])
@given(sizes_of_shards, st.data())
def test_a_process_that_hosts_some_draws_the_same(settings, sizes, data) -> None:
    """Any subset in any order: rows (and weights, beside filling) are those of the draw for all."""
    drawn = np.array([data.draw(st.integers(0, 9)) for _ in sizes])
    hosted = np.array(data.draw(st.permutations(range(len(sizes)))))[: data.draw(st.integers(1, len(sizes)))]
    rows, weights = sampler(sizes, **settings).draw(4, np.arange(len(sizes)), drawn, 2)
    own, own_weights = sampler(sizes, **settings).draw(4, hosted, drawn[hosted], 2)
    width = own.shape[2]
    assert (rows[hosted][:, :, :width] == own)[own_weights > 0].all()
    assert (weights[hosted][:, :, :width] == own_weights).all()
    assert weights[hosted][:, :, width:].sum() == 0


@pytest.mark.parametrize("settings", [{}, {"sampling": "with_replacement"}, {"batch_size": "full"}])
@given(sizes_of_shards, st.data())
def test_a_process_need_not_hold_the_others_pairs(settings, sizes, data) -> None:
    """A block of shards in rows of its own, the sizes of all: the same pairs, counted from where its rows begin."""
    first = data.draw(st.integers(0, len(sizes) - 1))
    block = np.arange(first, data.draw(st.integers(first + 1, len(sizes))))
    drawn = np.array([data.draw(st.integers(0, 9)) for _ in sizes])
    rows, weights = sampler(sizes, **settings).draw(4, block, drawn[block], 2)
    before = sum(sizes[:first])
    held = Sampler(
        [shard - 100 - before for shard in made_shards(sizes)[first : block[-1] + 1]],
        OptimizerSettings(**settings),
        0,
        sizes=np.array(sizes),
        first=first,
    )
    own, own_weights = held.draw(4, block, drawn[block], 2)
    assert (own == rows - 100 - before).all()
    assert (own_weights == weights).all()
    assert len(held.pairs) == sum(sizes[i] for i in block)


def test_epochs_and_seeds_differ() -> None:
    rows, _ = sampler([40], batch_size=40).draw(1, np.array([0]), np.array([0]), 3)
    other, _ = sampler([40], 1, batch_size=40).draw(1, np.array([0]), np.array([0]), 1)
    orders = [tuple(epoch) for epoch in [*rows[0], other[0, 0]]]
    assert len(set(orders)) == 4


def test_orders_are_uniform() -> None:
    """3 pairs: each of 6 orders in a sixth of 3,000 epochs."""
    rows, _ = sampler([3], batch_size=3).draw(1, np.array([0]), np.array([0]), 3000)
    _, counts = np.unique(rows[0], axis=0, return_counts=True)
    assert len(counts) == 6
    assert ((counts - 500) ** 2 / 500).sum() < 20.5  # chi-square, 5 degrees of freedom: 1 in 1,000


class TestWithReplacement:
    def test_frequencies(self) -> None:
        """Every pair equally often: a chi-square with 4 degrees of freedom, at 1 in 1,000."""
        made = sampler([5, 2], batch_size=10, sampling="with_replacement")
        rows = np.concatenate(
            [made.draw(round_, np.array([0]), np.array([0]), 2)[0].ravel() for round_ in range(200)]
        )
        values, counts = np.unique(rows, return_counts=True)
        assert list(values) == [100, 101, 102, 103, 104]
        assert ((counts - 800) ** 2 / 800).sum() < 18.5

    def test_rounds_differ_and_the_count_of_batches_does_not_matter(self) -> None:
        made = sampler([50], batch_size=10, sampling="with_replacement")
        first, second = (made.draw(round_, np.array([0]), np.array([0]), 1)[0] for round_ in (1, 2))
        late = made.draw(1, np.array([0]), np.array([7]), 1)[0]
        assert (first != second).any()
        assert (first == late).all()


def test_full_batches_are_the_whole_shard() -> None:
    made = sampler([3, 1], batch_size="full")
    rows, weights = made.draw(1, np.array([0, 1]), np.array([5, 5]), 2)
    assert made.pairs_per_batch == 3
    assert rows[:, 0].tolist() == rows[:, 1].tolist() == [[100, 101, 102], [103, 103, 103]]
    assert weights[:, 0].tolist() == [[1 / 3] * 3, [1, 0, 0]]
    assert rows.flags.writeable
    assert weights.flags.writeable
