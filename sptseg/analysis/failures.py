"""What a model gets wrong, where and why: predictions collected once, from which every table here is counted.

Nothing is drawn here; `sptseg.charts` draws. All functions take 8-bit labels, 255 is ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from sptseg.datasets import IGNORE, Sample, Split
from sptseg.inference import Scores, WindowLogits, confusion, evaluation, iou_per_class, scores
from sptseg.model import SptSeg

Array = np.ndarray
FLOWS = ("seen → seen", "seen → unseen", "unseen → seen", "unseen → unseen")  # true → predicted, where they differ
KINDS = {  # every wrong pixel is of exactly one kind: the first that fits
    "border": "the predicted class is there, but a few pixels further on",
    "in the picture": "the predicted class is in the picture, farther away",
    "absent, seen → seen": "a seen class was taken for a seen one that is not in the picture",
    "absent, seen → unseen": "a seen class was taken for an unseen one that is not in the picture",
    "absent, unseen → seen": "an unseen class was taken for a seen one that is not in the picture",
    "absent, unseen → unseen": "an unseen class was taken for another unseen one that is not in the picture",
}


@dataclass(frozen=True)
class Picture:
    """A picture, its truth, and what a model makes of it; 14 bytes a pixel.

    image (H, W, 3) uint8; label and predicted (H, W) uint8, label values of the split, label 255 ignored. For every
    other offset: the best of the seen classes and the best of the unseen ones, (H, W) uint8, and their scores before
    the offset, (H, W) float32 in 0..1; -inf where the split has no such class.
    """

    name: str
    image: Array
    label: Array
    predicted: Array
    seen_class: Array
    unseen_class: Array
    seen_score: Array
    unseen_score: Array

    def at(self, seen_offset: float) -> Array:
        """The prediction (H, W) uint8 with the seen classes' scores lowered by an offset."""
        lowered = self.seen_score - np.float32(seen_offset)
        ahead = (lowered > self.unseen_score) | ((lowered == self.unseen_score) & (self.seen_class < self.unseen_class))
        return np.where(ahead, self.seen_class, self.unseen_class)


@dataclass(frozen=True)
class Predictions:
    """A model's predictions over a data set, at the offset of its seen classes."""

    pictures: tuple[Picture, ...]
    split: Split
    seen_offset: float

    def at(self, seen_offset: float) -> Predictions:
        """The same with another offset: what `evaluate(..., seen_offset=...)` would predict, without the model.

        Equal pixel by pixel, but for scores that differ in the last bit of float32 only.
        """
        pictures = tuple(replace(picture, predicted=picture.at(seen_offset)) for picture in self.pictures)
        return Predictions(pictures, self.split, seen_offset)

    def only(self, positions: Iterable[int]) -> Predictions:
        """Some of the pictures."""
        return replace(self, pictures=tuple(self.pictures[i] for i in positions))

    def confusions(self) -> Array:
        """Pixel counts of each picture (P, C, C), rows true, columns predicted."""
        classes = len(self.split.classes)
        return np.stack([confusion(picture.label, picture.predicted, classes) for picture in self.pictures])

    def scores(self) -> Scores:
        return scores(torch.from_numpy(self.confusions().sum(axis=0)), self.split)


def collect(
    model: SptSeg,
    dataset: Dataset[Sample],
    split: Split,
    *,
    seen_offset: float | None = None,
    limit: int | None = None,
) -> Predictions:
    """A model's predictions over a data set or its first `limit` pictures, as `sptseg.evaluate` makes them.

    `seen_offset` is subtracted from the scores of the seen classes; None takes the model's own. All pictures stay in
    memory: a thousand of VOC's take 3 GB.
    """
    offset = model.config.seen_offset if seen_offset is None else seen_offset
    pictures, looked_at = [], evaluation.first_indices(dataset, limit)
    for sample, logits in evaluation.predictions(model, dataset, split, seen_offset=0.0, indices=looked_at):
        label = torch.as_tensor(sample["label"]).numpy()
        highest = label[label != IGNORE].max(initial=0)
        if highest >= len(split.classes):
            raise ValueError(
                f"picture {sample['name']} has the label {highest}; split {split.name!r} has the labels 0 to "
                f"{len(split.classes) - 1}, and {IGNORE} for ignored pixels: give the data set's own split"
            )
        image = np.ascontiguousarray(torch.as_tensor(sample["image"]).permute(1, 2, 0).numpy())
        label = label.astype(np.uint8)
        seen, unseen = (best_of(logits, labels, label.shape) for labels in (split.seen, split.unseen))
        pictures.append(Picture(sample["name"], image, label, label, seen[1], unseen[1], seen[0], unseen[0]))
    return Predictions(tuple(pictures), split, offset).at(offset)


