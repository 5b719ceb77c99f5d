"""What a model gets wrong, where and why: predictions collected once, from which every table here is counted.

Nothing is drawn here; `charts` draws. All functions take 8-bit labels, 255 is ignored."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import distance_transform_cdt, maximum_filter, minimum_filter
from torch.utils.data import Dataset

from sptseg.datasets import IGNORE, Sample, Split
from sptseg.inference import SUMMARY, Scores, evaluation, metrics
from sptseg.model import SptSeg

Array = np.ndarray
DIRECTIONS = ("seen → seen", "seen → unseen", "unseen → seen", "unseen → unseen")  # of errors: true → predicted class
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
    """A picture (H, W, 3) uint8, its label and what is predicted, (H, W) uint8, label 255 ignored; 14 bytes a pixel.

    For every other offset: the best of the seen and of the unseen classes, (H, W) uint8, and their scores before the
    offset, (H, W) float32 in 0..1; -inf where the split has no such class."""

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

    def at(self, seen_offset: float) -> Self:
        """The same with another offset: what `evaluate(..., seen_offset=...)` would predict, without the model, but for
        scores that differ in the last bit of float32."""
        pictures = tuple(replace(picture, predicted=picture.at(seen_offset)) for picture in self.pictures)
        return replace(self, pictures=pictures, seen_offset=seen_offset)

    def only(self, positions: Iterable[int]) -> Self:
        """Some of the pictures."""
        return replace(self, pictures=tuple(self.pictures[i] for i in positions))

    def confusions(self) -> Array:
        """Pixel counts of each picture (P, C, C), rows true, columns predicted."""
        return np.stack([metrics.confusion_matrix(p.label, p.predicted, self.split).numpy() for p in self.pictures])

    def scores(self) -> Scores:
        return metrics.scores(torch.from_numpy(self.confusions().sum(axis=0)), self.split)


def collect(
    model: SptSeg, dataset: Dataset[Sample], split: Split, *, seen_offset: float | None = None, limit: int | None = None
) -> Predictions:
    """A model's predictions over a data set or its first `limit` pictures, as `sptseg.evaluate` makes them.
    `seen_offset` is taken from the scores of seen classes; None: the model's own. A thousand of VOC's take 3 GB."""
    if split.ignore != IGNORE:
        raise ValueError(f"failures are told of at most {IGNORE} classes; {split.name!r} has {len(split.classes)}")
    offset = model.config.seen_offset if seen_offset is None else seen_offset
    pictures, looked_at = [], evaluation.first_indices(dataset, limit)
    for sample, logits in evaluation.predictions(model, dataset, split, seen_offset=0.0, indices=looked_at):
        label = torch.as_tensor(sample["label"])
        metrics.check_labels(label[label != IGNORE], split, f"the label of picture {sample['name']}")
        size, truth = (label.shape[0], label.shape[1]), label.numpy().astype(np.uint8)
        image = np.ascontiguousarray(torch.as_tensor(sample["image"]).permute(1, 2, 0).numpy())
        best = [logits.best(size, classes=labels) for labels in (split.seen, split.unseen)]
        scores, classes = ([each.cpu().numpy() for each in kind] for kind in zip(*best, strict=True))
        labels = [each.astype(np.uint8) for each in classes]
        pictures.append(Picture(sample["name"], image, truth, truth, *labels, *scores))
    return Predictions(tuple(pictures), split, offset).at(offset)


def errors_by_direction(confusion: Array, split: Split) -> dict[str, int]:
    """Wrong pixels of a confusion matrix (C, C) in the four `DIRECTIONS` between seen and unseen classes."""
    wrong = confusion - np.diag(np.diag(confusion))
    groups = [list(split.seen), list(split.unseen)]
    counts = [int(wrong[np.ix_(true, predicted)].sum()) for true in groups for predicted in groups]
    return dict(zip(DIRECTIONS, counts, strict=True))


def confused_pairs(confusion: Array, split: Split, most: int = 10) -> pd.DataFrame:
    """The class pairs with the most wrong pixels, the largest first. Columns: `true` and `predicted` name, one of the
    `DIRECTIONS`, `pixels`, `share` of the true class's pixels (0..1)."""
    wrong = confusion - np.diag(np.diag(confusion))
    largest = np.argsort(-wrong, axis=None, kind="stable")[:most]
    true, predicted = np.unravel_index(largest[wrong.flat[largest] > 0], wrong.shape)
    unseen, classes = np.isin(np.arange(len(wrong)), split.unseen), np.array(split.classes, object)
    pixels, direction = wrong[true, predicted], np.array(DIRECTIONS, object)[2 * unseen[true] + unseen[predicted]]
    columns = {"true": classes[true], "predicted": classes[predicted], "direction": direction, "pixels": pixels}
    return pd.DataFrame({**columns, "share": pixels / confusion.sum(axis=1)[true]})


