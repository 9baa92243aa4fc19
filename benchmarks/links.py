"""A ring's exchange and a server's all-reduce over slow links, against the least time that the bytes need.

Four network namespaces on one host, joined by a bridge, each with a link of `--mbit` in both directions (tc tbf), a process and an
agent in each. Rows of 1, 10 and 100 MB. `ring`: every agent sends its row to two neighbours and gets two, so 2 B / bandwidth (eq.
7.4 of docs/theory with latency 0). `server`: an all-reduce in a ring of P processes sends 2 (P - 1) / P of B. `bytes`: what passed
the first link in one step (the kernel's counter), against what the run reports. Needs root and tc's tbf.

    python benchmarks/links.py --out benchmarks/results/links.json
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

PROCESSES, MEGABYTES, REPEATS = 4, (1, 10, 100), 3
BRIDGE = "pmbridge"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def build(mbit: float) -> None:
    """Namespaces, links, limits."""
    ip("link", "add", BRIDGE, "type", "bridge")
    ip("link", "set", BRIDGE, "up")
    limit = ["tbf", "rate", f"{mbit}mbit", "burst", "64kb", "latency", "200ms"]
    for k in range(PROCESSES):
        space, inside, outside = f"pmsite{k}", "wire0", f"pmlink{k}"
        ip("netns", "add", space)
        ip("link", "add", outside, "type", "veth", "peer", "name", inside, "netns", space)
        ip("link", "set", outside, "master", BRIDGE, "up")
        ip("-n", space, "addr", "add", f"10.77.0.{k + 1}/24", "dev", inside)
        ip("-n", space, "link", "set", inside, "up")
        ip("-n", space, "link", "set", "lo", "up")
        subprocess.run(
            ["ip", "netns", "exec", space, "tc", "qdisc", "add", "dev", inside, "root", *limit], check=True
        )
        subprocess.run(["tc", "qdisc", "add", "dev", outside, "root", *limit], check=True)


def remove() -> None:
    for k in range(PROCESSES):
        subprocess.run(["ip", "netns", "del", f"pmsite{k}"], check=False, stderr=subprocess.DEVNULL)
    subprocess.run(["ip", "link", "del", BRIDGE], check=False, stderr=subprocess.DEVNULL)


def passed() -> int:
    """Bytes that left by this namespace's link."""
    return int(Path("/sys/class/net/wire0/statistics/tx_bytes").read_text())


def work() -> None:
    """In each namespace."""
    import numpy as np
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
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work()
        return
    remove()
    build(given.mbit)
    try:
        started = []
        for rank in range(PROCESSES):
            place = {
                "RANK": str(rank),
                "WORLD_SIZE": str(PROCESSES),
                "MASTER_ADDR": "10.77.0.1",
                "MASTER_PORT": "29400",
            }
            environment = os.environ | place | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "wire0"}
            command = ["ip", "netns", "exec", f"pmsite{rank}", sys.executable, __file__, "--work"]
            started.append(
                subprocess.Popen(
                    command, env=environment, stdout=subprocess.PIPE if rank == 0 else None, text=True
                )
            )
        out, _ = started[0].communicate()
        assert [process.wait() for process in started] == [0] * PROCESSES
    finally:
        remove()
    measured: list[dict[str, Any]] = json.loads(out)
    result: dict[str, Any] = {
        "machine": machine.describe(),
        "mbit": given.mbit,
        "processes": PROCESSES,
        "steps": [],
    }
    for megabytes in MEGABYTES:
        for way, share in (("ring", 2.0), ("server", 2 * (PROCESSES - 1) / PROCESSES)):
            some = [one for one in measured if (one["way"], one["mb"]) == (way, megabytes)]
            seconds = statistics.median(one["seconds"] for one in some)
            least = share * megabytes * 8 / given.mbit
            link = statistics.median(one["link_bytes"] for one in some)
            reported = statistics.median(one["reported_bytes"] for one in some)
            result["steps"].append(
                {"way": way, "mb": megabytes, "seconds": round(seconds, 3), "least": round(least, 3),
                 "times_least": round(seconds / least, 3), "link_over_reported": round(link / reported, 4),
                 "reported_over_least": round(reported / (share * megabytes * 1e6), 4)}
            )  # fmt: skip
    print(json.dumps(result, indent=2))
    if given.out:
        given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
