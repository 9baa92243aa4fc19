"""Which agents this process hosts, and everything that crosses agents: W Theta, a server's sum, the mean.

Processes host blocks of agents that follow each other. A process has the rows of Theta of its own block, (hosted, ...).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from torch import Tensor

from prefmesh.mesh.group import ALONE, Group
from prefmesh.mesh.products import mix, weighted_sum
from prefmesh.mesh.ranks import Ranks, cut

Rows = dict[str, Tensor]
"""Named tensors, each with a leading axis of agents."""


@dataclass(frozen=True, kw_only=True)
class _Routes:
    """What one mixing matrix makes this process send and need: agents' numbers, by the peer's rank.

    `inner`: own agents all of whose neighbours are own; `edge`: the others, which need `columns` (ascending).
    """

    send: dict[int, Int[np.ndarray, " _"]]
    receive: dict[int, Int[np.ndarray, " _"]]
    inner: Int[np.ndarray, " _"]
    edge: Int[np.ndarray, " _"]
    columns: Int[np.ndarray, " _"]


class Mesh:
    """`counts[p]`: how many agents process p hosts. `wire`: the type in which rows travel; none: as they are."""

    ranks: Ranks | None = None
    """Of agents' adapters; none: all use theirs whole."""

    def __init__(self, counts: Sequence[int], group: Group = ALONE, wire: torch.dtype | None = None):
        assert len(counts) == group.size
        self.group = group
        self.wire = wire
        self.bounds = np.concatenate([[0], np.cumsum(counts)])
        self.agents = int(self.bounds[-1])
        self.first, self.last = int(self.bounds[group.rank]), int(self.bounds[group.rank + 1])
        self._routes: tuple[csr_array, _Routes] | None = None

    @classmethod
    def of(cls, agents: int, group: Group = ALONE, wire: torch.dtype | None = None) -> "Mesh":
        """Blocks of equal size, to one agent."""
        return cls([len(part) for part in np.array_split(np.arange(agents), group.size)], group, wire)

    @property
    def hosted(self) -> int:
        """How many agents live here."""
        return self.last - self.first

    def here(self, agents: Int[np.ndarray, " some"]) -> Int[np.ndarray, " own"]:
        """Those of `agents` that live here."""
        return agents[(agents >= self.first) & (agents < self.last)]

    def rows(self, agents: Int[np.ndarray, " own"]) -> Int[np.ndarray, " own"]:
        """Where agents that live here stand among the rows of this process."""
        return agents - self.first

    def kept(self, rows: Rows, agents: Int[np.ndarray, " own"]) -> Rows:
        """What agents that live here keep of the rows (own, ...) that they are given: as many components as they use."""
        return rows if self.ranks is None else cut(rows, self.ranks.of[agents])

    def mix(self, matrix: csr_array, theta: Rows) -> Rows:
        """W Theta (hosted, ...): every agent takes the weighted rows of its neighbours, and keeps what it uses. `theta` is used up."""
        return self.kept(self._mixed(matrix, theta), np.arange(self.first, self.last))

    def _mixed(self, matrix: csr_array, theta: Rows) -> Rows:
        """Only rows that a peer's agents need are sent to it. Agents without neighbours elsewhere are mixed meanwhile."""
        if self.group.size == 1:
            return {name: mix(matrix, theta.pop(name)) for name in list(theta)}
        routes = self._routes_of(matrix)
        arrive = self._exchange(routes, theta)
        own = matrix[self.first : self.last]
        mixed = {name: torch.empty_like(tensor) for name, tensor in theta.items()}
        if len(routes.inner):
            block = own[routes.inner][:, self.first : self.last]
            for name, tensor in theta.items():
                mixed[name][torch.from_numpy(routes.inner)] = mix(block, tensor)
        received = arrive()
        if len(routes.edge):
            block = own[routes.edge][:, routes.columns]
            own_needed = torch.from_numpy(self.rows(self.here(routes.columns)))
            place = 0
            for name in list(theta):
                tensor = theta.pop(name)
                width = tensor[0].numel()
                parts = {
                    rank: flat[:, place : place + width].to(tensor.dtype).view(-1, *tensor.shape[1:])
                    for rank, flat in received.items()
                }
                parts[self.group.rank] = tensor[own_needed.to(tensor.device)]
                # Blocks follow each other as ranks do: together the columns ascend, and sums keep their order.
                needed = torch.cat([parts[rank] for rank in sorted(parts)])
                mixed[name][torch.from_numpy(routes.edge)] = mix(block, needed)
                place += width
        return mixed

    def needed(self, matrix: csr_array, theta: Rows) -> tuple[Int[np.ndarray, " columns"], Rows]:
        """Everybody whom agents hosted here take from, ascending, and their rows."""
        if self.group.size == 1:
            return np.arange(self.agents), theta
        routes = self._routes_of(matrix)
        received = self._exchange(routes, theta)()
        parts = {self.group.rank: np.arange(self.first, self.last)} | routes.receive
        ranks, place, found = sorted(parts), 0, {}
        for name, tensor in theta.items():
            width = tensor[0].numel()
            of = {
                rank: flat[:, place : place + width].to(tensor.dtype).view(-1, *tensor.shape[1:])
                for rank, flat in received.items()
            }
            found[name] = torch.cat([(of | {self.group.rank: tensor})[rank] for rank in ranks])
            place += width
        return np.concatenate([parts[rank] for rank in ranks]), found

    def weighted_sum(self, weights: Float[Tensor, " own"], rows: Rows) -> Rows:
        """sum_i weights_i rows_i (1, ...) over all processes' agents: what a server forms from what participants sent.

        `weights` and `rows` are those of the participants that live here, which may be none.
        """
        return self.add({name: weighted_sum(weights, tensor) for name, tensor in rows.items()}, self.wire)

    def mean(self, rows: Rows, of: int) -> Rows:
        """The mean (1, ...) of `of` agents' rows, this process having those of its own."""
        if self.group.size == 1:
            return {name: tensor.mean(0, keepdim=True) for name, tensor in rows.items()}
        return self.add({name: tensor.sum(0, keepdim=True) / of for name, tensor in rows.items()})

    def add(self, row: Rows, wire: torch.dtype | None = None) -> Rows:
        """The sum over processes of a row (1, ...), which travels as `wire`; none: as it is."""
        if self.group.size == 1:
            return row
        flat = torch.cat([tensor.reshape(-1) for tensor in row.values()])
        parts = (
            self.group.add(flat.to(wire or flat.dtype))
            .to(flat.dtype)
            .split([tensor.numel() for tensor in row.values()])
        )
        return {name: part.view_as(tensor) for (name, tensor), part in zip(row.items(), parts, strict=True)}

    def _routes_of(self, matrix: csr_array) -> _Routes:
        """Remembered for the matrix that was asked for last."""
        if self._routes is not None and self._routes[0] is matrix:
            return self._routes[1]
        ranks = [r for r in range(self.group.size) if r != self.group.rank]
        needed = [np.unique(matrix[a:b].indices) for a, b in zip(self.bounds, self.bounds[1:], strict=False)]
        columns = needed[self.group.rank]
        own = matrix[self.first : self.last]
        outside = (own.indices < self.first) | (own.indices >= self.last)
        outward = np.zeros(self.hosted, dtype=bool)
        outward[np.repeat(np.arange(self.hosted), np.diff(own.indptr))[outside]] = True
        edge = np.flatnonzero(outward)
        of_edge = np.unique(own[edge].indices) if len(edge) else columns[:0]
        between = {r: columns[(columns >= self.bounds[r]) & (columns < self.bounds[r + 1])] for r in ranks}
        routes = _Routes(
            send={r: sent for r in ranks if len(sent := self.here(needed[r]))},
            receive={r: wanted for r, wanted in between.items() if len(wanted)},
            inner=np.flatnonzero(~outward),
            edge=edge,
            columns=of_edge,
        )
        self._routes = (matrix, routes)
        return routes

    def _exchange(self, routes: _Routes, theta: Rows) -> Callable[[], dict[int, Tensor]]:
        """Start sending each peer the rows that it needs, all tensors side by side (rows, numbers)."""
        tensors = list(theta.values())
        dtype = self.wire or tensors[0].dtype
        device = tensors[0].device

        def side_by_side(agents: np.ndarray) -> Tensor:
            index = torch.from_numpy(self.rows(agents)).to(device)
            return torch.cat([t.index_select(0, index).flatten(1) for t in tensors], dim=1).to(dtype)

        width = sum(t[0].numel() for t in tensors)
        return self.group.exchange(
            {rank: side_by_side(agents) for rank, agents in routes.send.items()},
            {rank: (len(agents), width) for rank, agents in routes.receive.items()},
            dtype,
            device,
        )
