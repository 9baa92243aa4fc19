"""A ring's exchange and a server's all-reduce over slow links, against closed forms.

Four hosts (network namespaces, see slow_links.py) with links of `--mbit` each way and `--ms` from one to another, a process and an
agent in each. Rows of 1, 10 and 100 MB. `ring`: every agent sends its row to two neighbours and gets two: eq. 7.4 of docs/theory,
latency + 2 B / bandwidth, as `prefmesh.theory.clock.Links` says. `server`: an all-reduce in a ring of P processes is 2 (P - 1) steps
of latency + B / P / bandwidth. `bytes`: what passed the first link in one step (the kernel's counter), against what the run reports.

    python benchmarks/links.py --ms 50 --out benchmarks/results/links_50ms.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import machine
import numpy as np
from slow_links import address, hosts, space

from prefmesh.theory.clock import Links

PROCESSES, MEGABYTES, REPEATS = 4, (1, 10, 100), 3


def ring(row: float, bandwidth: float, delay: float) -> tuple[float, float]:
    """Seconds by eq. 7.4, and bytes that an agent sends."""
    receivers = np.arange(PROCESSES)
    senders = np.concatenate([receivers - 1, receivers + 1]) % PROCESSES
    links = Links(bandwidth=bandwidth, latency=delay)
    return float(links.between(PROCESSES, senders, np.tile(receivers, 2), row).max()), 2 * row


def server(row: float, bandwidth: float, delay: float) -> tuple[float, float]:
    """The same of an all-reduce in a ring: P - 1 steps that add up parts, P - 1 that hand sums round."""
    steps, part = 2 * (PROCESSES - 1), row / PROCESSES
    return steps * (delay + part / bandwidth), steps * part


PREDICT = {"ring": ring, "server": server}


def passed() -> int:
    """Bytes that left by this namespace's link."""
    return int(Path("/sys/class/net/wire0/statistics/tx_bytes").read_text())


def work() -> None:
    """In each namespace."""
    import torch

    from prefmesh.mesh import Mesh
    from prefmesh.mesh.torch_group import join
    from prefmesh.topology.build import build_mixing_matrix

    group = join(300)
    mesh = Mesh.of(PROCESSES, group)
    matrix = build_mixing_matrix("ring", "metropolis", agents=PROCESSES, seed=0).matrix
    found = []
    for megabytes in MEGABYTES:
        row = {"row": torch.ones(1, megabytes * 250_000)}
        ways = {
            "ring": lambda row=row: mesh.mix(matrix, {"row": row["row"].clone()}),
            "server": lambda row=row: mesh.weighted_sum(torch.ones(1), row),
        }
        for name, way in ways.items():
            for repeat in range(REPEATS + 1):  # the first opens connections
                group.total(np.zeros(1))
                bytes_, sent, began = passed(), group.bytes_sent, time.perf_counter()
                way()
                seconds = time.perf_counter() - began
                time.sleep(0.3)
                if repeat:
                    found.append(
                        {"way": name, "mb": megabytes, "seconds": seconds,
                         "link_bytes": passed() - bytes_, "reported_bytes": group.bytes_sent - sent}
                    )  # fmt: skip
    if group.rank == 0:
        print(json.dumps(found))
    group.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mbit", type=float, default=100)
    parser.add_argument("--ms", type=float, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work()
        return
    with hosts(PROCESSES, mbit=given.mbit, delay=given.ms / 1000) as switch:
        started = []
        for rank in range(PROCESSES):
            place = {
                "RANK": str(rank),
                "WORLD_SIZE": str(PROCESSES),
                "MASTER_ADDR": address(0),
                "MASTER_PORT": "29400",
            }
            environment = os.environ | place | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "wire0"}
            command = ["ip", "netns", "exec", space(rank), sys.executable, __file__, "--work"]
            started.append(
                subprocess.Popen(
                    command, env=environment, stdout=subprocess.PIPE if rank == 0 else None, text=True
                )
            )
        out, _ = started[0].communicate()
        assert [process.wait() for process in started] == [0] * PROCESSES
    measured: list[dict[str, Any]] = json.loads(out)
    result: dict[str, Any] = {
        "machine": machine.describe(),
        "mbit": given.mbit,
        "ms": given.ms,
        "dropped_packets": switch.dropped,
        "processes": PROCESSES,
        "steps": [],
    }
    for megabytes in MEGABYTES:
        for way, predict in PREDICT.items():
            predicted, sent = predict(megabytes * 1e6, given.mbit * 1e6 / 8, given.ms / 1000)
            some = [one for one in measured if (one["way"], one["mb"]) == (way, megabytes)]
            seconds = statistics.median(one["seconds"] for one in some)
            link = statistics.median(one["link_bytes"] for one in some)
            reported = statistics.median(one["reported_bytes"] for one in some)
            result["steps"].append(
                {"way": way, "mb": megabytes, "seconds": round(seconds, 3), "predicted": round(predicted, 3),
                 "times_predicted": round(seconds / predicted, 3), "link_over_reported": round(link / reported, 4),
                 "reported_over_least": round(reported / sent, 4)}
            )  # fmt: skip
    print(json.dumps(result, indent=2))
    if given.out:
        given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
