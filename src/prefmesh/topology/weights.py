"""Mixing weights of a graph: the matrix W of `Theta <- W Theta`, sparse, doubly stochastic.

Row i holds what agent i takes of whom: W[i, j] != 0 only where j sends to i (or j = i).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import networkx as nx
import numpy as np
from jaxtyping import Float
from scipy.sparse import csr_array, diags_array, eye_array

from prefmesh.errors import InputError, unknown_name
from prefmesh.topology.spectrum import gap_below_one, last_eigenvalue


@dataclass(frozen=True, kw_only=True)
class WeightRule:
    """A registered rule: the function, for which graphs it is legal, and that in words."""

    name: str
    function: Callable[[nx.Graph], csr_array]
    suits: Callable[[nx.Graph], bool]
    needs: str


# `fastest` takes some fifteen seconds here, and as N^6 beyond.
FASTEST_AGENTS = 64

WEIGHTS: dict[str, WeightRule] = {}

_Function = TypeVar("_Function", bound=Callable[[nx.Graph], csr_array])


def _undirected(graph: nx.Graph) -> bool:
    return not graph.is_directed()


def weights(
    name: str, *, suits: Callable[[nx.Graph], bool] = _undirected, needs: str = "an undirected graph"
) -> Callable[[_Function], _Function]:
    """Register `function(graph) -> csr_array` under a name, for the graphs that it `suits` (`needs` says which).

    What the function returns is checked where it is used (`mixing.MixingMatrix`).
    """

    def register(function: _Function) -> _Function:
        if name in WEIGHTS:
            raise InputError(f"weights: the name {name!r} is taken")
        WEIGHTS[name] = WeightRule(name=name, function=function, suits=suits, needs=needs)
        return function

    return register


def legal_weights(graph: nx.Graph) -> list[str]:
    """The names of the rules that give doubly stochastic weights on this graph, sorted.

    >>> legal_weights(nx.path_graph(3))
    ['best_constant', 'fastest', 'lazy_metropolis', 'max_degree', 'metropolis']
    """
    return sorted(name for name, rule in WEIGHTS.items() if rule.suits(graph))


def build_weights(name: str, graph: nx.Graph, where: str = "weights") -> csr_array:
    """The weights of that name on a connected graph with nodes 0 .. N - 1: (N, N), float64.

    Raises `InputError`, with the config key `where`, for an unknown name or one that does not suit the graph.
    """
    if name not in WEIGHTS:
        raise unknown_name(where, name, WEIGHTS)
    rule = WEIGHTS[name]
    if not rule.suits(graph):
        kind = "directed" if graph.is_directed() else "undirected"
        allowed = ", ".join(legal_weights(graph)) or "none of the built-in rules"
        raise InputError(
            f"{where}: {name!r} needs {rule.needs}; this {kind} one links {graph.number_of_edges()} pairs "
            f"of {len(graph)} agents. Allowed here: {allowed}"
        )
    try:
        return rule.function(graph)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


@weights("metropolis")
def metropolis(graph: nx.Graph) -> csr_array:
    """W_ij = 1 / (1 + max(d_i, d_j)). Metropolis-Hastings; Xiao, Boyd and Kim 2007."""
    links = adjacency(graph).tocoo()
    degree = _degrees(graph)
    i, j = links.coords
    return _with_self_weights(csr_array((1 / (1 + np.maximum(degree[i], degree[j])), (i, j)), links.shape))


@weights("lazy_metropolis")
def lazy_metropolis(graph: nx.Graph) -> csr_array:
    """(I + W) / 2 of Metropolis' W: no negative eigenvalue. Olshevsky 2017."""
    return csr_array((eye_array(len(graph)) + metropolis(graph)) / 2)


@weights("max_degree")
def max_degree(graph: nx.Graph) -> csr_array:
    """W_ij = 1 / (1 + d_max): one weight for every link."""
    return _with_self_weights(adjacency(graph) / (1 + _degrees(graph).max()))


@weights("best_constant")
def best_constant(graph: nx.Graph) -> csr_array:
    """I - 2 / (l_2 + l_max) L: the one weight for every link with the least rho. May be negative on the diagonal.

    L is the Laplacian, l_2 and l_max its least positive and its largest eigenvalue; Xiao and Boyd 2004.
    """
    if len(graph) == 1:
        return csr_array(eye_array(1))
    links = adjacency(graph)
    scale = 2 * _degrees(graph).max()
    lazy = _with_self_weights(
        links / scale
    )  # I - L / (2 d_max), whose ends are 1 - l / (2 d_max) of those of L
    return _with_self_weights(links * (2 / scale / (gap_below_one(lazy) + 1 - last_eigenvalue(lazy))))


