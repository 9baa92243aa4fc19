"""The summary table, for the terminal, as JSON and for the HTML report, and paired differences."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefmesh.reports.runs import Results, Row, Run, Variant
from prefmesh.reports.series import mean, sample_std

if TYPE_CHECKING:
    from rich.table import Table

MISSING, NOT_FINITE = "–", "not finite"


@dataclass(frozen=True, kw_only=True)
class Column:
    """One measure: how it is read off a run, how it is written, and what it means."""

    key: str
    header: str
    meaning: str
    read: Callable[[Run], float | None]
    write: Callable[[float], str]
    difference: bool = False  # also compared seed by seed with the first variant
    spread: bool = True  # whether the spread over seeds is worth a reader's time


def percent(number: float) -> str:
    """In a column whose header carries the unit.

    >>> percent(0.7349)
    '73.5'
    """
    return f"{100 * number:.1f}"


def plain_number(number: float) -> str:
    """Three significant digits; scientific where that is shorter to read.

    >>> plain_number(0.69314), plain_number(0.00012345), plain_number(0.0), plain_number(3456.0)
    ('0.693', '1.23e-04', '0', '3,456')
    """
    if number == 0:
        return "0"
    if abs(number) < 1e-3 or abs(number) >= 1e6:
        return f"{number:.2e}"
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def human_bytes(number: float) -> str:
    """SI units.

    >>> human_bytes(0.0), human_bytes(999.0), human_bytes(12_345_678.0)
    ('0 B', '999 B', '12.3 MB')
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(number) < 999.5 or unit == "TB":
            break
        number /= 1000
    return f"{number:.3g} {unit}" if number < 999.5 else f"{number:,.0f} {unit}"


def human_seconds(number: float) -> str:
    """
    >>> human_seconds(8.25), human_seconds(90.0), human_seconds(600.0), human_seconds(9000.0)
    ('8.2 s', '90 s', '10.0 min', '2.5 h')
    """
    if number < 120:
        return f"{number:.1f} s" if number < 10 else f"{number:.0f} s"
    return f"{number / 60:.1f} min" if number < 7200 else f"{number / 3600:.1f} h"


def _metric(key: str) -> Callable[[Run], float | None]:
    return lambda run: run.last(key)


def total_bytes(run: Run) -> float | None:
    from_summary = run.summary.get("bytes_sent_total")
    return run.last("bytes_sent_total") if from_summary is None else float(from_summary)


def total_seconds(run: Run) -> float | None:
    """The run's wall time; while there is no summary, the sum over the rounds so far."""
    from_summary = run.summary.get("seconds")
    if from_summary is not None:
        return float(from_summary)
    rounds = [float(row["seconds"]) for row in run.metrics if row.get("seconds") is not None]
    return sum(rounds) if rounds else None


