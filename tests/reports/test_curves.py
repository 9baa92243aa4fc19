import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.lines import Line2D

from prefmesh.reports.curves import (
    Frontier,
    Reference,
    StudyPoint,
    curve_notes,
    curves_figure,
    frontier_figure,
    log_floor,
    study_figure,
)
from prefmesh.reports.series import Curve
from prefmesh.reports.style import line_style


def line(
    label: str, mean: list[float], *, std: float = np.nan, bytes_per_round: float = 10.0, style: int = 0
) -> Curve:
    rounds = np.arange(len(mean), dtype=np.float64)
    return Curve(
        label=label,
        style=style,
        rounds=rounds,
        bytes_sent=rounds * bytes_per_round,
        mean=np.array(mean),
        std=np.full(len(mean), std),
        seeds=1 if np.isnan(std) else 3,
    )


def ydata(drawn: Line2D) -> np.ndarray:
    return np.asarray(drawn.get_ydata(), dtype=float)


def texts(figure) -> str:
    figure.draw_without_rendering()
    found = [
        text.get_text() for legend in figure.legends for text in [legend.get_title(), *legend.get_texts()]
    ]
    return " ".join([*found, figure.get_supxlabel() or ""])


def test_a_negative_estimate_is_a_gap_and_is_counted() -> None:
    figure = curves_figure(
        [line("a", [0.4, 0.1, -0.002, 0.03])], axis="rounds", title="t", y_label="y", scale="log"
    )
    (drawn,) = figure.axes[0].lines
    np.testing.assert_array_equal(ydata(drawn), [0.4, 0.1, np.nan, 0.03])
    assert "1 negative estimate not drawn." in texts(figure)


def test_what_a_log_axis_cannot_show_is_said() -> None:
    sick = line("a", [1.0, -1.0, -2.0, 0.0, np.nan, 1e-15])
    assert curve_notes([sick], "log") == [
        "2 negative estimates not drawn.",
        "1 value of exactly 0 not drawn.",
        "1 value more than 9 decades below the largest not drawn.",
        "1 value that is not finite not drawn.",
    ]
    assert curve_notes([sick, line("b", [1.0])], "log")[0] == "2 negative estimates not drawn (a: 2)."
    assert curve_notes([sick], "linear") == ["1 value that is not finite not drawn."]


def test_the_log_axis_ends_nine_decades_down_at_most() -> None:
    assert log_floor([line("a", [1.0, 1e-3])]) == 1e-3
    assert log_floor([line("a", [1.0, 1e-12])]) == pytest.approx(1e-9)
    assert log_floor([line("a", [0.0, np.nan])]) == 1.0


def test_the_band_is_one_standard_deviation() -> None:
    figure = curves_figure([line("a", [1.0, 2.0], std=0.25)], axis="rounds", title="t", y_label="y")
    (band,) = (c for c in figure.axes[0].collections if isinstance(c, PolyCollection))
    corners = band.get_paths()[0].vertices
    assert {(0.0, 0.75), (0.0, 1.25), (1.0, 1.75), (1.0, 2.25)} <= {
        tuple(map(float, corner)) for corner in corners
    }
    assert "Mean of up to 3 seeds ± one standard deviation." in texts(figure)


def test_on_a_log_axis_the_band_stops_at_the_floor() -> None:
    figure = curves_figure(
        [line("a", [1.0, 0.1], std=0.5)], axis="rounds", title="t", y_label="y", scale="log"
    )
    (band,) = (c for c in figure.axes[0].collections if isinstance(c, PolyCollection))
    assert band.get_paths()[0].vertices[:, 1].min() == pytest.approx(0.1)


def test_against_bytes_who_sends_nothing_is_a_level_line_at_its_last_value() -> None:
    silent = line("silent", [0.5, 0.7], bytes_per_round=0, style=1)
    figure = curves_figure([line("loud", [0.5, 0.8]), silent], axis="bytes", title="t", y_label="y")
    loud_line, silent_line = figure.axes[0].lines
    np.testing.assert_array_equal(loud_line.get_xdata(), [0, 10])
    np.testing.assert_array_equal(ydata(silent_line), [0.7, 0.7])
    assert "silent (sends nothing)" in texts(figure)


