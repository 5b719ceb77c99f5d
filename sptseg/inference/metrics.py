"""Segmentation scores: counting (a confusion matrix that adds up over processes) apart from the ratios taken of it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as processes
from numpy.typing import ArrayLike
from torch import Tensor

from sptseg.datasets import Split

FIGURES = {"pixel_accuracy": "pAcc", "miou_seen": "mIoU(S)", "miou_unseen": "mIoU(U)", "hiou": "hIoU"}
SUMMARY = tuple(FIGURES)


def table(*rows: Iterable[object]) -> str:
    """A table in Markdown; the first row is its head."""
    head, *lines = (f"| {' | '.join(map(str, row))} |" for row in rows)
    return "\n".join([head, "|---" * (head.count(" | ") + 1) + "|", *lines])


def percent(share: float | None) -> str:
    return "–" if share is None or share != share else f"{100 * share:.1f}"


@dataclass(frozen=True)
class Scores:
    """Ratios of one confusion matrix, all in 0..1; nan where no class of the kind occurs.

    pixel_accuracy is over all labelled pixels; the mIoUs are means over the classes that occur, in label or prediction;
    hIoU = 2 S U / (S + U). `iou` holds each class's, by name."""

    pixel_accuracy: float
    miou_seen: float
    miou_unseen: float
    hiou: float
    iou: dict[str, float]

    @classmethod
    def of(cls, values: Tensor, split: Split) -> Self:
        """The ratios (4 + C,) that `ratios_of_tallies` gives, by name."""
        summary, iou = values[: len(SUMMARY)].tolist(), values[len(SUMMARY) :].tolist()
        return cls(*summary, iou=dict(zip(split.classes, iou, strict=True)))

    def summary(self) -> dict[str, float | None]:
        """The four summary figures, JSON-ready: nan becomes None."""
        return {name: None if (value := getattr(self, name)) != value else value for name in SUMMARY}

    def as_dict(self) -> dict[str, Any]:
        """The summary, and "iou", each class's, JSON-ready."""
        return {**self.summary(), "iou": {name: None if v != v else v for name, v in self.iou.items()}}

    def cells(self) -> list[str]:
        """The four summary figures in percent."""
        return [*map(percent, self.summary().values())]

    def table(self) -> str:
        """The same as one Markdown table."""
        return table(FIGURES.values(), self.cells())


def confusion_matrix(label: ArrayLike, predicted: ArrayLike, split: Split) -> Tensor:
    """Pixel counts (C, C), rows true, columns predicted, of labels of equal shape; `split.ignore` does not count."""
    label, predicted = torch.as_tensor(label), torch.as_tensor(predicted)
    if predicted.shape != label.shape:
        got = f"the prediction is {tuple(predicted.shape)} and the label {tuple(label.shape)}"
        raise ValueError(f"{got}; wanted equal sizes")
    kept, classes = label != split.ignore, len(split.classes)
    label, predicted = label[kept].long(), predicted[kept].long()
    check_labels(predicted, split, "the prediction")
    check_labels(label, split, "the label")
    return torch.bincount(label * classes + predicted, minlength=classes**2).view(classes, classes)


def check_labels(values: Tensor, split: Split, name: str) -> None:
    """Refuses values that are no labels of a split; without those that are ignored."""
    low, high, last = *(map(int, values.aminmax()) if values.numel() else (0, 0)), len(split.classes) - 1
    if not 0 <= low <= high <= last:
        labels = f"split {split.name!r} has the labels 0 to {last}, and {split.ignore} for ignored pixels"
        raise ValueError(f"{name} holds values {low} to {high}; {labels}")


def tallies(confusion: Tensor) -> Tensor:
    """Confusion (..., C, C), rows true, columns predicted -> what the ratios are made of (..., 3, C): of each class the
    pixels that are right, those so labelled, and those so predicted."""
    return torch.stack([confusion.diagonal(dim1=-2, dim2=-1), confusion.sum(-1), confusion.sum(-2)], dim=-2)


def iou_per_class(confusion: Tensor) -> Tensor:
    """Confusion (..., C, C), rows true, columns predicted -> IoU (..., C), nan for classes in neither."""
    return _iou(tallies(confusion.double()))


def _iou(counts: Tensor) -> Tensor:
    hits, labelled, predicted = counts.unbind(-2)
    return hits / (labelled + predicted - hits)


