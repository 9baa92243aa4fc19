"""The machine's own limits: how fast it multiplies matrices, and what this process has taken of its memory."""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from prefmesh.policies import kernels

SIZES = [(1024, 768, 3072), (2048, 2048, 2048)]
"""(rows, in, out) of the products that are tried: a layer of a small transformer, and a large square."""
REPEATS = 7


def peak_gflops(device: torch.device, dtype: torch.dtype) -> float:
    """The most that a matrix product of this precision reached, in 1e9 floating point operations a second.

    The median of some repeats of each size, the best over sizes and over the products that this machine offers.
    """
    products: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [torch.nn.functional.linear]
    if kernels.serves(device, dtype):
        products.append(kernels.product)
    rates = []
    for rows, width, out in SIZES:
        x = torch.randn(rows, width, device=device).to(dtype)
        weight = torch.randn(out, width, device=device).to(dtype)
        for product in products:
            seconds = statistics.median(_timed(lambda p=product, x=x, w=weight: p(x, w), device))
            rates.append(2 * rows * width * out / seconds / 1e9)
    return max(rates)


def _timed(work: Any, device: torch.device) -> list[float]:
    found = []
    for _ in range(REPEATS + 2):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return found[2:]


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that this process has held, in GiB: of the GPU where that is where it works."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    kilo = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo / 2**30
