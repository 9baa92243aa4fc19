"""A landscape in words and numbers: tables for the terminal, and JSON."""

from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from prefmesh.algorithms.methods.dec_dpo import DecDPOSettings
from prefmesh.metrics import jsonable
from prefmesh.theory.landscape import Landscape
from prefmesh.theory.landscape_figures import groups_words, shown_words
from prefmesh.theory.laws import ModeShares, modes_of_gradients

MOST_ROWS, MOST_MODES = 30, 8


def tables(landscape: Landscape) -> list[Table]:
    """The constants, the region they come from, the groups, and the prices where there are any."""
    found = [constants_table(landscape), region_table(landscape)]
    if len(landscape.names) > 1:
        found.append(groups_table(landscape))
    if (modes := graph_modes(landscape)) is not None:
        found.append(modes_table(modes))
    if landscape.prices is not None and landscape.price_by_chance is not None:
        found.append(prices_table(landscape, landscape.prices, landscape.price_by_chance))
    return found


def constants_table(landscape: Landscape) -> Table:
    """What the bounds and laws need: the largest over the region."""
    table = Table(title="constants, the largest over the region")
    table.add_column("constant")
    table.add_column("value", justify="right")
    table.add_column("of")
    for row in constant_rows(landscape):
        table.add_row(*row)
    return table


def constant_rows(landscape: Landscape) -> list[tuple[str, str, str]]:
    """Name, value, and what it was taken over."""
    together, alone = landscape.curvature_pairs
    batch = "full batches" if landscape.batch_size is None else f"minibatches of {landscape.batch_size}"
    highest = max(landscape.points, key=lambda point: point.moments.heterogeneity()).moments
    error = f" ± {highest.heterogeneity_error():.2g}" if not highest.exact else ""
    rows = [
        (
            "Lam, smoothness",
            f"{landscape.smoothness:.4g}",
            f"Hessians seen: of f ({together:,} pairs), of agents ({alone:,} pairs each)",
        ),
        ("lowest eigenvalue", f"{landscape.lowest_eigenvalue:.3g}", _convexity(landscape)),
        ("sigma², gradient noise", f"{landscape.gradient_noise:.4g}", f"{batch}, of the noisiest agent"),
        (
            "zeta², heterogeneity",
            f"{landscape.heterogeneity:.4g}{error}",
            "mean over agents, by their weights",
        ),
    ]
    if landscape.exact is not None:
        bound = landscape.exact.smoothness()
        rows.insert(1, ("Lam, everywhere", f"{bound:.4g}", "the log-linear bound, eq. (2.1)"))
    return rows


def _convexity(landscape: Landscape) -> str:
    if landscape.exact is not None:
        return "convex: 0 or above, to rounding"
    return "not convex there" if landscape.lowest_eigenvalue < 0 else "none below 0 seen"


def region_table(landscape: Landscape) -> Table:
    """Every point that was measured."""
    table = Table(title="the region: the average model along the run")
    for header in ("round", "pairs an agent", "f", "‖∇f‖²", "sigma²", "zeta²", "ends of f's Hessian"):
        table.add_column(header, justify="right")
    for point in landscape.points:
        moments = point.moments
        error = "" if moments.exact else f" ± {moments.heterogeneity_error():.2g}"
        ends = "-"
        if point.hessian is not None:
            ends = f"{point.hessian.smallest:.3g} to {point.hessian.largest:.3g}"
        table.add_row(
            str(point.round),
            "all" if moments.exact else f"{moments.measured.max():,}",
            f"{moments.loss:.4f}",
            f"{moments.grad_norm_sq():.3g}",
            f"{moments.gradient_noise(landscape.batch_size):.4g}",
            f"{moments.heterogeneity():.3g}{error}",
            ends,
        )
    return table


def groups_table(landscape: Landscape) -> Table:
    """Who belongs together, and how alike they are: within the group, and with all others."""
    groups, cosine = landscape.groups, landscape.cosine
    table = Table(
        title=escape(f"groups of agents. {groups_words(landscape)}"), caption=shown_words(landscape)
    )
    for header in ("group", "agents", "members", "cosine within", "with others"):
        table.add_column(header, justify="left" if header == "members" else "right")
    labels = [*range(groups.count), *([-1] if (groups.label < 0).any() else [])]
    for label in labels:
        inside = groups.label == label
        names = [landscape.names[i] for i in np.flatnonzero(inside)]
        more = f", ... ({len(names)})" if len(names) > 6 else ""
        table.add_row(
            "cannot be told" if label < 0 else str(label + 1),
            str(len(names)),
            escape(", ".join(names[:6]) + more),
            _mean(cosine[np.ix_(inside, inside)][~np.eye(len(names), dtype=bool)]),
            _mean(cosine[np.ix_(inside, ~inside)].reshape(-1)),
        )
    return table


def _mean(values: np.ndarray) -> str:
    """Of those that are known."""
    known = values[np.isfinite(values)]
    return f"{known.mean():.2f}" if len(known) else "-"


def graph_modes(landscape: Landscape) -> ModeShares | None:
    """Which modes of the config's W carry the agents' disagreement at the last point; none without a constant symmetric W."""
    method = landscape.config.method
    if not isinstance(method, DecDPOSettings):
        return None
    mixing = method.mixing_matrix(len(landscape.names), landscape.config.seed)
    if not mixing.symmetric:
        return None
    return modes_of_gradients(mixing.matrix, landscape.points[-1].moments.unbiased)


