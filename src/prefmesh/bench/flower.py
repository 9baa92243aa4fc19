"""Flower's simulation engine on the same federated rounds: FedAvg, a worker a thread of ours, our own local step in its clients.

It is started anew for every turn, in a process of its own, so that ray shares nothing with us. Starting it, loading the model in
its workers and one round that warms them up are not timed; every round after is, from its configuration until it is aggregated.
`computing`: the clients' seconds in the local steps, divided by the workers. `overhead`: the rest of the round.
"""

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from prefmesh.algorithms.methods.fed_dpo import FedDPO
from prefmesh.bench.contest import Timed
from prefmesh.bench.plain import language_model, sits_out
from prefmesh.errors import InputError
from prefmesh.experiment import Experiment
from prefmesh.objectives import LOSSES

CHILD = "import json, sys; from prefmesh.bench.flower_simulation import simulate; simulate(**json.loads(sys.argv[1]))"


class Flower:
    """Goes on from the parameters that its last turn reached."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self.theta = experiment.start

    @staticmethod
    def check(experiment: Experiment) -> None:
        """Raise `InputError` for an experiment that its clients do not do, or where Flower's simulation is missing."""
        policy, method = language_model(experiment), experiment.method
        if policy.device.type != "cpu":
            raise InputError(f"--against flower: device {policy.device} found; allowed: runtime.device cpu")
        partial = sits_out(method)
        if partial or not isinstance(method, FedDPO):
            raise InputError(
                f"--against flower: {method.settings.name}{' with participation or staleness' * bool(partial)} found; "
                "allowed: fed_dpo with all agents and no staleness"
            )
        if experiment.config.objective.weights != "uniform":
            raise InputError("--against flower: objective.weights by_size found; allowed: uniform")
        if experiment.learner.optimizer.state != "reset":
            raise InputError(
                "--against flower: optimizer.state keep found; allowed: reset (its clients remember nothing)"
            )
        for loss in experiment.config.objective.names:
            if not LOSSES[loss].__module__.startswith("prefmesh."):
                raise InputError(f"--against flower: a plugin's loss {loss!r} found; allowed: prefmesh's own")
        if find_spec("flwr") is None or find_spec("ray") is None:
            raise InputError(
                "--against flower: flwr's simulation is not installed; allowed: pip install 'prefmesh[flower]'"
            )

    def rounds(self, first: int, count: int) -> Timed:
        """Rounds `first` and so on in one simulation. Raises `RuntimeError` with its last lines where it fails."""
        agents, threads = self.experiment.method.agents, torch.get_num_threads()
        workers = min(agents, threads)
        config = self.experiment.config.replace({"runtime.threads": threads // workers})
        with tempfile.TemporaryDirectory(prefix="prefmesh-") as name:
            directory = Path(name)
            (directory / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
            save_file(
                {n: t.detach().contiguous() for n, t in self.theta.items()}, directory / "start.safetensors"
            )
            turn = {
                "directory": name, "first": first, "count": count, "agents": agents, "workers": workers
            }  # fmt: skip
            ended = subprocess.run(
                [sys.executable, "-c", CHILD, json.dumps(turn)],
                env=_environment(directory, threads // workers),
                capture_output=True,
                text=True,
            )
            if ended.returncode:
                last = "\n".join(ended.stderr.splitlines()[-30:])
                raise RuntimeError(f"Flower's simulation ended with exit code {ended.returncode}:\n{last}")
            reached = load_file(directory / "end.safetensors")
            found = json.loads((directory / "rounds.json").read_text(encoding="utf-8"))
        self.theta = {name: reached[name] for name in self.theta}
        overhead = [all_ - own for all_, own in zip(found["seconds"], found["computing"], strict=True)]
        return Timed(
            seconds=found["seconds"],
            losses=found["losses"],
            parts={"computing": found["computing"], "overhead": overhead},
        )


def _environment(home: Path, threads: int) -> dict[str, str]:
    """The child's and its workers': so many threads each, no telemetry, no cluster but its own."""
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return kept | {
        "OMP_NUM_THREADS": str(threads),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_HOME": str(home),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
