import warnings
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from matplotlib.collections import PathCollection

from prefmesh.reports.figures import accuracy_references, draw
from prefmesh.reports.graphs import MOST_EDGES, graph_figure
from prefmesh.reports.people import MOST_DOTS, dot_ranks, jitter, ranked_figure, strips_figure
from prefmesh.reports.runs import read_results
from prefmesh.reports.series import Users

from . import synthetic


def names(place: Path) -> list[str]:
    return [plate.name for plate in draw(read_results(place))]


def test_a_gossip_run_has_every_figure_of_a_run(tmp_path: Path) -> None:
    place = synthetic.write_run(tmp_path / "out", graph=synthetic.topology())
    # Held-out loss and consensus before mixing are lines of the loss and consensus figures here.
    curves = {
        f"{n}_{a}"
        for n in ("accuracy", "loss", "grad_norm_sq", "consensus_error")
        for a in ("rounds", "bytes")
    }
    assert set(names(place)) == curves | {"frontier_margin", "frontier_win_rate", "users", "graph"}


def test_a_method_that_sends_nothing_has_no_figures_against_bytes(tmp_path: Path) -> None:
    rows = synthetic.metrics(bytes_per_round=0)
    place = synthetic.write_run(tmp_path / "out", method="local_only", rows=rows)
    assert not [name for name in names(place) if name.endswith("_bytes")]


def test_a_run_without_a_round_has_no_figure(tmp_path: Path) -> None:
    assert names(synthetic.write_run(tmp_path / "out", rows=[], people=[], status=None)) == []


def test_a_study_of_graphs_draws_each_graph_once(tmp_path: Path) -> None:
    place = synthetic.write_study(tmp_path / "out", xs=(None, None), labels=("ring", "star"), seeds=(0, 1))
    found = names(place)
    assert [name for name in found if name.startswith("graph")] == ["graph_1", "graph_2"]
    assert found[0] == "study_accuracy"


def test_methods_without_consensus_error_are_named_not_dropped(tmp_path: Path) -> None:
    results = read_results(synthetic.write_compare(tmp_path / "out", seeds=(0,)))
    plate = next(plate for plate in draw(results) if plate.name == "consensus_error_rounds")
    assert "Not drawn, never above 0: Centralized; FedDPO, all; FedDPO, S = 4." in plate.caption


def test_descriptions_hold_the_numbers(tmp_path: Path) -> None:
    (plate,) = (
        p for p in draw(read_results(synthetic.write_run(tmp_path / "out"))) if p.name == "accuracy_rounds"
    )
    assert "all pairs: 50.0 % at round 0, 76.0 % at round 40." in plate.description


def test_ceilings_are_drawn_only_where_all_variants_share_them(tmp_path: Path) -> None:
    shared = accuracy_references(read_results(synthetic.write_compare(tmp_path / "compare", seeds=(0,))))
    assert [(line.label, line.level) for line in shared] == [
        ("ceiling, knowing each user: 85.2 %", pytest.approx(0.852)),
        ("ceiling, one taste for all: 80.6 %", pytest.approx(0.806)),
        ("chance", 0.5),
    ]
    study = accuracy_references(read_results(synthetic.write_study(tmp_path / "study", seeds=(0,))))
    assert [line.label for line in study] == ["ceiling, knowing each user: 85.0 %", "chance"]


def test_the_noise_band_needs_users_enough() -> None:
    few = Users(accuracy=np.linspace(0.5, 0.9, 9), pairs=np.full(9, 20))
    enough = Users(accuracy=np.linspace(0.5, 0.9, 10), pairs=np.full(10, 20))
    assert not ranked_figure(few, title="t").axes[0].collections
    assert len(ranked_figure(enough, title="t").axes[0].collections) == 1
    assert not strips_figure([("a", 0, few)], title="t").axes[0].patches
    assert len(strips_figure([("a", 0, few), ("b", 1, enough)], title="t").axes[0].patches) == 1


def test_the_worst_tenth_is_marked() -> None:
    group = Users(accuracy=np.arange(20) / 20, pairs=np.full(20, 20))
    figure = ranked_figure(group, title="t")
    _, marked, pooled = figure.axes[0].lines
    np.testing.assert_array_equal(marked.get_xdata(), [1, 2])
    np.testing.assert_array_equal(marked.get_ydata(), [0, 0.05])
    assert pooled.get_ydata()[0] == pytest.approx(group.accuracy.mean())
    assert "worst tenth, mean 2.5 %" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_many_users_are_thinned_evenly_with_both_ends() -> None:
    ranks = dot_ranks(10_000)
    assert (len(ranks), ranks[0], ranks[-1]) == (MOST_DOTS, 0, 9999)
    np.testing.assert_array_equal(dot_ranks(5), range(5))
    assert np.abs(jitter(1000)).max() < 0.29


def test_the_graph_is_drawn_with_all_its_nodes_and_eigenvalues() -> None:
    topology = synthetic.topology("star", 9)
    figure = graph_figure(topology)
    left, right = figure.axes
    nodes = next(c for c in left.collections if isinstance(c, PathCollection))
    assert len(np.asarray(nodes.get_offsets())) == 9
    drawn = np.concatenate([np.asarray(line.get_ydata()) for line in right.lines[:2]])
    np.testing.assert_allclose(np.sort(drawn), np.sort(np.abs(topology["eigenvalues"])), atol=1e-12)
    assert (
        right.lines[2].get_ydata()[0] == topology["rho"] == pytest.approx(1 - 1 / 9)
    )  # closed form for a star
    assert f"ρ = {1 - 1 / 9:.4f}" in (figure.get_supxlabel() or "")


@pytest.mark.parametrize("name", ["ring", "path", "complete", "barbell", "unheard_of"])
@pytest.mark.parametrize("agents", [1, 2, 8, 41, 200])
def test_any_graph_can_be_drawn(name: str, agents: int) -> None:
    graph = nx.path_graph(agents)
    topology = {
        "graph": name,
        "agents": agents,
        "weights": "metropolis",
        "edges": [list(edge) for edge in graph.edges],
        "rho": 0.5,
        "spectral_gap": 0.5,
        "one_minus_rho_squared": 0.75,
        "eigenvalues": [1.0] + [[0.3, 0.4]] * (agents - 1),  # complex, as a directed graph's
        "mixing_matrix": [],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = graph_figure(topology)
        figure.draw_without_rendering()
    sizes = np.asarray(figure.axes[1].lines[0].get_ydata())
    np.testing.assert_allclose(sizes, [1.0] + [0.5] * (agents - 1))


def test_a_graph_too_dense_to_see_is_said_in_words() -> None:
    topology = synthetic.topology("ring", 8) | {"edges": [[0, 1]] * (MOST_EDGES + 1)}
    left = graph_figure(topology).axes[0]
    assert "too many to draw" in left.texts[0].get_text()
    assert not left.collections


def test_no_spectrum_is_said_in_words() -> None:
    right = graph_figure(synthetic.topology("ring", 8) | {"eigenvalues": None}).axes[1]
    assert "no eigenvalue but ρ" in right.texts[0].get_text()
    assert not right.lines
