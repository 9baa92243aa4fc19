"""Peak memory of rounds against the number of agents: does an agent cost its adapter, gradient and optimiser state?

The built-in policy with LoRA (r = 8) and AdamW whose moments stay at the agents; every number of agents in a fresh
process. Preferences are read, encoded and scored before the figure starts, so what it holds is the state of the agents
and the passes of the model. Two kinds of pass: of two agents at every N, which leaves the agents' state alone to grow;
and the default, which grows with N until it is full. The slope is that of least squares over N, divided by the bytes
of an agent's adapter, gradient and two moments.

`resident`: the kernel's high-water mark of the process, less what was resident before the first round.
`tracked`: the most bytes that torch's tensors held at once, in a further process (allocator and libraries left out).

    python benchmarks/memory_per_agent.py
"""

import argparse
import json
import os
import tempfile
import weakref
from typing import Any

import machine
import numpy as np

AGENTS = [2, 8, 32, 128, 512, 1024]
PAIRS_PER_AGENT, ROUNDS, STEPS = 4, 4, 1


def config(method: str, agents: int, agents_per_pass: int | None) -> Any:
    """A run of the built-in policy; each agent holds four pairs."""
    from prefmesh.config import ExperimentConfig

    return ExperimentConfig.parse(
        {
            "preferences": {
                "source": "builtin:town",
                "agents": agents,
                "town": {"users": agents, "pairs_per_user": PAIRS_PER_AGENT},
            },
            "policy": {"model": "builtin:tiny", "train": "lora", "lora": {"r": 8, "lora_alpha": 16}},
            "objective": {},
            "method": {"name": method, "rounds": ROUNDS, "local_steps": STEPS},
            "optimizer": {"name": "adamw", "batch_size": 4, "state": "keep"},
            "evaluation": {"held_out": 0.0, "samples": 0},
            "runtime": {"agents_per_pass": agents_per_pass},
        }
    )


def tracker() -> Any:
    """A mode that follows the bytes of all storages that torch's operations make, and the most at once."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Tracker(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.now = self.most = 0
            self.known: weakref.WeakSet[Any] = weakref.WeakSet()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            import torch

            made = func(*args, **(kwargs or {}))
            before = {t.untyped_storage() for t in tree_leaves(args) if isinstance(t, torch.Tensor)}
            for tensor in tree_leaves(made):
                if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in before:
                    self.add(storage)
            return made

        def add(self, storage: Any) -> None:
            if storage in self.known:
                return
            self.known.add(storage)
            size = storage.nbytes()
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.drop, size)

        def drop(self, size: int) -> None:
            self.now -= size

    return Tracker()


def once(method: str, agents: int, agents_per_pass: int | None, track: bool) -> dict[str, Any]:
    """One number of agents in this process."""
    from contextlib import nullcontext

    from prefmesh.experiment import prepare
    from prefmesh.policies.base import row_bytes

    with tempfile.TemporaryDirectory() as cache:
        os.environ["PREFMESH_CACHE"] = cache
        experiment = prepare(config(method, agents, agents_per_pass))
    learner = experiment.learner
    base = machine.reset_peak()
    follow = tracker() if track else None
    with follow or nullcontext():
        state = learner.begin(experiment.start)
        for round_ in range(1, ROUNDS + 1):
            state, _ = learner.round(state, round_)
    grown = follow.most if follow else machine.peak() - base
    return {
        "agents": agents,
        "bytes": grown,
        "base": base,
        "state_bytes": 4 * row_bytes(experiment.start),
        "agents_per_pass": learner.agents_per_pass,
    }


def slope(agents: list[int], grown: list[int]) -> float:
    """Bytes per agent by least squares, with an intercept."""
    return float(np.polyfit(agents, grown, 1)[0])


def series(method: str, agents_per_pass: int | None, track: bool, agents: list[int]) -> dict[str, Any]:
    """All numbers of agents, and their slopes."""
    runs = []
    for n in agents:
        arguments = ["--child", method, str(n), str(agents_per_pass or 0), str(int(track))]
        runs.append(machine.child(__file__, arguments))
        print(method, agents_per_pass, "tracked" if track else "resident", json.dumps(runs[-1]), flush=True)
    unit = runs[0]["state_bytes"]
    found = {
        "method": method,
        "agents_per_pass": agents_per_pass or "default",
        "kind": "tracked" if track else "resident",
        "agents": agents,
        "grown_bytes": [run["bytes"] for run in runs],
        "pass_of_agents": [run["agents_per_pass"] for run in runs],
        "adapter_gradient_and_moments_bytes": unit,
        "slope_ratio": slope(agents, [run["bytes"] for run in runs]) / unit,
    }
    if not track:
        # Data, their encoding and the division into shards: what was there before the first round.
        found["data_slope_bytes"] = slope(agents, [run["base"] for run in runs])
    full = [run for run in runs if run["agents"] >= 128]
    if len(full) > 1:
        found["slope_ratio_from_128"] = (
            slope([run["agents"] for run in full], [run["bytes"] for run in full]) / unit
        )
    return found


def main() -> None:
    """Run all series and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=["dec_dpo", "fed_dpo"])
    parser.add_argument("--agents", nargs="+", type=int, default=AGENTS)
    parser.add_argument("--no-store", action="store_true", help="print, and write no result")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        method, agents, agents_per_pass, track = arguments.child
        print(json.dumps(once(method, int(agents), int(agents_per_pass) or None, track == "1")))
        return
    found = [
        series(method, agents_per_pass, track, arguments.agents)
        for method in arguments.methods
        for agents_per_pass, track in [(2, False), (2, True), (None, False)]
    ]
    result = {"machine": machine.describe(), "series": found}
    print(json.dumps(result, indent=2))
    if not arguments.no_store:
        machine.store("memory_per_agent", result)


if __name__ == "__main__":
    main()