def best_of(logits: WindowLogits, labels: Sequence[int], size: tuple[int, ...]) -> tuple[Array, Array]:
    """Highest score among some classes and which class has it: (H, W) float32 and uint8; -inf without classes."""
    height, width = size
    if not labels:
        return np.full(size, -np.inf, np.float32), np.zeros(size, np.uint8)
    chosen = list(labels)
    some = replace(logits, logits=logits.logits[:, chosen], offset=logits.offset[chosen])
    score, position = some.best((height, width))
    return score.cpu().numpy(), np.array(chosen, np.uint8)[position.cpu().numpy()]


def flows(confusion: Array, split: Split) -> dict[str, int]:
    """Wrong pixels of a confusion matrix (C, C) in the four `FLOWS` between seen and unseen classes."""
    wrong = confusion - np.diag(np.diag(confusion))
    groups = [list(split.seen), list(split.unseen)]
    counts = [int(wrong[np.ix_(true, predicted)].sum()) for true in groups for predicted in groups]
    return dict(zip(FLOWS, counts, strict=True))


@dataclass(frozen=True)
class Pair:
    """A class taken for another: `pixels` of them, `share` (0..1) of the true class's labelled pixels."""

    true: str
    predicted: str
    flow: str
    pixels: int
    share: float


def pairs(confusion: Array, split: Split, most: int = 10) -> list[Pair]:
    """The class pairs with the most wrong pixels, the largest first."""
    wrong = confusion - np.diag(np.diag(confusion))
    found = []
    for place in np.argsort(-wrong, axis=None, kind="stable")[:most]:
        i, j = divmod(int(place), len(wrong))
        if wrong[i, j]:
            flow = FLOWS[2 * (i in split.unseen) + (j in split.unseen)]
            share = float(wrong[i, j] / confusion[i].sum())
            found.append(Pair(split.classes[i], split.classes[j], flow, int(wrong[i, j]), share))
    return found


def grown(mask: Array, radius: int) -> Array:
    """Pixels whose square window of 2 radius + 1 pixels touches a mask: bool (H, W)."""
    return F.max_pool2d(torch.from_numpy(mask)[None].float(), 2 * radius + 1, 1, radius)[0].numpy() > 0


def border_distance(label: Array, most: int) -> Array:
    """Distance in pixels to the nearest pixel of another label, at most `most`: (H, W) uint8.

    Chessboard distance: 1 where one of the eight neighbours differs. Ignored pixels are a label of their own, as in
    VOC, which ignores a band of some pixels around every object.
    """
    highest = torch.from_numpy(label)[None].float()
    lowest = highest
    distance = np.full(label.shape, most, np.uint8)
    for step in range(1, most):
        highest, lowest = F.max_pool2d(highest, 3, 1, 1), -F.max_pool2d(-lowest, 3, 1, 1)
        distance[(highest != lowest)[0].numpy() & (distance == most)] = step
    return distance


@dataclass(frozen=True)
class Band:
    """Pixels whose distance to a border is `nearest` to `farthest` pixels (None: or more), and their scores."""

    nearest: int
    farthest: int | None
    pixels: int
    scores: Scores


