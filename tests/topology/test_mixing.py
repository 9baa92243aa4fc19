"""Mixing matrices: doubly stochastic, contracting by rho, with spectra known in closed form."""

from math import cos, log2, pi

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from prefmesh.errors import InputError
from prefmesh.topology import spectrum
from prefmesh.topology.build import build_mixing_matrix
from prefmesh.topology.mixing import MixingMatrix
from prefmesh.topology.settings import GraphSettings
from prefmesh.topology.weights import WEIGHTS, build_weights, legal_weights, weights
from tests.strategies import UNDIRECTED_WEIGHTS, connected_graphs, mixing_matrices


def mixing(graph: str | GraphSettings, agents: int, rule: str = "metropolis") -> MixingMatrix:
    return build_mixing_matrix(graph, rule, agents, seed=0)


def made(matrix: np.ndarray, graph: nx.Graph) -> MixingMatrix:
    return MixingMatrix(
        matrix=csr_array(matrix), graph=graph, settings=GraphSettings(name="own"), weights="own"
    )


@given(mixing_matrices(), st.integers(0, 2**32 - 1))
def test_mixing_keeps_the_mean_and_contracts_by_rho(mixing, seed):
    x = np.random.default_rng(seed).standard_normal((mixing.agents, 3))
    mean = x.mean(axis=0)
    mixed = mixing.matrix @ x
    np.testing.assert_allclose(mixed.mean(axis=0), mean, atol=1e-12)
    assert np.linalg.norm(mixed - mean) <= mixing.rho * np.linalg.norm(x - mean) + 1e-12


@given(mixing_matrices())
def test_doubly_stochastic_and_only_along_links(mixing):
    w = mixing.matrix.toarray()
    assert mixing.matrix.dtype == np.float64
    np.testing.assert_allclose(w.sum(axis=0), 1, atol=1e-12)
    np.testing.assert_allclose(w.sum(axis=1), 1, atol=1e-12)
    assert mixing.has_negative_entries == (w.min() < -1e-12)
    assert not mixing.has_negative_entries or mixing.weights == "best_constant"
    if not mixing.graph.is_directed():
        np.testing.assert_allclose(w, w.T, atol=1e-15)
        assert mixing.symmetric
    links = {(a, b) for a, b in mixing.graph.edges}
    links |= set() if mixing.graph.is_directed() else {(b, a) for a, b in links}
    assert {(sender, receiver) for sender, receiver, _ in mixing.messages} == links
    assert mixing.messages_per_round == len(mixing.messages) == len(links)
    assert all(w[receiver, sender] == weight for sender, receiver, weight in mixing.messages)


@given(mixing_matrices())
def test_rho_is_attained_and_agrees_with_the_eigenvalues(mixing):
    n = mixing.agents
    off_mean = mixing.matrix.toarray() - 1 / n
    assert mixing.rho == pytest.approx(np.linalg.svd(off_mean, compute_uv=False)[0], abs=1e-12)
    assert 0 <= mixing.rho < 1
    values = mixing.eigenvalues
    assert len(values) == n
    assert values[0] == pytest.approx(1, abs=1e-12)
    assert (np.diff(values.real) <= 1e-8).all()
    assert values.sum() == pytest.approx(mixing.matrix.trace(), abs=1e-10)
    if n > 1:  # every matrix here is normal
        assert max(abs(values[1:])) == pytest.approx(mixing.rho, abs=1e-8)
    assert mixing.spectral_gap == 1 - mixing.rho
    assert mixing.one_minus_rho_squared == pytest.approx(1 - mixing.rho**2, abs=1e-15)


@pytest.mark.parametrize(
    ("graph", "agents", "rule", "rho"),
    [
        ("path", 1, "metropolis", 0),
        ("path", 2, "metropolis", 0),  # [[1/2, 1/2], [1/2, 1/2]]
        *[("complete", n, "uniform", 0) for n in (1, 2, 3, 8, 40)],
        *[("ring", n, "metropolis", 1 / 3 + 2 / 3 * cos(2 * pi / n)) for n in (5, 8, 16, 31)],
        *[("ring", n, "lazy_metropolis", 2 / 3 + 1 / 3 * cos(2 * pi / n)) for n in (5, 8, 16)],
        *[("star", n, "metropolis", 1 - 1 / n) for n in (3, 8, 20)],
        *[("star", n, "best_constant", (n - 1) / (n + 1)) for n in (3, 8, 20)],  # l_2 = 1, l_max = n
        *[("path", n, "metropolis", 1 / 3 + 2 / 3 * cos(pi / n)) for n in (3, 8, 21)],
        *[("hypercube", 2**d, "metropolis", (d - 1) / (d + 1)) for d in (1, 2, 3, 5)],
        *[("hypercube", 2**d, "best_constant", (d - 1) / (d + 1)) for d in (1, 2, 3, 5)],
        *[("exponential", 2**d, "uniform", (d - 1) / (d + 1)) for d in (1, 2, 3, 5)],
        ("torus", 25, "metropolis", 3 / 5 + 2 / 5 * cos(2 * pi / 5)),
        ("grid", 9, "max_degree", 1 - (2 - 2 * cos(pi / 3)) / 5),  # Laplacian of a path of 3 twice
    ],
)
def test_rho_in_closed_form(graph, agents, rule, rho):
    assert mixing(graph, agents, rule).rho == pytest.approx(rho, abs=1e-12)


