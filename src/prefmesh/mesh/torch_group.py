"""Several processes, on torch.distributed: gloo for tensors in the CPU's memory, NCCL for a GPU's."""

import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from prefmesh.errors import InputError, PeerLost
from prefmesh.mesh.group import ALONE, Group

WHERE = ("MASTER_ADDR", "MASTER_PORT")


class TorchGroup(Group):
    """The default process group. `limit`: seconds that any wait for others may take.

    Only tensors travel, never pickled objects. Raises `PeerLost` where a process is gone or does not answer in time.
    """

    def __init__(self, limit: float | int):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.limit = limit
        self.attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))

    def total(self, values: Float[ndarray, " numbers"]) -> Float[ndarray, " numbers"]:
        """All-reduced, as float64."""
        return self.add(torch.from_numpy(np.array(values, dtype=np.float64))).numpy()

    def gather(self, rows: Float[ndarray, "own columns"]) -> Float[ndarray, "all columns"]:
        """All-gathered; shorter blocks are filled up on the way."""
        own = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float64))
        counts = torch.zeros(self.size, dtype=torch.float64)
        counts[self.rank] = len(own)
        counts = [int(n) for n in self.add(counts)]
        filled = torch.zeros(max(counts), own.shape[1], dtype=torch.float64)
        filled[: len(own)] = own
        found = [torch.empty_like(filled) for _ in counts]
        with self._answered():
            dist.all_gather(found, filled)
        self.bytes_sent += filled.nbytes * (self.size - 1)
        return torch.cat([part[:n] for part, n in zip(found, counts, strict=True)]).numpy()

    def add(self, numbers: Float[Tensor, " numbers"]) -> Float[Tensor, " numbers"]:
        """All-reduced in place. In a ring of P processes each sends 2 (P - 1) / P of the tensor."""
        with self._answered():
            dist.all_reduce(numbers)
        self.bytes_sent += round(2 * (self.size - 1) / self.size * numbers.nbytes)
        return numbers

    def exchange(
        self,
        send: dict[int, Tensor],
        receive: dict[int, tuple[int, int]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Callable[[], dict[int, Tensor]]:
        """Point to point."""
        arriving = {rank: torch.empty(shape, dtype=dtype, device=device) for rank, shape in receive.items()}
        steps = [dist.P2POp(dist.irecv, tensor, rank) for rank, tensor in arriving.items()]
        steps += [dist.P2POp(dist.isend, tensor, rank) for rank, tensor in send.items()]
        with self._answered():
            works = dist.batch_isend_irecv(steps) if steps else []
        self.bytes_sent += sum(tensor.nbytes for tensor in send.values())

        def arrive() -> dict[int, Tensor]:
            with self._answered():
                for work in works:
                    work.wait()
            return arriving

        return arrive

    def close(self) -> None:
        """Leave; others that still wait for this process learn of it."""
        dist.destroy_process_group()

    @contextmanager
    def _answered(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch has no narrower class for what gloo and NCCL say
            raise PeerLost(
                f"process {self.rank} of {self.size}: another process is gone or did not answer within {self.limit:g} s ({_reason(error)})"
            ) from None


def _reason(error: RuntimeError) -> str:
    """What torch says, without the place in its own source and its advice."""
    return re.sub(r"^\[\S+\] ?", "", str(error).splitlines()[0]).split(". ")[0].rstrip(".")


def launched() -> int | None:
    """How many processes a launcher (torchrun, `prefmesh run --processes`) started, this being one; none: this is the only one."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    return size if size > 1 else None


def join(limit: float | int, device: str = "cpu") -> Group:
    """Meet the other processes that the launcher started, as its variables say (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    `ALONE` where there are none. On `device: cuda` each takes a GPU of its own. Raises `InputError` where there are too few, or
    where the processes do not all appear within `limit` seconds.
    """
    if not launched():
        return ALONE
    if missing := [name for name in ("RANK", *WHERE) if name not in os.environ]:
        raise InputError(
            f"{missing[0]}: missing, though WORLD_SIZE is {os.environ['WORLD_SIZE']}; allowed: the variables that torchrun sets"
        )
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=limit)
    if device == "cuda":
        _take_gpu(int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    try:
        # A launcher that restarts processes keeps its store: what an attempt before left there must not be read.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = TCPStore(
            host, port, size, is_master=rank == 0 and not hosted, timeout=timeout, wait_for_workers=False
        )
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            store=PrefixStore(f"prefmesh/{attempt}", store),
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
    except RuntimeError as error:
        raise InputError(
            f"process {rank} of {size} on {socket.gethostname()}: the others did not all meet at {host}:{port} within {limit:g} s "
            f"({_reason(error)}); allowed: all of them started, with the same MASTER_ADDR and a free MASTER_PORT"
        ) from None
    return TorchGroup(limit)


def _take_gpu(number: int, processes: int) -> None:
    if processes > (gpus := torch.cuda.device_count()):
        raise InputError(
            f"runtime.device: cuda, but {processes} processes would share the {gpus} GPU(s) of {socket.gethostname()}; allowed: as many "
            "processes as GPUs (a process hosts many agents), or runtime.device: cpu"
        )
    torch.cuda.set_device(number)
