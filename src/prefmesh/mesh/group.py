"""The processes that run an experiment together, and what they can do with each other's numbers."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor


class Group:
    """One process: nothing travels. `TorchGroup` (torch_group.py) is the same for several.

    All methods but `exchange` are collective: every process calls them, in the same order.
    """

    rank: int = 0
    """Which of the processes this is, from 0."""
    size: int = 1
    """How many there are."""
    bytes_sent: int = 0
    """Bytes that this process has handed to the network so far."""

    def total(self, values: Float[ndarray, " numbers"]) -> Float[ndarray, " numbers"]:
        """The sum over processes, in float64."""
        return values

    def gather(self, rows: Float[ndarray, "own columns"]) -> Float[ndarray, "all columns"]:
        """All processes' rows, in the order of their ranks; each may have any number of them, but equal columns."""
        return rows

    def add(self, numbers: Float[Tensor, " numbers"]) -> Float[Tensor, " numbers"]:
        """The sum over processes of a tensor, which may be used up."""
        return numbers

    def exchange(
        self,
        send: dict[int, Tensor],
        receive: dict[int, tuple[int, int]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Callable[[], dict[int, Tensor]]:
        """Start sending tensors to peers, by rank; the function that is returned waits for theirs, of these shapes.

        A peer must ask for what another one sends it. The tensors that are sent must not be written to before then.
        """
        assert not send
        assert not receive
        return dict

    def close(self) -> None:
        """Leave the group."""


ALONE = Group()