def test_figures_named_in_the_plan():
    assert mixing("star", 8).rho == pytest.approx(0.875, abs=1e-12)
    assert mixing("path", 8).rho == pytest.approx(0.949, abs=5e-4)
    assert mixing("path", 2).matrix.toarray().tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert mixing("ring", 1).matrix.toarray().tolist() == [[1.0]]


@given(st.integers(2, 130))
def test_exponential_rho_at_most_that_of_the_powers_of_two(agents):
    """Ying et al. 2021, Theorem 1: rho = 1 - 2 / (1 + ceil(log2 N)) for even N, below it for odd."""
    bound = 1 - 2 / (1 + np.ceil(log2(agents)))
    rho = mixing("exponential", agents, "uniform").rho
    assert rho <= bound + 1e-12
    if agents % 2 == 0:
        assert rho == pytest.approx(bound, abs=1e-12)


def test_directed_rows_are_receivers():
    w = mixing("exponential", 6, "uniform").matrix.toarray()
    assert np.flatnonzero(w[:, 0]).tolist() == [0, 1, 2, 4]  # 0 sends 1, 2 and 4 ahead
    assert set(w[w > 0]) == {0.25}


@given(connected_graphs())
def test_metropolis_by_its_definition(graph):
    w = build_weights("metropolis", graph).toarray()
    for i in graph:
        for j in graph:
            if i != j:
                linked = 1 / (1 + max(graph.degree[i], graph.degree[j])) if graph.has_edge(i, j) else 0
                assert w[i, j] == pytest.approx(linked, abs=1e-15)


@given(connected_graphs())
def test_lazy_metropolis_has_no_negative_eigenvalue_and_max_degree_one_weight(graph):
    assert np.linalg.eigvalsh(build_weights("lazy_metropolis", graph).toarray())[0] >= -1e-12
    w = build_weights("max_degree", graph).toarray()
    most = max(degree for _, degree in graph.degree)
    np.testing.assert_allclose(w[w - np.diag(np.diag(w)) > 0], 1 / (1 + most))


@settings(max_examples=50)
@given(connected_graphs())
def test_no_constant_weight_beats_the_best_constant(graph):
    n = len(graph)
    laplacian = nx.laplacian_matrix(graph).toarray().astype(np.float64) if graph.size() else np.zeros((n, n))
    best = np.linalg.norm(build_weights("best_constant", graph).toarray() - 1 / n, 2)
    most = max(degree for _, degree in graph.degree)
    for constant in [*np.linspace(0, 1, 41), 1 / (1 + most)]:
        assert best <= np.linalg.norm(np.eye(n) - constant * laplacian - 1 / n, 2) + 1e-10


def test_best_constant_says_its_negative_entries():
    # star of 8: alpha = 2 / (1 + 8), so the hub keeps 1 - 7 * 2 / 9
    star = mixing("star", 8, "best_constant")
    assert star.has_negative_entries
    assert star.matrix[0, 0] == pytest.approx(1 - 14 / 9)
    # path of 3: alpha = 2 / (1 + 3), the middle keeps nothing, which is not negative
    assert not mixing("path", 3, "best_constant").has_negative_entries


class TestSparse:
    """Above 2,000 agents: the same figures from sparse algebra, without a dense matrix."""

    @pytest.mark.parametrize(
        ("graph", "rule", "gap"),
        [
            ("ring", "metropolis", 2 / 3 * (1 - cos(2 * pi / 10_000))),
            ("path", "lazy_metropolis", 1 / 3 * (1 - cos(pi / 10_000))),
            ("star", "metropolis", 1e-4),
            ("exponential", "uniform", 2 / 15),
            ("grid", "max_degree", (2 - 2 * cos(pi / 100)) / 5),
        ],
    )
    def test_ten_thousand_agents_in_closed_form(self, graph, rule, gap):
        large = mixing(graph, 10_000, rule)
        assert "rho" not in vars(large)  # not before it is asked for
        assert large.matrix.nnz <= 15 * 10_000
        assert large.spectral_gap == pytest.approx(gap, rel=1e-6)

    def test_best_constant(self):
        l2, most = 2 - 2 * cos(2 * pi / 3000), 4
        assert mixing("ring", 3000, "best_constant").spectral_gap == pytest.approx(
            2 * l2 / (l2 + most), rel=1e-6
        )

    @settings(max_examples=30, deadline=None)
    @given(mixing_matrices(most=80).filter(lambda mixing: mixing.agents > 42), st.booleans())
    def test_sparse_routes_agree_with_dense(self, mixing, settles):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(spectrum, "DENSE_AGENTS", 0)
            if not settles:
                patch.setattr(spectrum, "eigsh", _fails_at_first(spectrum.eigsh))
            assert spectrum.mixing_rate(mixing.matrix) == pytest.approx(mixing.rho, abs=2e-8)

    def test_whole_spectrum_is_refused(self):
        with pytest.raises(InputError, match="agents: 2001 found; the whole spectrum is computed up to 2000"):
            _ = mixing("ring", 2001).eigenvalues


