"""Kill processes of runs that several share, at random moments, and compare what is left with runs that nobody disturbed.

    python scripts/chaos_test.py --kills 20 --out runs/chaos

Each run is `prefmesh run CONFIG --processes K --restarts N`; one of its processes after the other, drawn at random, is killed with
kill -9 at a random moment, also while the processes start, meet, write checkpoints or end. The launcher then starts all of them again,
and they go on from the last checkpoint that all have. Every run has to end by itself with exit code 0 and leave the same parameters,
logs and figures, bit for bit. Exit code 1 on any difference, or where a run hangs.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from kill_test import differences

PATIENCE = 300.0
"""Seconds after which a run hangs, counted from its last kill."""

RESTARTS = 4
"""Kills of one run at most."""

CONFIGS = {
    "ring": (
        3,
        """
seed: 5
preferences: {source: builtin:town, agents: 7, town: {users: 7, pairs_per_user: 60}}
policy: {model: log_linear, features: attributes}
method: {name: dec_dpo, rounds: 900, local_steps: 4, graph: ring}
optimizer: {name: adamw, lr: 0.05, max_grad_norm: 1.0}
evaluation: {every: 50, held_out: 0.2}
runtime: {checkpoint_every: 10, threads: 1, timeout: 60}
""",
    ),
    "server": (
        2,
        """
seed: 5
preferences: {source: builtin:town, agents: 5, town: {users: 5, pairs_per_user: 12}}
policy: {model: builtin:tiny, max_length: 96, lora: {r: 2}}
method: {name: fed_dpo, rounds: 60, local_steps: 2, participation: 3, staleness: 2}
optimizer: {name: adamw, lr: 1.0e-3, batch_size: 2, max_grad_norm: 1.0}
evaluation: {every: 5, held_out: 0.2, samples: 4, max_new_tokens: 8}
runtime: {checkpoint_every: 3, threads: 1, timeout: 60}
""",
    ),
}
"""Processes and experiments: gossip with neighbours, and a server with late answers."""


def started(config: Path, processes: int, out: Path) -> subprocess.Popen[bytes]:
    """A run on its way."""
    command = [sys.executable, "-m", "prefmesh", "run", config, "-p", str(processes), "--restarts", str(RESTARTS), "--out", out]  # fmt: skip
    with out.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def workers(run: subprocess.Popen[bytes]) -> list[int]:
    """The processes that share it."""
    try:
        return [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
    except OSError:
        return []


def disturbed(
    config: Path, processes: int, out: Path, seconds: float, kills: int, dice: random.Random
) -> tuple[list[float], str | None]:
    """One run with up to so many kills: at which share of an undisturbed run's time they came, and what went wrong."""
    run = started(config, processes, out)
    done: list[float] = []
    begun = time.monotonic()
    for _ in range(kills):
        until = time.monotonic() + dice.uniform(0, 0.9 * seconds)
        while run.poll() is None and (time.monotonic() < until or len(workers(run)) < processes):
            time.sleep(0.01)
        if run.poll() is not None:
            break
        with suppress(ProcessLookupError):
            os.kill(dice.choice(workers(run)), signal.SIGKILL)
            done.append((time.monotonic() - begun) / seconds)
            # The launcher sees it, and starts all again.
            time.sleep(1.0)
    try:
        code = run.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        for pid in (*workers(run), run.pid):
            os.kill(pid, signal.SIGKILL)
        return done, f"hangs {PATIENCE:g} s after the last kill"
    return done, None if code == 0 else f"exit code {code}"


def main() -> int:
    """Run, report, and say by the exit code whether everything was the same."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--out", type=Path, help="a new directory; a temporary one otherwise")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims")
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    out = given.out or Path(tempfile.mkdtemp(prefix="prefmesh-chaos-"))
    out.mkdir(parents=True, exist_ok=given.out is None)
    dice = random.Random(given.seed)
    wholes = {}
    for name, (processes, text) in CONFIGS.items():
        config = out / f"{name}.yaml"
        config.write_text(text.lstrip())
        begun = time.monotonic()
        assert started(config, processes, out / f"whole_{name}").wait(PATIENCE) == 0
        wholes[name] = time.monotonic() - begun
    kills, runs, wrong = [], 0, []
    while len(kills) < given.kills and not wrong:
        name = list(CONFIGS)[runs % len(CONFIGS)]
        where = out / f"run_{runs:04d}_{name}"
        budget = min(dice.randint(1, RESTARTS), given.kills - len(kills))
        done, fault = disturbed(out / f"{name}.yaml", CONFIGS[name][0], where, wholes[name], budget, dice)
        kills += done
        runs += 1
        found = [fault] if fault else _differences(where, out / f"whole_{name}")
        wrong += [f"{where.name}: {difference}" for difference in found]
        print(f"{where.name}: {len(kills)} kills, {len(wrong)} faults", file=sys.stderr, flush=True)
    summary = {
        "kills": len(kills),
        "runs": runs,
        "moments, in undisturbed runs' time": [round(moment, 2) for moment in kills],
        "faults": wrong,
    }
    (out / "chaos_test.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))
    if given.out is None and not wrong:
        shutil.rmtree(out)
    return 1 if wrong else 0


def _differences(run: Path, whole: Path) -> list[str]:
    """As for one process; what was sent differs by what it takes to go on."""
    return [found for found in differences(run, whole) if "wire_bytes" not in found]


if __name__ == "__main__":
    sys.exit(main())
