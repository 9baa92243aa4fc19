"""What a comparison trades: accuracy against bytes, the mean user against the worst off; and which method that speaks for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator
from scipy.stats import t

from prefmesh.reports import style, tables
from prefmesh.reports.runs import Results
from prefmesh.reports.series import mean

LEAST = 3
"""Variants below which there is nothing to trade."""
NEAR = 0.01
"""With one seed: accuracies that are not told apart."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A variant: means over its seeds, and its accuracies by seed. `personal`: each agent ends with a policy of its own."""

    label: str
    bytes_sent: float
    accuracy: float
    worst_tenth: float
    by_seed: dict[int | None, float]
    personal: bool


def choices(results: Results) -> list[Choice]:
    """Of a comparison of methods: its finished variants that have all figures; none where there are fewer than `LEAST`."""
    found = []
    for variant in results.variants if results.kind == "compare" else ():
        done = [run for run in variant.runs if run.status == "done"]
        read = [
            (tables.total_bytes(r), r.last(r.accuracy_key), r.last("eval/accuracy_worst_tenth")) for r in done
        ]
        numbers = [row for row in read if None not in row]
        if not numbers or len(numbers) < len(read):
            continue
        sent, accuracy, worst = (mean([float(row[k] or 0) for row in numbers]) for k in range(3))
        found.append(
            Choice(
                label=variant.label,
                bytes_sent=sent,
                accuracy=accuracy,
                worst_tenth=worst,
                by_seed={run.seed: float(row[1] or 0) for run, row in zip(done, numbers, strict=True)},
                personal=variant.accuracy_key.startswith("eval/own"),
            )
        )
    return found if len(found) >= LEAST else []


def apart(one: Choice, other: Choice) -> bool:
    """Whether their accuracies differ: Student's t over common seeds, 95 %; with one seed by more than `NEAR`."""
    gaps = np.array(
        [one.by_seed[seed] - other.by_seed[seed] for seed in one.by_seed if seed in other.by_seed]
    )
    if len(gaps) < 2:
        return abs(one.accuracy - other.accuracy) > NEAR
    half = float(t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / np.sqrt(len(gaps)))
    return bool(abs(gaps.mean()) > half)


def advice(results: Results) -> list[str]:
    """Sentences, each with its evidence; none where there is nothing to choose from."""
    all_ = choices(results)
    if not all_:
        return []
    seeds = len(results.seeds)
    told = "paired over seeds, 95 %" if seeds > 1 else f"one seed: {100 * NEAR:g} point counts as equal"
    best = _highest(all_)
    lines = [f"Highest accuracy: {best.label}, {_said(best)} ({told})."]
    equal = [c for c in all_ if c is best or not apart(best, c)]
    cheap = min(equal, key=lambda choice: choice.bytes_sent)
    if cheap is best:
        lines.append("No method that sends less comes near it.")
    else:
        lines.append(f"Not told apart from it and cheapest: {cheap.label}, {_said(cheap)}.")
    kind = max(all_, key=lambda choice: choice.worst_tenth)
    lines.append(f"Best for the worst tenth of users: {kind.label}, {tables.percent(kind.worst_tenth)} %.")
    shared, personal = ([c for c in all_ if c.personal is p] for p in (False, True))
    if shared and personal:
        lines.append(
            _verdict(
                _highest(personal),
                _highest(shared),
                equal="Policies of one's own are not told apart from the best shared one:",
                better="Users disagree: policies of their own gain",
                worse="One policy serves all: own ones change accuracy by",
            )
        )
    alone = [c for c in personal if c.bytes_sent == 0]
    taught = [c for c in personal if c.bytes_sent > 0]
    if alone and taught:
        lines.append(
            _verdict(
                _highest(taught),
                _highest(alone),
                equal="Own policies that learn from others are not told apart from learning alone:",
                better="Users learn from each other: against learning alone they gain",
                worse="Nothing is gained from others: own policies that learn from them change accuracy by",
            )
        )
    return lines


def _highest(choices: Sequence[Choice]) -> Choice:
    return max(choices, key=lambda choice: choice.accuracy)


