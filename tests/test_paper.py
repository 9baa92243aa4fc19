"""`study paper`: five sweeps in one directory, and a page of their figures."""

import json

import pytest

from tests.runs import TOWN, contents, prefmesh, write_yaml

SMALL = {
    **TOWN,
    "preferences": {"source": "builtin:town", "agents": 5, "town": {"users": 5, "pairs_per_user": 10}},
    "method": {"name": "dec_dpo", "rounds": 2, "local_steps": 1, "graph": "ring"},
    "evaluation": {"every": 1, "held_out": 0.2},
}
PARTS = {"compare", "local-steps", "participation", "topology", "staleness"}


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_yaml(tmp_path / "small.yaml", SMALL)
    return tmp_path


def test_everything_runs_and_the_page_has_it_all(small, undrawn) -> None:
    done = prefmesh("study", "paper", "small.yaml", "--seeds", "0,1", "--out", "out", "--json")
    assert done.code == 0, done.err
    page = (small / json.loads(done.out)["page"]).read_text(encoding="utf-8")
    for part in PARTS:
        assert f'<section id="{part}"' in page
        assert (small / "out" / "figures" / f"{part}_grad_norm_sq_rounds.svg").is_file()
    # The paper's own ablations, and a band that is the standard error of two seeds.
    labels = json.loads((small / "out" / "topology" / "sweep.json").read_text())["variants"]
    assert {variant["name"] for variant in labels} == {"path", "ring", "star", "complete"}
    assert "one standard error" in page
    # Nothing is run twice.
    before = contents(small / "out")
    again = prefmesh("study", "paper", "--resume", "out")
    assert again.code == 0, again.err
    assert {k: v for k, v in contents(small / "out").items() if k.endswith("metrics.jsonl")} == {
        k: v for k, v in before.items() if k.endswith("metrics.jsonl")
    }
    other = prefmesh("study", "paper", "--resume", "out", "--seeds", "7")
    assert (other.code, "started with seeds [0, 1]" in other.err) == (2, True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["small.yaml", "--values", "1,2"], "--values"),
        (["--resume", "nowhere"], "nowhere"),
        ([], "no config was given"),
    ],
)
def test_bad_requests(small, argv, message) -> None:
    said = prefmesh("study", "paper", *argv)
    assert said.code == 2
    assert message in said.err
    assert said.err.count("\n") == 1
    assert set(contents(small)) == {"small.yaml"}