def _fails_at_first(eigsh):
    """Every first of two calls does not converge, so that the factorised route is taken."""
    calls = iter(range(100))

    def patched(*arguments, **options):
        if next(calls) % 2 == 0:
            raise spectrum.ArpackNoConvergence("none of %d", np.empty(0), np.empty((0, 0)))
        return eigsh(*arguments, **options)

    return patched


class TestRefused:
    @pytest.mark.parametrize(
        ("graph", "rule", "said"),
        [
            ("ring", "metropolsi", "method.weights: unknown name 'metropolsi'; did you mean 'metropolis'?"),
            ("ring", "uniform", "method.weights: 'uniform' needs a complete graph"),
            (
                "ring",
                "uniform",
                "Allowed here: best_constant, fastest, lazy_metropolis, max_degree, metropolis",
            ),
            ("exponential", "metropolis", "method.weights: 'metropolis' needs an undirected graph"),
            ("exponential", "best_constant", "Allowed here: uniform"),
            ("rnig", "metropolis", "method.graph: unknown name 'rnig'"),
        ],
    )
    def test_names(self, graph, rule, said):
        with pytest.raises(InputError) as refused:
            mixing(graph, 8, rule)
        assert said in str(refused.value)

    def test_key_prefix(self):
        with pytest.raises(InputError, match=r"^graph: unknown name"):
            build_mixing_matrix("rnig", "metropolis", 8, 0, key_prefix="")

    @pytest.mark.parametrize(
        ("matrix", "graph", "said"),
        [
            (np.eye(2), nx.path_graph(3), "W of shape (2, 2)"),
            (np.eye(2, dtype=np.float32), nx.path_graph(2), "float32 found; allowed: (2, 2), float64"),
            (np.array([[np.nan, 1], [1, 0]]), nx.path_graph(2), "W is not finite"),
            (np.array([[0.5, 0.6], [0.6, 0.5]]), nx.path_graph(2), "row 0 sums to 1.1"),
            (np.array([[0.5, 0.5], [0.6, 0.4]]), nx.path_graph(2), "column 0 sums to 1.1"),
            (np.roll(np.eye(3), 1, axis=0) / 2 + np.eye(3) / 2, nx.complete_graph(3), "W is not symmetric"),
            (
                np.full((3, 3), 1 / 3),
                nx.path_graph(3),
                "W lets agent 0 take of agent 2, who does not send to it",
            ),
            (np.eye(2), nx.path_graph(2), "W is disconnected: 2 components"),
            (np.array([[0.0, 1.0], [1.0, 0.0]]), nx.path_graph(2), "rho = 1 found"),
            (np.array([[-1.0, 2.0], [2.0, -1.0]]), nx.path_graph(2), "rho = 3 found"),
        ],
    )
    def test_matrices(self, matrix, graph, said):
        with pytest.raises(InputError) as refused:
            made(matrix, graph)
        assert said in str(refused.value)

    def test_own_rule(self, monkeypatch):
        monkeypatch.setattr("prefmesh.topology.weights.WEIGHTS", dict(WEIGHTS))
        weights("keep")(lambda graph: csr_array(np.eye(len(graph))))
        with pytest.raises(InputError, match=r"^method.weights: keep: W is disconnected"):
            mixing("ring", 4, "keep")
        with pytest.raises(InputError, match="'keep' is taken"):
            weights("keep")(lambda graph: csr_array(np.eye(len(graph))))


def test_legal_weights():
    assert legal_weights(nx.path_graph(8)) == sorted([*UNDIRECTED_WEIGHTS, "fastest"])
    assert legal_weights(nx.complete_graph(8)) == sorted([*UNDIRECTED_WEIGHTS, "fastest", "uniform"])
    assert legal_weights(nx.DiGraph([(0, 1), (1, 2), (2, 0)])) == ["uniform"]
    assert legal_weights(nx.DiGraph([(0, 1), (1, 2), (2, 0), (1, 0)])) == []


def test_the_same_seed_gives_the_same_matrix():
    one, again, other = (
        build_mixing_matrix(GraphSettings(name="erdos_renyi", p=0.3), "metropolis", 20, seed).matrix.toarray()
        for seed in (0, 0, 1)
    )
    assert (one == again).all()
    assert (one != other).any()
