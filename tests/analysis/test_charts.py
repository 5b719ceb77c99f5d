"""Figures of the analyses: what is drawn is what was measured."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from sptseg.analysis import charts
from sptseg.analysis.spectra import RadialPower
from sptseg.datasets import Split, plots
from sptseg.inference import Change

POWER = RadialPower(np.array([0, 0.25, 0.5, 0.75]), np.array([[0, 4.0, 1.0, 9.0]]), np.array([1, 8, 12, 16]))


def points(line: Any) -> Any:
    return pytest.approx(line.get_xydata())


def words(texts: Any) -> list[str]:
    return [text.get_text() for text in texts]


def looks(ax: Axes) -> set[tuple[Any, Any]]:
    """How curves are told apart without colour."""
    return {(line.get_linestyle(), line.get_marker()) for line in ax.lines}


def test_spectra_are_drawn_up_to_a_half_and_the_law_has_its_slope() -> None:
    figure = charts.power_spectra({"left": {"a": POWER}, "right": {"a": POWER, "b": POWER}}, "pixel", "Title", law=-2)
    left, right = figure.axes
    curve, law = left.lines
    assert points(curve) == np.array([[0.25, 4], [0.5, 1]])
    (x0, y0), (x1, y1) = np.log(np.asarray(law.get_xydata()))
    assert (y1 - y0) / (x1 - x0) == pytest.approx(-2)
    assert len(looks(right)) == len(right.lines) == 3 and "pixel" in right.get_xlabel()


def test_changes_and_differences_are_drawn_in_points_with_their_intervals() -> None:
    changes = {"seen": [Change(-0.1, -0.2, -0.05)], "unseen": [Change(0.01, 0.0, 0.03)]}
    (ax,) = charts.changes_by_group(["a band"], changes, "change", "Title").axes
    bars: Any = ax.containers
    assert [bar[0].get_ydata().item() for bar in bars] == pytest.approx([-10, 1])
    assert np.allclose([bar[2][0].get_segments()[0][:, 1] for bar in bars], [[-20, -5], [0, 3]])
    pair = {"miou_seen": [0.02, -0.01, 0.05], "miou_unseen": [0.1, 0.05, 0.2]}
    figure = charts.differences({"a part": pair}, "Title")
    for ax, (value, low, high) in zip(figure.axes, ((2, -1, 5), (10, 5, 20)), strict=True):
        interval, mark, zero = ax.lines
        assert points(interval) == np.array([[low, 0], [high, 0]])
        assert points(mark) == np.array([[value, 0]]) and list(zero.get_xdata()) == [0, 0]


def test_the_class_table_starts_with_the_class_hurt_most() -> None:
    sure, unsure, none = Change(-0.4, -0.5, -0.3), Change(-0.1, -0.2, 0.1), Change(np.nan, np.nan, np.nan)
    figure = charts.class_band_table({"tree": [unsure, none], "car": [sure, unsure]}, ["low", "high"], ["car"], "Title")
    (ax,) = figure.axes
    assert words(ax.get_yticklabels()) == ["car*", "tree"] and words(ax.texts) == ["-40", "(-10)", "(-10)"]


def test_filter_curves_draw_means_and_percentiles() -> None:
    columns = {"gain": [0.2, 0.3], "gain_low": [0.1, 0.2], "gain_high": [0.3, 0.4]}
    columns |= {"phase": [80, 90], "phase_low": [10, 20], "phase_high": [150, 160]}
    radial = pd.DataFrame(columns, [0, 0.5])
    gain, phase = charts.filter_curves({"learned": radial, "start": radial}, "Title").axes
    assert [points(line) for line in gain.lines] == [np.array([[0, 0.2], [0.5, 0.3]])] * 2 and len(looks(gain)) == 2
    assert points(phase.lines[0]) == np.array([[0, 80], [0.5, 90]]) and phase.get_ylim() == (0, 180)
    area = np.asarray(gain.collections[0].get_paths()[0].vertices)[:, 1]
    assert area.min() == 0.1 and area.max() == 0.4


def test_small_maps_show_their_values_on_one_scale() -> None:
    figure = charts.wave_maps({"a": np.array([[1.0, -3.0]]), "b": np.array([[0.5, 0.25]])}, "Title", "value")
    first, second, _ = figure.axes
    assert words([*first.texts, *second.texts]) == ["1", "-3", "0.5", "0.25"]
    assert first.images[0].get_clim() == second.images[0].get_clim() == (-3, 3)


def test_bars_and_intervals_stand_in_their_order_with_their_values() -> None:
    left, right = plots.Plot(6, 2).subplots(1, 2)
    charts.bars(left, pd.Series({"first": 2.0, "second": -1.0}), "points", "Title", "{:+.1f}")
    bars: Any = left.patches
    assert [bar.get_width() for bar in bars] == [2, -1] and words(left.texts) == ["+2.0", "-1.0"]
    assert words(left.get_yticklabels()) == ["first", "second"] and left.yaxis_inverted(), "the first on top"
    charts.intervals(right, {"a": (0.5, 0.4, 0.7)}, "%", "Title")
    ends, dot = right.lines
    assert points(ends) == np.array([[40, 0], [70, 0]]) and points(dot) == np.array([[50, 0]])
    assert words(right.texts) == ["50.0"]


def test_the_scatter_names_the_lowest_classes_and_leaves_absent_ones_out() -> None:
    ax = plots.Plot(3, 2).subplots()
    columns = {"unseen": [False, True, False, False], "pictures": [3, 1, 2, 0]}
    columns |= {"region": [0.2, 0.3, 0.3, np.nan], "iou": [0.9, 0.4, 0.6, np.nan]}
    classes = pd.DataFrame(columns, ["cow", "sheep", "sky", "kite"])
    charts.class_scatter(ax, classes, "region", "size", "Title", named=2)
    seen, unseen = ax.lines
    assert points(seen) == np.array([[20, 90], [30, 60]]) and points(unseen) == np.array([[30, 40]])
    assert len(looks(ax)) == 2 and words(ax.texts) == ["sheep", "sky"]


def test_a_sheet_of_masks_has_names_over_masks_only() -> None:
    split = Split.from_names("farm", ["cow", "sheep"], unseen=["sheep"])
    image, mask, nothing = np.full((64, 64, 3), 9, np.uint8), *np.full((2, 64, 64), [[[1]], [[255]]], np.uint8)
    figure = charts.mask_sheet([(image, [mask, nothing])], ["picture", "truth", "errors"], split, ["a row"])
    picture, _, errors = figure.axes
    assert [words(ax.texts) for ax in figure.axes] == [[], ["sheep*"], []] and picture.get_ylabel() == "a row"
    assert (np.asarray(errors.images[0].get_array()) == image).all(), "ignored pixels stay as they are"


def test_class_bars_are_sorted_split_into_seen_and_unseen_and_compared() -> None:
    iou = {"sky": 0.2, "boat": 0.9, "water": 0.5, "fish": float("nan"), "tree": 0.7}
    other = dict.fromkeys(iou, 0.4)
    figure = charts.class_iou_bars(iou, ("water", "fish", "tree"), "IoU", "SPT-SEG", {"dense CLIP": other})
    seen, unseen, key = figure.axes
    assert words(seen.get_yticklabels()) == ["boat", "sky"]
    assert words(unseen.get_yticklabels()) == ["tree", "water", "fish"]
    bars: Any = unseen.patches
    assert [bar.get_width() for bar in bars] == pytest.approx([70, 50, 0])
    assert words(unseen.texts) == ["not in these pictures"]
    assert unseen.get_title(loc="left") == "unseen* classes, mean 60.0 %" and seen.get_xlabel() == "IoU (%)"
    assert seen.lines[0].get_xdata() == pytest.approx([40, 40])
    assert not seen.patches[0].get_hatch() and bars[0].get_hatch(), "not by colour alone"
    assert words(key.get_legend().get_texts())[2:] == ["dense CLIP"]


def test_training_curves_show_the_history_and_where_it_was_validated() -> None:
    history: list[dict] = [{"iteration": i, "focal": 2 / i, "total": 3 / i, "learning_rate": 1} for i in range(1, 5)]
    history[1] |= {"miou_seen": 0.5, "miou_unseen": None, "hiou": None}
    history[3] |= {"miou_seen": 0.75, "miou_unseen": 0.25, "hiou": 0.375}
    losses, rate, validation = charts.training_curves(history).axes
    titles = [ax.get_title(loc="left") for ax in (losses, rate, validation)]
    assert titles == ["Loss (weighted terms)", "Learning rate", "Validation (%)"]
    lines = {str(line.get_label()): line for line in losses.lines}
    assert set(lines) == {"total", "focal"} and len({line.get_linestyle() for line in lines.values()}) == 2
    assert points(lines["total"]) == np.array([[1, 3], [2, 1.5], [3, 1], [4, 0.75]])
    assert losses.get_ylim()[0] == 0 and validation.get_ylim() == (0, 100) and rate.get_xlabel() == "iteration"
    found = {str(line.get_label()): np.column_stack(line.get_data()).tolist() for line in validation.lines}
    assert found == {"mIoU, seen": [[2, 50], [4, 75]], "mIoU, unseen*": [[4, 25]], "hIoU": [[4, 37.5]]}
    (line,) = charts.training_curves([{"iteration": i, "total": i % 2} for i in range(1, 1202)]).axes[0].lines
    assert np.array_equal(np.asarray(line.get_xydata())[:2], [[2.5, 0.5], [6.5, 0.5]]), (
        "long histories as means of blocks"
    )


def test_seed_dots_have_a_marker_per_seed_and_a_bar_at_the_mean() -> None:
    figure = charts.seed_dots({"hIoU": {"a": [1.0, 3.0], "b": [5.0]}}, "hIoU (%)", "two", zero=True)
    (ax,) = figure.axes
    dots = [
        (*np.asarray(line.get_xydata())[0], line.get_marker())
        for line in ax.lines
        if line.get_marker() in plots.MARKERS
    ]
    assert dots == [(1, 0, "D"), (3, 0, "o"), (5, 1, "D")]
    bars = [np.asarray(line.get_xydata())[:, 0].tolist() for line in ax.lines if line.get_color() == plots.VERMILION]
    assert bars == [[2, 2], [5, 5]]
    assert words(ax.get_yticklabels()) == ["a", "b"]
    assert words(figure.legends[0].get_texts()) == ["seed 0", "seed 1", "mean"]
