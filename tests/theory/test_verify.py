"""Verdicts, and the command that shows them."""

import json

import pytest

from prefmesh.theory import verify as verifying
from prefmesh.theory.verify import CLAIMS, Claim, Effort, Finding, Plot, Series, verify
from tests.runs import prefmesh


@pytest.mark.parametrize(
    ("finding", "holds"),
    [
        (Finding(kind="equal", predicted=2.0, measured=2.05, tolerance=0.03), True),
        (Finding(kind="equal", predicted=2.0, measured=2.07, tolerance=0.03), False),
        (Finding(kind="equal", predicted=2.0, measured=2.07, error=0.1, tolerance=0.03), False),
        (Finding(kind="at most", predicted=1.0, measured=1.0), True),
        (Finding(kind="at most", predicted=1.0, measured=1.1, error=0.04), False),
        (Finding(kind="exponent", predicted=-1.0, measured=-0.92, tolerance=0.1), True),
        (Finding(kind="exponent", predicted=-1.0, measured=-0.85, tolerance=0.1), False),
        (Finding(kind="order", predicted=1.0, measured=0.5), False),
        (Finding(kind="equal", predicted=1.0, measured=float("nan"), tolerance=0.5), False),
        (Finding(kind="at most", predicted=1.0, measured=float("nan")), False),
    ],
)
def test_verdicts(finding: Finding, holds: bool) -> None:
    assert finding.holds is holds


def broken(effort: Effort) -> Finding:
    raise ValueError("lr: found 9")


def refuted(effort: Effort) -> Finding:
    plot = Plot(
        x_label="x",
        y_label="y",
        series=[
            Series(label="law", x=[1.0, 2.0], y=[1.0, 2.0]),
            Series(label="seen", x=[1.0, 2.0], y=[2.0, 1.0], error=[0.1, 0.1], kind="points"),
        ],
    )
    return Finding(kind="order", predicted=1.0, measured=-1.0, note="the other way round", plot=plot)


@pytest.fixture
def two_claims(monkeypatch):
    """In place of the real ones: one that is refuted and one whose experiment breaks."""
    verify(Effort(quick=True), only=["Lam bounds the curvature"])  # registers the real ones first
    made = {
        name: Claim(
            name=name, statement=f"{name} is said", source="paper", of="tests", where="nowhere", experiment=f
        )
        for name, f in (("refuted", refuted), ("broken", broken))
    }
    for known in list(CLAIMS):
        monkeypatch.delitem(CLAIMS, known)
    for name, one in made.items():
        monkeypatch.setitem(CLAIMS, name, one)


def test_failures_are_shown_and_the_others_go_on(two_claims, tmp_path) -> None:
    done = prefmesh("theory", "verify", "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    rows = json.loads(done.out)["claims"]
    assert [row["verdict"] for row in rows] == ["fails", "not checked"]
    assert rows[0]["ratio"] == -1.0
    assert rows[1]["problem"] == "ValueError: lr: found 9"
    page = (tmp_path / "out" / "verify.html").read_text(encoding="utf-8")
    assert "0 hold, 1 fail, 1 could not be checked" in page
    assert "the other way round" in page
    assert page.count("<svg") == 1
    assert (tmp_path / "out" / "figures" / "claim_refuted.png").is_file()
    assert json.loads((tmp_path / "out" / "verify.json").read_text())["claims"] == rows


def test_claims_by_name(tmp_path) -> None:
    done = prefmesh("theory", "verify", "--only", "lam bounds", "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    [row] = json.loads(done.out)["claims"]
    assert (row["name"], row["verdict"]) == ("Lam bounds the curvature", "holds")
    wrong = prefmesh("theory", "verify", "--only", "Lam bounds the curvatures", "--out", tmp_path / "other")
    assert wrong.code == 2
    assert "did you mean 'Lam bounds the curvature'" in wrong.err
    assert not (tmp_path / "other").exists()


def test_quick_is_less_work() -> None:
    assert (verifying.Effort(quick=True).pick(1, 5), verifying.Effort().pick(1, 5)) == (1, 5)


def test_side_by_side_finds_the_same() -> None:
    words = ["consensus optimum", "Lam bounds", "Seats"]
    alone, together = (verify(Effort(quick=True, seed=1), words, jobs=jobs) for jobs in (1, 2))
    assert [row.claim.name for row in alone.rows] == [row.claim.name for row in together.rows]
    for one, other in zip(alone.rows, together.rows, strict=True):
        assert one.finding is not None
        assert one.finding == other.finding
