"""Figures of the analyses: what is drawn is what was measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sptseg.analysis import charts
from sptseg.analysis.failures import ClassRow
from sptseg.analysis.spectra import OCTAVES, Band, Change, FilterRadial, PromptEffect, RadialPower
from sptseg.datasets import plots
from sptseg.datasets.splits import Split

POWER = RadialPower(np.array([0, 0.25, 0.5, 0.75]), np.array([[0, 4.0, 1.0, 9.0]]), np.array([1, 8, 12, 16]))


def xs(line: Any) -> list[float]:
    return line.get_xdata().tolist()


def ys(line: Any) -> list[float]:
    return line.get_ydata().tolist()


@pytest.mark.parametrize(
    ("band", "name"),
    [(OCTAVES[0], "below 1/64"), (OCTAVES[3], "1/16 to 1/8"), (OCTAVES[-1], "above 1/4"), ((0.1, 0.3), "1/10 to 0.3")],
)
def test_band_names(band: Band, name: str) -> None:
    assert charts.band_name(band) == name


def test_spectra_are_drawn_up_to_a_half_and_the_law_has_its_slope() -> None:
    figure = charts.power_spectra({"left": {"a": POWER}, "right": {"a": POWER, "b": POWER}}, "pixel", "Title", law=-2)
    left, right = figure.axes
    curve, law = left.lines
    assert xs(curve) == [0.25, 0.5] and ys(curve) == [4, 1]
    (x0, x1), (y0, y1) = np.log(xs(law)), np.log(ys(law))
    assert (y1 - y0) / (x1 - x0) == pytest.approx(-2)
    assert len(right.lines) == 3 and "pixel" in right.get_xlabel()
    looks = {(line.get_linestyle(), line.get_marker()) for line in right.lines}
    assert len(looks) == 3, "told apart without colour"


def test_changes_are_drawn_in_points_with_their_intervals() -> None:
    changes = {"seen": [Change(-0.1, -0.2, -0.05)], "unseen": [Change(0.01, 0.0, 0.03)]}
    (ax,) = charts.changes_by_group(["a band"], changes, "change", "Title").axes
    assert [ys(line)[0] for line in ax.lines if line.get_marker() in plots.MARKERS] == [-10, pytest.approx(1)]
    containers: Any = ax.containers
    ends = [container[2][0].get_segments()[0][:, 1] for container in containers]
    assert np.allclose(ends, [[-20, -5], [0, 3]])


def test_the_class_table_starts_with_the_class_hurt_most() -> None:
    sure, unsure, none = Change(-0.4, -0.5, -0.3), Change(-0.1, -0.2, 0.1), Change(np.nan, np.nan, np.nan)
    figure = charts.class_band_table({"tree": [unsure, none], "car": [sure, unsure]}, ["low", "high"], ["car"], "Title")
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["car*", "tree"]
    assert [text.get_text() for text in ax.texts] == ["-40", "(-10)", "(-10)"]  # and nothing where nothing is known


def test_filter_curves_draw_means_and_percentiles() -> None:
    spread = np.array([[0.1, 0.2], [0.2, 0.3], [0.3, 0.4]])
    radial = FilterRadial(np.array([0, 0.5]), np.array([0.2, 0.3]), spread, np.array([80.0, 90]), 100 * spread)
    gain, phase = charts.filter_curves({"learned": radial, "start": radial}, "Title").axes
    assert [ys(line) for line in gain.lines] == [[0.2, 0.3]] * 2
    assert ys(phase.lines[0]) == [80, 90] and phase.get_ylim() == (0, 180)
    area = np.asarray(gain.collections[0].get_paths()[0].vertices)[:, 1]
    assert area.min() == 0.1 and area.max() == 0.4


def test_prompt_energy_hatches_blocks_that_do_not_use_it() -> None:
    effects = [PromptEffect(block, block == 0, 0.01 * (1 + block), 0.0, POWER, POWER) for block in range(2)]
    (ax,) = charts.prompt_energy(effects, "Title").axes
    bars: Any = ax.patches
    assert [(bar.get_height(), bar.get_hatch()) for bar in bars] == [(1, None), (2, "///")]
    assert [text.get_text() for text in ax.texts] == ["1.0 %", "2.0 %"]


def test_small_maps_show_their_values_on_one_scale() -> None:
    figure = charts.wave_maps({"a": np.array([[1.0, -3.0]]), "b": np.array([[0.5, 0.25]])}, "Title", "value")
    first, second, _ = figure.axes
    assert [text.get_text() for text in (*first.texts, *second.texts)] == ["1", "-3", "0.5", "0.25"]
    assert first.images[0].get_clim() == second.images[0].get_clim() == (-3, 3)
    only, _ = charts.wave_maps({"a": np.full((9, 9), 2.0)}, "Title", "share").axes
    assert only.images[0].get_clim() == (0, 2) and not only.texts


def test_bars_stand_in_their_order_with_their_values_behind_them() -> None:
    ax = plots.Plot(3, 2).subplots()
    charts.bars(ax, {"first": 2.0, "second": -1.0}, "points", "Title", "{:+.1f}")
    patches: Any = ax.patches
    assert [bar.get_width() for bar in patches] == [2, -1]
    assert [text.get_text() for text in ax.texts] == ["+2.0", "-1.0"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["first", "second"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "the first on top"


def test_intervals_are_drawn_in_percent() -> None:
    ax = plots.Plot(3, 2).subplots()
    charts.intervals(ax, {"a": (0.5, 0.4, 0.7)}, "%", "Title")
    whisker, ends, dot = ax.lines
    assert np.allclose(xs(whisker), [40, 70]) and np.allclose(xs(ends), [40, 70]) and np.allclose(xs(dot), 50)
    assert ax.texts[0].get_text() == "50.0"


def test_lines_over_names_and_over_numbers() -> None:
    left, right = plots.Plot(6, 2).subplots(1, 2)
    charts.lines(left, ["1", "2+"], {"a": [0.5, 0.6], "b": [0.1, 0.2]}, "x", "%", "Title")
    assert xs(left.lines[0]) == [0, 1] and np.allclose(ys(left.lines[1]), [10, 20])
    assert [label.get_text() for label in left.get_xticklabels()] == ["1", "2+"]
    assert len({(line.get_linestyle(), line.get_marker()) for line in left.lines}) == 2, "told apart without colour"
    charts.lines(right, [-0.1, 0.4], {"a": [0.5, 0.6]}, "x", "%", "Title")
    assert xs(right.lines[0]) == [-0.1, 0.4] and right.get_legend() is None


def test_the_scatter_names_the_lowest_classes_and_leaves_absent_ones_out() -> None:
    nan = float("nan")
    rows = [
        ClassRow("cow", False, 0.5, 3, 0.2, 0.9), ClassRow("sheep", True, 0.1, 1, 0.3, 0.4),
        ClassRow("sky", False, 0.2, 2, 0.3, 0.6), ClassRow("kite", False, 0.0, 0, nan, nan),
    ]  # fmt: skip
    ax = plots.Plot(3, 2).subplots()
    charts.class_scatter(ax, rows, [row.region for row in rows], "size", "Title", named=2)
    seen, unseen = ax.lines
    assert np.allclose(xs(seen), [20, 30]) and np.allclose(ys(seen), [90, 60]) and np.allclose(ys(unseen), [40])
    assert seen.get_marker() != unseen.get_marker()
    assert [text.get_text() for text in ax.texts] == ["sheep", "sky"]


def test_a_sheet_of_masks_has_names_over_masks_only() -> None:
    split = Split.from_names("farm", ["cow", "sheep"], unseen=["sheep"])
    image, mask = np.full((64, 64, 3), 9, np.uint8), np.ones((64, 64), np.uint8)
    nothing = np.full((64, 64), 255, np.uint8)
    figure = charts.mask_sheet([(image, [mask, nothing])], ["picture", "truth", "errors"], split, ["a row"])
    picture, truth, errors = figure.axes
    assert [len(ax.texts) for ax in (picture, truth, errors)] == [0, 1, 0]
    assert truth.texts[0].get_text() == "sheep*" and picture.get_ylabel() == "a row"
    assert (np.asarray(errors.images[0].get_array()) == image).all(), "ignored pixels stay as they are"
