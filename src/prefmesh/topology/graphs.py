"""The built-in graphs: functions of the number of agents, networkx's own generators wherever it has them.

An option whose default depends on the number of agents is `None` in the signature; what that means is said at each.
"""

from collections.abc import Iterator
from math import isqrt, log
from typing import Annotated

import networkx as nx
import numpy as np
from pydantic import Field

from prefmesh.errors import InputError
from prefmesh.topology.edge_list import read_edges
from prefmesh.topology.registry import graph

# A random graph is drawn again until it is connected, this often at most.
TRIES = 100

Positive = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0, le=1)]


@graph("path")
def path(agents: int) -> nx.Graph:
    """A line: each agent and the next."""
    return nx.path_graph(agents)


@graph("ring")
def ring(agents: int) -> nx.Graph:
    """A cycle; the single link between two agents."""
    return nx.cycle_graph(agents) if agents > 2 else nx.path_graph(agents)


@graph("star")
def star(agents: int) -> nx.Graph:
    """Agent 0 in the middle."""
    return nx.star_graph(agents - 1)


@graph("complete")
def complete(agents: int) -> nx.Graph:
    """Everyone with everyone."""
    return nx.complete_graph(agents)


@graph("grid")
def grid(agents: int, rows: Positive | None = None) -> nx.Graph:
    """A lattice, numbered row by row; by default as square as the number of agents allows."""
    return _lattice("grid", agents, rows, periodic=False)


@graph("torus")
def torus(agents: int, rows: Positive | None = None) -> nx.Graph:
    """A lattice whose ends meet, numbered row by row; by default as square as the number of agents allows."""
    return _lattice("torus", agents, rows, periodic=True)


@graph("hypercube")
def hypercube(agents: int) -> nx.Graph:
    """Agents whose numbers differ in one bit."""
    dimension = agents.bit_length() - 1
    if agents != 2**dimension:
        raise InputError(
            f"a hypercube of {agents} agents found; allowed: a power of two ({2**dimension} or {2 * 2**dimension})"
        )
    if dimension == 0:
        return nx.empty_graph(1)
    return nx.convert_node_labels_to_integers(nx.hypercube_graph(dimension), ordering="sorted")


@graph("exponential")
def exponential(agents: int) -> nx.DiGraph:
    """The static exponential graph: i sends to i + 2^k (mod agents) for every 2^k < agents. Directed.

    Assran et al. 2019 (Stochastic Gradient Push); Ying et al. 2021 (arXiv 2110.13363) for its spectrum.
    """
    built = nx.empty_graph(agents, create_using=nx.DiGraph)
    hops = [2**k for k in range((agents - 1).bit_length())]
    # not nx.circulant_graph, which adds i -> i - hop too
    built.add_edges_from((i, (i + hop) % agents) for i in range(agents) for hop in hops)
    return built


@graph("random_regular")
def random_regular(agents: int, *, degree: Positive | None = None, rng: np.random.Generator) -> nx.Graph:
    """Uniform among graphs where all have `degree` links; by default 4, or all others where they are fewer."""
    if degree is None:
        degree = min(4, agents - 1)
    elif degree >= agents or agents * degree % 2 or (degree == 1 and agents > 2):
        even = ", even" if agents % 2 else ""
        allowed = f"2 to {agents - 1}{even}" if agents > 2 else "1" if agents == 2 else "none, an agent alone"
        raise InputError(f"degree {degree} for {agents} agents found; allowed: {allowed}")

    def drawn() -> nx.Graph:
        # networkx pairs stubs at random until it succeeds, which dense graphs rarely let it: draw what is missing.
        if degree > (agents - 1) / 2:
            return nx.complement(nx.random_regular_graph(agents - 1 - degree, agents, seed=rng))
        return nx.random_regular_graph(degree, agents, seed=rng)

    return _first_connected(
        (drawn() for _ in range(TRIES)),
        f"degree {degree} for {agents} agents",
        "a larger degree, or the ring",
    )


