"""Which figures a report has, with their titles, captions and descriptions in words."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from prefmesh.reports import style
from prefmesh.reports.curves import (
    Axis,
    Frontier,
    Reference,
    Scale,
    StudyPoint,
    curve_notes,
    curves_figure,
    frontier_figure,
    study_figure,
)
from prefmesh.reports.graphs import graph_figure, graph_title, spectrum_words
from prefmesh.reports.pareto import trades
from prefmesh.reports.people import ranked_figure, strips_figure
from prefmesh.reports.runs import Results, Row, Run, Variant, value
from prefmesh.reports.series import Curve, Users, curve, mean, users, worst_tenth


@dataclass(frozen=True, kw_only=True)
class Plate:
    """A figure and its words. `description` tells what is seen to who cannot see it."""

    name: str  # of the file, without suffix
    section: str  # "study", "trade", "training", "users" or "graph"
    title: str
    caption: str
    description: str
    figure: Figure


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric's figure: in a comparison `key` of every variant, in a single run every key of `parts`."""

    name: str
    key: str
    title: str
    y_label: str
    caption: str
    scale: Scale = "linear"
    axes: tuple[Axis, ...] = ("rounds", "bytes")
    parts: tuple[tuple[str, str], ...] = ()


HEADLINE = "headline accuracy"  # stands for each method's own key, see Run.accuracy_key

METRICS = (
    Metric(
        name="accuracy",
        key=HEADLINE,
        title="Held-out accuracy",
        y_label="held-out accuracy",
        scale="percent",
        caption="Share of held-out pairs on which the policy prefers what the user chose; ties count one half. "
        "Of the average model, except for local-only training and personal methods, where each agent's own model answers its own users.",
        parts=(
            (HEADLINE, "all pairs"),
            ("eval/own/rewards/accuracies", "each agent's own model"),
            ("eval/accuracy_worst_tenth", "worst tenth of users"),
        ),
    ),
    Metric(
        name="loss",
        key="train_loss",
        title="Training loss",
        y_label="DPO loss (nats per pair)",
        caption="The global training objective at the average model; ln 2 = 0.693 before training.",
        parts=(
            ("train_loss", "training, global objective"),
            ("eval/loss", "held out"),
            ("loss", "minibatches of the round"),
        ),
    ),
    Metric(
        name="held_out_loss",
        key="eval/loss",
        title="Held-out loss",
        y_label="DPO loss (nats per pair)",
        caption="The loss of the average model on held-out pairs; where it rises while training loss falls, "
        "the policy overfits.",
        axes=("rounds",),
    ),
    Metric(
        name="grad_norm_sq",
        key="grad_norm_sq",
        title="Squared gradient norm",
        y_label="‖∇F(θ̄)‖²",
        scale="log",
        caption="Of the global objective at the average model, before any clipping. An unbiased estimate can be "
        "negative near the optimum; a logarithmic axis cannot show it.",
        parts=(("grad_norm_sq", "at the average model"),),
    ),
    Metric(
        name="consensus_error",
        key="consensus_error",
        title="Consensus error after mixing",
        y_label="(1/N) Σ ‖θᵢ − θ̄‖²",
        scale="log",
        caption="How far agents' parameters are from their mean, once the round's mixing is done.",
        parts=(("consensus_error", "after mixing"), ("consensus_error_before_mixing", "before mixing")),
    ),
    Metric(
        name="consensus_error_before_mixing",
        key="consensus_error_before_mixing",
        title="Consensus error before mixing",
        y_label="(1/N) Σ ‖θᵢ − θ̄‖²",
        scale="log",
        caption="How far the round's local steps drove agents apart, before they mixed.",
        axes=("rounds",),
    ),
)

FRONTIERS: tuple[tuple[str, str, str, str, Scale], ...] = (
    (
        "frontier_margin",
        "eval/rewards/margins",
        "Reward margin against KL",
        "held-out reward margin",
        "linear",
    ),
    (
        "frontier_win_rate",
        "eval/win_rate",
        "Win rate against KL",
        "true win rate",
        "percent",
    ),
)

STUDY_METRICS: tuple[tuple[str, str, str, str, Scale], ...] = (
    ("accuracy", HEADLINE, "Final held-out accuracy", "held-out accuracy", "percent"),
    (
        "worst_tenth",
        "eval/accuracy_worst_tenth",
        "Final accuracy, worst tenth",
        "mean of worst tenth",
        "percent",
    ),
    ("loss", "train_loss", "Final training loss", "DPO loss (nats per pair)", "linear"),
    ("grad_norm_sq", "grad_norm_sq", "Final squared gradient norm", "‖∇F(θ̄)‖²", "log"),
    ("consensus_error", "consensus_error", "Final consensus error", "(1/N) Σ ‖θᵢ − θ̄‖²", "log"),
    ("win_rate", "eval/win_rate", "Final win rate", "true win rate", "percent"),
)

