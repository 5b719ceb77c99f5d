"""Pictures from arrays: exact pixels where pixels matter, the figure's structure elsewhere."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from sptseg.analysis import charts
from sptseg.datasets import images, plots

RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)
PALETTE = (RED, GREEN, BLUE)
NAMES = ("sky", "water", "boat")


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def halves(size: int = 40) -> np.ndarray:
    """Labels: sky above, water below."""
    labels = np.zeros((size, size), np.int64)
    labels[size // 2 :] = 1
    return labels


def words(figure: Figure) -> list[str]:
    """All text in a figure's axes: titles, notes in the picture, legend entries."""
    found = []
    for ax in figure.axes:
        legend = ax.get_legend()
        found += [ax.get_title(), ax.get_title(loc="left"), *(text.get_text() for text in ax.texts)]
        found += [text.get_text() for text in legend.get_texts()] if legend else []
    return [word for word in found if word]


def test_plots_work_without_pyplot_and_torch() -> None:
    room = Path(plots.__file__).parent
    code = f"""
import sys, types
for name, folder in (("sptseg", {str(room.parent)!r}), ("sptseg.datasets", {str(room)!r})):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from sptseg.datasets import plots
plots.png_bytes(plots.Plot(1, 1))
print({{"torch", "matplotlib.pyplot"}} & set(sys.modules))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# label colours


def test_colourise_looks_up_each_label() -> None:
    colours = plots.colourise(np.array([[0, 1], [2, 255]]), PALETTE, ignore=(9, 8, 7))
    assert colours.dtype == np.uint8 and colours.tolist() == [[[200, 0, 0], [0, 200, 0]], [[0, 0, 200], [9, 8, 7]]]


@pytest.mark.parametrize("label", [3, -1, 254, 256])
def test_colourise_refuses_labels_without_a_colour(label: int) -> None:
    with pytest.raises(ValueError, match=f"label {label} has no colour; wanted 0 to 2, or 255"):
        plots.colourise(np.array([[0, label]]), PALETTE)


def test_borders_stand_where_the_class_changes() -> None:
    labels = np.array([[0, 0, 1], [0, 0, 1], [2, 2, 2]])
    assert plots.borders(labels).tolist() == [[False, True, False], [True, True, True], [False, False, False]]
    assert plots.borders(labels, 2).tolist() == [[True] * 3, [True] * 3, [False] * 3]
    assert not plots.borders(np.zeros((1, 1), int)).any()


def test_overlay_mixes_grey_and_class_colour_and_darkens_borders() -> None:
    image = np.full((4, 4, 3), (90, 180, 30), np.uint8)
    labels = np.zeros((4, 4), int)
    labels[2:] = 1
    before = image.copy()
    mixed = plots.overlay(image, labels, PALETTE, alpha=0.5)
    grey = 0.299 * 90 + 0.587 * 180 + 0.114 * 30
    assert mixed.dtype == np.uint8 and mixed[0, 0] == pytest.approx([grey / 2 + 100, grey / 2, grey / 2], abs=0.5)
    assert mixed[3, 3] == pytest.approx([grey / 2, grey / 2 + 100, grey / 2], abs=0.5)
    assert (mixed[1] < 0.3 * mixed[0]).sum() == 12, "the row above the change is dark"
    assert (image == before).all()


def test_overlay_leaves_ignored_pixels_as_they_are() -> None:
    image = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    assert (plots.overlay(image, np.full((6, 5), 255), PALETTE) == image).all()


def test_overlay_refuses_labels_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"the image is \(4, 4\) and the labels \(2, 2\)"):
        plots.overlay(np.zeros((4, 4, 3), np.uint8), np.zeros((2, 2), int), PALETTE)


def test_enlarge_repeats_labels_and_smooths_images() -> None:
    assert images.enlarge(np.array([[0, 7]]), 2).tolist() == [[0, 0, 7, 7], [0, 0, 7, 7]]
    image = np.zeros((3, 2, 3), np.uint8)
    image[:, 1] = 255
    large = images.enlarge(image, 4)
    assert large.shape == (12, 8, 3) and len(np.unique(large)) > 2


def test_present_sorts_by_area_and_adds_what_only_others_have() -> None:
    labels = np.array([[1, 1, 1], [2, 2, 255]])
    assert plots.present(labels) == [1, 2]
    assert plots.present(labels, None, np.array([[0, 2, 255]])) == [1, 2, 0]


# names in regions


def test_names_stand_inside_their_regions() -> None:
    labels = halves(100)
    labels[70:95, 10:60] = 2
    spots = {name: (x, y) for name, x, y in plots.label_spots(labels, NAMES)}
    assert set(spots) == set(NAMES)
    for name, (x, y) in spots.items():
        assert labels[int(100 * y), int(100 * x)] == NAMES.index(name)
    assert spots["sky"] == pytest.approx((0.5, 0.25), abs=0.02), "the middle, where it is free"


def test_a_ring_gets_its_name_on_the_ring() -> None:
    y, x = np.mgrid[:200, :200] - 99.5
    radius = np.hypot(x, y)
    labels = np.where((radius > 50) & (radius < 95), 1, 0)
    spots = {name: (x, y) for name, x, y in plots.label_spots(labels, NAMES)}
    x, y = spots["water"]
    assert labels[int(200 * y), int(200 * x)] == 1, "the mean of its pixels would lie in the hole"


def test_names_that_do_not_fit_are_left_out() -> None:
    labels = halves(100)
    labels[60:64, 10:90] = 2
    assert {name for name, _, _ in plots.label_spots(labels, NAMES)} == {"sky", "water"}
    assert not list(plots.label_spots(halves(100), ["a very long name that no picture has any room for"] * 2))


# PNG


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_png_keeps_every_pixel(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert (decoded(images.png(array)) == array).all()


@pytest.mark.parametrize("array", [np.zeros((2, 2)), np.zeros((2, 2, 2), np.uint8), np.zeros(4, np.uint8)])
def test_png_refuses_what_is_no_picture(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"wanted uint8 \(H,W\) or \(H,W,3\)"):
        images.png(array)


def test_png_bytes_have_the_figures_size_and_are_the_same_again() -> None:
    def draw(dpi: float | None = None) -> bytes:
        return plots.png_bytes(charts.training_curves([{"iteration": 1, "total": 1.0}]), dpi)

    assert decoded(draw()).shape[:2] == (290, 400) and decoded(draw(50)).shape[:2] == (145, 200)
    assert draw() == draw()


def test_notebooks_show_figures_by_themselves() -> None:
    figure = plots.Plot(1, 1)
    assert decoded(figure._repr_png_()).shape == (100, 100, 4)


# figures


def test_segmentation_shows_picture_truth_prediction_and_a_legend_of_what_occurs() -> None:
    image, labels = np.full((60, 60, 3), 120, np.uint8), halves(60)
    truth = labels.copy()
    truth[:9, :9] = 255
    figure = plots.show_segmentation(image, labels, NAMES, PALETTE, unseen=("water",), truth=truth, title="Scene")
    assert figure.get_suptitle() == "Scene"
    assert [ax.get_title() for ax in figure.axes] == ["picture", "truth", "prediction", ""]
    pictures = [np.asarray(ax.images[0].get_array()) for ax in figure.axes[:3]]
    assert (pictures[0] == image).all() and (pictures[1][:8, :8] == image[:8, :8]).all()
    assert (pictures[2] == plots.overlay(image, labels, PALETTE)).all()
    assert [text.get_text() for text in figure.axes[2].texts] == ["sky", "water*"]
    legend = figure.axes[3].get_legend()
    assert legend and [text.get_text() for text in legend.get_texts()] == ["sky", "water*", "* unseen in training"]
    assert legend.get_patches()[1].get_facecolor()[:3] == pytest.approx([0, 200 / 255, 0])


def test_segmentation_without_truth_or_unseen_classes_says_nothing_of_them() -> None:
    figure = plots.show_segmentation(np.zeros((30, 90, 3), np.uint8), np.zeros((30, 90), int), NAMES, PALETTE)
    assert words(figure) == ["picture", "prediction", "sky", "sky"]
    assert figure.get_suptitle() == ""
    decoded(plots.png_bytes(figure))


def test_contact_sheet_places_pictures_row_by_row() -> None:
    pictures = [[np.full((4, 4, 3), 10 * i + j, np.uint8) for j in range(3)] for i in range(2)]
    figure = plots.contact_sheet(pictures, ["a", "b", "c"], ["first", "second"])
    assert [int(np.asarray(ax.images[0].get_array())[0, 0, 0]) for ax in figure.axes] == [0, 1, 2, 10, 11, 12]
    assert [ax.get_title() for ax in figure.axes] == ["a", "b", "c", "", "", ""]
    assert [ax.get_ylabel() for ax in figure.axes] == ["first", "", "", "second", "", ""]


@pytest.mark.parametrize("rows", [[], [[np.zeros((2, 2), np.uint8)]]])
def test_contact_sheet_wants_a_title_per_column(rows: list[list[np.ndarray]]) -> None:
    with pytest.raises(ValueError, match="2 titles, rows of .* wanted one per column"):
        plots.contact_sheet(rows, ["a", "b"])


def test_score_maps_run_from_0_to_1_or_as_told() -> None:
    figure = plots.Plot(3, 3)
    scores = np.full((4, 4), 0.25)
    plots.score_map(figure.subplots(), scores, "a red boat")
    picture, bar = figure.axes
    assert picture.images[0].get_clim() == (0, 1) and picture.get_title() == "a red boat"
    assert bar.get_ylabel() == "score" and [text.get_text() for text in bar.get_yticklabels()] == ["0", "0.5", "1"]
    plots.score_map(picture, scores, "again", highest=0.3)
    assert picture.images[1].get_clim() == (0, 0.3)


def test_grey_pictures_keep_their_brightness() -> None:
    figure = plots.contact_sheet([[np.full((4, 4), 128, np.uint8)]], ["grey"])
    assert figure.axes[0].images[0].to_rgba(np.array([128]))[0, 0] == pytest.approx(128 / 255, abs=0.01)


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
    decoded(plots.png_bytes(figure))


def test_class_bars_refuse_more_models_than_markers() -> None:
    with pytest.raises(ValueError, match="6 other models; wanted 5 at most"):
        charts.class_iou_bars({"a": 1.0}, (), "IoU", others={str(i): {"a": 0.5} for i in range(6)})


def test_training_curves_show_what_the_history_holds() -> None:
    history = [
        {
            "iteration": i,
            "focal": 2.0 / i,
            "dice": 1.0 / i,
            "total": 3.0 / i,
            "learning_rate": 1e-4,
            "images_per_second": 9,
        }
        for i in range(1, 5)
    ]
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


def test_training_curves_refuse_an_empty_history() -> None:
    with pytest.raises(ValueError, match="history is empty"):
        charts.training_curves([])


def test_seen_and_unseen_colours_differ_in_lightness() -> None:
    seen, unseen = (np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)) for colour in (plots.BLUE, plots.ORANGE))
    assert abs(seen - unseen) > 0.2


# label values and seeds


def test_label_values_are_written_into_their_pixels() -> None:
    figure = plots.Plot(2, 2)
    charts.show_label_values(figure.subplots(), np.array([[0, 2], [255, 1]]), PALETTE, "labels")
    (ax,) = figure.axes
    assert {(t.get_text(), *t.get_position()) for t in ax.texts} == {
        ("0", 0, 0), ("2", 1, 0), ("255", 0, 1), ("1", 1, 1),
    }  # fmt: skip
    assert (np.array(ax.images[0].get_array())[1, 0] == 255).all()


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


def test_seed_dots_share_row_names_only_if_they_are_the_same() -> None:
    same = charts.seed_dots({"x": {"a": [1.0]}, "y": {"a": [2.0]}}, "", "")
    other = charts.seed_dots({"x": {"a": [1.0]}, "y": {"b": [2.0]}}, "", "")
    names = [[[t.get_text() for t in ax.get_yticklabels()] for ax in figure.axes] for figure in (same, other)]
    assert names == [[["a"], [""]], [["a"], ["b"]]]


def test_seed_dots_refuse_more_seeds_than_markers() -> None:
    with pytest.raises(ValueError, match="a row has 6 values; wanted 5 at most"):
        charts.seed_dots({"x": {"a": [1.0] * 6}}, "", "")