def border_distance(label: Array, most: int) -> Array:
    """Chessboard distance to the nearest pixel of another label, at most `most`: (H, W) uint8, 1 where one of the eight
    neighbours differs. Ignored pixels are a label of their own, as VOC ignores a band around every object."""
    inside = maximum_filter(label, 3) == minimum_filter(label, 3)
    distance = 1 + np.asarray(distance_transform_cdt(inside, "chessboard"))  # 0 where there is no border at all
    return np.where(distance, distance.clip(max=most), most).astype(np.uint8)


def by_distance(predictions: Predictions, starts: Sequence[int] = (1, 2, 3, 5, 9, 17)) -> pd.DataFrame:
    """Scores by distance from the true border, a row ("3–4", "17+") from each start to just before the next.

    Columns: `pixels`, and the `SUMMARY` of the scores. Of prediction and truth alike, the pixels at that distance count
    (the "trimap" measure of Kohli and others 2009)."""
    split = predictions.split
    counts = np.zeros((len(starts), len(split.classes), len(split.classes)), np.int64)
    for picture in predictions.pictures:
        row = np.searchsorted(starts, border_distance(picture.label, max(starts[-1], 2)), side="right") - 1
        for i in range(len(starts)):
            counts[i] += metrics.confusion_matrix(picture.label[row == i], picture.predicted[row == i], split).numpy()
    spans = [f"{start}" if end == start + 1 else f"{start}–{end - 1}" for start, end in pairwise(starts)]
    table = summaries(counts, split, pd.Index([*spans, f"{starts[-1]}+"], name="distance"))
    table.insert(0, "pixels", counts.sum(axis=(1, 2)))
    return table


def summaries(confusions: Array, split: Split, index: pd.Index) -> pd.DataFrame:
    """The `SUMMARY` of the scores (0..1) of each of N confusion matrices (N, C, C), which `index` names."""
    figures = metrics.ratios_of_tallies(metrics.tallies(torch.from_numpy(confusions)), split)[:, : len(SUMMARY)]
    return pd.DataFrame(figures.numpy(), index, SUMMARY)


def regions(confusions: Array) -> pd.DataFrame:
    """All pixels of one class in one picture make a region: a row each, from the pictures' confusions (P, C, C).

    Columns: positions of `picture` and `label`, `pixels`, and 0..1 the `share` of the picture's labelled pixels, the
    `recall` (how much of the region was found), the `iou` of region and prediction in this picture."""
    true, hits = confusions.sum(axis=2), np.diagonal(confusions, axis1=1, axis2=2)  # (P, C) each
    picture, label = here = np.nonzero(true)
    pixels, iou = true[here], metrics.iou_per_class(torch.from_numpy(confusions)).numpy()[here]
    share, recall = pixels / true.sum(axis=1)[picture], hits[here] / pixels
    columns = {"pixels": pixels, "share": share, "recall": recall, "iou": iou}
    return pd.DataFrame({"picture": picture, "label": label, **columns})


def by_size(regions: pd.DataFrame, groups: int = 6) -> pd.DataFrame:
    """Regions sorted by pixels and cut into groups of (nearly) equal number, a row each: pixels of the `smallest` and
    the `largest`, how many `regions`, their mean `recall` and `iou`, the share that is `missed` entirely."""
    cuts = len(regions) * np.arange(1, groups) // groups
    group = np.searchsorted(cuts, np.arange(len(regions)), side="right")
    return (
        regions.sort_values("pixels", kind="stable")
        .assign(missed=lambda ordered: ordered.recall == 0)
        .groupby(group)
        .agg(
            smallest=("pixels", "min"), largest=("pixels", "max"), regions=("pixels", "size"),
            recall=("recall", "mean"), iou=("iou", "mean"), missed=("missed", "mean"),
        )
    )  # fmt: skip