def test_references_are_inside_the_axes_and_named_below_them() -> None:
    figure = curves_figure(
        [line("a", [0.5, 0.7])],
        axis="rounds",
        title="t",
        y_label="y",
        references=[Reference(label="ceiling", level=0.9), Reference(label="chance", level=0.5)],
    )
    low, high = figure.axes[0].get_ylim()
    assert low < 0.5
    assert high > 0.9
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["ceiling", "chance"]
    assert not figure.axes[0].texts


def test_curves_differ_without_colour() -> None:
    looks = [line_style(i) for i in range(30)]
    assert len({(str(look["linestyle"]), look["marker"]) for look in looks}) == 30


def test_labels_are_text_and_never_formulas() -> None:
    figure = curves_figure(
        [line("$x^{", [0.0, 1.0]), line("_hidden\x00\nline", [1.0, 0.0], style=1)],
        axis="rounds",
        title="t",
        y_label="y",
    )
    assert r"\$x^{ _hidden line" in texts(figure)  # drawn by `texts`: a formula would have raised


def test_a_study_shows_mean_and_deviation_at_its_x() -> None:
    points = [
        StudyPoint(order=0, label="E = 8", x=8.0, values=[1.0, 3.0]),
        StudyPoint(order=1, label="E = 2", x=2.0, values=[5.0, 5.0]),
    ]
    figure = study_figure(points, title="t", x_label="E", y_label="y")
    joined = figure.axes[0].lines[0]
    np.testing.assert_array_equal(joined.get_xdata(), [2, 8])
    np.testing.assert_array_equal(ydata(joined), [5, 2])
    _, _, (bars,) = figure.axes[0].containers[0]
    spans = sorted(tuple(np.round(path.vertices[:, 1], 6)) for path in bars.get_paths())
    assert spans == [(round(2 - 2**0.5, 6), round(2 + 2**0.5, 6)), (5.0, 5.0)]


def test_a_study_of_names_keeps_their_order_and_equal_labels_apart() -> None:
    points = [
        StudyPoint(order=i, label=name, x=None, values=[1.0])
        for i, name in enumerate(["star", "ring", "star"])
    ]
    figure = study_figure(points, title="t", x_label="", y_label="y")
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["star", "ring", "star"]
    np.testing.assert_array_equal(figure.axes[0].get_xticks(), [0, 1, 2])


def test_a_study_says_what_it_does_not_draw() -> None:
    points = [
        StudyPoint(order=i, label=str(i), x=float(i), values=[10.0**-i, np.nan, -1.0]) for i in range(2)
    ]
    assert "4 values are not finite or not positive" in texts(
        study_figure(points, title="t", x_label="x", y_label="y", scale="log")
    )


def test_rounding_noise_does_not_squash_a_study() -> None:
    points = [
        StudyPoint(order=i, label=str(i), x=float(i), values=[v]) for i, v in enumerate([3.0, 0.2, 1e-13])
    ]
    figure = study_figure(points, title="t", x_label="x", y_label="y", scale="log")
    said = "1 value is not finite or not positive, or more than 9 decades below the largest, and not drawn"
    assert said in texts(figure).replace("\n", " ")
    assert figure.axes[0].get_ylim()[0] > 1e-3


def test_the_frontier_ends_in_a_large_marker_with_its_error() -> None:
    figure = frontier_figure(
        [Frontier(label="a", style=0, kl=[0.0, 2.0], reward=[0.0, 1.5], kl_error=0.5)],
        title="t",
        y_label="margin",
    )
    path, end = figure.axes[0].lines[:2]
    np.testing.assert_array_equal(path.get_xdata(), [0, 2])
    assert end.get_markersize() > path.get_markersize()
    (bar,) = figure.axes[0].collections
    np.testing.assert_array_equal(bar.get_paths()[0].vertices, [[1.5, 1.5], [2.5, 1.5]])


def test_each_series_of_a_study_is_a_curve_of_its_own() -> None:
    values = {"FedDPO": [(0.0, 1.0), (2.0, 3.0)], "Local only": [(0.0, 5.0), (2.0, 7.0)]}
    points = [
        StudyPoint(order=order, label=f"{name}, {x}", x=x, values=[y], series=name)
        for order, (name, x, y) in enumerate((name, x, y) for name, both in values.items() for x, y in both)
    ]
    figure = study_figure(points, title="t", x_label="h", y_label="y")
    drawn = [line.get_xydata().tolist() for line in figure.axes[0].lines if line.get_linestyle() == "-"]
    assert drawn == [[list(point) for point in both] for both in values.values()]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(values)