COLUMNS = (
    Column(
        key="accuracy",
        header="accuracy (%)",
        meaning="Share of held-out pairs on which the policy's implicit reward is higher for what the user chose; ties "
        "count one half. Of the average model; for local-only training and personal methods, of each agent's own model on its own users.",
        read=lambda run: run.last(run.accuracy_key),
        write=percent,
        difference=True,
    ),
    Column(
        key="ceiling",
        header="ceiling (%)",
        meaning="The best accuracy that can be expected on these pairs, since simulated users' answers are noisy: of one "
        "policy for all; for local-only training and personal methods, of policies that know each user. Unknown for real users.",
        read=lambda run: run.ceiling,
        write=percent,
        spread=False,
    ),
    Column(
        key="worst_tenth",
        header="worst tenth (%)",
        meaning="Mean accuracy of the tenth of users with the lowest accuracy. With few pairs per user much of its "
        "distance from the mean is noise: see the grey band in the figure of users.",
        read=_metric("eval/accuracy_worst_tenth"),
        write=percent,
        difference=True,
    ),
    Column(
        key="loss_gap",
        header="loss gap",
        meaning="Held-out loss of the user with the largest minus the mean over users, in nats per pair: 0 where one policy serves "
        "all alike. With few pairs per user much of it is noise.",
        read=_metric("eval/users/loss_gap"),
        write=plain_number,
        difference=True,
    ),
    Column(
        key="own_accuracy",
        header="own accuracy (%)",
        meaning="Held-out accuracy when every agent answers its own users with its own parameters.",
        read=_metric("eval/own/rewards/accuracies"),
        write=percent,
        difference=True,
    ),
    Column(
        key="loss",
        header="loss",
        meaning="The global training objective at the average model, in nats per pair (sigmoid DPO: ln 2 = 0.693 "
        "before training).",
        read=_metric("train_loss"),
        write=plain_number,
        difference=True,
    ),
    Column(
        key="grad_norm_sq",
        header="‖∇F‖²",
        meaning="Squared norm of the gradient of the global objective at the average model, before any clipping. "
        "Where it is estimated from two halves it is unbiased and may be negative.",
        read=_metric("grad_norm_sq"),
        write=plain_number,
    ),
    Column(
        key="mixing_error",
        header="mixing error",
        meaning="How much of the average of LoRA's products B A the last mixing lost: the norm of what is missing, relative to the average.",
        read=_metric("lora/mixing_error"),
        write=plain_number,
    ),
    Column(
        key="consensus_error",
        header="consensus error",
        meaning="Mean squared distance of agents' parameters from their mean, after mixing.",
        read=_metric("consensus_error"),
        write=plain_number,
    ),
    Column(
        key="kl",
        header="KL (nats)",
        meaning="Kullback-Leibler divergence of the policy from the reference, in nats per completion, on the policy's "
        "own samples.",
        read=_metric("eval/kl"),
        write=plain_number,
    ),
    Column(
        key="win_rate",
        header="win rate (%)",
        meaning="How often users' known utilities prefer the policy's samples to the reference's. Only simulated users "
        "have known utilities.",
        read=_metric("eval/win_rate"),
        write=percent,
    ),
    Column(
        key="bytes_sent_total",
        header="bytes",
        meaning="What a real deployment would send, all agents and rounds together.",
        read=total_bytes,
        write=human_bytes,
        spread=False,
    ),
    Column(
        key="seconds",
        header="time",
        meaning="Wall time of the run on the machine that is named under Environment.",
        read=total_seconds,
        write=human_seconds,
        spread=False,
    ),
)


def summary_rows(results: Results) -> list[Row]:
    """One row per variant: raw numbers, as `--json` prints them.

    A measure is None where it was not taken, else {mean, std, n} with std None for a single seed; `low` and `high`
    (95 %, clustered by prompt) stand beside a single run's accuracy. A mean that is not finite is None and says so
    under `non_finite`.
    """
    return [
        {
            "variant": variant.name,
            "label": variant.label,
            "method": variant.runs[0].method if variant.runs else None,
            "status": [run.status for run in variant.runs],
            "seeds": [run.seed for run in variant.runs],
            **{column.key: _cell(column, variant) for column in COLUMNS},
        }
        for variant in results.variants
    ]


def _cell(column: Column, variant: Variant) -> Row | None:
    numbers = [number for run in variant.runs if (number := column.read(run)) is not None]
    if not numbers:
        return None
    cell = _moments(numbers)
    interval = variant.runs[0].summary.get("accuracy_interval")
    if column.key == "accuracy" and len(variant.runs) == 1 and interval:
        cell["low"], cell["high"] = interval
    return cell


def _moments(numbers: Sequence[float]) -> Row:
    centre, spread = mean(numbers), sample_std(numbers)
    cell: Row = {"mean": centre, "std": spread, "n": len(numbers)}
    if not math.isfinite(spread):
        cell["std"] = None
    if not math.isfinite(centre):
        cell["mean"] = None
        cell["non_finite"] = "inf" if math.inf in numbers and not any(map(math.isnan, numbers)) else "nan"
    return cell


