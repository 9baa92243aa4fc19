"""What the benchmarks share: fresh child processes, peak memory, and the machine that figures belong to."""

import ctypes
import datetime
import gc
import json
import math
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def describe() -> dict[str, Any]:
    """Processor, cores, versions and date; nothing that names the host."""
    from prefmesh.environment import cpu_name

    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": sys.version.split()[0],
        "torch": version("torch"),
        "transformers": version("transformers"),
        "date": datetime.date.today().isoformat(),
    }


def child(script: str, arguments: list[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a script of this folder in a fresh process; the JSON on the last line of its stdout."""
    found = subprocess.run(
        [sys.executable, str(Path(script).resolve()), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | (environment or {}),
    )
    return json.loads(found.stdout.strip().splitlines()[-1])


def reset_peak() -> int:
    """Give freed memory back, start the kernel's high-water mark anew, and return the resident bytes now."""
    gc.collect()
    # Holes left by what ran before would otherwise be filled by what is measured, and hide it.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """The highest number of resident bytes since `reset_peak`, or since the process began."""
    return _status("VmHWM")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}: this benchmark reads Linux's figures")


def store(name: str, result: dict[str, Any]) -> None:
    """Write `results/<name>.json`; numbers that are not finite, which JSON does not know, as words."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(_plain(result), indent=2) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
