"""Segmentation scores: counting (a confusion matrix that adds up over processes) apart from the ratios taken of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from sptseg.datasets import IGNORE, Split

Array = np.ndarray


@dataclass(frozen=True)
class Scores:
    """Ratios of one confusion matrix, all in 0..1; nan where no class of the kind occurs.

    pixel_accuracy is over all labelled pixels; the mIoUs are means over the classes that occur, in label or prediction;
    hIoU = 2 S U / (S + U). `iou` holds each class's, by name.
    """

    pixel_accuracy: float
    miou_seen: float
    miou_unseen: float
    hiou: float
    iou: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """The ratios, JSON-ready: nan becomes None."""

        def clean(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: clean(each) for name, each in value.items()}
            return None if value != value else value

        return {name: clean(value) for name, value in asdict(self).items()}

    def table(self) -> str:
        """The four summary figures in percent, as one Markdown table."""
        cells = [self.pixel_accuracy, self.miou_seen, self.miou_unseen, self.hiou]
        shown = [" - " if value != value else f"{100 * value:.1f}" for value in cells]
        return "| pAcc | mIoU(S) | mIoU(U) | hIoU |\n|---|---|---|---|\n| " + " | ".join(shown) + " |"


SUMMARY = ("pixel_accuracy", "miou_seen", "miou_unseen", "hiou")


def iou_per_class(confusion: Tensor) -> Tensor:
    """Confusion (C, C), rows true, columns predicted -> IoU (C,), nan for classes in neither."""
    confusion = confusion.double()
    hits = confusion.diagonal()
    return hits / (confusion.sum(0) + confusion.sum(1) - hits)


def scores(confusion: Tensor, split: Split) -> Scores:
    """All ratios of a confusion matrix (C, C), rows true, columns predicted."""
    iou = iou_per_class(confusion.cpu())
    seen, unseen = (iou[list(labels)].nanmean().item() for labels in (split.seen, split.unseen))
    total = confusion.sum().item()
    return Scores(
        pixel_accuracy=confusion.diagonal().sum().item() / total if total else float("nan"),
        miou_seen=seen,
        miou_unseen=unseen,
        hiou=2 * seen * unseen / (seen + unseen) if seen + unseen != 0 else 0.0,
        iou=dict(zip(split.classes, iou.tolist(), strict=True)),
    )


def bootstrap(
    confusions: Tensor, split: Split, *, samples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[Scores, Scores]:
    """Lower and upper ends of confidence intervals of all scores, by bootstrap over pictures.

    confusions (P, C, C), one a picture. P pictures are drawn with replacement, since the pixels of one picture go
    wrong together; each draw is pooled and scored, and the middle `level` (0..1) of the draws is kept. A draw in which
    a class does not occur does not count for that class.
    """
    pictures = len(confusions)
    equal = torch.full((samples, pictures), 1 / pictures)
    drawn = torch.multinomial(equal, pictures, replacement=True, generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(samples, pictures).scatter_add_(1, drawn, torch.ones(drawn.shape)).double()
    pooled = (weights @ confusions.flatten(1).double()).unflatten(1, confusions.shape[1:])  # (samples, C, C)
    rows = [scores(each, split) for each in pooled]
    table = [[*(getattr(row, name) for name in SUMMARY), *row.iou.values()] for row in rows]
    shares = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.tensor(table, dtype=torch.float64).nanquantile(shares, dim=0).tolist()
    n = len(SUMMARY)
    ends = [Scores(*end[:n], iou=dict(zip(split.classes, end[n:], strict=True))) for end in (low, high)]
    return ends[0], ends[1]


class SegmentationMetrics:
    """Counts predictions over a whole validation set; in distributed runs `compute` adds up all processes."""

    def __init__(self, split: Split, device: torch.device | str = "cpu") -> None:
        self.split = split
        counter = MulticlassConfusionMatrix(len(split.classes), ignore_index=split.ignore, validate_args=False)
        self.counter = counter.to(device)

    def update(self, predicted: Tensor, label: Tensor) -> None:
        """Adds predictions and labels of equal shape (..., H, W); pixels labelled `split.ignore` do not count."""
        if predicted.shape != label.shape:
            raise ValueError(
                f"the prediction is {tuple(predicted.shape)} and the label {tuple(label.shape)}; wanted equal sizes"
            )
        for name, values in (("prediction", predicted), ("label", label)):
            kept = values[label != self.split.ignore]
            if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < len(self.split.classes):
                raise ValueError(
                    f"the {name} holds values {int(kept.min())} to {int(kept.max())}; split {self.split.name!r} has "
                    f"the labels 0 to {len(self.split.classes) - 1}, and {self.split.ignore} for ignored pixels"
                )
        self.counter.update(predicted.long(), label.long())

    def confusion(self) -> Tensor:
        """Pixel counts (C, C), rows true, columns predicted."""
        return self.counter.compute()

    def compute(self) -> Scores:
        return scores(self.confusion(), self.split)


def confusion(label: Array, predicted: Array, classes: int) -> Array:
    """Pixel counts (C, C), rows true, columns predicted, of arrays of equal shape; label 255 does not count."""
    counts = label != IGNORE
    pairs = label[counts].astype(np.int64) * classes + predicted[counts]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
