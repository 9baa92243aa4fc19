"""Plugins are loaded for one test and forgotten after it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefmesh.algorithms.methods import METHODS
from prefmesh.objectives import LOSSES, TRAITS
from prefmesh.plugins import load_plugin
from prefmesh.topology import graphs  # noqa: F401 - registered now, so that `forget` keeps them
from prefmesh.topology.registry import GRAPHS
from prefmesh.topology.weights import WEIGHTS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def forget() -> Iterator[None]:
    """What a test registers is gone after it."""
    registries = (METHODS, LOSSES, TRAITS, GRAPHS, WEIGHTS)
    before = [dict(registry) for registry in registries]
    yield
    for registry, content in zip(registries, before, strict=True):
        registry.clear()
        registry.update(content)


@pytest.fixture
def plugin(forget: None) -> Callable[[str], None]:
    """Loads one of the example plugins, as `--plugin` does."""
    return lambda name: load_plugin(ROOT / "examples" / "plugins" / name)
