"""The processes that run an experiment together, and what they can do with each other's numbers."""

import hashlib
from collections.abc import Callable
from typing import TypeVar, cast

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from prefmesh.errors import InputError

T = TypeVar("T")


class Group:
    """One process: nothing travels. `TorchGroup` (torch_group.py) is the same for several.

    All methods but `exchange` are collective: every process calls them, in the same order.
    """

    rank: int = 0
    """Which of the processes this is, from 0."""
    size: int = 1
    """How many there are."""
    attempt: int = 0
    """How often the launcher has started the group again, after it lost a process."""
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

    def together(self, action: Callable[[], T]) -> T:
        """Do it in every process; where one refuses its input, all stop with an `InputError`."""
        refused, result = None, None
        try:
            result = action()
        except InputError as error:
            refused = error
        failed = self.gather(np.array([[refused is not None]], dtype=np.float64))[:, 0]
        if refused is not None:
            raise refused
        if failed.any():
            raise InputError(
                f"process {self.rank} of {self.size}: stopped, since process {int(failed.argmax())} refused to go on (its own line says why)"
            )
        return cast(T, result)

    def agree(self, found: dict[str, str]) -> None:
        """Raise `InputError` in all processes where one of these texts, by what they are, differs from process 0's."""
        numbers = [
            int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")
            for text in found.values()
        ]
        all_ = self.gather(np.array([numbers], dtype=np.float64))
        for column, (what, text) in enumerate(found.items()):
            other = np.flatnonzero(all_[:, column] != all_[0, column])
            if len(other):
                raise InputError(
                    f"{what}: process {other[0]} of {self.size} found another one than process 0 (process {self.rank}'s is {text}); "
                    "allowed: the same in all processes"
                )

    def close(self) -> None:
        """Leave the group."""


ALONE = Group()
