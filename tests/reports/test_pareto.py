"""What a comparison trades, and what it is said to speak for."""

from pathlib import Path

import pytest

from prefmesh.reports import style
from prefmesh.reports.pareto import NEAR, advice, choices, frontier, trades
from prefmesh.reports.runs import Results, Run, Variant

FIGURES = {
    # label: accuracies by seed, worst tenth, bytes, own
    "FedDPO": ([0.70, 0.72], 0.50, 1e6, False),
    "DecDPO": ([0.701, 0.719], 0.52, 4e6, False),
    "Clustered": ([0.80, 0.83], 0.70, 2e6, True),
    "Alone": ([0.799, 0.831], 0.65, 0.0, True),
}


def results(figures: dict = FIGURES, seeds: int = 2, status: str = "done") -> Results:
    variants = []
    for label, (accuracy, worst, sent, own) in figures.items():
        key = "eval/own/rewards/accuracies" if own else "eval/rewards/accuracies"
        runs = tuple(
            Run(
                directory=Path(f"{label}/seed_{seed}"), config_text="", config={}, environment={}, agents=(), topology=None,
                metrics=({"round": 1, key: accuracy[seed], "eval/accuracy_worst_tenth": worst},),
                summary={"status": status, "seed": seed, "bytes_sent_total": sent, "headline": "own" if own else "average"},
            )
            for seed in range(seeds)
        )  # fmt: skip
        variants.append(Variant(name=label, label=label, x=None, series=None, overrides=None, runs=runs))
    return Results(
        directory=Path(), kind="compare", title="", x_label=None, seeds=tuple(range(seeds)), variants=tuple(variants), comparison={}
    )  # fmt: skip


def test_two_seeds() -> None:
    """Clustered and Alone differ by 0.1 points one way and the other: the one that sends nothing is as good. Over FedDPO the gains are
    10 and 11 points: t(0.975, 1) = 12.7 times their standard error of 0.5 is less than 10.5."""
    assert advice(results()) == [
        "Highest accuracy: Clustered, 81.5 % for 2 MB (paired over seeds, 95 %).",
        "Not told apart from it and cheapest: Alone, 81.5 % for 0 B.",
        "Best for the worst tenth of users: Clustered, 70.0 %.",
        "Users disagree: policies of their own gain +10.5 points (Clustered against FedDPO).",
        "Own policies that learn from others are not told apart from learning alone: +0.0 points (Clustered against Alone).",
    ]


def test_one_seed() -> None:
    """A point counts as equal. Ten do not: users disagree."""
    lines = advice(results(seeds=1))
    assert f"one seed: {100 * NEAR:g} point" in lines[0]
    assert lines[1].startswith("Not told apart from it and cheapest: Alone")
    assert lines[3] == "Users disagree: policies of their own gain +9.9 points (Clustered against DecDPO)."


def test_the_best_may_be_the_only_one() -> None:
    figures = FIGURES | {"Clustered": ([0.90, 0.93], 0.7, 2e6, True)}
    assert advice(results(figures, seeds=1))[1] == "No method that sends less comes near it."
    shared = {name: row for name, row in FIGURES.items() if not row[3]} | {
        "Alone": ([0.5, 0.5], 0.3, 0.0, True)
    }
    assert advice(results(shared, seeds=1))[3] == "One policy serves all: own ones change accuracy by −20.1 points (Alone against DecDPO)."  # fmt: skip


@pytest.mark.parametrize(
    ("clustered", "said"),
    [
        (0.9, "Users learn from each other: against learning alone they gain +10.0 points (Clustered against Alone)."),
        (
            0.75,
            "Nothing is gained from others: own policies that learn from them change accuracy by −5.0 points (Clustered against Alone).",
        ),
        (0.805, "Own policies that learn from others are not told apart from learning alone: +0.5 points (Clustered against Alone)."),
    ],
)  # fmt: skip
def test_learning_from_others_against_learning_alone(clustered: float, said: str) -> None:
    figures = FIGURES | {"Clustered": ([clustered], 0.7, 2e6, True), "Alone": ([0.8], 0.65, 0.0, True)}
    assert advice(results(figures, seeds=1))[-1] == said


def test_where_there_is_nothing_to_choose() -> None:
    few = {name: FIGURES[name] for name in ("FedDPO", "DecDPO")}
    for found in (results(few), results(status="unfinished")):
        assert choices(found) == []
        assert advice(found) == []
        assert not list(trades(found))


def test_the_figures() -> None:
    """Filled marks are those that nobody beats; what sends nothing has a place on the logarithmic axis."""
    with style.house_style():
        by_bytes, by_users = trades(results())
    assert by_bytes.description == "Accuracy against bytes. Not beaten: Alone 81.5 % for 0 B."
    assert by_users.description == "Mean against worst tenth. Not beaten: Clustered 81.5 % and 70.0 %."
    for trade, filled in ((by_bytes, ["Alone"]), (by_users, ["Clustered"])):
        (legend,) = trade.figure.legends
        found = [
            text.get_text()
            for text, mark in zip(legend.get_texts(), legend.get_lines(), strict=True)
            if mark.get_markerfacecolor() != style.PAPER
        ]
        assert found == filled
    marks = [line for line in by_bytes.figure.axes[0].lines if line.get_marker() != "None"]
    assert min(float(line.get_xdata()[0]) for line in marks) == pytest.approx(1e6 / 3)
    written = [label.get_text() for label in by_bytes.figure.axes[0].get_xticklabels(which="both")]
    assert len([text for text in written if text]) >= 2
    assert all(text.endswith("B") for text in written if text)


def test_the_frontier_of_equals() -> None:
    assert frontier([(1.0, 0.5), (1.0, 0.5), (2.0, 0.5)]) == [0]
    assert frontier([]) == []