def by_distance(predictions: Predictions, starts: Sequence[int] = (1, 2, 3, 5, 9, 17)) -> list[Band]:
    """Scores inside bands around the true borders; band i goes from starts[i] to just before starts[i + 1].

    The IoU of a band counts, of prediction and truth alike, the pixels inside it (the "trimap" measure of Kohli and
    others 2009).
    """
    if starts[0] != 1 or list(starts) != sorted(set(starts)) or starts[-1] > IGNORE:
        raise ValueError(f"by_distance: starts is {tuple(starts)}; wanted 1 first, then ascending, up to {IGNORE}")
    classes = len(predictions.split.classes)
    counts = np.zeros((len(starts), classes, classes), np.int64)
    for picture in predictions.pictures:
        band = np.searchsorted(starts, border_distance(picture.label, max(starts[-1], 2)), side="right") - 1
        for i in range(len(starts)):
            here = band == i
            counts[i] += confusion(picture.label[here], picture.predicted[here], classes)
    ends = [*(start - 1 for start in starts[1:]), None]
    return [
        Band(first, last, int(count.sum()), scores(torch.from_numpy(count), predictions.split))
        for first, last, count in zip(starts, ends, counts, strict=True)
    ]


@dataclass(frozen=True)
class Region:
    """All pixels of one class in one picture.

    `picture` is its position; `share` of the picture's labelled pixels (0..1); `recall` the share of the region that
    was found (0..1), `iou` that of region and prediction in this picture (0..1).
    """

    picture: int
    label: int
    pixels: int
    share: float
    recall: float
    iou: float


def regions(confusions: Array) -> list[Region]:
    """The regions of all pictures, from the pictures' confusions (P, C, C)."""
    found = []
    for i, counts in enumerate(confusions):
        true, hits = counts.sum(axis=1), np.diag(counts)
        iou = iou_per_class(torch.from_numpy(counts)).tolist()
        for label in np.flatnonzero(true).tolist():
            share, recall = float(true[label] / true.sum()), float(hits[label] / true[label])
            found.append(Region(i, label, int(true[label]), share, recall, iou[label]))
    return found


@dataclass(frozen=True)
class SizeGroup:
    """Regions of similar size: their number, mean recall and mean IoU, and the share of them missed entirely."""

    smallest: int
    largest: int
    regions: int
    recall: float
    iou: float
    missed: float