def difference_rows(results: Results) -> list[Row]:
    """Every other variant minus the first, over the seeds that both have: {mean, std, n, low, high}.

    low and high bound the mean difference with 95 % confidence: of accuracy over the held-out pairs of all seeds, each
    pair judged by both, clustered by prompt (a finished sweep's comparison.json); else by Student's t over seeds, or None
    for one seed. Variants on other data than the first's (folds, other tastes or shards) have no such rows.
    """
    from scipy.stats import t

    if len(results.variants) < 2 or results.folds:
        return []
    first, *others = results.variants
    base = {run.seed: run for run in first.runs}
    rows = []
    for variant in others:
        if not variant.same_data(first):
            continue
        pairs = [(run, base[run.seed]) for run in variant.runs if run.seed in base]
        cells: Row = {}
        for column in COLUMNS:
            if not column.difference:
                continue
            read = [(column.read(run), column.read(other)) for run, other in pairs]
            numbers = [a - b for a, b in read if a is not None and b is not None]
            if not numbers:
                cells[column.key] = None
                continue
            cell = {**_moments(numbers), "low": None, "high": None}
            if cell["mean"] is not None and cell["std"] is not None:
                half = float(t.ppf(0.975, len(numbers) - 1)) * cell["std"] / math.sqrt(len(numbers))
                cell["low"], cell["high"] = cell["mean"] - half, cell["mean"] + half
            cells[column.key] = cell
        paired = results.comparison.get("differences", {}).get(variant.name, {})
        if paired.get("seeds") == len(pairs) and (cell := cells["accuracy"]):
            cell["low"], cell["high"] = paired["low"], paired["high"]
        if pairs:
            rows.append({"variant": variant.name, "label": variant.label, "versus": first.label, **cells})
    return rows


def pooled_accuracy(results: Results) -> str | None:
    """Of a study of folds: the accuracy over all held-out pairs, each held out once a seed."""
    pooled = results.comparison.get("pooled")
    if not results.folds or not pooled:
        return None
    interval = f"[{percent(pooled['low'])}, {percent(pooled['high'])}]"
    return f"All folds together: accuracy {percent(pooled['accuracy'])} % {interval} on {pooled['pairs']:,} held-out pairs"


def write_cell(column: Column, cell: Row | None) -> str:
    """A cell in words: the mean, with the spread over seeds or a single run's interval."""
    if cell is None:
        return MISSING
    if cell["mean"] is None:
        return NOT_FINITE
    text = column.write(cell["mean"])
    if cell["std"] is not None and column.spread:
        std = cell["std"]
        return f"{text} ± {percent(std)}" if column.write is percent else f"{text} ± {std:.1g}"
    if cell.get("low") is not None:
        return f"{text} [{percent(cell['low'])}, {percent(cell['high'])}]"
    return text


def write_difference(column: Column, cell: Row | None) -> str:
    """A difference with its sign, accuracies in points."""
    if cell is None:
        return MISSING
    if cell["mean"] is None:
        return NOT_FINITE
    points = column.write is percent

    def signed(number: float) -> str:
        text = f"{100 * number:+.1f}" if points else f"{number:+.2g}" if number else "0"
        return text.replace("-", "−")

    text = signed(cell["mean"])
    return text if cell["low"] is None else f"{text} [{signed(cell['low'])}, {signed(cell['high'])}]"


def difference_header(column: Column) -> str:
    return column.header.replace("(%)", "(points)")


def shown_columns(rows: Sequence[Row]) -> list[Column]:
    """Columns that have a value in some row; the others would be nothing but dashes."""
    return [column for column in COLUMNS if any(row.get(column.key) is not None for row in rows)]


