"""What runs in the process that `flower.py` starts: Flower's server, and the clients that its workers call."""

import json
import time
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from prefmesh.algorithms.local_rule import local_steps
from prefmesh.algorithms.optimizers import initial_state, learning_rate
from prefmesh.bench.ours import batches
from prefmesh.config import load_config
from prefmesh.experiment import Experiment, prepare


def simulate(directory: str, first: int, count: int, agents: int, workers: int) -> None:
    """Rounds `first` and so on, from `start.safetensors` to `end.safetensors`; `rounds.json` says how long each part took."""
    from flwr.app import ArrayRecord, ConfigRecord  # type: ignore[import-not-found]
    from flwr.clientapp import ClientApp  # type: ignore[import-not-found]
    from flwr.serverapp import ServerApp  # type: ignore[import-not-found]
    from flwr.serverapp.strategy import FedAvg  # type: ignore[import-not-found]
    from flwr.simulation import run_simulation  # type: ignore[import-not-found]

    place = Path(directory)
    rounds: dict[str, list[float]] = {"seconds": [], "computing": [], "losses": []}

    class Clocked(FedAvg):
        began = 0.0

        def configure_train(self, *args: Any, **kwargs: Any) -> Iterable[Any]:
            self.began = time.perf_counter()
            return super().configure_train(*args, **kwargs)

        def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> tuple[Any, Any]:
            replies = list(replies)
            failed = [reply.error.reason for reply in replies if reply.has_error()]
            if failed or len(replies) < agents:
                raise RuntimeError(f"{len(replies)} of {agents} clients replied; failed: {failed[:1]}")
            arrays, means = super().aggregate_train(server_round, replies)
            rounds["seconds"].append(time.perf_counter() - self.began)
            rounds["computing"].append(means["seconds"] * agents / workers)
            rounds["losses"].append(means["loss"])
            return arrays, means

    server, client = ServerApp(), ClientApp()
    client.train()(_train)

    @server.main()
    def _(grid: Any, context: Any) -> None:
        start = ArrayRecord(load_file(place / "start.safetensors"))
        strategy = Clocked(fraction_evaluate=0.0, min_train_nodes=agents, min_available_nodes=agents)
        # The first time, workers load what they keep and take their first steps: neither is a round's work.
        for number in (1, count):
            for measured in rounds.values():
                measured.clear()
            told = ConfigRecord({"config-file": str(place / "config.yaml"), "first-round": first})
            result = strategy.start(grid, start, num_rounds=number, train_config=told)
        save_file(result.arrays.to_torch_state_dict(), place / "end.safetensors")
        (place / "rounds.json").write_text(json.dumps(rounds), encoding="utf-8")

    run_simulation(
        server,
        client,
        agents,
        backend_config={
            "init_args": {"address": "local", "num_cpus": workers},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )


def _train(message: Any, context: Any) -> Any:
    """One agent's local steps, from the server's adapters to its own."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict  # type: ignore[import-not-found]

    told = message.content["config"]
    experiment = _prepared(told["config-file"])
    arrays = message.content["arrays"].to_torch_state_dict()
    theta = {name: arrays[name] for name in experiment.start}
    began = time.perf_counter()
    learner = experiment.learner
    round_ = told["first-round"] + told["server-round"] - 1
    rows, weights = batches(learner, round_, np.array([context.node_config["partition-id"]]))
    lr = learning_rate(learner.optimizer, round_, learner.method.settings.rounds)
    moments = initial_state(learner.optimizer, theta, 1)
    found = local_steps(learner.problem, learner.optimizer, lr, theta, moments, rows, weights)
    seconds = time.perf_counter() - began
    metrics = {"num-examples": 1, "loss": float(found.stats["loss"][0]), "seconds": seconds}
    content = RecordDict({"arrays": ArrayRecord(theta), "metrics": MetricRecord(metrics)})
    return Message(content, reply_to=message)


@lru_cache(maxsize=1)
def _prepared(config_file: str) -> Experiment:
    """Kept by each worker: model, encoded pairs, reference log-probabilities."""
    return prepare(load_config(config_file), agents_per_pass=1)
