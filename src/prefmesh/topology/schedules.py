"""Mixing matrices that change from round to round. A single one need not connect all agents; the product over rounds does."""

import networkx as nx
import numpy as np
from jaxtyping import Bool
from scipy.sparse import coo_array, csr_array, eye_array

from prefmesh.errors import InputError


def one_peer_exponential(agents: int, round_: int) -> csr_array:
    """Agent i takes half of agent i - 2^t, t = (round - 1) mod ceil(log2 N) (Ying et al. 2021, arXiv 2110.13363, section 4).

    Doubly stochastic, one message an agent. Where N is a power of 2, the product over a period is J: all agents agree exactly.

    >>> w = one_peer_exponential(4, 1) @ one_peer_exponential(4, 2)
    >>> w.toarray().tolist() == [[0.25] * 4] * 4
    True
    """
    if agents == 1:
        return csr_array(np.ones((1, 1)))
    hop = 2 ** ((round_ - 1) % int(np.ceil(np.log2(agents))))
    here = np.arange(agents)
    peer = csr_array((np.full(agents, 0.5), (here, (here - hop) % agents)), shape=(agents, agents))
    return csr_array(peer + 0.5 * eye_array(agents))


def random_matching(graph: nx.Graph, random: np.random.Generator) -> csr_array:
    """Pairs of neighbours that average: links in random order, each taken whose ends are both still free."""
    links = np.array(sorted(graph.edges), dtype=np.int64).reshape(-1, 2)
    free, pairs = np.ones(len(graph), dtype=bool), []
    for i, j in random.permutation(links).tolist():
        if free[i] and free[j]:
            free[[i, j]] = False
            pairs.append((i, j))
    return averaging(len(graph), pairs)


def averaging(agents: int, pairs: list[tuple[int, int]]) -> csr_array:
    """W under which the two agents of each pair become equal, and all others stay."""
    keeps, rows, columns = np.ones(agents), [], []
    for i, j in pairs:
        keeps[[i, j]] = 0.5
        rows += [i, j]
        columns += [j, i]
    other = coo_array((np.full(len(rows), 0.5), (rows, columns)), shape=(agents, agents))
    own = coo_array((keeps, (np.arange(agents), np.arange(agents))), shape=(agents, agents))
    return csr_array(own + other)


def without(
    matrix: csr_array, lost: Bool[np.ndarray, " links"], down: Bool[np.ndarray, " agents"]
) -> csr_array:
    """A symmetric W without some links, whose weights their ends keep: still symmetric, still doubly stochastic.

    `lost`: of the links {i, j}, i < j, in the order of the upper triangle's rows. `down`: agents that lose all of theirs.
    """
    entries: coo_array = matrix.tocoo()
    i, j = entries.coords
    n = matrix.shape[0]
    ends = np.minimum(i, j) * n + np.maximum(i, j)
    upper = np.sort(ends[i < j])
    link = np.searchsorted(upper, ends)
    here = np.append(lost, False)[np.minimum(link, len(lost))]  # the diagonal has no link
    gone = (i != j) & (here | down[i] | down[j])
    kept = csr_array((entries.data[~gone], (i[~gone], j[~gone])), shape=matrix.shape)
    back = np.bincount(i[gone], weights=entries.data[gone], minlength=n)
    return csr_array(kept + csr_array((back, (np.arange(n), np.arange(n))), shape=matrix.shape))


def refuse_directed(graph: nx.Graph, what: str) -> None:
    """Raise `InputError` where links go one way."""
    if graph.is_directed():
        raise InputError(f"{what}, but the graph is directed; allowed: an undirected graph, or push_sum")
