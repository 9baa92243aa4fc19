"""A mixing matrix in words and numbers: what `prefmesh topology` prints, as JSON or as a table."""

from typing import Any

import numpy as np
from rich.table import Table

from prefmesh.topology.mixing import MixingMatrix
from prefmesh.topology.spectrum import DENSE_AGENTS
from prefmesh.topology.weights import adjacency


def description(mixing: MixingMatrix) -> dict[str, Any]:
    """JSON-ready: graph, agents, weights, edges, rho, spectral_gap, one_minus_rho_squared, eigenvalues, mixing_matrix.

    `graph` is as a config writes it; `edges` are the links [i, j], each once (directed: i sends to j);
    `eigenvalues` fall, as pairs [re, im] where W is not symmetric; `mixing_matrix` is a list of rows.
    These two are None above 2,000 agents: they would take minutes and fill the disk.
    """
    dense = mixing.agents <= DENSE_AGENTS
    return {
        "graph": mixing.settings.model_dump(),
        "agents": mixing.agents,
        "weights": mixing.weights,
        "edges": [list(edge) for edge in sorted_edges(mixing)],
        "rho": mixing.rho,
        "spectral_gap": mixing.spectral_gap,
        "one_minus_rho_squared": mixing.one_minus_rho_squared,
        "eigenvalues": [_json_number(value) for value in mixing.eigenvalues] if dense else None,
        "mixing_matrix": mixing.matrix.toarray().tolist() if dense else None,
    }


def sorted_edges(mixing: MixingMatrix) -> list[tuple[int, int]]:
    """The links, each once, sorted; of an undirected graph with the smaller number first."""
    if mixing.graph.is_directed():
        return sorted(mixing.graph.edges)
    return sorted((min(a, b), max(a, b)) for a, b in mixing.graph.edges)


def table(mixing: MixingMatrix) -> Table:
    """The same for the terminal: one row a quantity, matrices left out."""
    degrees = adjacency(mixing.graph).sum(axis=1).astype(int)
    shown = Table(title=mixing.title, title_justify="left")
    shown.add_column("quantity")
    shown.add_column("value", justify="right")
    shown.add_column("meaning", style="dim")
    kind = "directed" if mixing.graph.is_directed() else "undirected"
    least, most = degrees.min(), degrees.max()
    for row in (
        ("links", f"{mixing.graph.number_of_edges()}", kind),
        ("degree", f"{least}" if least == most else f"{least} to {most}", "whom an agent sends to"),
        ("messages per round", f"{mixing.messages_per_round}", "models sent, all agents together"),
        ("rho", f"{mixing.rho:.6g}", "||W - J||: what one mixing leaves of a disagreement, at most"),
        ("spectral gap", f"{mixing.spectral_gap:.6g}", "1 - rho"),
        ("1 - rho^2", f"{mixing.one_minus_rho_squared:.6g}", "the gap as the paper plots it"),
        ("negative entries", "yes" if mixing.has_negative_entries else "no", _negative_entries(mixing)),
    ):
        shown.add_row(*row)
    return shown


def _negative_entries(mixing: MixingMatrix) -> str:
    if mixing.has_negative_entries:
        return f"least weight {mixing.matrix.data.min():.4g}: the mean is kept, but an agent may overshoot"
    return "each agent takes an average"


def _json_number(value: np.floating | np.complexfloating) -> float | list[float]:
    return [float(value.real), float(value.imag)] if isinstance(value, np.complexfloating) else float(value)
