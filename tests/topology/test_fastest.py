"""Fastest-mixing weights: against every other rule, closed forms and a dual certificate."""

import sys
from math import cos, pi

import numpy as np
import pytest
from hypothesis import given, settings

from prefmesh.errors import InputError
from prefmesh.topology import weights as rules
from prefmesh.topology.build import build_mixing_matrix
from prefmesh.topology.weights import build_weights
from tests.strategies import UNDIRECTED_WEIGHTS, connected_graphs

cvxpy = pytest.importorskip("cvxpy")


def rho(matrix) -> float:
    dense = matrix.toarray()
    return float(np.linalg.norm(dense - 1 / len(dense), 2))


@pytest.mark.parametrize(
    ("graph", "agents", "expected"),
    [
        ("complete", 2, 0),
        ("complete", 9, 0),
        # Links that look alike have one weight (Xiao and Boyd 2004): the best constant.
        ("star", 8, 7 / 9),
        ("ring", 8, (2 - 2 * cos(2 * pi / 8) - 4) / (2 * cos(2 * pi / 8) - 2 - 4)),
        ("hypercube", 8, 1 / 2),
        # Boyd, Diaconis, Sun and Xiao 2006: one half on every link.
        ("path", 8, cos(pi / 8)),
        ("path", 13, cos(pi / 13)),
    ],
)
def test_known_optima(graph, agents, expected) -> None:
    assert build_mixing_matrix(graph, "fastest", agents, 0).rho == pytest.approx(expected, abs=2e-7)


@settings(max_examples=25)
@given(connected_graphs(most=9))
def test_no_rule_mixes_faster(graph) -> None:
    found = rho(build_weights("fastest", graph))
    for name in UNDIRECTED_WEIGHTS:
        assert found <= rho(build_weights(name, graph)) + 2e-6


@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")  # what it claims is checked here
@pytest.mark.parametrize(("graph", "agents"), [("grid", 9), ("barbell", 8), ("tree", 7), ("path", 6)])
def test_a_dual_point_proves_the_optimum(graph, agents) -> None:
    """Eq. (6.3): any symmetric Y of nuclear norm 1 with Y_ii + Y_jj = 2 Y_ij on all links bounds rho from below."""
    mixing = build_mixing_matrix(graph, "fastest", agents, 0)
    y = cvxpy.Variable((agents, agents), symmetric=True)
    off_mean = np.eye(agents) - 1 / agents
    on_links = [y[i, i] + y[j, j] == 2 * y[i, j] for i, j in mixing.graph.edges]
    cvxpy.Problem(cvxpy.Maximize(cvxpy.trace(y @ off_mean)), [cvxpy.normNuc(y) <= 1, *on_links]).solve(
        solver="CLARABEL"
    )
    certificate = y.value / np.linalg.svd(y.value, compute_uv=False).sum()
    worst = max(
        abs(certificate[i, i] + certificate[j, j] - 2 * certificate[i, j]) for i, j in mixing.graph.edges
    )
    assert worst < 1e-7
    assert np.trace(certificate @ off_mean) == pytest.approx(mixing.rho, abs=1e-6)


def test_a_config_can_ask_for_them() -> None:
    from tests.runs import TOWN, config

    settings_ = config(TOWN | {"method": {"name": "dec_dpo", "graph": "grid", "weights": "fastest"}}).method
    mixing = settings_.mixing_matrix(4, seed=0)  # type: ignore[attr-defined]
    assert mixing.weights == "fastest"
    np.testing.assert_allclose(mixing.matrix.sum(axis=1), 1, atol=1e-15)


def test_without_the_solver_it_is_refused(monkeypatch) -> None:
    rules._fastest.cache_clear()
    monkeypatch.setitem(sys.modules, "clarabel", None)
    with pytest.raises(InputError, match=r"method\.weights: fastest needs clarabel, .*prefmesh\[theory\]"):
        build_mixing_matrix("ring", "fastest", 5, 0)


def test_too_many_agents_are_refused() -> None:
    with pytest.raises(InputError, match="fastest: 65 agents found; allowed: up to 64"):
        build_mixing_matrix("ring", "fastest", 65, 0)
