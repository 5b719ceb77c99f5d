"""Failures counted: hand arithmetic on tiny label maps, plain twins, and every wrong pixel in exactly one kind."""

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from toys import SPLIT, Toys, toy_model

from sptseg import evaluate
from sptseg.analysis import failures
from sptseg.analysis.failures import DIRECTIONS, KINDS, Picture, Predictions
from sptseg.datasets import IGNORE, Split

FARM = Split.from_names("farm", ["cow", "grass", "sheep", "sky"], unseen=["sheep", "sky"])
SIZES = ((32, 32), (40, 48))  # of the toys: the second is resized on the way


LABELS, CLASSES = st.sampled_from([0, 1, 2, 3, IGNORE]), st.integers(0, 3)
MAPS = st.tuples(st.integers(1, 7), st.integers(1, 7)).flatmap(  # a label map, partly ignored, and a prediction
    lambda size: st.tuples(arrays(np.uint8, size, elements=LABELS), arrays(np.uint8, size, elements=CLASSES))
)


def picture(label: Any, predicted: Any, seen: Any = 0, unseen: Any = 0) -> Picture:
    """Truth and prediction; or scores of the best seen class, always cow, and of the best unseen one, always sheep."""
    label, predicted = np.array(label, np.uint8), np.array(predicted, np.uint8)
    best = np.zeros_like(label), np.full_like(label, 2)
    scores = (np.broadcast_to(np.array(each, np.float32), label.shape) for each in (seen, unseen))
    return Picture("", np.zeros((*label.shape, 3), np.uint8), label, predicted, *best, *scores)


def farm(*maps: tuple[Any, ...]) -> Predictions:
    return Predictions(tuple(picture(*each) for each in maps), FARM, 0.0)


@pytest.mark.parametrize("start", ["dense_clip", "random"])  # random: many scores are equal
@pytest.mark.parametrize("offset", [None, 0.0, 0.005, -0.01, 0.6])
def test_every_offset_is_what_the_model_gives(start: str, offset: float | None) -> None:
    model, data = toy_model(start=start, seen_offset=0.02), Toys(sizes=SIZES)
    found = failures.collect(model, data, SPLIT)
    scores = (found if offset is None else found.at(offset)).scores()
    expected = evaluate(model, data, SPLIT, seen_offset=offset, progress=False)
    assert scores.pixel_accuracy == pytest.approx(expected.pixel_accuracy, abs=2e-3)  # rounding may turn a pixel
    assert scores.iou == pytest.approx(expected.iou, abs=2e-3, nan_ok=True)


def test_pictures_come_as_they_are_at_the_models_own_offset_or_are_refused() -> None:
    toys = failures.collect(toy_model(start="dense_clip", seen_offset=0.02), Toys(sizes=SIZES), SPLIT)
    sample, kept = Toys(sizes=SIZES)[1], toys.pictures[1]
    assert kept.name == "1" and toys.seen_offset == 0.02
    assert np.array_equal(kept.image, sample["image"].permute(1, 2, 0)) and np.array_equal(kept.label, sample["label"])
    assert np.isin(kept.seen_class, SPLIT.seen).all() and np.isin(kept.unseen_class, SPLIT.unseen).all()
    assert all((each.predicted == each.at(0.02)).all() for each in toys.pictures)
    assert any((each.at(0.02) != each.at(0.0)).any() for each in toys.pictures)
    assert [each.name for each in toys.only([3, 0]).pictures] == ["3", "0"]
    some = failures.collect(toy_model(), Toys(), SPLIT.with_unseen([]), limit=2)
    assert len(some.pictures) == 2
    assert (some.at(0.9).confusions() == some.at(0.0).confusions()).all(), "without unseen classes, it moves nothing"
    with pytest.raises(ValueError, match="wanted at least one picture"):
        failures.collect(toy_model(), Toys(), SPLIT, limit=0)
    with pytest.raises(ValueError, match="label of picture 2 holds values 2 to 2; split 'two' has the labels 0 to 1"):
        failures.collect(toy_model(), Toys(), Split.from_names("two", ["grass", "water"]))
    with pytest.raises(ValueError, match="told of at most 255 classes; 'many' has 256"):
        failures.collect(toy_model(), Toys(), Split.from_names("many", [*map(str, range(256))]))


