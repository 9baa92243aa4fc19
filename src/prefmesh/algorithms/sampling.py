"""Which pairs each step sees, as a pure function of (seed, round, batches drawn so far)."""

from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int

from prefmesh.algorithms.optimizers import OptimizerSettings
from prefmesh.randomness import generator


class Sampler:
    """Draws minibatches from shards. One generator per (epoch or round) draws for all of them, so a process that holds
    the pairs of some draws what one that holds all would.

    `shards[i]` are the encoded rows of shard `first + i`. `sizes` (shards,): pairs in every shard, held here or not; none:
    all are held.
    """

    def __init__(
        self,
        shards: list[Int[np.ndarray, "_"]],
        settings: OptimizerSettings,
        seed: int,
        *,
        sizes: Int[np.ndarray, " shards"] | None = None,
        first: int = 0,
    ):
        held = np.array([len(shard) for shard in shards], dtype=np.int64)
        self.sizes = held if sizes is None else sizes.astype(np.int64)
        assert self.sizes.min() > 0
        assert (self.sizes[first : first + len(shards)] == held).all()
        self.pairs = np.concatenate(shards)
        before = np.cumsum(self.sizes) - self.sizes
        self.offsets = before - before[first]
        self.first, self.last = first, first + len(shards)
        self.settings = settings
        self.seed = seed
        self._order = lru_cache(maxsize=8)(self._draw_order)

    @property
    def pairs_per_batch(self) -> int:
        """Pairs that one shard adds to a step."""
        return int(self.sizes.max()) if self.settings.batch_size == "full" else self.settings.batch_size

    def draw(
        self, round_: int, shards: Int[np.ndarray, " chosen"], drawn: Int[np.ndarray, " chosen"], steps: int
    ) -> tuple[Int[np.ndarray, "chosen steps batch"], Float[np.ndarray, "chosen steps batch"]]:
        """Rows and their weights within the batch (each batch's weights sum to 1); `shards` are held here.

        `drawn` counts the batches that each of `shards` has drawn before. With full batches, shards smaller than the
        largest one are filled up with rows of weight 0.
        """
        assert ((self.first <= shards) & (shards < self.last)).all()
        if self.settings.batch_size == "full":
            return self._full(shards, steps)
        batch = self.settings.batch_size
        count = steps * batch
        if self.settings.sampling == "with_replacement":
            uniform = generator(self.seed, "batches", round_).random((len(self.sizes), count))[shards]
            position = (uniform * self.sizes[shards, None]).astype(np.int64)
        else:
            place = drawn[:, None] * batch + np.arange(count)
            epoch, within = np.divmod(place, self.sizes[shards, None])
            position = np.empty_like(place)
            for e in np.unique(epoch):
                here = epoch == e
                at = np.broadcast_to(self.offsets[shards, None], place.shape)[here] + within[here]
                position[here] = self._order(int(e))[at]
        rows = self.pairs[self.offsets[shards, None] + position]
        return rows.reshape(-1, steps, batch), np.full((len(shards), steps, batch), 1 / batch)

    def _draw_order(self, epoch: int) -> Int[np.ndarray, " held"]:
        """For each shard held here, its positions in the order in which this epoch visits them, one shard after the other."""
        before = -int(self.offsets[0])
        held = slice(before, before + len(self.pairs))
        uniform = generator(self.seed, "epoch", epoch).random(int(self.sizes.sum()))[held]
        shard = np.repeat(np.arange(len(self.sizes)), self.sizes)[held]
        order = np.argsort(shard + uniform, kind="stable")
        return order - self.offsets[shard]

    def _full(
        self, shards: Int[np.ndarray, " chosen"], steps: int
    ) -> tuple[Int[np.ndarray, "chosen steps batch"], Float[np.ndarray, "chosen steps batch"]]:
        place = np.arange(self.sizes[shards].max())
        inside = place < self.sizes[shards, None]
        rows = self.pairs[self.offsets[shards, None] + np.where(inside, place, 0)]
        weights = inside / self.sizes[shards, None]
        shape = (len(shards), steps, len(place))
        # Copies: torch warns about arrays that are views of a broadcast.
        return np.broadcast_to(rows[:, None], shape).copy(), np.broadcast_to(weights[:, None], shape).copy()