def by_class(confusions: Array, split: Split) -> pd.DataFrame:
    """A row per class, from the pictures' confusions (P, C, C): `unseen`, `share` of the labelled pixels, how many
    `pictures` show it, `region` (the mean share of these that it fills; nan without any), `iou`; shares 0..1."""
    true = confusions.sum(axis=2)  # (P, C)
    found = regions(confusions).groupby("label").share
    columns = {
        "unseen": np.isin(np.arange(len(split.classes)), split.unseen),
        "share": true.sum(axis=0) / true.sum(),
        "pictures": (true > 0).sum(axis=0),
        "region": found.mean().reindex(range(len(split.classes))).to_numpy(),
        "iou": metrics.iou_per_class(torch.from_numpy(confusions.sum(axis=0))).numpy(),
    }
    return pd.DataFrame(columns, pd.Index(split.classes))


def calibration(predictions: Predictions, offsets: Sequence[float] | Array) -> pd.DataFrame:
    """The scores (`SUMMARY`) that `evaluate` would give at each offset, a row each, from predictions collected once."""
    index = pd.Index(np.asarray(offsets, float), name="offset")
    counts = np.stack([predictions.at(offset).confusions().sum(axis=0) for offset in index])
    return summaries(counts, predictions.split, index)


def best_offset(curve: pd.DataFrame) -> float:
    """The offset of the highest hIoU in a `calibration`; of equals the one nearest 0."""
    return float(min(curve.index[curve.hiou == curve.hiou.max()], key=abs))


def held_out(predictions: Predictions, offsets: Sequence[float] | Array) -> pd.DataFrame:
    """The best `offset` of every second picture on the rest, then the other way round, a row each, with the `hiou`
    (0..1) on the rest at this offset, and `hiou_without` (at 0)."""
    first, second = (predictions.only(range(start, len(predictions.pictures), 2)) for start in (0, 1))
    rows = []
    for half, rest in ((first, second), (second, first)):
        offset = best_offset(calibration(half, offsets))
        rows.append((offset, rest.at(offset).scores().hiou, rest.at(0.0).scores().hiou))
    return pd.DataFrame(rows, columns=["offset", "hiou", "hiou_without"])


def error_map(label: Array, predicted: Array, split: Split, radius: int = 4) -> Array:
    """Kind of error at each pixel (H, W) uint8: 0 right, i + 1 for `KINDS`' i-th, 255 ignored; a wrong pixel is a
    border error if the class predicted there begins within `radius` pixels."""
    unseen = np.isin(np.arange(IGNORE + 1), split.unseen)
    wrong = (label != IGNORE) & (predicted != label)
    kind = np.where(wrong, 3 + 2 * unseen[label] + unseen[predicted], 0).astype(np.uint8)
    for value in np.unique(predicted[wrong]):
        truth = label == value
        if truth.any():
            here = wrong & (predicted == value)
            kind[here] = np.where(maximum_filter(truth, 2 * radius + 1), 1, 2)[here]
    kind[label == IGNORE] = IGNORE
    return kind


def error_counts(predictions: Predictions, radius: int = 4) -> pd.DataFrame:
    """Wrong pixels: a row per picture, a column for each of the `KINDS`; see `error_map`."""
    maps = (error_map(p.label, p.predicted, predictions.split, radius) for p in predictions.pictures)
    counts = [np.bincount(kind.ravel(), minlength=IGNORE + 1)[1 : len(KINDS) + 1] for kind in maps]
    return pd.DataFrame(np.stack(counts), columns=pd.Index(KINDS))


def error_shares(errors: pd.DataFrame) -> pd.Series:
    """Share of all wrong pixels, 0..1, by kind, from `error_counts`; they add up to 1 (to 0 if nothing is wrong)."""
    return errors.sum() / max(errors.to_numpy().sum(), 1)


def worst_pictures(errors: pd.DataFrame, labelled: Array, kind: str | None = None) -> list[int]:
    """Positions of the pictures, most wrong pixels (of a kind, or None: of all) per labelled pixel (P,) first."""
    pixels = (errors.sum(axis=1) if kind is None else errors[kind]).to_numpy()
    return np.argsort(-pixels / np.maximum(labelled, 1), kind="stable").tolist()


def repaired_scores(predictions: Predictions, radius: int = 4) -> pd.DataFrame:
    """The scores (`SUMMARY`) if a model's errors of one kind alone were right, a row per kind, as in TIDE (Bolya and
    others 2020)."""
    split = predictions.split
    counts = np.zeros((len(KINDS), len(split.classes), len(split.classes)), np.int64)
    for picture in predictions.pictures:
        kind = error_map(picture.label, picture.predicted, split, radius)
        for i in range(len(KINDS)):
            repaired = np.where(kind == i + 1, picture.label, picture.predicted)
            counts[i] += metrics.confusion_matrix(picture.label, repaired, split).numpy()
    return summaries(counts, split, pd.Index(KINDS))
