"""Several processes on this machine, for tests: each runs one function with its group."""

import os
import socket
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def together(work: Callable[..., None], size: int, *arguments: Any, limit: float = 60) -> None:
    """Call `work(group, *arguments)` in `size` processes; raises where one of them does."""
    mp.start_processes(_enter, (work, size, free_port(), limit, arguments), nprocs=size, start_method="spawn")


def _enter(
    rank: int, work: Callable[..., None], size: int, port: int, limit: float, arguments: tuple
) -> None:
    from prefmesh.mesh.torch_group import join

    warnings.simplefilter("error")
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    group = join(limit)
    try:
        work(group, *arguments)
        sys.stdout.flush()
    finally:
        group.close()