CEILINGS = {"own": "ceiling, knowing each user", "consensus": "ceiling, one taste for all"}


def metric_key(key: str, owner: Variant | Run) -> str:
    return owner.accuracy_key if key == HEADLINE else key


def plates(results: Results) -> Iterator[Plate]:
    """Every figure that the results have data for, in the order of the report."""
    if results.kind == "study":
        yield from study_plates(results)
    for trade in trades(results):
        yield Plate(section="trade", **vars(trade))
    for metric in METRICS:
        for axis in metric.axes:
            yield from curve_plates(results, metric, axis)
    yield from frontier_plates(results)
    yield from user_plates(results)
    yield from graph_plates(results)


def metric_curves(results: Results, metric: Metric) -> list[Curve]:
    """The lines of one figure: the parts of a single run, or one metric of every variant."""
    if results.kind == "run":
        (variant,) = results.variants
        wanted = {metric_key(key, variant): label for key, label in reversed(metric.parts)}
        found = [
            curve(label, i, variant.runs, key) for i, (key, label) in enumerate(reversed(wanted.items()))
        ]
    else:
        found = [
            curve(variant.label, i, variant.runs, metric_key(metric.key, variant))
            for i, variant in enumerate(results.variants)
        ]
    return [line for line in found if line is not None]


def curve_plates(
    results: Results, metric: Metric, axis: Axis, *, standard_error: bool = False
) -> Iterator[Plate]:
    lines = metric_curves(results, metric)
    if standard_error:
        lines = [line.with_standard_error() for line in lines]
    if metric.scale == "log":
        drawn = [line for line in lines if np.any(line.mean[np.isfinite(line.mean)] > 0)]
    else:
        drawn = [line for line in lines if np.any(np.isfinite(line.mean))]
    if not drawn or (axis == "bytes" and all(line.sends_nothing for line in drawn)):
        return
    title = f"{metric.title} against {axis}"
    figure = curves_figure(
        drawn,
        axis=axis,
        title=title,
        y_label=metric.y_label,
        scale=metric.scale,
        references=accuracy_references(results) if metric.key == HEADLINE else (),
    )
    notes = curve_notes(drawn, metric.scale)
    left_out = [line.label for line in lines if not any(line is other for other in drawn)]
    never = "never above 0" if metric.scale == "log" else "never finite"
    hidden = [f"Not drawn, {never}: {'; '.join(left_out)}."] if left_out else []
    yield Plate(
        name=f"{metric.name}_{axis}",
        section="training",
        title=title,
        caption=" ".join([metric.caption, *hidden]),
        description=" ".join([f"{title}.", *(describe_curve(line, metric.scale) for line in drawn), *notes]),
        figure=figure,
    )


def describe_curve(line: Curve, scale: Scale) -> str:
    finite = np.flatnonzero(np.isfinite(line.mean))
    first, last = finite[0], finite[-1]
    start, end = _number(float(line.mean[first]), scale), _number(float(line.mean[last]), scale)
    return f"{line.label}: {start} at round {line.rounds[first]:.0f}, {end} at round {line.rounds[last]:.0f}."


def accuracy_references(results: Results) -> list[Reference]:
    """The ceilings that the users' own noise sets where they are known and the same for all variants, and chance: from the top."""
    found = []
    for kind in ("own", "consensus"):
        levels = [mean(values) for variant in results.variants if (values := ceilings(variant.runs, kind))]
        if levels and max(levels) - min(levels) < 0.01:
            level = mean(levels)
            label = f"{CEILINGS[kind]}: {100 * level:.1f} %"
            found.append(
                Reference(label=label, level=level, dashes=(8, 2, 1, 2) if kind == "own" else (5, 3))
            )
    return [*found, Reference(label="chance", level=0.5, dashes=(1, 2))]


def ceilings(runs: Sequence[Run], kind: str) -> list[float]:
    known = [run.summary.get("ceiling") or {} for run in runs]
    return [number for ceiling in known if (number := value(ceiling, kind)) is not None]


def frontier_plates(results: Results) -> Iterator[Plate]:
    for name, key, title, y_label, scale in FRONTIERS:
        found = [
            path
            for i, variant in enumerate(results.variants)
            if (path := frontier(variant, i, key)) is not None
        ]
        if found:
            ends = " ".join(
                f"{f.label}: {_number(f.reward[-1], scale)} at {f.kl[-1]:.3g} nats." for f in found
            )
            yield Plate(
                name=name,
                section="training",
                title=title,
                caption="What offline preference optimisation buys: reward gained for distance from the reference. "
                "KL is estimated on the policy's own samples.",
                description=f"{title}, at the last evaluation. {ends}",
                figure=frontier_figure(found, title=title, y_label=y_label, scale=scale),
            )