def test_directions_and_pairs_by_hand() -> None:
    confusion = np.array([[9, 4, 2, 0], [3, 9, 0, 1], [7, 0, 9, 5], [6, 8, 0, 9]])  # cow, grass seen; sheep, sky not
    directions = dict(zip(DIRECTIONS, (4 + 3, 2 + 1, 7 + 6 + 8, 5 + 0), strict=True))
    assert failures.errors_by_direction(confusion, FARM) == directions
    assert failures.confused_pairs(confusion, FARM, most=3).values.tolist() == [
        ["sky", "grass", "unseen → seen", 8, pytest.approx(8 / 23)],
        ["sheep", "cow", "unseen → seen", 7, pytest.approx(7 / 21)],
        ["sky", "cow", "unseen → seen", 6, pytest.approx(6 / 23)],
    ]
    assert len(failures.confused_pairs(confusion, FARM, most=99)) == 8, "only pairs that are confused"


def test_scores_by_distance_by_hand() -> None:
    found = farm(([[0, 0, 0, 0, 1, 1, 1, 1]], [[0, 0, 0, 1, 1, 1, 1, 2]]))
    table = failures.by_distance(found, starts=(1, 2, 3))
    assert table.pixels.to_dict() == {"1": 2, "2": 2, "3+": 4}
    assert table.pixel_accuracy.tolist() == [0.5, 1, 0.75]
    assert table.miou_seen.tolist() == pytest.approx([(0 + 1 / 2) / 2, 1, (1 + 1 / 2) / 2])
    assert table.miou_unseen.tolist() == pytest.approx([np.nan, np.nan, 0], nan_ok=True)
    assert list(failures.by_distance(found).index) == ["1", "2", "3–4", "5–8", "9–16", "17+"]


def test_regions_sizes_and_classes_by_hand() -> None:
    first = [[0, 0, 0, 1], [0, 0, 0, IGNORE]], [[0, 0, 0, 0], [0, 0, 1, 1]]
    second = [[2, 2, 3, 3]], [[2, 1, 1, 1]]
    found = failures.regions(farm(first, second).confusions())
    shares = ([6 / 7, 1 / 7, 1 / 2, 1 / 2], [5 / 6, 0, 1 / 2, 0], [5 / 7, 0, 1 / 2, 0])  # cow: 5 found, 1 lost, 1 more
    columns = zip((0, 0, 1, 1), (0, 1, 2, 3), (6, 1, 2, 2), *shares, strict=True)
    wanted = pd.DataFrame(columns, columns=["picture", "label", "pixels", "share", "recall", "iou"])
    pd.testing.assert_frame_equal(found, wanted)
    groups = failures.by_size(found, groups=2)
    assert groups[["smallest", "largest", "regions"]].values.tolist() == [[1, 2, 2], [2, 6, 2]]
    assert groups.recall.tolist() == pytest.approx([0.25, (5 / 6 + 0) / 2]) and groups.missed.tolist() == [0.5, 0.5]
    assert groups.iou.tolist() == pytest.approx([0.25, (5 / 7 + 0) / 2])
    seven = failures.by_size(pd.concat([found, found[:3]]), groups=3)
    assert seven.regions.tolist() == [2, 2, 3], "cut as evenly as can be"
    confusions = farm(([[0, 0, 0, 1]], [[0, 0, 1, 1]]), ([[0, 2, 2, 2]], [[0, 2, 2, 2]])).confusions()
    wanted = {
        "unseen": [False, False, True, True], "share": [4 / 8, 1 / 8, 3 / 8, 0], "pictures": [2, 1, 1, 0],
        "region": [(3 / 4 + 1 / 4) / 2, 1 / 4, 3 / 4, np.nan], "iou": [3 / 4, 1 / 2, 1, np.nan],
    }  # fmt: skip
    pd.testing.assert_frame_equal(failures.by_class(confusions, FARM), pd.DataFrame(wanted, FARM.classes))