def by_size(found: Sequence[Region], groups: int = 6) -> list[SizeGroup]:
    """Regions sorted by pixels and cut into groups of (nearly) equal number."""
    ordered = sorted(found, key=lambda region: region.pixels)
    cut = [ordered[len(ordered) * i // groups : len(ordered) * (i + 1) // groups] for i in range(groups)]
    rows = []
    for each in filter(None, cut):
        recall, iou = [region.recall for region in each], [region.iou for region in each]
        missed = recall.count(0) / len(each)
        means = float(np.mean(recall)), float(np.mean(iou))
        rows.append(SizeGroup(each[0].pixels, each[-1].pixels, len(each), *means, missed))
    return rows


@dataclass(frozen=True)
class ClassRow:
    """How often a class occurs (share of labelled pixels, 0..1; pictures), how large it is, and its IoU.

    `region` is the mean share of the picture where it occurs, 0..1; nan where it does not.
    """

    name: str
    unseen: bool
    share: float
    pictures: int
    region: float
    iou: float


def by_class(confusions: Array, split: Split) -> list[ClassRow]:
    """A row per class, in the split's order, from the pictures' confusions (P, C, C)."""
    true = confusions.sum(axis=2)  # (P, C)
    pictures = (true > 0).sum(axis=0)
    inside = (true / np.maximum(true.sum(axis=1, keepdims=True), 1)).sum(axis=0)
    region = np.where(pictures > 0, inside / np.maximum(pictures, 1), np.nan)
    iou = iou_per_class(torch.from_numpy(confusions.sum(axis=0)))
    columns = (true.sum(axis=0) / true.sum(), pictures, region, iou)
    rows = zip(split.classes, *(column.tolist() for column in columns), strict=True)
    return [ClassRow(name, i in split.unseen, *figures) for i, (name, *figures) in enumerate(rows)]


@dataclass(frozen=True)
class Calibration:
    """Scores (0..1) at each of some offsets, all (O,)."""

    offsets: Array
    miou_seen: Array
    miou_unseen: Array
    hiou: Array

    @property
    def best(self) -> float:
        """The offset of the highest hIoU; of equals the one nearest 0."""
        highest = self.offsets[self.hiou == np.nanmax(self.hiou)]
        return float(highest[np.abs(highest).argmin()])


def calibration(predictions: Predictions, offsets: Sequence[float] | Array) -> Calibration:
    """The curve that `evaluate` would give at each offset, from predictions collected once."""
    split = predictions.split
    if not split.seen or not split.unseen:
        raise ValueError(f"split {split.name!r} has no {'un' * bool(split.seen)}seen classes; an offset moves nothing")
    rows = [predictions.at(offset).scores() for offset in np.asarray(offsets).tolist()]
    columns = [np.array([getattr(row, name) for row in rows]) for name in ("miou_seen", "miou_unseen", "hiou")]
    return Calibration(np.asarray(offsets, float), *columns)


@dataclass(frozen=True)
class HeldOut:
    """An offset chosen on one half of the pictures, and hIoU (0..1) on the other half: with it, and with offset 0."""

    offset: float
    hiou: float
    hiou_without: float


def held_out(predictions: Predictions, offsets: Sequence[float] | Array) -> list[HeldOut]:
    """The best offset of every second picture on the rest, then the other way round."""
    halves = [predictions.only(range(start, len(predictions.pictures), 2)) for start in (0, 1)]
    best = [calibration(half, offsets).best for half in halves]
    return [
        HeldOut(offset, rest.at(offset).scores().hiou, rest.at(0.0).scores().hiou)
        for offset, rest in zip(best, reversed(halves), strict=True)
    ]


def error_map(label: Array, predicted: Array, split: Split, radius: int = 4) -> Array:
    """Kind of error at each pixel (H, W) uint8: 0 right, i + 1 for `KINDS`' i-th, 255 ignored.

    `radius`: a wrong pixel is a border error if the class predicted there begins within that many pixels.
    """
    unseen = np.isin(np.arange(IGNORE + 1), split.unseen)
    wrong = (label != IGNORE) & (predicted != label)
    kind = np.where(wrong, 3 + 2 * unseen[label] + unseen[predicted], 0).astype(np.uint8)
    for value in np.unique(predicted[wrong]):
        truth = label == value
        if truth.any():
            here = wrong & (predicted == value)
            kind[here] = np.where(grown(truth, radius), 1, 2)[here]
    kind[label == IGNORE] = IGNORE
    return kind


@dataclass(frozen=True)
class Errors:
    """Wrong pixels by picture and kind: counts (P, K), K in the order of `KINDS`; labelled (P,) pixels.

    `repaired` holds, by kind, the scores that the model would have if its errors of that kind alone were right.
    """

    counts: Array
    labelled: Array
    repaired: dict[str, Scores]

    def shares(self) -> dict[str, float]:
        """Share of all wrong pixels, 0..1, by kind; they add up to 1 (to 0 if nothing is wrong)."""
        return dict(zip(KINDS, (self.counts.sum(axis=0) / max(self.counts.sum(), 1)).tolist(), strict=True))

    def worst(self, kind: str | None = None) -> list[int]:
        """Positions of the pictures, most wrong pixels (of a kind, or None: of all) per labelled pixel first."""
        pixels = self.counts.sum(axis=1) if kind is None else self.counts[:, list(KINDS).index(kind)]
        return np.argsort(-pixels / np.maximum(self.labelled, 1), kind="stable").tolist()


def errors(predictions: Predictions, radius: int = 4) -> Errors:
    """All wrong pixels of all pictures by kind; see `error_map`. Repairs as in TIDE (Bolya and others 2020)."""
    split = predictions.split
    counts, labelled = [], []
    mended = np.zeros((len(KINDS), len(split.classes), len(split.classes)), np.int64)
    for picture in predictions.pictures:
        kind = error_map(picture.label, picture.predicted, split, radius)
        counts.append(np.bincount(kind.ravel(), minlength=IGNORE + 1)[1 : len(KINDS) + 1])
        labelled.append(int((picture.label != IGNORE).sum()))
        for i in range(len(KINDS)):
            predicted = np.where(kind == i + 1, picture.label, picture.predicted)
            mended[i] += confusion(picture.label, predicted, len(split.classes))
    repaired = {kind: scores(torch.from_numpy(each), split) for kind, each in zip(KINDS, mended, strict=True)}
    return Errors(np.array(counts), np.array(labelled), repaired)
