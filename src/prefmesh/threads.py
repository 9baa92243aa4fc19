"""How many threads torch computes with on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits


def use_threads(count: int) -> None:
    """From here on, by OpenMP's own setting.

    `torch.set_num_threads` tells MKL besides, which from then on opens a team of threads within each of torch's: attention, which is many
    small products, took 1.5 to 2 times as long with two threads (torch 2.13, MKL 2024.2), and no less than with one.
    """
    threadpool_limits(limits=count, user_api="openmp")
    if torch.get_num_threads() != count:  # a torch that does not work with OpenMP
        torch.set_num_threads(count)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """For a while."""
    before = torch.get_num_threads()
    use_threads(count)
    try:
        yield
    finally:
        use_threads(before)
