"""examples/*.yaml are read, and those whose data and model are there run."""

import pytest

from prefmesh.config import load_config
from tests.docs.conftest import ROOT
from tests.runs import prefmesh

EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_it_is_a_config_whose_header_names_it(path) -> None:
    load_config(path)
    assert f"examples/{path.name}" in path.read_text(encoding="utf-8").partition("\nseed:")[0]


def test_workers_run(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config("examples/workers.yaml")
    if not (ROOT / config.preferences.source).is_file():
        pytest.skip(f"{config.preferences.source} is not here")
    done = prefmesh(
        "run", "examples/workers.yaml", "-o", "method.rounds=2", "--out", tmp_path / "run", "--json"
    )
    assert done.code == 0, done.err
