"""Failures counted: hand arithmetic on tiny label maps, plain twins, and every wrong pixel in exactly one kind."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import SPLIT, Toys, toy_model

from sptseg import evaluate
from sptseg.analysis import failures
from sptseg.analysis.failures import FLOWS, KINDS, Errors, Picture, Predictions
from sptseg.datasets.splits import IGNORE, Split

CLASSES, LABELS = st.integers(0, 3), st.sampled_from([0, 1, 2, 3, IGNORE])
FARM = Split.from_names("farm", ["cow", "grass", "sheep", "sky"], unseen=["sheep", "sky"])
SIZES = ((32, 32), (40, 48))  # of the toys: the second is resized on the way


@st.composite
def maps_of(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """A label map, partly ignored, and a prediction of the same size."""
    size = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    values = [draw(st.lists(one, min_size=size[0] * size[1], max_size=size[0] * size[1])) for one in (LABELS, CLASSES)]
    label, predicted = (np.array(each, np.uint8).reshape(size) for each in values)
    return label, predicted


def picture(label: list | np.ndarray, predicted: list | np.ndarray, name: str = "") -> Picture:
    """A picture of which only truth and prediction matter."""
    label, predicted = np.array(label, np.uint8), np.array(predicted, np.uint8)
    scores = np.zeros(label.shape, np.float32)
    return Picture(name, np.zeros((*label.shape, 3), np.uint8), label, predicted, predicted, predicted, scores, scores)


def farm(*maps: tuple[list | np.ndarray, list | np.ndarray]) -> Predictions:
    return Predictions(tuple(picture(*each) for each in maps), FARM, 0.0)


def scored(label: list[int], seen: list[float], unseen: list[float]) -> Picture:
    """A row of pixels with the best seen class always cow, the best unseen one always sheep."""
    truth = np.array([label], np.uint8)
    best = np.zeros_like(truth), np.full_like(truth, 2)
    scores = np.array([seen], np.float32), np.array([unseen], np.float32)
    return Picture("", np.zeros((*truth.shape, 3), np.uint8), truth, truth, *best, *scores)


@pytest.fixture(scope="module")
def toys() -> Predictions:
    """Of an untrained model that starts as dense CLIP."""
    return failures.collect(toy_model(start="dense_clip", seen_offset=0.02), Toys(sizes=SIZES), SPLIT)


@pytest.mark.parametrize("start", ["dense_clip", "random"])  # random: many scores are equal
@pytest.mark.parametrize("offset", [None, 0.0, 0.005, -0.01, 0.6])
def test_every_offset_is_what_the_model_gives(start: str, offset: float | None) -> None:
    model, data = toy_model(start=start, seen_offset=0.02), Toys(sizes=SIZES)
    found = failures.collect(model, data, SPLIT)
    at_offset = found if offset is None else found.at(offset)
    expected = evaluate(model, data, SPLIT, seen_offset=offset, progress=False)
    found, wanted = (
        {**each.as_dict().pop("iou"), "all": each.pixel_accuracy} for each in (at_offset.scores(), expected)
    )
    assert found == pytest.approx(wanted, abs=2e-3)  # rounding may turn a pixel


def test_the_models_own_offset_is_the_default(toys: Predictions) -> None:
    assert toys.seen_offset == 0.02
    for each in toys.pictures:
        assert (each.predicted == each.at(0.02)).all()
    assert any((each.at(0.02) != each.at(0.0)).any() for each in toys.pictures)


def test_pictures_come_as_they_are(toys: Predictions) -> None:
    sample, kept = Toys(sizes=SIZES)[1], toys.pictures[1]
    assert kept.name == "1"
    assert kept.image.dtype == np.uint8 and (kept.image == sample["image"].permute(1, 2, 0).numpy()).all()
    assert kept.label.dtype == np.uint8 and (kept.label == sample["label"].numpy()).all()
    assert np.isin(kept.seen_class, SPLIT.seen).all() and np.isin(kept.unseen_class, SPLIT.unseen).all()
    assert kept.seen_score.min() > 0 and kept.seen_score.max() < 1


def test_a_limit_a_wrong_split_and_nothing_at_all() -> None:
    assert len(failures.collect(toy_model(), Toys(), SPLIT, limit=2).pictures) == 2
    with pytest.raises(ValueError, match="wanted at least one picture"):
        failures.collect(toy_model(), Toys(), SPLIT, limit=0)
    with pytest.raises(ValueError, match="picture 2 has the label 2; split 'two' has the labels 0 to 1"):
        failures.collect(toy_model(), Toys(), Split.from_names("two", ["grass", "water"]))


def test_without_unseen_classes_an_offset_moves_nothing() -> None:
    seen = SPLIT.with_unseen([])
    found = failures.collect(toy_model(), Toys(), seen, limit=2)
    assert (found.at(0.9).confusions() == found.at(0.0).confusions()).all()
    with pytest.raises(ValueError, match="split 'toys' has no unseen classes"):
        failures.calibration(found, [0.0])


def test_equal_scores_go_to_the_first_class() -> None:
    tie = scored([0, 0], seen=[0.5, 0.5], unseen=[0.5, 0.5])  # cow against sheep
    tie.seen_class[0, 1] = 3
    assert tie.at(0.0).tolist() == [[0, 2]]
    assert tie.at(0.1).tolist() == [[2, 2]]
    assert tie.at(-0.1).tolist() == [[0, 3]]


def test_flows_and_pairs_by_hand() -> None:
    confusion = np.array([[9, 4, 2, 0], [3, 9, 0, 1], [7, 0, 9, 5], [6, 8, 0, 9]])  # cow, grass seen; sheep, sky not
    assert failures.flows(confusion, FARM) == dict(zip(FLOWS, (4 + 3, 2 + 1, 7 + 6 + 8, 5 + 0), strict=True))
    first, second, third = failures.pairs(confusion, FARM, most=3)
    assert (first.true, first.predicted, first.flow, first.pixels) == ("sky", "grass", "unseen → seen", 8)
    assert first.share == pytest.approx(8 / 23)
    assert (second.true, second.predicted, second.pixels) == ("sheep", "cow", 7)
    assert (third.true, third.predicted, third.pixels) == ("sky", "cow", 6)
    assert failures.pairs(np.eye(4, dtype=int), FARM) == []


def test_distance_to_a_border_by_hand() -> None:
    label = np.array([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]], np.uint8)
    wanted = [[4, 3, 2, 1, 1], [4, 3, 2, 1, 1], [4, 3, 2, 2, 2], [4, 3, 3, 3, 3]]
    assert failures.border_distance(label, most=9).tolist() == wanted
    assert failures.border_distance(label, most=3).max() == 3
    assert (failures.border_distance(np.zeros((2, 3), np.uint8), most=5) == 5).all()


@settings(max_examples=40, deadline=None)
@given(maps_of())
def test_distances_equal_a_search_over_all_pixels(maps: tuple[np.ndarray, np.ndarray]) -> None:
    label, most = maps[0], 4
    rows, columns = np.indices(label.shape)
    for y, x in np.ndindex(label.shape):
        away = np.maximum(abs(rows - y), abs(columns - x))[label != label[y, x]]
        assert failures.border_distance(label, most)[y, x] == min([most, *away])


def test_bands_by_hand() -> None:
    label = [[0, 0, 0, 0, 1, 1, 1, 1]]
    predicted = [[0, 0, 0, 1, 1, 1, 1, 2]]
    near, middle, far = failures.by_distance(farm((label, predicted)), starts=(1, 2, 3))
    assert (near.nearest, near.farthest, near.pixels) == (1, 1, 2)
    assert (middle.pixels, far.pixels, far.farthest) == (2, 4, None)
    assert near.scores.pixel_accuracy == 0.5 and near.scores.iou["grass"] == 0.5 and near.scores.iou["cow"] == 0
    assert middle.scores.pixel_accuracy == 1
    assert far.scores.pixel_accuracy == 0.75 and far.scores.iou["sheep"] == 0
    with pytest.raises(ValueError, match="wanted 1 first"):
        failures.by_distance(farm((label, predicted)), starts=(0, 2))


@settings(max_examples=30, deadline=None)
@given(maps_of())
def test_bands_hold_every_labelled_pixel_once(maps: tuple[np.ndarray, np.ndarray]) -> None:
    found = farm(maps)
    bands = failures.by_distance(found, starts=(1, 2, 3))
    assert sum(band.pixels for band in bands) == (maps[0] != IGNORE).sum() == found.confusions().sum()


def test_regions_and_sizes_by_hand() -> None:
    first = [[0, 0, 0, 1], [0, 0, 0, IGNORE]], [[0, 0, 0, 0], [0, 0, 1, 1]]
    second = [[2, 2, 3, 3]], [[2, 1, 1, 1]]
    confusions = farm(first, second).confusions()
    found = failures.regions(confusions)
    assert [(r.picture, r.label, r.pixels) for r in found] == [(0, 0, 6), (0, 1, 1), (1, 2, 2), (1, 3, 2)]
    assert [r.share for r in found] == pytest.approx([6 / 7, 1 / 7, 1 / 2, 1 / 2])
    assert [r.recall for r in found] == pytest.approx([5 / 6, 0, 1 / 2, 0])
    assert [r.iou for r in found] == pytest.approx([5 / 7, 0, 1 / 2, 0])  # cow: 5 found, 1 lost, 1 too many
    small, large = failures.by_size(found, groups=2)
    assert (small.smallest, small.largest, large.smallest, large.largest) == (1, 2, 2, 6)
    assert (small.recall, small.missed, large.missed) == (0.25, 0.5, 0.5)
    assert large.iou == pytest.approx((5 / 7 + 0) / 2)
    assert len(failures.by_size(found[:1], groups=3)) == 1


def test_classes_by_hand() -> None:
    confusions = farm(([[0, 0, 0, 1]], [[0, 0, 1, 1]]), ([[0, 2, 2, 2]], [[0, 2, 2, 2]])).confusions()
    cow, grass, sheep, sky = failures.by_class(confusions, FARM)
    assert (cow.name, cow.unseen, cow.pictures, cow.share) == ("cow", False, 2, 0.5)
    assert cow.region == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert (cow.iou, grass.iou, sheep.iou) == pytest.approx((3 / 4, 1 / 2, 1))
    assert (sheep.unseen, sheep.pictures, sheep.region) == (True, 1, 0.75)
    assert sky.pictures == 0 and math.isnan(sky.iou) and math.isnan(sky.region)


def test_calibration_by_hand() -> None:
    """Cow leads by 0.4, 0.2; sheep is behind by 0.1 in one pixel and leads by 0.1 in the other."""
    row = scored([0, 0, 2, 2], seen=[0.9, 0.7, 0.6, 0.4], unseen=[0.5, 0.5, 0.5, 0.5])
    curve = failures.calibration(Predictions((row,), FARM, 0.0), [-1.0, 0.0, 0.15, 0.3, 1.0])
    assert curve.miou_seen == pytest.approx([2 / 4, 2 / 3, 1, 1 / 2, 0])
    assert curve.miou_unseen == pytest.approx([0, 1 / 2, 1, 2 / 3, 2 / 4])
    assert curve.hiou == pytest.approx([0, 4 / 7, 1, 4 / 7, 0])
    assert curve.best == 0.15
    assert failures.calibration(Predictions((row,), FARM, 0.0), [0.3, 0.0]).best == 0  # of equals the nearest to 0


def test_the_other_half_judges_an_offset() -> None:
    biased = scored([0, 2], seen=[0.9, 0.6], unseen=[0.5, 0.5])  # wants an offset of 0.15
    fair = scored([0, 2], seen=[0.6, 0.4], unseen=[0.5, 0.5])  # is right at 0 and wrong at 0.15
    found = Predictions((biased, fair), FARM, 0.0)
    chosen_on_biased, chosen_on_fair = failures.held_out(found, [0.0, 0.15])
    assert (chosen_on_biased.offset, chosen_on_fair.offset) == (0.15, 0)
    assert (chosen_on_biased.hiou, chosen_on_biased.hiou_without) == pytest.approx((0, 1))
    assert (chosen_on_fair.hiou, chosen_on_fair.hiou_without) == pytest.approx((0, 0))


def test_kinds_of_errors_by_hand() -> None:
    label = np.array([[0, 0, 0, 0, 0, 2, 2, IGNORE]], np.uint8)
    #            one off; two off; right; absent seen; right; absent: seen, unseen; ignored
    predicted = np.array([[2, 0, 1, 3, 2, 1, 3, 2]], np.uint8)
    border, present, seen_seen, seen_unseen, unseen_seen, unseen_unseen = range(1, 7)
    wanted = [present, 0, seen_seen, seen_unseen, border, unseen_seen, unseen_unseen, IGNORE]
    assert failures.error_map(label, predicted, FARM, radius=1).tolist() == [wanted]
    assert failures.error_map(label, predicted, FARM, radius=5)[0, 0] == border
    assert failures.error_map(label, predicted, FARM, radius=4)[0, 0] == present
    found = failures.errors(farm((label, predicted)), radius=1)
    assert found.counts.tolist() == [[1, 1, 1, 1, 1, 1]] and found.labelled.tolist() == [7]
    assert found.shares() == pytest.approx(dict.fromkeys(KINDS, 1 / 6))


@settings(max_examples=150, deadline=None)
@given(maps_of(), st.integers(0, 3))
def test_every_wrong_pixel_has_exactly_one_kind(maps: tuple[np.ndarray, np.ndarray], radius: int) -> None:
    """The kinds add up to all wrong pixels, and each is what it says, searched pixel by pixel."""
    label, predicted = maps
    kind = failures.error_map(label, predicted, FARM, radius)
    wrong = (label != IGNORE) & (label != predicted)
    assert ((kind != 0) & (kind != IGNORE)).sum() == wrong.sum()
    rows, columns = np.indices(label.shape)
    names = ["right", *KINDS]
    counted: Counter[str] = Counter()
    for y, x in np.ndindex(label.shape):
        true, guess = label[y, x], predicted[y, x]
        away = np.maximum(abs(rows - y), abs(columns - x))[label == guess]
        if true == IGNORE:
            assert kind[y, x] == IGNORE
            continue
        if true == guess:
            wanted = "right"
        elif away.size:
            wanted = "border" if away.min() <= radius else "in the picture"
        else:
            wanted = "absent, " + FLOWS[2 * (true >= 2) + (guess >= 2)]
        assert names[kind[y, x]] == wanted
        counted[wanted] += wanted != "right"
    found = failures.errors(farm(maps), radius)
    assert found.counts[0].tolist() == [counted[name] for name in KINDS]
    assert found.counts.sum() == wrong.sum()


def test_repairing_a_kind_by_hand() -> None:
    label, predicted = [[0, 0, 0, 2, 2, 2, 2, 2]], [[0, 0, 2, 2, 2, 2, 2, 1]]  # one over the border, one absent
    found = failures.errors(farm((label, predicted)), radius=1)
    assert found.repaired["border"].iou["cow"] == 1 and found.repaired["border"].iou["sheep"] == 4 / 5
    assert found.repaired["absent, unseen → seen"].iou["sheep"] == 5 / 6
    assert found.repaired["in the picture"].as_dict() == farm((label, predicted)).scores().as_dict()


def test_the_worst_pictures_come_first() -> None:
    kinds = np.zeros((3, len(KINDS)), int)
    kinds[:, 0], kinds[:, 2] = (5, 2, 6), (0, 9, 0)
    found = Errors(kinds, np.array([10, 20, 100]), {})
    assert found.worst("border") == [0, 1, 2]
    assert found.worst("absent, seen → seen") == [1, 0, 2]
    assert found.worst() == [1, 0, 2]
    with pytest.raises(ValueError, match="'sky' is not in list"):
        found.worst("sky")


def test_a_part_of_the_pictures(toys: Predictions) -> None:
    some = toys.only([3, 0])
    assert [each.name for each in some.pictures] == ["3", "0"]
    assert (some.confusions() == toys.confusions()[[3, 0]]).all()
    assert torch.from_numpy(toys.confusions()).sum() == sum((each.label != IGNORE).sum() for each in toys.pictures)