def frontier(variant: Variant, index: int, key: str) -> Frontier | None:
    """Mean KL and mean reward over seeds at every evaluation that has both; None with fewer than one such."""
    kl, reward = curve("", 0, variant.runs, "eval/kl"), curve("", 0, variant.runs, key)
    if kl is None or reward is None:
        return None
    rewards = dict(zip(reward.rounds, reward.mean, strict=True))
    points = [(k, rewards[r]) for r, k in zip(kl.rounds, kl.mean, strict=True) if r in rewards]
    points = [point for point in points if np.all(np.isfinite(point))]
    if not points:
        return None
    errors = [run.last("eval/kl_stderr") for run in variant.runs]
    error = errors[0] if len(errors) == 1 and errors[0] is not None and np.isfinite(errors[0]) else None
    return Frontier(
        label=variant.label,
        style=index,
        kl=[float(k) for k, _ in points],
        reward=[float(r) for _, r in points],
        kl_error=error,
    )


def variant_users(variant: Variant) -> Users | None:
    """The users of every seed at its last evaluation, by the accuracy that counts for the method."""
    rows: list[Row] = [row for run in variant.runs for row in run.final_users]
    return users(rows, own=variant.accuracy_key.startswith("eval/own"))


def user_plates(results: Results) -> Iterator[Plate]:
    groups = [
        (variant.label, i, group)
        for i, variant in enumerate(results.variants)
        if (group := variant_users(variant)) is not None
    ]
    if not groups:
        return
    title = "Accuracy per user"
    caption = (
        "At the last evaluation. The grey band is what binomial noise alone would give if every user had the accuracy "
        "of all pairs together: what lies inside it is no evidence that users differ."
    )
    words = " ".join(
        f"{label}: {len(group.accuracy):,} users from {_number(group.accuracy[0], 'percent')} to "
        f"{_number(group.accuracy[-1], 'percent')}, worst tenth {_number(float(worst_tenth(group.accuracy)), 'percent')}."
        for label, _, group in groups
    )
    one = results.kind == "run"
    yield Plate(
        name="users",
        section="users",
        title=title,
        caption=caption + ("" if one else " Users of all seeds together."),
        description=f"{title}. {words}",
        figure=ranked_figure(groups[0][2], title=title) if one else strips_figure(groups, title=title),
    )


def graph_plates(results: Results) -> Iterator[Plate]:
    """One per different graph; runs of one sweep often share theirs."""
    seen: dict[str, Row] = {}
    for run in results.runs:
        if run.topology is not None:
            seen.setdefault(graph_title(run.topology), run.topology)
    for number, (title, topology) in enumerate(seen.items(), start=1):
        yield Plate(
            name="graph" if len(seen) == 1 else f"graph_{number}",
            section="graph",
            title=title[0].upper() + title[1:],
            caption="Agents and who sends to whom; beside it the sizes of the eigenvalues of the mixing matrix W. "
            "The dashed line is ρ = ‖W − J‖₂: one round of mixing leaves at most this share of the disagreement.",
            description=f"A graph ({title}) with {len(topology['edges']):,} edges. {spectrum_words(topology)}.",
            figure=graph_figure(topology),
        )


def study_plates(results: Results) -> Iterator[Plate]:
    for name, key, title, y_label, scale in STUDY_METRICS:
        points = study_points(results, lambda run, key=key: run.last(metric_key(key, run)))
        drawable = [p for p in points if any(np.isfinite(v) and (scale != "log" or v > 0) for v in p.values)]
        if len(drawable) < 2:
            continue
        bounds = []
        if key == HEADLINE:
            for kind, label in CEILINGS.items():
                known = study_points(results, lambda run, kind=kind: next(iter(ceilings([run], kind)), None))
                bounds += [(label, known)] if known else []
        ends = " ".join(f"{p.label}: {_number(mean(p.values), scale)}." for p in drawable)
        yield Plate(
            name=f"study_{name}",
            section="study",
            title=title,
            caption="At the last evaluation of each run.",
            description=f"{title}. {ends}",
            figure=study_figure(
                drawable,
                title=title,
                x_label=results.x_label or "",
                y_label=y_label,
                scale=scale,
                ceilings=bounds,
            ),
        )


def study_points(results: Results, read: Callable[[Run], float | None]) -> list[StudyPoint]:
    """One point per variant that has a value, in the sweep's order."""
    found = []
    for order, variant in enumerate(results.variants):
        values = [number for run in variant.runs if (number := read(run)) is not None]
        if values:
            found.append(
                StudyPoint(
                    order=order, label=variant.label, x=variant.x, values=values, series=variant.series
                )
            )
    return found


def _number(number: float, scale: Scale) -> str:
    return f"{100 * number:.1f} %" if scale == "percent" else f"{number:.3g}"


def draw(results: Results) -> list[Plate]:
    """All plates in the house style."""
    with style.house_style():
        return list(plates(results))
