"""One process with two threads against two and four with one each: the same rounds, in turn, and how long four talk.

Built-in language model, LoRA r = 8, 8 agents on a ring, 4 pairs each. `seconds`: the median round of each of `--turns` fresh runs,
the first round left out. `talking`: the share of the rounds' time that process 0 of 4 spends handing rows over and waiting for
others' (which holds their being slower, on two cores), and the least that a run of four saw in any round.

    python benchmarks/processes.py --out benchmarks/results/processes.json
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

AGENTS, ROUNDS = 8, 12


def config(processes: int) -> Any:
    from prefmesh.config import ExperimentConfig

    return ExperimentConfig.parse(
        {
            "preferences": {"source": "builtin:town", "agents": AGENTS, "town": {"users": AGENTS, "pairs_per_user": 64}},
            "policy": {"model": "builtin:tiny", "lora": {"r": 8}},
            "objective": {},
            "method": {"name": "dec_dpo", "rounds": ROUNDS, "graph": "ring", "local_steps": 4},
            "optimizer": {"batch_size": 4},
            "evaluation": {"every": ROUNDS, "held_out": 0.0, "samples": 0},
            "runtime": {"processes": processes, "checkpoint_every": ROUNDS},
        }
    )  # fmt: skip


def work(processes: int) -> None:
    """In each process: all rounds, timed."""
    from prefmesh.experiment import prepare
    from prefmesh.mesh.torch_group import join

    group = join(300)
    talked = [0.0]
    exchange = group.exchange

    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        arrive = exchange(*arguments)
        talked[0] += time.perf_counter() - began

        def arrived() -> Any:
            began = time.perf_counter()
            found = arrive()
            talked[0] += time.perf_counter() - began
            return found

        return arrived

    group.exchange = timed  # type: ignore[method-assign]
    learner = (experiment := prepare(config(processes), group=group)).learner
    state = learner.begin(experiment.start)
    seconds, talking = [], []
    for round_ in range(1, ROUNDS + 1):
        began, talked[0] = time.perf_counter(), 0.0
        state, _ = learner.round(state, round_, consensus=False)
        seconds.append(time.perf_counter() - began)
        talking.append(talked[0] / seconds[-1])
    if group.rank == 0:
        told = {
            "seconds": statistics.median(seconds[1:]),
            "talking": statistics.median(talking[1:]),
            "least": min(talking[1:]),
        }
        Path(os.environ["TOLD"]).write_text(json.dumps(told))
    group.close()


def turn(processes: int, directory: Path) -> dict[str, float]:
    """One run, its processes started afresh."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    started = []
    for rank in range(processes):
        told = {
            "RANK": str(rank),
            "OMP_NUM_THREADS": "2" if processes == 1 else "1",
            "TOLD": str(directory / "told.json"),
        }
        environment = os.environ | place | told | {"HF_HUB_OFFLINE": "1"}
        started.append(
            subprocess.Popen([sys.executable, __file__, "--work", str(processes)], env=environment)
        )
    assert [process.wait() for process in started] == [0] * processes
    return json.loads((directory / "told.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.work)
        return
    found: dict[int, list[dict[str, float]]] = {1: [], 2: [], 4: []}
    with tempfile.TemporaryDirectory() as name:
        for _ in range(given.turns):
            for processes, told in found.items():
                told.append(turn(processes, Path(name)))
    seconds = {p: [told["seconds"] for told in turns] for p, turns in found.items()}
    result = {
        "machine": machine.describe(),
        "seconds": seconds,
        "ratio": {p: [one / many for one, many in zip(seconds[1], seconds[p], strict=True)] for p in (2, 4)},
        "talking": [told["talking"] for told in found[4]],
        "talking_least": [told["least"] for told in found[4]],
    }
    print(json.dumps(result, indent=2))
    if given.out:
        given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
