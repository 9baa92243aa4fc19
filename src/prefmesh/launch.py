"""Several processes of a run on this machine, started and watched by torch's elastic launcher (what torchrun is made of)."""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

PEER_LOST = 4
"""The exit code of a process that another one left alone."""


def launch(processes: int, arguments: Sequence[str], *, restarts: int = 0, limit: float | int = 600) -> int:
    """Start `prefmesh ARGUMENTS` so many times and wait; 0 when all are done, else the exit code of the one that failed by itself.

    `restarts`: how often all are started again after one failed. A signal is passed on to all of them, which then have `limit`
    seconds to end as they do alone: they finish the round under way.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # torch's: the processes say themselves why they end
    # Each would take all cores otherwise.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=restarts,
        shutdown_timeout=int(limit),
        signals_to_handle="SIGTERM,SIGINT,SIGHUP",
    )
    try:
        elastic_launch(config, sys.executable)("-m", "prefmesh", *arguments)
    except ChildFailedError as error:
        return _exit_code({rank: failure.exitcode for rank, failure in error.failures.items()}, processes)
    except SignalException:
        return 130
    return 0


def _exit_code(codes: dict[int, int], processes: int) -> int:
    """What the others died of is what the one that did not lose a peer says; a killed one says nothing, so this does."""
    rank = min(codes, key=lambda rank: (codes[rank] == PEER_LOST, codes[rank] >= 0))
    if codes[rank] >= 0:
        return codes[rank]
    sys.stderr.write(
        f"prefmesh: process {rank} of {processes} was killed ({signal.Signals(-codes[rank]).name}); go on with --resume, or let "
        "--restarts do it\n"
    )
    return PEER_LOST
