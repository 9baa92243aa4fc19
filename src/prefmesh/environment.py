"""What a run was made with: versions, code, machine."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "prefmesh",
    "torch",
    "transformers",
    "peft",
    "datasets",
    "numpy",
    "scipy",
    "safetensors",
    "tokenizers",
    "bitsandbytes",
)


def describe_environment(seed: int, device: Any) -> dict[str, Any]:
    """Versions, git commit of the code (none outside a repository), hardware, threads and seed, for `environment.json`."""
    import psutil
    import torch

    device = torch.device(device)
    return {
        "seed": seed,
        "python": sys.version.split()[0],
        "packages": {name: installed(name) for name in PACKAGES},
        "git": git_commit(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def installed(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Of the packages that must be the same wherever a run's agents live, by what they are."""
    return {
        f"the version of {package}": version(package) for package in ("prefmesh", "torch", "transformers")
    }


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from, with `-dirty` where files differ from it."""
    here = Path(__file__).parent
    if not any((parent / ".git").exists() for parent in here.parents):
        return None
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
