"""Pictures from arrays: exact pixels where pixels matter, the figure's structure elsewhere."""

import numpy as np
import pytest

from sptseg.datasets import plots

PALETTE = ((200, 0, 0), (0, 200, 0), (0, 0, 200))
NAMES = ("sky", "water", "boat")


def halves(size: int) -> np.ndarray:
    """Labels: sky above, water below."""
    labels = np.zeros((size, size), np.int64)
    labels[size // 2 :] = 1
    return labels


def test_labels_have_colours_and_borders_stand_where_they_change() -> None:
    colours = plots.colourise(np.array([[0, 1], [2, 255]]), PALETTE, ignore=(9, 8, 7))
    assert colours.dtype == np.uint8 and colours.tolist() == [[[200, 0, 0], [0, 200, 0]], [[0, 0, 200], [9, 8, 7]]]
    labels = np.array([[0, 0, 1], [0, 0, 1], [2, 2, 2]])
    assert plots.borders(labels).tolist() == [[False, True, False], [True, True, True], [False, False, False]]
    assert plots.borders(labels, 2).tolist() == [[True] * 3, [True] * 3, [False] * 3]


def test_overlay_mixes_grey_and_class_colour_and_darkens_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.full((4, 4, 3), (90, 180, 30), np.uint8)
    for rows in (1000, 1):
        monkeypatch.setattr(plots, "ROWS_AT_ONCE", rows)
        mixed = plots.overlay(image, halves(4), PALETTE, alpha=0.5)
        grey = 0.299 * 90 + 0.587 * 180 + 0.114 * 30
        assert mixed.dtype == np.uint8 and mixed[0, 0] == pytest.approx([grey / 2 + 100, grey / 2, grey / 2], abs=0.5)
        assert mixed[3, 3] == pytest.approx([grey / 2, grey / 2 + 100, grey / 2], abs=0.5)
        assert (mixed[1] < 0.3 * mixed[0]).sum() == 12, "the row above the change is dark"
    assert (plots.overlay(image, np.full((4, 4), 255), PALETTE) == image).all(), "ignored pixels stay"


def test_large_pictures_are_reduced_before_they_are_drawn() -> None:
    image, labels = np.zeros((3000, 5000, 3), np.uint8), np.repeat(halves(3000), 2, axis=1)[:, :5000]
    labels[-1, -1] = 2
    picture, prediction, key = plots.show_segmentation(image, labels, NAMES, PALETTE).axes
    assert {np.asarray(ax.images[0].get_array()).shape for ax in (picture, prediction)} == {(614, 1024, 3)}
    assert [text.get_text() for text in key.get_legend().get_texts()] == [*NAMES], "of a single pixel too"
    assert plots.present(np.array([[1, 1, 1], [2, 2, 255]]), None, np.array([[0, 2, 255]])) == [1, 2, 0], "by area"


def test_names_stand_inside_their_regions() -> None:
    labels = halves(100)
    labels[70:95, 10:60] = 2
    radius = np.hypot(*(np.mgrid[:100, :100] - 49.5))
    ring = np.where((radius > 25) & (radius < 48), 1, 0)  # the mean of its pixels lies in the hole
    for where, wanted in ((labels, NAMES), (ring, ("sky", "water"))):
        spots = {name: (x, y) for name, x, y in plots.label_spots(where, NAMES, letter=0.018)}
        assert set(spots) == set(wanted)
        for name, (x, y) in spots.items():
            assert where[int(100 * y), int(100 * x)] == NAMES.index(name)
    (sky,) = ((x, y) for name, x, y in plots.label_spots(labels, NAMES) if name == "sky")
    assert sky == pytest.approx((0.5, 0.25), abs=0.02), "the middle, where it is free"


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
    plots.png_bytes(plots.gallery([("$a_{$", image, labels)], ["$x_{$", *NAMES[1:]], PALETTE))  # no formulas


def test_contact_sheet_places_pictures_row_by_row() -> None:
    pictures = [[np.full((4, 4, 3), 10 * i + j, np.uint8) for j in range(3)] for i in range(2)]
    figure = plots.contact_sheet(pictures, ["a", "b", "c"], ["first", "second"])
    assert [int(np.asarray(ax.images[0].get_array())[0, 0, 0]) for ax in figure.axes] == [0, 1, 2, 10, 11, 12]
    assert [ax.get_title() for ax in figure.axes] == ["a", "b", "c", "", "", ""]
    assert [ax.get_ylabel() for ax in figure.axes] == ["first", "", "", "second", "", ""]
    grey = plots.contact_sheet([[np.full((4, 4), 128, np.uint8)]], ["grey"]).axes[0].images[0]
    assert grey.to_rgba(np.array([128]))[0, 0] == pytest.approx(128 / 255, abs=0.01), "its brightness is kept"
