"""What a landscape looks like: the heat map of agents' similarity, losses on a plane and on lines."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy.interpolate import RectBivariateSpline

from prefmesh.reports import style
from prefmesh.reports.svg import figure_bytes
from prefmesh.theory.landscape import Landscape
from prefmesh.theory.slices import Plane

OPPOSED = LinearSegmentedColormap.from_list("opposed", [style.COLOURS[1], "#f7f7f7", style.COLOURS[0]])
"""-1 orange, 0 grey-white, 1 blue: told apart by colour-blind readers."""
MOST_NUMBERS = 10
MOST_NAMES = 32
BANDS = 10
"""Of the contour plot."""
FINE = 161
"""Places a side that the plane is drawn with, between those that were measured."""


def save_figures(landscape: Landscape, directory: Path) -> list[Path]:
    """Every figure as SVG and PNG in `directory`; the files' paths."""
    found = []
    with style.house_style():
        for name, figure in figures(landscape):
            for suffix in ("svg", "png"):
                path = directory / f"{name}.{suffix}"
                path.write_bytes(figure_bytes(figure, suffix))
                found.append(path)
    return found


def figures(landscape: Landscape) -> Iterator[tuple[str, Figure]]:
    """File name and figure; slices only where agents' models differ."""
    if len(landscape.names) > 1:
        yield "similarity", similarity_figure(landscape)
    if landscape.slices.plane is not None:
        yield "plane", plane_figure(landscape, landscape.slices.plane)
        yield "lines", lines_figure(landscape)


def similarity_figure(landscape: Landscape) -> Figure:
    """Cosines of agents' gradients, group by group, with lines between groups."""
    groups, order = landscape.groups, landscape.groups.order
    agents = len(order)
    cosine = landscape.cosine[np.ix_(order, order)]
    few = agents <= MOST_NUMBERS
    notes = [f"At the start. {groups_words(landscape)}", shown_words(landscape)]
    figure, axes = style.new_figure(
        "Similarity of agents' gradients", height=2.8, rows_below=len(style.wrapped(notes))
    )
    axes.set_facecolor(style.GRID)  # not told from chance
    image = axes.pcolormesh(
        np.ma.masked_invalid(cosine), cmap=OPPOSED, vmin=-1, vmax=1, rasterized=agents > 64
    )
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.set_xlabel("agents, in the same order", fontsize=9)
    if agents <= MOST_NAMES:
        names = [style.plain(landscape.names[i], 14) for i in order]
        axes.set_yticks(np.arange(agents) + 0.5, names, fontsize=8 if agents <= 16 else 6)
    else:
        axes.set_yticks([])
    axes.tick_params(length=0)
    if few:
        for (r, c), value in np.ndenumerate(cosine):
            text = "?" if np.isnan(value) else f"{value:.2f}".replace("-", "−")
            colour = "white" if abs(value) > 0.75 else style.INK
            axes.text(c + 0.5, r + 0.5, text, ha="center", va="center", fontsize=7, color=colour)
    for edge in (np.flatnonzero(np.diff(groups.label[order])) + 1).tolist():
        axes.axhline(edge, color=style.INK, linewidth=1.6)
        axes.axvline(edge, color=style.INK, linewidth=1.6)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[-1, -0.5, 0, 0.5, 1])
    bar.set_label("cosine, chance taken out", fontsize=9)
    style.add_legend(figure, [], notes)
    return figure


def groups_words(landscape: Landscape) -> str:
    """What was found, and how sure that is."""
    groups = landscape.groups
    if np.isnan(groups.silhouette):
        return "Too few agents to look for groups."
    found = f"{groups.count} groups" if groups.count > 1 else "No groups stand out"
    return f"{found}: best silhouette {groups.silhouette:.2f}, p\u00a0=\u00a0{groups.p_value:.2g}."


