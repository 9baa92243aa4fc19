"""What half precision on the way does: two processes, rows as they are, in bfloat16 and in float16; the same seeds.

FedDPO and DecDPO (ring) on the built-in town, LoRA, 20 rounds. `accuracy`: held-out pairs under the average model; `loss`: over training
pairs; both as differences to `same`, by seed. `bytes`: what processes handed to the network, over `same`.

    python benchmarks/wire.py --out benchmarks/results/wire.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine

WIRES = ("same", "bfloat16", "float16")
METHODS = {
    "fed_dpo": {"name": "fed_dpo", "rounds": 20, "local_steps": 2},
    "dec_dpo": {"name": "dec_dpo", "rounds": 20, "local_steps": 2, "graph": "ring"},
}


def run(method: str, wire: str, seed: int, directory: Path) -> dict[str, Any]:
    """Its last measures, and all bytes."""
    raw = {
        "seed": seed,
        "preferences": {"source": "builtin:town", "agents": 6, "town": {"users": 6, "pairs_per_user": 80}},
        "policy": {"model": "builtin:tiny", "lora": {"r": 4}},
        "objective": {"beta": 0.5},
        "method": METHODS[method],
        "optimizer": {"lr": 0.003, "batch_size": 8},
        "evaluation": {"every": 20, "held_out": 0.2, "samples": 0},
        "runtime": {"processes": 2, "wire": wire},
    }
    config, out = directory / "config.json", directory / f"{method}_{wire}_{seed}"
    config.write_text(json.dumps(raw))
    command = [sys.executable, "-m", "prefmesh", "run", str(config), "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = records[-1]
    return {
        "accuracy": last["eval/rewards/accuracies"],
        "loss": last["train_loss"],
        "bytes": sum(record.get("wire_bytes", 0) for record in records),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    result: dict[str, Any] = {"machine": machine.describe()}
    with tempfile.TemporaryDirectory() as name:
        for method in METHODS:
            found = {w: [run(method, w, s, Path(name)) for s in range(given.seeds)] for w in WIRES}
            result[method] = {"same": found["same"]}
            for wire in WIRES[1:]:
                pairs = list(zip(found[wire], found["same"], strict=True))
                result[method][wire] = {
                    key: [a[key] - b[key] for a, b in pairs] for key in ("accuracy", "loss")
                }
                result[method][wire]["bytes"] = [a["bytes"] / b["bytes"] for a, b in pairs]
    print(json.dumps(result, indent=2))
    if given.out:
        given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
