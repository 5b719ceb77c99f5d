"""Ratios of confusions made by hand, and counting that adds up."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import SPLIT as TOYS
from toys import Toys, toy_model

from sptseg.datasets import IGNORE, Split
from sptseg.inference import SegmentationMetrics, evaluation, iou_change, iou_per_class, score_interval, scores

SPLIT = Split.from_names("farm", ["cow", "grass", "sheep", "sky"], unseen=["sheep", "sky"])


def test_a_confusion_made_by_hand() -> None:
    confusion = torch.tensor([[6, 2, 0, 0], [0, 4, 0, 4], [1, 0, 1, 0], [0, 0, 0, 2]])  # rows true, columns predicted
    result = scores(confusion, SPLIT)
    iou = {"cow": 6 / 9, "grass": 4 / 10, "sheep": 1 / 2, "sky": 2 / 6}
    seen, unseen = (6 / 9 + 4 / 10) / 2, (1 / 2 + 2 / 6) / 2
    assert result.iou == pytest.approx(iou)
    assert result.pixel_accuracy == pytest.approx(13 / 20)
    assert (result.miou_seen, result.miou_unseen) == pytest.approx((seen, unseen))
    assert result.hiou == pytest.approx(2 * seen * unseen / (seen + unseen))


@pytest.mark.parametrize(
    ("predicted", "label", "figures", "grass"),
    [
        ([0, 0, 2, 2], [0, 0, 2, 2], [1, 1, 1, 1], None),  # absent classes do not count
        ([0, 1, 2, 2], [0, 0, 2, 2], [3 / 4, (1 / 2 + 0) / 2, 1, 2 * 1 / 4 / (5 / 4)], 0),  # false predictions do
        ([1, 0, 3, 2], [0, 1, 2, 3], [0, 0, 0, 0], 0),  # nothing right is no error
        ([0, 1, 255, 3], [0, IGNORE, IGNORE, IGNORE], [1, 1, None, None], None),
        ([0, 1], [IGNORE, IGNORE], [None] * 4, None),
    ],
)
def test_what_counts(predicted: list, label: list, figures: list, grass: float | None) -> None:
    metrics = SegmentationMetrics(SPLIT)
    metrics.update(torch.tensor([predicted]), torch.tensor([label]))
    result = metrics.compute()
    assert list(result.summary().values()) == pytest.approx(figures)
    assert json.loads(json.dumps(result.as_dict(), allow_nan=False))["iou"]["grass"] == grass


def test_without_unseen_classes_their_figures_are_nan() -> None:
    result = scores(torch.tensor([[1, 1], [0, 0]]), Split.from_names("farm", ["cow", "grass"]))
    assert math.isnan(result.miou_unseen) and math.isnan(result.hiou)
    assert result.table().splitlines()[-1] == "| 50.0 | 25.0 | – | – |"


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4))
def test_updates_add_up_to_the_counts_of_a_plain_loop(sizes: list[tuple[int, int, int]]) -> None:
    """Over images of any size."""
    metrics, plain = SegmentationMetrics(SPLIT), torch.zeros(4, 4, dtype=torch.long)
    for size in sizes:
        predicted, label = torch.randint(0, 4, size), torch.randint(0, 5, size)
        label[label == 4] = IGNORE
        metrics.update(predicted.to(torch.uint8), label.to(torch.uint8))
        for p, t in zip(predicted.flatten().tolist(), label.flatten().tolist(), strict=True):
            if t != IGNORE:
                plain[t, p] += 1
    assert torch.equal(metrics.confusion(), plain) and metrics.compute().as_dict() == scores(plain, SPLIT).as_dict()


@pytest.mark.parametrize(
    ("predicted", "label", "message"),
    [
        ([[4, 0]], [[0, 0]], "the prediction holds values 0 to 4; split 'farm' has the labels 0 to 3, and 255"),
        ([[0, 0]], [[0, -1]], "the label holds values -1 to 0"),
        ([[0, 0]], [[0]], r"the prediction is \(1, 2\) and the label \(1, 1\); wanted equal sizes"),
    ],
)
def test_what_cannot_be_counted_is_refused(predicted: list, label: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentationMetrics(SPLIT).update(torch.tensor(predicted), torch.tensor(label))


def test_large_counts_stay_exact() -> None:
    confusion = torch.zeros(4, 4, dtype=torch.long)
    confusion[0, 0], confusion[0, 1] = 3 * 10**9, 1
    assert iou_per_class(confusion)[0].item() == 3 * 10**9 / (3 * 10**9 + 1)
    assert iou_per_class(torch.stack([confusion, confusion.T]))[:, 0].tolist() == [3 * 10**9 / (3 * 10**9 + 1)] * 2


def test_intervals_by_hand() -> None:
    """Of two pictures, one right and one wrong, a quarter of the draws is both times the right one."""
    confusions = torch.zeros(2, 4, 4)
    confusions[0, 0, 0], confusions[1, 2, 3] = 6, 6
    low, high = score_interval(confusions, SPLIT)
    assert (low.pixel_accuracy, high.pixel_accuracy) == (0, 1)
    assert (low.iou["cow"], high.iou["cow"], high.iou["sheep"]) == (1, 1, 0)  # draws without a class do not count
    assert math.isnan(low.iou["grass"])
    low, high = score_interval(confusions, SPLIT, level=0.4)
    assert (low.pixel_accuracy, high.pixel_accuracy) == (0.5, 0.5)
    confusions = torch.randint(0, 9, (5, 4, 4))
    for end in score_interval(confusions[:1], SPLIT, draws=9):  # one picture has no width
        assert end.summary() == pytest.approx(scores(confusions[0], SPLIT).summary())
    once, again, other = (score_interval(confusions, SPLIT, draws=50, seed=seed) for seed in (1, 1, 2))
    assert once == again != other


def test_matrices_of_pictures_add_up_to_what_evaluate_scores() -> None:
    model, dataset = toy_model().eval(), Toys(5, ((32, 32), (40, 33)))
    counts = evaluation.confusion_matrices(model, dataset, TOYS, batch_size=2)
    assert scores(counts.sum(0), TOYS) == evaluation.evaluate(model, dataset, TOYS, progress=False)
    assert counts.sum((1, 2)).tolist() == [int((dataset[i]["label"] != IGNORE).sum()) for i in range(5)]
    assert torch.equal(evaluation.confusion_matrices(model, dataset, TOYS, limit=3), counts[:3])


def test_change_of_iou_by_hand() -> None:
    """Two pictures of 10 pixels of class 0, all of them right before, half of them called 1 after."""
    before, after = (torch.tensor([[[hits, 10 - hits], [0, 0]]] * 2) for hits in (10, 5))
    found = iou_change(before, after, [0])  # every draw of two equal pictures gives the same
    assert (found.change, found.low, found.high) == (-0.5, -0.5, -0.5)
    assert str(found) == "-50.0 (-50.0 to -50.0)"
    assert iou_change(before, after, [0, 1]) == found, "no picture shows class 1: it does not count"
    assert math.isnan(iou_change(before, after, [1]).change)
    before, after = torch.randint(0, 9, (2, 5, 4, 4))
    first, second = (iou_per_class(each.sum(0))[[0, 2]].mean() for each in (before, after))
    assert iou_change(before, after, [0, 2], draws=9).change == pytest.approx(float(second - first))
    with pytest.raises(ValueError, match="wanted the same pictures"):
        iou_change(before, after[:1], [0])
