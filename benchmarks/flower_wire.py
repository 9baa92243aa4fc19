"""Bytes between SuperNodes and SuperLink, as the kernel counts them, against those that the run reports.

examples/flower/run_local.sh with adapters of a few megabytes, evaluated at the start and the end alone. Between the second round and
the last but one, what every SuperNode's connections to the SuperLink sent and received (`ss`: TLS, HTTP and gRPC included, TCP's
headers not) over `bytes_sent` of these rounds. Needs the extra flower, openssl, ssh-keygen and ss.

    python benchmarks/flower_wire.py --out benchmarks/results/flower_wire.json
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import yaml

APP = Path(__file__).resolve().parents[1] / "examples" / "flower"
PORT, ROUNDS, RANK = 18443, 6, 512


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        app, there = Path(place) / "app", Path(place) / "local"
        shutil.copytree(APP, app)
        config = yaml.safe_load((app / "town.yaml").read_text())
        config["policy"]["lora"]["r"] = RANK
        config["method"] |= {"rounds": ROUNDS, "local_steps": 1}
        config["evaluation"]["every"] = ROUNDS
        (app / "town.yaml").write_text(yaml.safe_dump(config))
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        with (Path(place) / "log").open("w") as log:
            run = subprocess.Popen(
                ["bash", app / "run_local.sh", there],
                env=os.environ | {"PORT": str(PORT), "PATH": path}, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        seen, marks = {}, {}
        while run.poll() is None:
            seen |= connections()
            marks.setdefault(lines(there / "run" / "metrics.jsonl"), sum(seen.values()))
            time.sleep(0.05)
        assert run.returncode == 0, (Path(place) / "log").read_text()[-3000:]
        records = [json.loads(line) for line in (there / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = 3, ROUNDS  # lines that stand there: of rounds 0 to 2, and of all but the last
    reported = sum(record["bytes_sent"] for record in records[first:last])
    result: dict[str, Any] = {
        "machine": machine.describe(),
        "adapter_mb": round(records[1]["bytes_sent"] / 6e6, 3),
        "rounds": last - first,
        "reported_mb": round(reported / 1e6, 3),
        "link_mb": round((marks[last] - marks[first]) / 1e6, 3),
        "link_over_reported": round((marks[last] - marks[first]) / reported, 4),
    }
    print(json.dumps(result, indent=2))
    if given.out:
        given.out.write_text(json.dumps(result, indent=2) + "\n")


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def connections() -> dict[str, int]:
    """Bytes sent and received of every connection of a SuperNode to the SuperLink, by its local address."""
    told = subprocess.run(
        ["ss", "-tinpHO", f"dport = :{PORT}"], capture_output=True, text=True, check=True
    ).stdout
    found = {}
    for line in told.splitlines():
        if "flower-super" in line:
            words = dict(re.findall(r"(bytes_sent|bytes_received):(\d+)", line))
            found[line.split()[3]] = sum(map(int, words.values()))
    return found


if __name__ == "__main__":
    main()
