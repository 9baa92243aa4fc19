"""What runs in a process of its own: Flower's simulation of several runs after each other.

    python -m tests.flower.simulated '{"agents": 4, "runs": [{"config": "a.yaml", "out": "a"}], "mods": ["broken"]}'

`mods`: names of functions below, or of Flower's own, through which every answer goes.
"""

import json
import sys
import time
from typing import Any

import numpy as np


def broken(message: Any, context: Any, call_next: Any) -> Any:
    """Site 1 answers nonsense in rounds 1 to 4: not finite, of another shape, under another name, with less than all numbers."""
    from flwr.app import ArrayRecord, Message

    reply = call_next(message, context)
    kind, round_ = message.metadata.message_type.split(".")[0], message.metadata.group_id
    if kind != "train" or context.node_config["partition-id"] != 1:
        return reply
    content = reply.content
    row = content["row"].to_torch_state_dict()
    first = next(iter(row))
    if round_ == "1":
        row[first] = row[first] * np.nan
    elif round_ == "2":
        row[first] = row[first][:, :-1]
    elif round_ == "3":
        row["other"] = row.pop(first)
    elif round_ == "4":
        del content["measures"]["loss"]
    content["row"] = ArrayRecord(row)
    return Message(content, reply_to=message)


def slow(message: Any, context: Any, call_next: Any) -> Any:
    """Site 2 answers round 1 after its deadline of 8 seconds, while site 0 keeps round 2 waiting."""
    kind, round_ = message.metadata.message_type.split(".")[0], message.metadata.group_id
    if kind == "train":
        time.sleep({("1", 2): 12, ("2", 0): 7}.get((round_, context.node_config["partition-id"]), 0))
    return call_next(message, context)


def main(told: dict[str, Any]) -> None:
    from flwr.clientapp.mod import LocalDpMod
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    from prefmesh.flower import client_app, server_app

    mods: list[Any] = [globals()[name] for name in told.get("mods", [])]
    if "clip" in told:
        # Noise of next to nothing: what is seen is the clipping.
        mods.append(LocalDpMod(clipping_norm=told["clip"], sensitivity=1e-9, epsilon=1.0, delta=0.1))
    client, server = client_app.client_app(mods), ServerApp()

    @server.main()
    def _(grid: Any, context: Any) -> None:
        for run in told["runs"]:
            keys = {
                "sites": told["agents"],
                "experiment": run["config"],
                "out": run["out"],
                **run.get("keys", {}),
            }
            server_app.serve(grid, server_app.Settings.of(keys))

    run_simulation(
        server,
        client,
        told["agents"],
        backend_config={
            "init_args": {"address": "local", "num_cpus": told.get("workers", 2)},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
