"""What is computed once per model and data and then read from disk: encoded pairs, reference log-probabilities."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def cache_directory() -> Path:
    """`$PREFMESH_CACHE`, else `$XDG_CACHE_HOME/prefmesh`, else `~/.cache/prefmesh`."""
    if given := os.environ.get("PREFMESH_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefmesh"


def cached(
    kind: str, key: Sequence[str], compute: Callable[[], Tensors], fits: Callable[[Tensors], bool]
) -> Tensors:
    """Tensors from the cache, mapped into memory, where it holds ones under `key` that `fits`; else computed and stored.

    An unreadable file is computed anew; a cache that cannot be written to costs time only.
    """
    name = hashlib.blake2b("\n".join(key).encode(), digest_size=16).hexdigest()
    path = cache_directory() / kind / f"{name}.safetensors"
    if path.is_file():
        try:
            found = load_file(path)
            if fits(found):
                return found
        except (SafetensorError, OSError, KeyError):
            pass
    made = compute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        save_file({name: tensor.cpu().contiguous() for name, tensor in made.items()}, part)
        os.replace(part, path)
    except OSError:
        pass
    return made
