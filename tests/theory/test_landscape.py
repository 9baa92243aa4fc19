"""`prefmesh landscape`: what it measures, on small experiments, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefmesh.experiment import prepare
from prefmesh.theory.constants import as_log_linear
from prefmesh.theory.landscape import measure
from tests.runs import TINY, TOWN, config, prefmesh, write_yaml

GROUPED: dict[str, Any] = {
    **TOWN,
    "preferences": {
        "source": "builtin:town",
        "town": {"users": 8, "pairs_per_user": 200, "groups": 2, "heterogeneity": 1.0},
    },
    "method": {"name": "fed_dpo", "rounds": 4, "local_steps": 2},
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def grouped() -> tuple[Any, Any]:
    experiment = prepare(config(GROUPED))
    return experiment, measure(experiment, rounds=4)


def test_constants_are_the_closed_forms_over_the_region(grouped: tuple[Any, Any]) -> None:
    experiment, found = grouped
    problem = experiment.learner.problem
    shards = [agent.train for agent in experiment.division.agents]
    exact = as_log_linear(problem, shards, np.full(8, 1 / 8))
    assert [point.round for point in found.points] == [0, 2, 4]
    state = experiment.learner.begin(experiment.start)
    along = [np.zeros(exact.dim)]
    for round_ in range(1, 5):
        state, _ = experiment.learner.round(state, round_)
        along.append(state.theta["theta"][0].double().numpy())
    region = [along[0], along[2], along[4]]
    # The policy computes in float32.
    assert found.heterogeneity == pytest.approx(max(map(exact.heterogeneity, region)), rel=1e-4)
    noise = max(exact.gradient_noise(theta, 4) for theta in region)
    assert found.gradient_noise == pytest.approx(noise, rel=1e-4)
    # At the start s (1 - s) = 1/4, its largest: the bound is reached there.
    assert found.smoothness == pytest.approx(exact.smoothness(), rel=1e-4)
    assert found.lowest_eigenvalue > -1e-4 * found.smoothness
    np.testing.assert_allclose(found.prices, exact.price_of_consensus())


def test_the_planted_groups_of_the_town_are_found(grouped: tuple[Any, Any]) -> None:
    experiment, found = grouped
    assert found.groups.count == 2
    assert found.groups.label.tolist() == experiment.town.group.tolist()
    same = experiment.town.group[:, None] == experiment.town.group[None, :]
    apart = ~np.eye(8, dtype=bool)
    assert found.cosine[same & apart].min() > found.cosine[~same].max()


def test_slices_hold_the_losses_at_the_models_themselves(grouped: tuple[Any, Any]) -> None:
    experiment, found = grouped
    exact = as_log_linear(
        experiment.learner.problem, [agent.train for agent in experiment.division.agents], np.full(8, 1 / 8)
    )
    # FedDPO's agents share one model; the slices' are where local steps lead from it.
    assert found.slices.agents[0] < found.slices.agents[1]
    line = found.slices.lines[0]
    at = {round(t, 9): loss for t, loss in zip(line.t, line.loss, strict=True)}
    average, own = at[0.0], at[1.0]
    lowest = exact.loss(exact.optimum())
    assert lowest <= min(average, own)
    assert max(average, own) < np.log(2) + 0.2
    plane = found.slices.plane
    assert plane.loss.shape == (13, 13)
    assert plane.loss.min() >= lowest - 1e-6
    for x, y in (*plane.places, (0.0, 0.0)):
        assert plane.x[0] < x < plane.x[-1]
        assert plane.y[0] < y < plane.y[-1]
    # Convex along every row and column of the plane, as the loss is.
    assert (np.diff(plane.loss, 2, axis=0) > -1e-6).all()
    assert (np.diff(plane.loss, 2, axis=1) > -1e-6).all()


def test_of_one_row_of_theta_per_agent_these_are_the_models() -> None:
    """Local-only: after one round from the reference the two furthest apart are the slices' agents."""
    experiment = prepare(config(TOWN))
    found = measure(experiment, rounds=1)
    state = experiment.learner.begin(experiment.start)
    state, _ = experiment.learner.round(state, 1)
    theta = state.theta["theta"].double().numpy()
    distance = np.linalg.norm(theta[:, None] - theta[None], axis=2)
    a, b = found.slices.agents
    assert distance[a, b] == pytest.approx(distance.max())
    places = found.slices.plane.places
    assert np.linalg.norm(places[0] - places[1]) == pytest.approx(distance.max(), rel=1e-5)
    exact = as_log_linear(
        experiment.learner.problem, [agent.train for agent in experiment.division.agents], np.full(4, 1 / 4)
    )
    line = found.slices.lines[0]
    at_mean = exact.loss(theta.mean(0))
    at = {round(t, 9): loss for t, loss in zip(line.t, line.loss, strict=True)}
    assert at[0.0] == pytest.approx(at_mean, rel=1e-5)
    assert at[1.0] == pytest.approx(exact.loss(theta[a]), rel=1e-5)
    own = dict(zip(np.round(line.t, 9), line.own, strict=True))[1.0]
    assert own == pytest.approx(exact.agent_losses(theta)[a], rel=1e-5)