def ratios_of_tallies(counts: Tensor, split: Split) -> Tensor:
    """`tallies` (..., 3, C) -> the figures of `SUMMARY`, then each class's IoU: (..., 4 + C), float64; see `Scores`."""
    counts = counts.double()
    iou = _iou(counts)
    seen, unseen = (iou[..., list(labels)].nanmean(-1) for labels in (split.seen, split.unseen))
    accuracy = counts[..., 0, :].sum(-1) / counts[..., 1, :].sum(-1)
    hiou = torch.where(seen + unseen == 0, 0.0, 2 * seen * unseen / (seen + unseen))
    return torch.cat([torch.stack([accuracy, seen, unseen, hiou], dim=-1), iou], dim=-1)


def scores(confusion: Tensor, split: Split) -> Scores:
    """All ratios of a confusion matrix (C, C), rows true, columns predicted."""
    return Scores.of(ratios_of_tallies(tallies(confusion.cpu()), split), split)


def bootstrap(
    counts: Tensor, figures: Callable[[Tensor], Tensor], *, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> Tensor:
    """Figures and the ends of their confidence intervals (3, F), see `with_ends`, by bootstrap over pictures.

    counts (P, ...), one a picture, since the pixels of one go wrong together; `figures` makes F figures (D, F) of
    pooled counts (D, ...)."""
    pooled = drawn(len(counts), draws, seed) @ counts.flatten(1).double()
    return with_ends(figures(pooled.unflatten(1, counts.shape[1:])), level)


def drawn(count: int, draws: int, seed: int) -> Tensor:
    """How often each of `count` is drawn in as many draws with replacement: (1 + draws, count); first each once."""
    equal, generator = torch.full((draws, count), 1 / count), torch.Generator().manual_seed(seed)
    picked = torch.multinomial(equal, count, replacement=True, generator=generator)
    often = torch.zeros(draws, count).scatter_add_(1, picked, torch.ones(picked.shape))
    return torch.cat([torch.ones(1, count), often]).double()


def with_ends(values: Tensor, level: float = 0.95) -> Tensor:
    """The first of values (1 + draws, F) with the lower and upper end of the middle `level` (0..1) of the others, of
    which nan does not count: (3, F)."""
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    return torch.cat([values[:1], values[1:].nanquantile(ends, dim=0)])


def score_interval(confusions: Tensor, split: Split, **options: Any) -> tuple[Scores, Scores]:
    """Lower and upper ends of all scores of pictures' confusions (P, C, C); options as for `bootstrap`."""
    _, low, high = bootstrap(tallies(confusions), lambda pooled: ratios_of_tallies(pooled, split), **options)
    return Scores.of(low, split), Scores.of(high, split)


@dataclass(frozen=True)
class Change:
    """How the mean IoU of a group of classes changes, with the ends of its confidence interval; all -1..1."""

    change: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.change:+.1f} ({100 * self.low:+.1f} to {100 * self.high:+.1f})"


def iou_change(before: Tensor, after: Tensor, classes: Sequence[int], **options: Any) -> Change:
    """Mean IoU over `classes` after less before, from confusions (P, C, C) of the same pictures.

    Classes count where the pictures really show them; nan if they show none. The interval is that of `bootstrap` (and
    its options): how much other pictures of the kind would move the figure, nothing of other trainings."""
    if before.shape != after.shape:
        raise ValueError(f"confusions {tuple(before.shape)} and {tuple(after.shape)}; wanted the same pictures")
    both = tallies(torch.stack([before, after], dim=1).double())[..., list(classes)]  # (P, 2, 3, k)

    def change(pooled: Tensor) -> Tensor:  # (..., 2, 3, k) -> (..., 1)
        return _iou(pooled).masked_fill(pooled[..., 1, :] == 0, torch.nan).nanmean(-1).diff(dim=-1)

    return Change(*bootstrap(both, change, **options)[:, 0].tolist())


class SegmentationMetrics:
    """Counts predictions over a whole validation set; in distributed runs `compute` adds up all processes."""

    def __init__(self, split: Split, device: torch.device | str = "cpu") -> None:
        self.split = split
        self.counts = torch.zeros(len(split.classes), len(split.classes), dtype=torch.long, device=device)

    def update(self, predicted: Tensor, label: Tensor) -> None:
        """Adds predictions and labels of equal shape (..., H, W); pixels labelled `split.ignore` do not count."""
        self.counts += confusion_matrix(label, predicted, self.split)

    def confusion(self) -> Tensor:
        """Pixel counts (C, C), rows true, columns predicted."""
        total = self.counts.clone()
        if processes.is_available() and processes.is_initialized():
            processes.all_reduce(total)
        return total

    def compute(self) -> Scores:
        return scores(self.confusion(), self.split)
