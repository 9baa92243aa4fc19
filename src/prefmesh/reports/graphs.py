"""Who talks to whom: the graph beside the spectrum of its mixing matrix."""

import networkx as nx
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prefmesh.reports import style
from prefmesh.reports.runs import Row

MOST_EDGES = 4000  # beyond this a drawing is a black disc of megabytes
MOST_LABELS = 24


def graph_figure(topology: Row) -> Figure:
    """The graph and |eigenvalues| of W, from the keys of topology.json."""
    agents, edges = int(topology["agents"]), topology["edges"]
    figure = Figure(figsize=(style.WIDTH, 2.6))
    style.add_title(figure, style.plain(graph_title(topology), 52))
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.05])
    left.set_axis_off()
    left.set_aspect("equal")
    left.margins(0.12)
    if len(edges) > MOST_EDGES:
        text = f"{agents:,} agents,\n{len(edges):,} edges:\ntoo many to draw"
        left.text(0.5, 0.5, text, ha="center", va="center", transform=left.transAxes)
    else:
        _draw_graph(left, str(topology["graph"]), agents, edges)
    _draw_spectrum(right, topology)
    style.add_legend(figure, [], [spectrum_words(topology)])
    return figure


def spectrum_words(topology: Row) -> str:
    """rho, 1 - rho and 1 - rho^2: papers plot one or the other, so all are named."""
    rho, gap, squared = (float(topology[key]) for key in ("rho", "spectral_gap", "one_minus_rho_squared"))
    return f"ρ = {rho:.4f}, spectral gap 1 − ρ = {gap:.3g}, 1 − ρ² = {squared:.3g}"


def graph_title(topology: Row) -> str:
    name = str(topology["graph"]).replace("_", " ")
    return f"{name}, {int(topology['agents']):,} agents, {topology['weights']} weights"


def _draw_graph(axes: Axes, name: str, agents: int, edges: list) -> None:
    graph = nx.Graph()
    graph.add_nodes_from(range(agents))
    graph.add_edges_from((a, b) for a, b in edges if a != b)
    places = _layout(name, graph)
    size = float(np.clip(3600 / agents, 6, 190))
    nx.draw_networkx_edges(
        graph, places, ax=axes, edge_color=style.MUTED, width=1.2 if agents <= 100 else 0.5
    )
    nx.draw_networkx_nodes(graph, places, ax=axes, node_color=style.COLOURS[0], node_size=size, linewidths=0)
    if agents <= MOST_LABELS:
        nx.draw_networkx_labels(graph, places, ax=axes, font_size=8, font_color="white")


def _layout(name: str, graph: nx.Graph) -> dict:
    """Round what is round; else distances as in the graph; else, for many agents, what is quick."""
    if name == "path" and len(graph) <= 40:
        # Snake through a square, or the nodes of a straight line would touch.
        width = max(2, round(len(graph) ** 0.5))
        rows = [divmod(i, width) for i in range(len(graph))]
        return {i: (c if r % 2 == 0 else width - 1 - c, -r) for i, (r, c) in enumerate(rows)}
    if name == "star":
        hub = max(graph, key=lambda node: graph.degree[node])
        rim = nx.circular_layout(graph.subgraph(node for node in graph if node != hub))
        return {**rim, hub: (0.0, 0.0)}
    if name in ("ring", "path", "complete", "exponential", "watts_strogatz"):
        return nx.circular_layout(graph)
    if len(graph) <= 150:
        return nx.kamada_kawai_layout(graph)
    return nx.spring_layout(graph, seed=0, iterations=30)


def _draw_spectrum(axes: Axes, topology: Row) -> None:
    if topology["eigenvalues"] is None:
        axes.set_axis_off()
        text = "so many agents:\nno eigenvalue but ρ\nwas computed"
        axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
        return
    # Complex eigenvalues (a directed graph's) come as [real, imaginary].
    found = [complex(*e) if isinstance(e, list) else complex(e) for e in topology["eigenvalues"]]
    found.sort(key=abs, reverse=True)
    sizes, ranks = np.array([abs(e) for e in found]), np.arange(1, len(found) + 1)
    negative = np.array([e.real < -1e-9 and abs(e.imag) < 1e-9 for e in found])
    size = 4 if len(ranks) <= 64 else 2
    axes.plot(ranks[~negative], sizes[~negative], "o", color=style.COLOURS[0], markersize=size)
    axes.plot(
        ranks[negative], sizes[negative], "o", color=style.COLOURS[0], markersize=size, markerfacecolor="none"
    )
    axes.axhline(float(topology["rho"]), color=style.COLOURS[1], linestyle="--", linewidth=1.4)
    axes.set_ylim(-0.05, 1.09)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.set_title("|eigenvalue| of W", fontweight="normal", fontsize=9)
    axes.set_xlabel("rank" + (" (hollow: negative)" if negative.any() else ""), fontsize=9)
