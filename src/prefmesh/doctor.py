"""What this machine has, and what is missing for what."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from prefmesh.environment import PACKAGES, describe_environment, installed
from prefmesh.policies.cache import cache_directory

if TYPE_CHECKING:
    from rich.table import Table

OPTIONAL = {
    "trl": "tests of equality with TRL (extra: dev)",
    "pytest": "the tests (extra: dev)",
    "flwr": "bench --against flower, with ray (extra: flower)",
    "bitsandbytes": "policy.load_in_4bit (extra: quantized)",
    "accelerate": "loading models larger than memory",
    "cvxpy": "fastest-mixing weights, with clarabel (extra: theory)",
}


def examine() -> dict[str, Any]:
    """Versions, hardware, devices, the cache, optional packages and checks of what could go wrong, JSON-ready."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    environment = describe_environment(seed=0, device=device)
    environment.pop("seed")
    cache = cache_directory()
    problems = [f"{name} is not installed" for name in PACKAGES if installed(name) is None]
    if device == "cpu":
        problems.append("no GPU: policies above some 100M parameters will be slow")
    if environment["threads"] < (environment["cores"] or 1):
        problems.append(
            f"torch uses {environment['threads']} of {environment['cores']} cores (OMP_NUM_THREADS or runtime.threads)"
        )
    if not _writable(cache):
        problems.append(
            f"{cache} cannot be written to: reference log-probabilities are computed anew in every run (set PREFMESH_CACHE)"
        )
    return {
        **environment,
        "bfloat16": _fast_bfloat16(device),
        "cache": str(cache),
        "cache_mb": round(sum(path.stat().st_size for path in cache.rglob("*.safetensors")) / 2**20, 1),
        "optional": {
            name: {"installed": find_spec(name) is not None, "for": use} for name, use in OPTIONAL.items()
        },
        "notes": problems,
    }


def table(found: dict[str, Any]) -> "Table":
    """`examine`'s findings for the terminal."""
    from rich.table import Table

    rows = Table(title="prefmesh doctor", show_header=False)
    rows.add_row("python", found["python"])
    for name, version in found["packages"].items():
        rows.add_row(name, version or "missing")
    rows.add_row("code", found["git"] or "not a git checkout")
    rows.add_row("processor", f"{found['cpu']}, {found['cores']} cores, torch uses {found['threads']}")
    rows.add_row("memory", f"{found['memory_gb']} GiB")
    rows.add_row("device", found["device_name"] or found["device"])
    rows.add_row("bfloat16 in hardware", "yes" if found["bfloat16"] else "no")
    rows.add_row("cache", f"{found['cache']} ({found['cache_mb']} MiB)")
    for name, entry in found["optional"].items():
        rows.add_row(name, "installed" if entry["installed"] else f"not installed; for {entry['for']}")
    for note in found["notes"]:
        rows.add_row("note", note)
    return rows


def _fast_bfloat16(device: str) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith("flags")), "").split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _writable(directory: Any) -> bool:
    import os

    existing = next(path for path in (directory, *directory.parents) if path.exists())
    return os.access(existing, os.W_OK)