def shown_words(landscape: Landscape) -> str:
    """What chance does to cosines before it is taken out."""
    apart = ~np.eye(len(landscape.names), dtype=bool)
    mean = landscape.attenuation[apart].mean()
    return f"Agents of one direction would show {mean:.2f} on so few pairs, before chance is taken out."


def plane_figure(landscape: Landscape, plane: Plane) -> Figure:
    """Contours of f on the plane through the average model and two agents' own."""
    fine_x, fine_y = (np.linspace(side[0], side[-1], FINE) for side in (plane.x, plane.y))
    between = RectBivariateSpline(plane.y, plane.x, plane.loss)(fine_y, fine_x)
    between = np.clip(between, plane.loss.min(), plane.loss.max())
    names = [style.plain(landscape.names[i], 18) for i in landscape.slices.agents]
    notes = [
        f"f over {landscape.slices.pairs:,} pairs, after round {landscape.rounds}. "
        f"Measured at {len(plane.x)} × {len(plane.y)} places; each colour covers a tenth of the plane."
    ]
    if plane.collinear:
        notes.append("Both agents and the average lie on a line; upwards, f falls most steeply.")
    figure, axes = style.new_figure(
        "Loss around the average model", height=3.1, rows_below=2 + len(style.wrapped(notes))
    )
    # Levels at quantiles: a valley is seen as well as the walls around it.
    levels = np.unique(np.quantile(between, np.linspace(0, 1, BANDS + 1)))
    if len(levels) < 3:  # as good as flat
        levels = levels[0] + np.array([-1e-6, 0.0, 1e-6])
    norm = BoundaryNorm(levels, ncolors=256)
    filled = axes.contourf(fine_x, fine_y, between, levels=levels, cmap="cividis", norm=norm)
    axes.contour(fine_x, fine_y, between, levels=levels[1:-1], colors="white", linewidths=0.4)
    axes.set_aspect("equal")
    axes.grid(visible=False)
    places = np.vstack([[0.0, 0.0], plane.places])
    entries: list[tuple[Line2D | Patch, str]] = []
    for (x, y), marker, label in zip(places, ("*", "o", "s"), ("average model", *names), strict=True):
        (dot,) = axes.plot(
            x, y, marker, linestyle="", markersize=11 if marker == "*" else 7, color=style.COLOURS[1],
            markeredgecolor="white", markeredgewidth=1.2, zorder=4,
        )  # fmt: skip
        entries.append((dot, label))
    axes.set_xlabel("distance between parameters", fontsize=9)
    bar = figure.colorbar(filled, ax=axes, shrink=0.85, spacing="uniform", format="%.3g")
    bar.set_label("f (nats per pair)", fontsize=9)
    bar.ax.tick_params(labelsize=8, length=0)
    style.add_legend(figure, entries, notes)
    return figure


def lines_figure(landscape: Landscape) -> Figure:
    """f and the agent's own loss from the average model through that agent's own, one panel for each of the two."""
    lines = landscape.slices.lines
    figure = Figure(figsize=(style.WIDTH, 1.2 + 1.75 * len(lines)))
    style.add_title(figure, "Loss from the average to own models")
    panels = figure.subplots(len(lines), 1, sharex=True, squeeze=False)[:, 0]
    entries: list[tuple[Line2D | Patch, str]] = []
    for axes, line in zip(panels, lines, strict=True):
        (shared,) = axes.plot(line.t, line.loss, **style.line_style(0))
        (own,) = axes.plot(line.t, line.own, **style.line_style(1))
        for place in (0, 1):
            axes.axvline(place, color=style.MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        axes.set_title(style.plain(landscape.names[line.agent], 40), fontsize=9, loc="left")
        axes.set_ylabel("nats per pair", fontsize=9)
        entries = [(shared, "f, all agents"), (own, "that agent's loss")]
    panels[-1].set_xticks([-1, 0, 1, 2], ["−1", "average", "own", "2"])
    style.add_legend(figure, entries)
    return figure