def test_calibration_by_hand() -> None:
    """Cow leads by 0.4, 0.2; sheep is behind by 0.1 in one pixel and leads by 0.1 in the other. Halves judge halves."""
    row = farm(([[0, 0, 2, 2]], [[0, 0, 2, 2]], [0.9, 0.7, 0.6, 0.4], 0.5))
    curve = failures.calibration(row, [-1.0, 0.0, 0.15, 0.3, 1.0])
    assert curve.miou_seen.tolist() == pytest.approx([2 / 4, 2 / 3, 1, 1 / 2, 0])
    assert curve.miou_unseen.tolist() == pytest.approx([0, 1 / 2, 1, 2 / 3, 2 / 4])
    assert curve.hiou.tolist() == pytest.approx([0, 4 / 7, 1, 4 / 7, 0])
    assert failures.best_offset(curve) == 0.15
    assert failures.best_offset(curve.loc[[0.3, 0.0]]) == 0  # of equals the nearest to 0
    biased = [[0, 2]], [[0, 2]], [0.9, 0.6], 0.5  # wants an offset of 0.15
    fair = [[0, 2]], [[0, 2]], [0.6, 0.4], 0.5  # is right at 0 and wrong at 0.15
    found = failures.held_out(farm(biased, fair), [0.0, 0.15])
    assert found[["offset", "hiou", "hiou_without"]].values.tolist() == [[0.15, 0, 1], [0, 0, 0]]


@settings(max_examples=150, deadline=None)
@given(MAPS, st.integers(0, 3))
def test_every_pixel_has_its_distance_and_every_wrong_one_its_kind(maps: tuple[Any, Any], radius: int) -> None:
    """Each is what it says, searched pixel by pixel, and they add up."""
    label, predicted = maps
    names, counted = ["right", *KINDS], Counter[str]()
    kind, distance = failures.error_map(label, predicted, FARM, radius), failures.border_distance(label, 4)
    rows, columns = np.indices(label.shape)
    for y, x in np.ndindex(label.shape):
        true, guess, away = label[y, x], predicted[y, x], np.maximum(abs(rows - y), abs(columns - x))
        assert distance[y, x] == min([4, *away[label != true]])
        if true == IGNORE:
            assert kind[y, x] == IGNORE
            continue
        wanted = "absent, " + DIRECTIONS[2 * (true >= 2) + (guess >= 2)]
        if true == guess:
            wanted = "right"
        elif (label == guess).any():
            wanted = "border" if away[label == guess].min() <= radius else "in the picture"
        assert names[kind[y, x]] == wanted
        counted[wanted] += 1
    counts, wrong = failures.error_counts(farm(maps), radius), max(1, sum(counted[name] for name in KINDS))
    assert counts.to_dict("records") == [{name: counted[name] for name in KINDS}]
    assert failures.error_shares(counts).to_dict() == pytest.approx({name: counted[name] / wrong for name in KINDS})
    assert failures.by_distance(farm(maps), starts=(1, 2, 3)).pixels.sum() == sum(counted.values())


def test_repairing_a_kind_and_finding_its_worst_pictures_by_hand() -> None:
    found = farm(([[0, 0, 0, 2, 2, 2, 2, 2]], [[0, 0, 2, 2, 2, 2, 2, 1]]))  # one over the border, one absent
    repaired = failures.repaired_scores(found, radius=1)
    assert repaired.miou_unseen["border"] == 4 / 5 and repaired.miou_seen["border"] == (1 + 0) / 2  # grass nowhere
    assert repaired.miou_unseen["absent, unseen → seen"] == 5 / 6
    assert repaired.hiou["in the picture"] == found.scores().hiou
    errors, labelled = pd.DataFrame({"border": [5, 2, 6], "in the picture": [0, 9, 0]}), np.array([10, 20, 100])
    assert failures.worst_pictures(errors, labelled, "border") == [0, 1, 2]
    assert failures.worst_pictures(errors, labelled, "in the picture") == [1, 0, 2]
    assert failures.worst_pictures(errors, labelled) == [1, 0, 2]
