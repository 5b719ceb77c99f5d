"""Figures of scores, training and seeds: what is drawn is what was measured."""

from __future__ import annotations

import numpy as np
import pytest

from sptseg.analysis import charts
from sptseg.datasets import plots

PALETTE = ((200, 0, 0), (0, 200, 0), (0, 0, 200))


def test_class_bars_are_sorted_split_into_seen_and_unseen_and_compared() -> None:
    iou = {"sky": 0.2, "boat": 0.9, "water": 0.5, "fish": float("nan"), "tree": 0.7}
    other = dict.fromkeys(iou, 0.4)
    figure = charts.class_iou_bars(iou, ("water", "fish", "tree"), "IoU", "SPT-SEG", {"dense CLIP": other})
    seen, unseen, key = figure.axes
    assert [label.get_text() for label in seen.get_yticklabels()] == ["boat", "sky"]
    assert [label.get_text() for label in unseen.get_yticklabels()] == ["tree", "water", "fish"]
    widths = [bar.get_width() for bar in unseen.patches]  # pyright: ignore[reportAttributeAccessIssue]
    assert widths == pytest.approx([70, 50, 0])
    assert [text.get_text() for text in unseen.texts] == ["not in these pictures"]
    assert unseen.get_title(loc="left") == "unseen* classes, mean 60.0 %" and seen.get_xlabel() == "IoU (%)"
    assert seen.lines[0].get_xdata() == pytest.approx([40, 40])
    assert not seen.patches[0].get_hatch() and unseen.patches[0].get_hatch(), "not by colour alone"
    legend = key.get_legend()
    assert legend and [text.get_text() for text in legend.get_texts()][2:] == ["dense CLIP"]


def test_class_bars_without_unseen_classes_draw() -> None:
    figure = charts.class_iou_bars({"sky": 0.2}, (), "IoU")
    assert figure.axes[1].get_title(loc="left") == "unseen* classes, none"


def test_training_curves_show_what_the_history_holds() -> None:
    history = [
        {
            "iteration": i, "focal": 2.0 / i, "dice": 1.0 / i, "total": 3.0 / i, "learning_rate": 1e-4,
            "images_per_second": 9,
        }
        for i in range(1, 5)
    ]  # fmt: skip
    figure = charts.training_curves(history)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["Loss (weighted terms)", "Learning rate"]
    lines = {str(line.get_label()): line for line in figure.axes[0].lines}
    assert set(lines) == {"total", "focal", "dice"} and len({line.get_linestyle() for line in lines.values()}) == 3
    assert lines["total"].get_xdata() == pytest.approx([1, 2, 3, 4])
    assert lines["total"].get_ydata() == pytest.approx([3, 1.5, 1, 0.75])
    assert figure.axes[0].get_ylim()[0] == 0 and {ax.get_xlabel() for ax in figure.axes} == {"iteration"}


def test_validation_figures_show_where_they_were_taken_and_in_percent() -> None:
    history: list[dict] = [{"iteration": i, "total": 1.0} for i in range(1, 5)]
    history[1] |= {"miou_seen": 0.5, "miou_unseen": None, "hiou": None}
    history[3] |= {"miou_seen": 0.75, "miou_unseen": 0.25, "hiou": 0.375}
    panel = charts.training_curves(history).axes[1]
    assert panel.get_title(loc="left") == "Validation (%)" and panel.get_ylim() == (0, 100)
    points = {str(line.get_label()): np.column_stack(line.get_data()).tolist() for line in panel.lines}
    assert points == {"mIoU, seen": [[2, 50], [4, 75]], "mIoU, unseen*": [[4, 25]], "hIoU": [[4, 37.5]]}


def test_long_histories_are_drawn_as_block_means() -> None:
    history = [{"iteration": i, "total": i % 2} for i in range(1, 1202)]
    (line,) = charts.training_curves(history).axes[0].lines
    x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    assert len(x) == 301
    assert y[:2] == pytest.approx([0.5, 0.5]) and x[0] == 2.5


def test_seed_dots_have_a_marker_per_seed_and_a_bar_at_the_mean() -> None:
    figure = charts.seed_dots({"hIoU": {"a": [1.0, 3.0], "b": [5.0]}}, "hIoU (%)", "two", zero=True)
    (ax,) = figure.axes
    dots = [line for line in ax.lines if line.get_marker() in plots.MARKERS]
    assert [(*np.asarray(line.get_xydata())[0], line.get_marker()) for line in dots] == [
        (1, 0, "D"),
        (3, 0, "o"),
        (5, 1, "D"),
    ]
    bars = [np.asarray(line.get_xydata())[:, 0].tolist() for line in ax.lines if line.get_color() == plots.VERMILION]
    assert bars == [[2, 2], [5, 5]]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["seed 0", "seed 1", "mean"]


def test_seed_dots_refuse_more_seeds_than_markers() -> None:
    with pytest.raises(ValueError, match="a row has 6 values; wanted 5 at most"):
        charts.seed_dots({"x": {"a": [1.0] * 6}}, "", "")