@weights("fastest")
def fastest(graph: nx.Graph) -> csr_array:
    """The symmetric weights with the least rho = ||W - J||_2: a semidefinite program. May be negative.

    Xiao and Boyd 2004, eq. (17); docs/theory, eq. (6.2). Links that the optimum leaves unused (below 1e-7) have weight 0.
    Raises `InputError` where cvxpy or Clarabel is missing, or above 64 agents.
    """
    links = sorted((min(i, j), max(i, j)) for i, j in graph.edges)
    return _fastest(len(graph), tuple(links))


# A config's check, its method and its report all ask for the same weights.
@lru_cache(maxsize=8)
def _fastest(n: int, links: tuple[tuple[int, int], ...]) -> csr_array:
    if n > FASTEST_AGENTS:
        raise InputError(
            f"fastest: {n} agents found; allowed: up to {FASTEST_AGENTS}, or best_constant, which is near it"
        )
    if not links:
        return csr_array(eye_array(n))
    if len(links) == n * (n - 1) // 2:  # rho = 0, where the cones' tips meet and the solver has no inside
        return csr_array(np.full((n, n), 1 / n))
    try:
        import clarabel  # noqa: F401  (the solver that cvxpy is asked for)
        import cvxpy
    except ImportError as error:
        raise InputError(
            f"fastest needs {error.name}, which is not installed (pip install 'prefmesh[theory]'); "
            "allowed without it: best_constant, metropolis"
        ) from None
    ends = np.array(links)
    place = np.arange(len(links))
    incidence = csr_array(
        (np.repeat([1.0, -1.0], len(links)), (ends.T.ravel(), np.tile(place, 2))), (n, len(links))
    )
    weight, rho = cvxpy.Variable(len(links)), cvxpy.Variable()
    off_mean = np.eye(n) - 1 / n - incidence @ cvxpy.diag(weight) @ incidence.T
    problem = cvxpy.Problem(
        cvxpy.Minimize(rho), [rho * np.eye(n) - off_mean >> 0, rho * np.eye(n) + off_mean >> 0]
    )
    with warnings.catch_warnings():  # near rho = 0 the solver doubts the last digits
        warnings.simplefilter("ignore")
        problem.solve(solver="CLARABEL")
    if weight.value is None:
        raise InputError(f"fastest: the solver ended {problem.status}; allowed: best_constant instead")
    found = np.where(np.abs(weight.value) < 1e-7, 0.0, weight.value)
    used = csr_array((np.tile(found, 2), (np.concatenate(ends.T), np.concatenate(ends.T[::-1]))), (n, n))
    used.eliminate_zeros()
    return _with_self_weights(used)


def _complete_or_regular_directed(graph: nx.Graph) -> bool:
    n = len(graph)
    if isinstance(graph, nx.DiGraph):
        degrees = {degree for _, degree in graph.in_degree()} | {degree for _, degree in graph.out_degree()}
        return len(degrees) == 1
    return graph.number_of_edges() == n * (n - 1) // 2


@weights(
    "uniform",
    suits=_complete_or_regular_directed,
    needs="a complete graph, or a directed one where all send and receive equally many",
)
def uniform(graph: nx.Graph) -> csr_array:
    """1 / (1 + d) for oneself and each of the d that send to one; on a complete graph J = 11^T / N.

    On the static exponential graph: Ying et al. 2021 (arXiv 2110.13363).
    """
    links = adjacency(graph)
    degree = links[[0]].sum()  # the same for all
    return csr_array((links.T + eye_array(len(graph))) / (1 + degree))


def adjacency(graph: nx.Graph) -> csr_array:
    """A_ij = 1 where i -> j is a link, in the order of the agents' numbers; weights of links are not looked at."""
    order = range(len(graph))
    weight: Any = None  # networkx's stubs know only names of attributes
    return csr_array(
        nx.to_scipy_sparse_array(graph, nodelist=order, weight=weight, dtype=np.float64, format="csr")
    )


def _degrees(graph: nx.Graph) -> Float[np.ndarray, " agents"]:
    return np.array([graph.degree[agent] for agent in range(len(graph))], dtype=np.float64)


def _with_self_weights(links: csr_array) -> csr_array:
    """The same weights with what is missing to row sums of one on the diagonal."""
    return csr_array(links + diags_array(1 - links.sum(axis=1)))
