"""Flower's messages know which task sends them, which its runtime says. Here nobody does."""

from importlib.util import find_spec

import pytest


@pytest.fixture(autouse=True)
def _task(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("flwr") is not None:
        from flwr.supercore.task_identity import TaskIdentity

        for name in ("_run_id", "_node_id", "_task_id"):
            monkeypatch.setattr(TaskIdentity, name, 1)