def status_words(row: Row) -> str:
    """What is wrong with a variant's runs, if anything: `2 diverged`, `not started`."""
    if not row["status"]:
        return "not started"
    odd = [status for status in dict.fromkeys(row["status"]) if status != "done"]
    many = len(row["status"]) > 1
    return ", ".join(f"{row['status'].count(status)} {status}" if many else status for status in odd)


def summary_tables(results: Results, width: int) -> "list[Table]":
    """The summary for a terminal `width` characters wide: as few tables as show every figure whole."""
    rows = summary_rows(results)
    labels = [row["label"] + (f" ({words})" if (words := status_words(row)) else "") for row in rows]
    columns = [
        (column.header, [write_cell(column, row[column.key]) for row in rows])
        for column in shown_columns(rows)
    ]
    return _terminal_tables(results.title, labels, columns, width)


def difference_tables(results: Results, width: int) -> "list[Table]":
    """Paired differences to the first variant for the terminal; none where no seed matches."""
    rows = difference_rows(results)
    if not rows:
        return []
    columns = [
        (difference_header(column), [write_difference(column, row[column.key]) for row in rows])
        for column in shown_columns(rows)
    ]
    title = f"Difference to {rows[0]['versus']}, seed by seed [95 % interval]"
    return _terminal_tables(title, [row["label"] for row in rows], columns, width)


def _terminal_tables(
    title: str, labels: list[str], columns: list[tuple[str, list[str]]], width: int
) -> "list[Table]":
    """One row per variant; a lone variant as one row per measure."""
    from rich.markup import escape

    if len(labels) == 1 and columns:
        # A run's title is its name, and so is its label, with what happened to it.
        table = _plain_table(escape(labels[0] if labels[0].startswith(title) else f"{title}: {labels[0]}"))
        table.add_column("measure", no_wrap=True)
        table.add_column("value", justify="right", overflow="fold")
        for header, (cell,) in columns:
            table.add_row(header, cell)
        return [table]
    label_width = min(28, _width([*labels, "variant"]))
    tables = []
    for block in _blocks(columns, width - label_width - _PADDING - 1):  # and a blank at the edge
        table = _plain_table(escape(title) if not tables else None)
        table.add_column("variant", overflow="fold", width=label_width)
        for header, _, column_width in block:
            table.add_column(header, justify="right", width=column_width)
        for i, label in enumerate(labels):
            table.add_row(escape(label), *(cells[i] for _, cells, _ in block))
        tables.append(table)
    return tables


_PADDING = 3  # a blank on either side of a cell, and one for the line between


def _blocks(columns: list[tuple[str, list[str]]], width: int) -> list[list[tuple[str, list[str], int]]]:
    """The columns of each table with their widths, which rich would rather share out its own way, cutting figures.

    A header may break between words, a figure never; what room is left goes to the headers, from the left.
    """
    blocks: list[list[tuple[str, list[str], int]]] = []
    left = 0
    for header, cells in columns:
        needed = _width([*header.split(), *cells])
        if not blocks or needed + _PADDING > left:
            blocks.append([])
            left = width
        blocks[-1].append((header, cells, needed))
        left -= needed + _PADDING
    roomy = []
    for block in blocks:
        left = width - sum(needed + _PADDING for _, _, needed in block)
        roomy.append([])
        for header, cells, needed in block:
            more = min(max(0, left), max(0, _width([header]) - needed))
            roomy[-1].append((header, cells, needed + more))
            left -= more
    return roomy


def _plain_table(title: str | None) -> "Table":
    from rich import box
    from rich.table import Table

    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)


def _width(texts: Sequence[str]) -> int:
    """Of the widest, in cells of the terminal."""
    from rich.cells import cell_len

    return max(map(cell_len, texts))


def as_json(results: Results) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "title": results.title,
        "kind": results.kind,
        "variants": summary_rows(results),
        "differences": difference_rows(results),
        "pooled": results.comparison.get("pooled") if results.folds else None,
    }