def _verdict(one: Choice, other: Choice, *, equal: str, better: str, worse: str) -> str:
    words = equal if not apart(one, other) else better if one.accuracy > other.accuracy else worse
    gain = f"{100 * (one.accuracy - other.accuracy):+z.1f}".replace("-", "−")
    return f"{words} {gain} points ({one.label} against {other.label})."


def _said(choice: Choice) -> str:
    return f"{tables.percent(choice.accuracy)} % for {tables.human_bytes(choice.bytes_sent)}"


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other one beats: smaller x and larger y are better. By rising x.

    >>> frontier([(1.0, 0.5), (2.0, 0.4), (3.0, 0.9)])
    [0, 2]
    """
    found: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not found or points[i][1] > points[found[-1]][1]:
            found.append(i)
    return found


@dataclass(frozen=True, kw_only=True)
class Trade:
    """A figure of a trade and its words."""

    name: str
    title: str
    caption: str
    description: str
    figure: Figure


def trades(results: Results) -> Iterator[Trade]:
    """Accuracy against bytes, and mean against worst tenth."""
    all_ = choices(results)
    if not all_:
        return
    on_line = "Filled: no other method is better in both."
    best = frontier([(c.bytes_sent, c.accuracy) for c in all_])
    yield Trade(
        name="pareto_bytes",
        title="Accuracy against bytes",
        caption=f"At the end of training, means over seeds. {on_line} What sends nothing stands at the left edge.",
        description="Accuracy against bytes. Not beaten: " + "; ".join(f"{all_[i].label} {_said(all_[i])}" for i in best) + ".",
        figure=_bytes_figure(all_, best),
    )  # fmt: skip
    best = frontier([(-c.accuracy, c.worst_tenth) for c in all_])
    yield Trade(
        name="pareto_users",
        title="The mean user and the worst off",
        caption=f"Accuracy of all held-out pairs against that of the worst tenth of users. {on_line}",
        description="Mean against worst tenth. Not beaten: "
        + "; ".join(
            f"{all_[i].label} {tables.percent(all_[i].accuracy)} % and {tables.percent(all_[i].worst_tenth)} %" for i in best
        )
        + ".",
        figure=_users_figure(all_, best),
    )  # fmt: skip


def _bytes_figure(all_: Sequence[Choice], best: Sequence[int]) -> Figure:
    sent = [c.bytes_sent for c in all_ if c.bytes_sent > 0]
    least = min(sent, default=1.0)
    x = [c.bytes_sent or least / 3 for c in all_]
    figure = _scatter(all_, best, x, [c.accuracy for c in all_], "Accuracy against bytes")
    axes = figure.axes[0]
    axes.set_xscale("log")
    style.label_logarithms(axes.xaxis, EngFormatter(unit="B"))
    axes.set_xlabel("bytes sent, all agents together")
    axes.set_ylabel("held-out accuracy")
    return figure


def _users_figure(all_: Sequence[Choice], best: Sequence[int]) -> Figure:
    x, y = [c.accuracy for c in all_], [c.worst_tenth for c in all_]
    figure = _scatter(all_, best, x, y, "The mean user and the worst off")
    figure.axes[0].xaxis.set_major_locator(MaxNLocator(4))  # more labels would touch
    figure.axes[0].xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{100 * number:.3g} %"))
    figure.axes[0].set_xlabel("held-out accuracy, all pairs")
    figure.axes[0].set_ylabel("worst tenth of users")
    return figure


def _scatter(
    all_: Sequence[Choice], best: Sequence[int], x: Sequence[float], y: Sequence[float], title: str
) -> Figure:
    """A mark for each; those on the frontier filled, and joined."""
    labels = [style.plain(c.label, 30) for c in all_]
    figure, axes = style.new_figure(title, rows_below=style.rows_below(labels, []))
    axes.plot([x[i] for i in best], [y[i] for i in best], color=style.MUTED, linewidth=1, linestyle=":")
    entries = []
    for i, label in enumerate(labels):
        look = style.line_style(i)
        fill = look["color"] if i in best else style.PAPER
        (mark,) = axes.plot(
            [x[i]], [y[i]], linestyle="", marker=look["marker"], color=look["color"], markerfacecolor=fill, markersize=6
        )  # fmt: skip
        entries.append((mark, label))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{100 * number:.3g} %"))
    axes.margins(0.08)
    style.add_legend(figure, entries)
    return figure