def test_two_agents_lie_on_a_line_with_their_average() -> None:
    two = config(TOWN, preferences={"agents": 2, "town": {"users": 2, "pairs_per_user": 30}})
    found = measure(prepare(two), rounds=2)
    assert found.slices.plane.collinear
    assert np.isfinite(found.slices.plane.loss).all()
    assert found.groups.count == 1


@pytest.mark.parametrize("method", ["centralized", "dec_dpo"])
def test_every_method_has_a_landscape(method: str) -> None:
    raw = {**TOWN, "method": {"name": method, "rounds": 2}}
    found = measure(prepare(config(raw)), rounds=2)
    assert found.slices.plane is not None
    assert np.isfinite(found.heterogeneity)


def test_end_to_end_on_a_language_model(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA and AdamW on three users of six pairs."""
    monkeypatch.setattr("prefmesh.theory.landscape.CURVATURE_PAIRS", 6)
    monkeypatch.setattr("prefmesh.theory.slices.SIDE", 5)
    monkeypatch.setattr("prefmesh.theory.slices.LINE", 4)
    write_yaml(here / "tiny.yaml", TINY)
    said = prefmesh("landscape", "tiny.yaml", "--rounds", "1", "--pairs", "4", "--out", "out", "--json")
    assert (said.code, said.err) == (0, "")
    found = json.loads(said.out)
    assert json.loads((here / "out" / "landscape.json").read_text()) == found
    constants = found["constants"]
    assert constants["smoothness"] > 0
    assert constants["gradient_noise"] > 0
    assert constants["lowest_eigenvalue"] < 0
    assert found["price_of_consensus"] is None
    assert any("adamw" in remark and "SGD" in remark for remark in found["remarks"])
    assert any("No price of consensus" in remark for remark in found["remarks"])
    assert [point["round"] for point in found["region"]] == [0, 1]
    assert found["region"][0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert len(found["similarity"]["cosine"]) == 3
    names = {Path(path).name for path in found["figures"]}
    assert {"similarity.svg", "similarity.png", "plane.svg", "plane.png", "lines.svg", "lines.png"} == names
    assert all(Path(path).stat().st_size > 1000 for path in found["figures"])


def test_tables_in_the_terminal(here: Path) -> None:
    write_yaml(here / "town.yaml", TOWN)
    said = prefmesh("landscape", "town.yaml", "--rounds", "0", "--out", "out")
    assert (said.code, said.err) == (0, "")
    for words in (
        "Lam, smoothness",
        "sigma²",
        "zeta²",
        "price of consensus",
        "groups of agents",
        "resident_000",
    ):
        assert words in said.out
    assert said.out.endswith("out\n")


@pytest.mark.parametrize("graph", ["path", "exponential"])
def test_modes_of_the_graph_that_the_config_names(here: Path, graph: str) -> None:
    """A symmetric W has some; the exponential graph is directed."""
    weights = "uniform" if graph == "exponential" else "metropolis"
    method = {"name": "dec_dpo", "rounds": 3, "graph": graph, "weights": weights}
    write_yaml(here / "town.yaml", {**TOWN, "method": method})
    said = prefmesh("landscape", "town.yaml", "--rounds", "0", "--out", "out")
    assert (said.code, said.err) == (0, "")
    found = json.loads((here / "out" / "landscape.json").read_text())
    assert ("modes of the graph" in said.out) == (found["graph_modes"] is not None) == (graph == "path")
    if found["graph_modes"]:
        modes = found["graph_modes"]
        assert len(modes["eigenvalues"]) == len(found["agents"]) - 1
        assert sum(modes["heterogeneity"]) == pytest.approx(found["constants"]["heterogeneity"])


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--rounds", "9"], "--rounds: found 9; allowed: 0 to 5 (method.rounds)"),
        (["--rounds", "-1"], "--rounds: found -1; allowed: 0 to 5"),
        (["--pairs", "1"], "--pairs: found 1; allowed: at least 2"),
        (["-o", "method.graph=ring"], "method.graph"),
        (["--out", "."], "exists already"),
    ],
)
def test_refused(here: Path, words: list[str], why: str) -> None:
    write_yaml(here / "town.yaml", TOWN)
    said = prefmesh("landscape", "town.yaml", *words)
    assert said.code == 2
    assert said.out == ""
    assert said.err.startswith("prefmesh: ")
    assert said.err.count("\n") == 1
    assert why in said.err
    assert sorted(path.name for path in here.iterdir()) == ["town.yaml"]


def test_a_run_that_diverges_says_so(here: Path) -> None:
    write_yaml(here / "town.yaml", {**TOWN, "optimizer": {"name": "sgd", "lr": 1e6, "weight_decay": 1.0}})
    said = prefmesh("landscape", "town.yaml", "--out", "out")
    assert said.code == 3
    assert "stopped being finite in round" in said.err
    assert not (here / "out").exists()
