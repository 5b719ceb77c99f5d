"""Segmentation scores: counting (a confusion matrix that adds up over processes) apart from the ratios taken of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from sptseg.splits import IGNORE, Split


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
        """JSON-ready: nan becomes None."""

        def clean(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: clean(each) for name, each in value.items()}
            return None if value != value else value

        return clean(asdict(self))

    def table(self) -> str:
        """The four summary figures in percent, as one Markdown table."""
        cells = [self.pixel_accuracy, self.miou_seen, self.miou_unseen, self.hiou]
        shown = [" - " if value != value else f"{100 * value:.1f}" for value in cells]
        return "| pAcc | mIoU(S) | mIoU(U) | hIoU |\n|---|---|---|---|\n| " + " | ".join(shown) + " |"


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


class SegmentationMetrics:
    """Counts predictions over a whole validation set; in distributed runs `compute` adds up all processes."""

    def __init__(self, split: Split, device: torch.device | str = "cpu") -> None:
        self.split = split
        counter = MulticlassConfusionMatrix(len(split.classes), ignore_index=IGNORE, validate_args=False)
        self.counter = counter.to(device)

    def update(self, predicted: Tensor, label: Tensor) -> None:
        """Adds predictions and labels of equal shape (..., H, W); pixels labelled 255 do not count."""
        if predicted.shape != label.shape:
            raise ValueError(
                f"the prediction is {tuple(predicted.shape)} and the label {tuple(label.shape)}; wanted equal sizes"
            )
        for name, values in (("prediction", predicted), ("label", label)):
            kept = values[label != IGNORE]
            if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < len(self.split.classes):
                raise ValueError(
                    f"the {name} holds values {int(kept.min())} to {int(kept.max())}; split {self.split.name!r} has "
                    f"the labels 0 to {len(self.split.classes) - 1}, and {IGNORE} for ignored pixels"
                )
        self.counter.update(predicted.long(), label.long())

    def confusion(self) -> Tensor:
        """Pixel counts (C, C), rows true, columns predicted."""
        return self.counter.compute()

    def compute(self) -> Scores:
        return scores(self.confusion(), self.split)
