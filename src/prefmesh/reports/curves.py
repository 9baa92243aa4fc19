"""Curves of a metric against rounds or bytes, against KL, and a study's final metric against its x."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from prefmesh.reports import style
from prefmesh.reports.series import Curve, flags

Axis = Literal["rounds", "bytes"]
Scale = Literal["linear", "log", "percent"]
LOG_DECADES = 9  # further down there is only rounding noise, and everything else would be squashed


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A dashed horizontal line that needs no curve: a ceiling, or chance."""

    label: str
    level: float
    dashes: tuple[int, ...] = (5, 3)


def curves_figure(
    curves: Sequence[Curve],
    *,
    axis: Axis,
    title: str,
    y_label: str,
    scale: Scale = "linear",
    references: Sequence[Reference] = (),
) -> Figure:
    """One line per curve with a band of its spread over seeds.

    Against bytes, a method that sends nothing is a level line at its last value.
    A value that the axis cannot show is a gap, counted in a note below the figure.
    """
    floor = log_floor(curves) if scale == "log" else -np.inf
    labels = [
        f"{style.plain(c.label)} (sends nothing)"
        if axis == "bytes" and c.sends_nothing
        else style.plain(c.label)
        for c in curves
    ]
    shown_labels = [*(labels if len(labels) > 1 else []), *(r.label for r in references)]
    notes = curve_notes(curves, scale)
    figure, axes = style.new_figure(title, rows_below=style.rows_below(shown_labels, notes))
    entries = []
    for curve, label in zip(curves, labels, strict=True):
        shown = np.where(curve.mean >= floor, curve.mean, np.nan)
        look = style.line_style(curve.style)
        if axis == "bytes" and curve.sends_nothing:
            finite = shown[np.isfinite(shown)]
            level = finite[-1] if len(finite) else np.nan
            entries.append((axes.axhline(level, color=look["color"], linestyle=(0, (1, 2))), label))
            continue
        x = curve.rounds if axis == "rounds" else curve.bytes_sent
        (line,) = axes.plot(x, shown, **look, markevery=max(1, len(x) // 10))
        if np.isfinite(curve.std).any():
            low, high = curve.mean - curve.std, curve.mean + curve.std
            axes.fill_between(
                x,
                np.fmax(low, floor),
                np.fmax(high, floor),
                color=look["color"],
                alpha=style.BAND,
                linewidth=0,
            )
        entries.append((line, label))
    _scale_y(axes, scale)
    levels = [(_draw_reference(axes, reference), reference.label) for reference in references]
    axes.set_ylabel(y_label)
    _label_x(axes, axis)
    style.add_legend(figure, [*(entries if len(curves) > 1 else []), *levels], notes)
    return figure


def log_floor(curves: Sequence[Curve]) -> float:
    """The lowest value that a logarithmic axis shows: LOG_DECADES below the largest."""
    positive = [c.mean[np.isfinite(c.mean) & (c.mean > 0)] for c in curves]
    largest = max((p.max() for p in positive if len(p)), default=1.0)
    smallest = min((p.min() for p in positive if len(p)), default=1.0)
    return float(max(smallest, largest * 10.0**-LOG_DECADES))


def curve_notes(curves: Sequence[Curve], scale: Scale) -> list[str]:
    """What a figure of these curves does not show, in words; nothing is left out silently."""
    notes = []
    seeds = max((c.seeds for c in curves), default=0)
    if seeds > 1:
        notes.append(f"Mean of up to {seeds} seeds ± one {curves[0].spread}.")
    words = {
        "negative": ("negative estimate", "negative estimates", ""),
        "zero": ("value", "values", " of exactly 0"),
        "below": ("value", "values", f" more than {LOG_DECADES} decades below the largest"),
        "non_finite": ("value", "values", " that {be} not finite"),
    }
    floor = log_floor(curves) if scale == "log" else -np.inf
    for kind, (one, many, which) in words.items():
        if scale != "log" and kind != "non_finite":
            continue
        counts = [(style.plain(c.label), int(flags(c.mean, floor)[kind].sum())) for c in curves]
        counts = [(label, count) for label, count in counts if count]
        total = sum(count for _, count in counts)
        if total:
            where = "; ".join(f"{label}: {count}" for label, count in counts)
            what = (one if total == 1 else many) + which.format(be="is" if total == 1 else "are")
            notes.append(f"{total} {what} not drawn" + (f" ({where})." if 1 < len(curves) <= 4 else "."))
    return notes


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """Reward gained against distance from the reference, evaluation by evaluation. Errors are standard errors."""

    label: str
    style: int
    kl: Sequence[float]
    reward: Sequence[float]
    kl_error: float | None = None


def frontier_figure(
    frontiers: Sequence[Frontier], *, title: str, y_label: str, scale: Scale = "linear"
) -> Figure:
    """Paths from the reference (KL 0) outwards; the last evaluation is the large marker."""
    labels = [style.plain(f.label) for f in frontiers]
    shown_labels = labels if len(labels) > 1 else []
    notes = ["Large marker: last evaluation. Up and to the left is better."]
    figure, axes = style.new_figure(title, rows_below=style.rows_below(shown_labels, notes))
    entries = []
    for frontier, label in zip(frontiers, labels, strict=True):
        look = style.line_style(frontier.style)
        (line,) = axes.plot(frontier.kl, frontier.reward, **look, markersize=3)
        axes.errorbar(
            frontier.kl[-1],
            frontier.reward[-1],
            xerr=frontier.kl_error,
            color=look["color"],
            marker=look["marker"],
            markersize=8,
            capsize=2,
        )
        entries.append((line, label))
    _scale_y(axes, scale)
    axes.set_xlabel("KL to the reference (nats per completion)")
    axes.set_ylabel(y_label)
    style.add_legend(figure, entries if shown_labels else [], notes)
    return figure


@dataclass(frozen=True, kw_only=True)
class StudyPoint:
    """The final metric of one variant: one value per seed. `x` is None where variants are categories."""

    order: int  # of the variant in its study
    label: str
    x: float | None
    values: Sequence[float]
    series: str | None = None  # the curve it belongs to, where a study has several


def study_figure(
    points: Sequence[StudyPoint],
    *,
    title: str,
    x_label: str,
    y_label: str,
    scale: Scale = "linear",
    ceilings: Sequence[tuple[str, Sequence[StudyPoint]]] = (),
) -> Figure:
    """Mean and one standard deviation over seeds against x, each seed's value a small dot.

    Numbers of one series are joined by a line; where any variant has no x, variants are categories in their order.
    """
    numeric = all(point.x is not None for point in points)
    place = {p.order: float(p.x if numeric and p.x is not None else i) for i, p in enumerate(points)}
    seeds = max(len(point.values) for point in points)
    notes = ["Mean ± one standard deviation; dots: single seeds."] if seeds > 1 else []
    floor = max((v for p in points for v in p.values if np.isfinite(v)), default=0.0) * 10.0**-LOG_DECADES
    shown = [replace(p, values=[v for v in p.values if _drawable(v, scale, floor)]) for p in points]
    undrawn = sum(len(point.values) for point in points) - sum(len(point.values) for point in shown)
    if undrawn:
        kind = (
            f"not finite or not positive, or more than {LOG_DECADES} decades below the largest,"
            if scale == "log"
            else "not finite"
        )
        notes.append(f"{undrawn} {'value is' if undrawn == 1 else 'values are'} {kind} and not drawn.")
    ordered = sorted(shown, key=lambda point: place[point.order])
    series = list(dict.fromkeys(point.series for point in ordered))
    names = [name for name in series if name] + [name for name, _ in ceilings]
    crowded = not numeric and (len(points) > 4 or max(len(p.label) for p in points) > 9)
    figure, axes = style.new_figure(
        title, height=3.5 if crowded else 2.9, rows_below=style.rows_below(names, notes)
    )
    x = np.array([place[point.order] for point in ordered])
    entries: list[tuple[Line2D | Patch, str]] = []
    for index, name in enumerate(series):
        mine = [point for point in ordered if point.series == name]
        drawn = _draw_series(axes, mine, place, style.line_style(index), scale=scale, joined=numeric)
        if name:
            entries.append((drawn, name))
    for index, (name, ceiling) in enumerate(ceilings, start=len(series)):
        across = sorted(
            {place[p.order]: float(np.mean(p.values)) for p in ceiling if p.order in place}.items()
        )
        (line,) = axes.plot(
            *zip(*across, strict=True), color=style.line_style(index)["color"], linestyle="--"
        )
        entries.append((line, name))
    if numeric:
        if x.min() > 0 and x.max() / x.min() >= 50:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
        elif np.all(x == np.round(x)):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    else:
        axes.set_xticks(
            x,
            [style.plain(point.label, 22) for point in ordered],
            rotation=35 if crowded else 0,
            ha="right" if crowded else "center",
        )
        axes.margins(x=0.08)
    _scale_y(axes, scale)
    axes.set_xlabel(style.plain(x_label, 60))
    axes.set_ylabel(y_label)
    style.add_legend(figure, entries, notes)
    return figure


def _draw_series(
    axes: Axes,
    points: Sequence[StudyPoint],
    place: Mapping[int, float],
    look: Mapping[str, Any],
    *,
    scale: Scale,
    joined: bool,
) -> Line2D:
    """One curve of a study: means, deviations, and a dot per seed."""
    values = [point.values for point in points]
    x = np.array([place[point.order] for point in points])
    mean = np.array([np.mean(v) if v else np.nan for v in values])
    std = np.array([np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in values])
    # A log axis has no way down to 0.
    low = np.where(mean - std > 0, std, mean * 0.9) if scale == "log" else std
    if joined and len(x) > 1:
        axes.plot(x, mean, color=look["color"])
    bars = axes.errorbar(
        x, mean, yerr=np.stack([low, std]), fmt=look["marker"], color=look["color"], capsize=3, markersize=6
    )
    for centre, single in zip(x, values, strict=True):
        if len(single) > 1:
            axes.plot([centre] * len(single), single, ".", color=style.MUTED, markersize=4, zorder=3)
    (line, _, _) = bars
    return line


def _drawable(number: float, scale: Scale, floor: float) -> bool:
    return bool(np.isfinite(number)) and (scale != "log" or number > floor)


def _draw_reference(axes: Axes, reference: Reference) -> Line2D:
    line = Line2D(
        [0, 1],
        [reference.level] * 2,
        transform=axes.get_yaxis_transform(),
        color=style.MUTED,
        linestyle=(0, reference.dashes),
        linewidth=1.2,
    )
    axes.add_line(line)
    axes.update_datalim([(np.nan, reference.level)], updatex=False)
    axes.autoscale_view(scalex=False)
    return line


def _scale_y(axes: Axes, scale: Scale) -> None:
    if scale == "percent":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{100 * number:.3g} %"))
    elif scale == "log":
        axes.set_yscale("log")
        style.label_logarithms(axes.yaxis, FuncFormatter(lambda number, _: f"{number:g}"))


def _label_x(axes: Axes, axis: Axis) -> None:
    if axis == "bytes":
        axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
        axes.set_xlabel("bytes sent, all agents together")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 5, 10]))
        axes.set_xlabel("round")
