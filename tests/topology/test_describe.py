"""What `prefmesh topology` prints and draws."""

import io
import json

import numpy as np
import pytest
from hypothesis import given
from PIL import Image
from rich.console import Console

from prefmesh.errors import InputError
from prefmesh.randomness import generator
from prefmesh.topology.build import build_mixing_matrix
from prefmesh.topology.describe import description, table
from prefmesh.topology.drawing import draw, figure
from prefmesh.topology.layout import layout
from prefmesh.topology.registry import build_graph
from prefmesh.topology.settings import GraphSettings
from tests.strategies import graph_names_and_agents, mixing_matrices

KEYS = [
    "graph",
    "agents",
    "weights",
    "edges",
    "rho",
    "spectral_gap",
    "one_minus_rho_squared",
    "eigenvalues",
    "mixing_matrix",
]


@given(mixing_matrices(most=10))
def test_description_is_json_that_restates_the_matrix(mixing):
    said = json.loads(json.dumps(description(mixing), allow_nan=False))
    assert list(said) == KEYS
    np.testing.assert_array_equal(np.array(said["mixing_matrix"]), mixing.matrix.toarray())
    values = [complex(*value) if isinstance(value, list) else value for value in said["eigenvalues"]]
    assert (np.array(values) == mixing.eigenvalues).all()
    assert len(said["edges"]) == mixing.graph.number_of_edges()


def test_star_of_eight():
    said = description(build_mixing_matrix("star", "metropolis", 8, 0))
    assert (said["graph"], said["agents"], said["weights"]) == ("star", 8, "metropolis")
    assert said["edges"] == [[0, i] for i in range(1, 8)]
    assert said["rho"] == pytest.approx(0.875)
    assert said["spectral_gap"] == pytest.approx(0.125)
    assert said["one_minus_rho_squared"] == pytest.approx(1 - 0.875**2)
    assert said["eigenvalues"] == pytest.approx([1] + [0.875] * 6 + [0], abs=1e-12)


def test_directed_eigenvalues_are_pairs():
    # circulant of 1/3 at hops 0, 1, 2 (mod 4): (1 + w^k + w^2k) / 3 with w = i, that is 1, i/3, 1/3, -i/3
    said = description(build_mixing_matrix("exponential", "uniform", 4, 0))
    np.testing.assert_allclose(said["eigenvalues"], [[1, 0], [1 / 3, 0], [0, -1 / 3], [0, 1 / 3]], atol=1e-12)


def test_graph_with_options_is_written_as_in_the_config():
    graph = GraphSettings(name="grid", rows=2)
    assert description(build_mixing_matrix(graph, "metropolis", 6, 0))["graph"] == {"name": "grid", "rows": 2}


def test_too_large_to_write_out():
    found = description(build_mixing_matrix("ring", "metropolis", 2001, 0))
    assert found["eigenvalues"] is None
    assert found["mixing_matrix"] is None
    assert len(found["edges"]) == 2001
    assert found["rho"] == pytest.approx(1 / 3 + 2 / 3 * np.cos(2 * np.pi / 2001), abs=1e-12)


@pytest.mark.parametrize(
    ("graph", "weights", "shown"),
    [
        (
            "star",
            "metropolis",
            ["star, 8 agents, metropolis weights", "undirected", "1 to 7", "14", "0.875", "0.234375"],
        ),
        ("star", "best_constant", ["yes", "least weight -0.5556"]),
        ("exponential", "uniform", ["directed", "24"]),
    ],
)
def test_table(graph, weights, shown):
    console = Console(file=io.StringIO(), width=160)
    console.print(table(build_mixing_matrix(graph, weights, 8, 0)))
    printed = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert all(text in printed for text in shown)


@given(graph_names_and_agents(most=32))
def test_no_two_agents_are_drawn_on_one_another(name_and_agents):
    name, agents = name_and_agents
    places = layout(name, build_graph(name, agents, {}, generator(0, "test")))
    assert places.shape == (agents, 2)
    assert np.isfinite(places).all()
    apart = np.linalg.norm(places[:, None] - places[None], axis=-1) + np.eye(agents) * 1e9
    size = max(float(np.ptp(places, axis=0).max()), 1e-9)
    assert agents == 1 or apart.min() > 0.02 * size


class TestDrawing:
    @pytest.mark.parametrize("graph", ["star", "exponential"])
    def test_png_is_an_image(self, tmp_path, graph):
        file = tmp_path / "graph.png"
        draw(build_mixing_matrix(graph, "uniform" if graph == "exponential" else "metropolis", 8, 0), file)
        with Image.open(file) as image:
            assert image.size[0] > image.size[1] > 500

    def test_svg_is_the_same_bytes_twice(self, tmp_path):
        files = [tmp_path / "one.svg", tmp_path / "two.svg"]
        for file in files:
            draw(build_mixing_matrix("erdos_renyi", "metropolis", 12, 0), file)
        assert files[0].read_bytes() == files[1].read_bytes()
        assert b"<svg" in files[0].read_bytes()

    def test_other_endings_are_refused(self, tmp_path):
        with pytest.raises(InputError, match=r"ending '.gif' found; allowed: .svg, .png, .pdf"):
            draw(build_mixing_matrix("star", "metropolis", 8, 0), tmp_path / "graph.gif")
        assert not list(tmp_path.iterdir())

    def test_agents_are_numbered_only_where_legible(self):
        few, many = (
            {
                text.get_text()
                for text in figure(build_mixing_matrix("ring", "metropolis", n, 0)).axes[0].texts
            }
            for n in (40, 1000)
        )
        assert few == {str(agent) for agent in range(40)}
        assert many == set()

    def test_above_two_thousand_agents_the_graph_alone(self):
        drawn = figure(build_mixing_matrix("ring", "metropolis", 2001, 0))
        assert len(drawn.axes) == 1
        assert "rho = 0.999997" in drawn.axes[0].get_title()  # 1 - 2/3 (1 - cos(2 pi / 2001)) = 1 - 3.3e-6