@graph("erdos_renyi")
def erdos_renyi(
    agents: int, *, p: Probability | None = None, directed: bool = False, rng: np.random.Generator
) -> nx.Graph:
    """Each pair linked with probability `p`, given that all is connected; by default 2 ln N / N.

    Connected graphs are to be expected from p = ln N / N on (Erdos and Renyi 1960). `directed`: each of a pair's two directions has
    that probability, and there is a way from each agent to each.
    """
    threshold = log(agents) / agents
    if p is None:
        p = min(1.0, 2 * threshold)
    return _first_connected(
        (nx.fast_gnp_random_graph(agents, p, seed=rng, directed=directed) for _ in range(TRIES)),
        f"p = {p:.4g} for {agents} agents",
        f"p well above ln N / N = {threshold:.4g}",
    )


@graph("watts_strogatz")
def watts_strogatz(
    agents: int, *, k: Positive | None = None, p: Probability = 0.1, rng: np.random.Generator
) -> nx.Graph:
    """A ring with links to the `k` nearest, each rewired with probability `p`, given that all is connected.

    By default k = 4, or 2 where four others are not there. Watts and Strogatz 1998.
    """
    if k is None:
        if agents < 3:
            return nx.path_graph(agents)
        k = 4 if agents > 4 else 2
    elif k % 2 or k >= agents:
        even = "even numbers from 2 to " + str((agents - 1) // 2 * 2) if agents > 2 else "none below 3 agents"
        raise InputError(f"k = {k} for {agents} agents found; allowed: {even}")
    return _first_connected(
        (nx.watts_strogatz_graph(agents, k, p, seed=rng) for _ in range(TRIES)),
        f"k = {k} and p = {p:.4g} for {agents} agents",
        "a larger k or a smaller p",
    )


@graph("tree")
def tree(agents: int, branching: Positive = 2) -> nx.Graph:
    """A rooted tree filled level by level, `branching` children each; agent 0 is the root."""
    return nx.full_rary_tree(branching, agents)


@graph("barbell")
def barbell(agents: int, bridge: Annotated[int, Field(ge=0)] | None = None) -> nx.Graph:
    """Two equal complete groups joined by a path of `bridge` agents; by default none or, for odd N, one."""
    if bridge is None:
        if agents < 4:  # groups of one: all is bridge
            return nx.path_graph(agents)
        bridge = agents % 2
    group, odd = divmod(agents - bridge, 2)
    if odd or group < 2:
        parity = "odd numbers" if agents % 2 else "even numbers"
        allowed = f"{parity} from {agents % 2} to {agents - 4}" if agents > 3 else "none below 4 agents"
        raise InputError(f"bridge {bridge} for {agents} agents found; allowed: {allowed}")
    built = nx.barbell_graph(group, bridge)
    built.graph["bridge"] = bridge
    return built


@graph("edges")
def edges(agents: int, file: str) -> nx.Graph:
    """The links of a file, one `a b` or `a,b` a row."""
    built = nx.empty_graph(agents)
    built.add_edges_from(read_edges(file, agents))
    return built


def _lattice(family: str, agents: int, rows: int | None, periodic: bool) -> nx.Graph:
    least = 2 if agents > 2 else 1  # one or two agents have no second row
    allowed = [r for r in range(least, agents // least + 1) if agents % r == 0]
    if not allowed:
        near = [
            n
            for n in range(max(4, agents - 2), agents + 3)
            if any(n % r == 0 for r in range(2, isqrt(n) + 1))
        ]
        raise InputError(
            f"a {family} of {agents} agents found, a prime number; allowed: rows x columns, at least 2 each "
            f"(such as {near[0]} or {near[-1]} agents)"
        )
    if rows is None:
        rows = max(r for r in allowed if r <= isqrt(agents))
    elif rows not in allowed:
        raise InputError(f"rows = {rows} for {agents} agents found; allowed: {', '.join(map(str, allowed))}")
    lattice = nx.convert_node_labels_to_integers(nx.grid_2d_graph(rows, agents // rows, periodic=periodic))
    lattice.graph["shape"] = rows, agents // rows
    return lattice


def _first_connected(draws: Iterator[nx.Graph], what: str, allowed: str) -> nx.Graph:
    for drawn in draws:
        if nx.is_strongly_connected(drawn) if isinstance(drawn, nx.DiGraph) else nx.is_connected(drawn):
            return drawn
    raise InputError(f"{what} gave no connected graph in {TRIES} draws; allowed: {allowed}")