def modes_table(modes: ModeShares) -> Table:
    """The modes with the largest parts of the consensus error."""
    order = np.argsort(-modes.consensus_error, kind="stable")[:MOST_MODES]
    more = (
        f", the {MOST_MODES} largest of {len(modes.eigenvalues)}"
        if len(modes.eigenvalues) > MOST_MODES
        else ""
    )
    table = Table(title=f"modes of the graph{more}: what disagreement leaves apart, eq. (5.19)")
    for header in ("eigenvalue of W", "of zeta²", "of the consensus error"):
        table.add_column(header, justify="right")
    for k in order:
        table.add_row(
            f"{modes.eigenvalues[k]:.4f}",
            *(
                f"{share[k] / share.sum():.1%}" if share.sum() > 0 else "-"  # an estimate may be negative
                for share in (modes.heterogeneity, modes.consensus_error)
            ),
        )
    return table


def prices_table(landscape: Landscape, prices: np.ndarray, chance: np.ndarray) -> Table:
    """The agents who lose most by sharing one policy."""
    order = np.argsort(-prices, kind="stable")
    more = f" (the {MOST_ROWS} highest of {len(prices)})" if len(prices) > MOST_ROWS else ""
    table = Table(title=f"price of consensus{more}: mean {prices.mean():.4f} nats per pair")
    table.add_column("agent")
    table.add_column("nats per pair", justify="right")
    table.add_column("by chance", justify="right")
    for i in order[:MOST_ROWS]:
        table.add_row(escape(landscape.names[i]), f"{prices[i]:.4f}", f"{chance[i]:.4f}")
    return table


def remarks(landscape: Landscape) -> list[str]:
    """What one must know to read the figures."""
    found = []
    optimizer = landscape.config.optimizer
    if optimizer.name != "sgd" or optimizer.momentum or optimizer.schedule != "constant":
        kind = optimizer.name + (" with momentum" if optimizer.momentum else "")
        found.append(
            f"The run steps by {kind}, schedule {optimizer.schedule}: the constants are those of its loss, but the theory's "
            "bounds and laws are about SGD with a constant step size."
        )
    if any(not point.moments.exact for point in landscape.points):
        found.append(
            "Gradients are estimated on some of the pairs; zeta² and ‖∇f‖² without bias, as from independent halves, and so "
            "possibly negative."
        )
    if landscape.effort.curvature_pairs is not None:
        found.append(
            "Curvature is that of the loss on the pairs named; the fewer, the larger. Lam is what was seen at the points of "
            "the region, no bound on what lies between."
        )
    if landscape.prices is None:
        found.append(
            f"No price of consensus: {landscape.why_no_prices}."
            + (
                " On held-out pairs, `prefmesh compare` puts local-only beside one policy."
                if landscape.exact is None
                else ""
            )
        )
    elif landscape.price_by_chance is not None:
        found.append(
            f"Of the price of consensus, {landscape.price_by_chance.mean():.4f} of {landscape.prices.mean():.4f} nats would be there if nobody "
            "disagreed, since a policy of one's own also fits the accidents of its pairs (docs/theory, eq. (1.12))."
        )
    if landscape.slices.plane is None:
        found.append("No loss slices: all agents' models are the same.")
    return found


def as_json(landscape: Landscape) -> dict[str, Any]:
    """Everything that was measured, as plain values; what is not known is null."""
    groups = landscape.groups
    together, alone = landscape.curvature_pairs
    return jsonable(
        {
            "config": landscape.config.hash(),
            "agents": list(landscape.names),
            "parameters": landscape.parameters,
            "rounds": landscape.rounds,
            "constants": {
                "smoothness": landscape.smoothness,
                "smoothness_bound": None if landscape.exact is None else landscape.exact.smoothness(),
                "lowest_eigenvalue": landscape.lowest_eigenvalue,
                "gradient_noise": landscape.gradient_noise,
                "batch_size": "full" if landscape.batch_size is None else landscape.batch_size,
                "heterogeneity": landscape.heterogeneity,
            },
            "curvature_pairs": {"all_agents": together, "each_agent": alone},
            "region": [_point(landscape, k) for k in range(len(landscape.points))],
            "similarity": {
                "cosine": _matrix(landscape.cosine),
                "attenuation": _matrix(landscape.attenuation),
            },
            "groups": {
                "count": groups.count,
                "label": [None if label < 0 else int(label) for label in groups.label],
                "silhouette": groups.silhouette,
                "p_value": groups.p_value,
            },
            "graph_modes": _modes(graph_modes(landscape)),
            "price_of_consensus": None if landscape.prices is None else landscape.prices.tolist(),
            "price_by_chance": None
            if landscape.price_by_chance is None
            else landscape.price_by_chance.tolist(),
            "remarks": remarks(landscape),
        }
    )


def _modes(modes: ModeShares | None) -> dict[str, list[float]] | None:
    if modes is None:
        return None
    return {
        field: getattr(modes, field).tolist() for field in ("eigenvalues", "heterogeneity", "consensus_error")
    }


def _point(landscape: Landscape, k: int) -> dict[str, Any]:
    point = landscape.points[k]
    moments, hessian = point.moments, point.hessian
    return jsonable(
        {
            "round": point.round,
            "pairs": moments.measured.tolist(),
            "loss": moments.loss,
            "grad_norm_sq": moments.grad_norm_sq(),
            "gradient_noise": moments.gradient_noise(landscape.batch_size),
            "heterogeneity": moments.heterogeneity(),
            "heterogeneity_stderr": moments.heterogeneity_error(),
            "largest_eigenvalue": None if hessian is None else hessian.largest,
            "smallest_eigenvalue": None if hessian is None else hessian.smallest,
            "eigenvalue_error": None if hessian is None else hessian.error,
            "agents_largest_eigenvalue": {
                landscape.names[i]: ends.size for i, ends in (point.agent_hessians or {}).items()
            },
        }
    )


def _matrix(values: np.ndarray) -> list[list[float | None]]:
    return [[float(value) if np.isfinite(value) else None for value in row] for row in values]
