"""Is a data set whole, do its label values mean what its split says? `check_dataset` counts, `show_samples` shows."""

import math
import warnings
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch.utils.data import Dataset
from tqdm import tqdm

from sptseg.datasets import plots
from sptseg.datasets.folders import ImageMaskFiles, Sample, UnknownValues
from sptseg.datasets.images import Note, listed, reduce
from sptseg.datasets.splits import Split

MOST_LISTED = 12  # faults or warnings in a table
REDUCE = "give --reduce-zero-label (in Python value_map={0: 255, 1: 0, 2: 1, ...})"


@dataclass
class DataReport:
    """What a data set holds: of `total` images `looked_at` were read; per class its `pixels`, and the `images` with it.

    `ignored`: share of pixels that no class has. `sizes`: (width, height) of every sound image. `all_ignored`: names of
    images without a labelled pixel. `faults` stop a training run or spoil it; `warnings` ask for a look."""

    split: Split
    total: int
    looked_at: int
    pixels: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    ignored: float = 0.0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    all_ignored: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def never_seen(self) -> tuple[str, ...]:
        """Classes without a pixel."""
        return tuple(name for name, count in zip(self.split.classes, self.images, strict=True) if not count)

    @property
    def shares(self) -> list[float]:
        """Per class, its share of the labelled pixels."""
        return [count / max(1, sum(self.pixels)) for count in self.pixels]

    def size_range(self) -> dict[str, tuple[int, int]]:
        """(width, height) of the smallest, the median and the largest image, by pixels."""
        ordered = sorted(self.sizes, key=math.prod)
        places = {"smallest": 0, "median": len(ordered) // 2, "largest": -1}
        return {name: ordered[place] for name, place in places.items()} if ordered else {}

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, lists and texts, for JSON."""
        classes = [
            {"label": i, "name": name, "unseen": i in self.split.unseen, "share": share, "images": images}
            for i, (name, share, images) in enumerate(zip(self.split.classes, self.shares, self.images, strict=True))
        ]
        kept = ("total", "looked_at", "ignored", "all_ignored", "faults", "warnings", "never_seen")
        return {**{name: getattr(self, name) for name in kept}, "sizes": self.size_range(), "classes": classes}

    def table(self) -> str:
        """The report in Markdown: the images, the classes, then faults and warnings."""
        sizes = [f"{width} x {height}" for width, height in self.size_range().values()] or ["none"] * 3
        cells = [f"{self.looked_at} of {self.total}", str(self.looked_at - len(self.sizes)), *sizes]
        lines = ["| images read | faulty | smallest | median | largest | pixels ignored |", "|" + "---:|" * 6]
        lines += [f"| {' | '.join(cells)} | {self.ignored:.1%} |", ""]
        lines += ["| label | class | in training | share of labelled pixels | images |", "|---:|---|---|---:|---:|"]
        for i, name in enumerate(self.split.classes):
            kind = "unseen" if i in self.split.unseen else "seen"
            lines.append(f"| {i} | {name} | {kind} | {self.shares[i]:.2%} | {self.images[i]} |")
        for title, texts in (("Faults", self.faults), ("Warnings", self.warnings)):
            if texts:
                rest = [f"and {len(texts) - MOST_LISTED} more"] if len(texts) > MOST_LISTED else []
                lines += ["", f"{title}: {len(texts)}", "", *(f"- {text}" for text in texts[:MOST_LISTED] + rest)]
        return "\n".join(lines)


def check_dataset(dataset: Dataset[Sample], *, limit: int | None = None, progress: bool = True) -> DataReport:
    """Reads a data set, or `limit` of its images spread evenly, and counts; faulty files are collected, not raised."""
    split, length = dataset.split, len(dataset)  # pyright: ignore
    report = survey(dataset, split, evenly(length, limit), progress)
    if report.never_seen:
        report.warnings.append(f"classes without a pixel in the images read: {listed(report.never_seen)}")
    if report.never_seen == split.classes[:1] and any(report.images):
        told = f"label 0 ({split.classes[0]!r}) alone never occurs: if the masks count from 1, every class has its"
        report.warnings.append(f"{told} neighbour's name; then {REDUCE}")
    return report


def evenly(length: int, limit: int | None) -> list[int]:
    """`limit` indices below `length`, evenly spaced; all of them if there are fewer, or without a limit."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; wanted at least 1")
    count = length if limit is None else min(limit, length)
    return [i * length // count for i in range(count)]


def survey(dataset: Dataset[Sample], split: Split, indices: Sequence[int], progress: bool) -> DataReport:
    """The report on some items, whose label values are those of `split`; faulty files are faults."""
    counts, classes = np.zeros(split.ignore + 1, np.int64), len(split.classes)
    report = DataReport(split, len(dataset), len(indices))  # pyright: ignore[reportArgumentType]
    images = np.zeros(classes, np.int64)
    notes: dict[str, list[str]] = defaultdict(list)
    values: set[int] = set()
    for index in tqdm(indices, desc="checking", disable=not progress, mininterval=1):
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always", Note)
                sample = dataset[index]
            for message in (each.message for each in said):
                notes[message.args[1] if isinstance(message, Note) else str(message)].append(sample["name"])
            image, label = sound(sample, split)
        except Exception as error:  # whatever one file does, the next one is looked at
            kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
            report.faults.append(f"image {index}: {kind}{error}")
            values.update(error.values if isinstance(error, UnknownValues) else ())
            continue
        found = np.bincount(label.ravel(), minlength=split.ignore + 1)
        counts += found
        images += found[:classes] > 0
        report.sizes.append((image.shape[1], image.shape[0]))
        if not found[: split.ignore].any():
            report.all_ignored.append(sample["name"])
    if report.all_ignored:
        notes["no labelled pixel"] = report.all_ignored
    report.pixels, report.images = counts[:classes].tolist(), images.tolist()
    report.ignored = float(counts[split.ignore] / max(1, counts.sum()))
    report.warnings = [f"{len(names)} images: {text}: {listed(names)}" for text, names in notes.items()]
    if isinstance(dataset, ImageMaskFiles) and not dataset.mapped:
        meaning = what_values_mean(values.union(np.flatnonzero(counts).tolist()), report)
        report.warnings += [meaning] if meaning else []
    return report


def what_values_mean(values: Collection[int], report: DataReport) -> str | None:
    """How to map the values in masks if they seem to mean other classes than their labels."""
    split, missing = report.split, report.never_seen
    count, ignore = len(split.classes), split.ignore
    if count in values and {*values} <= {*range(count + 1), ignore}:
        return (
            f"the only mask value out of range is {count}, one above the last class: if the masks count from 1, and 0 "
            f"is no class, ignoring it would leave every name shifted by one; then {REDUCE}"
        )
    strange = [(value, label) for label, value in enumerate(sorted(values)) if value != label]
    if len(values) == count and strange:
        pairs = ",".join(f"{value}={label}" for value, label in strange)
        told = f"the masks hold {count} values, {listed([*map(str, sorted(values))])}"
        return f"{told}: if these are the {count} classes, say so with --values {pairs}"
    some = len(missing) == 1 or report.ignored > 0.25 or report.looked_at == report.total
    if ignore in values and ((missing and some) or count == 1):
        what = f"{listed(missing)} never occur" if missing else f"all others are {split.classes[0]}"
        return (
            f"{ignore} is ignored and has {report.ignored:.1%} of the pixels, while {what}: if {ignore} means a class, "
            f"say which with --values {ignore}=LABEL"
        )
    return None


def sound(sample: Sample, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """A sample's image (H,W,3) uint8 and labels (H,W); refuses what no training run could use."""
    image, label = np.asarray(sample["image"]), np.asarray(sample["label"])
    name, last = sample["name"], len(split.classes) - 1
    if image.dtype != np.uint8 or label.shape != image.shape[1:] or label.dtype.kind not in "iu":
        got = f"the image is {image.dtype} {image.shape}, its labels {label.dtype} {label.shape}"
        raise ValueError(f"{name}: {got}; wanted uint8 (3, height, width) and integers (height, width)")
    wrong = label[(label < 0) | ((label > last) & (label != split.ignore))]
    if wrong.size:
        known = f"of split {split.name!r} (0 to {last}, {split.ignore} is ignored)"
        raise ValueError(f"{name}: label value {wrong[0]} is no class {known}; map it, or name its class")
    return image.transpose(1, 2, 0), label


def show_samples(dataset: Dataset[Sample], count: int = 12, seed: int = 0) -> Figure:
    """Some images, drawn by seed, beside their masks with class names; a file that cannot be read says why."""
    if count < 1 or seed < 0:
        raise ValueError(f"count is {count}, seed {seed}; wanted at least 1 picture, and 0")
    split, length = dataset.split, len(dataset)  # pyright: ignore
    cells: list[tuple[str, np.ndarray | str, np.ndarray | None]] = []
    for index in sorted(np.random.default_rng(seed).choice(length, min(count, length), replace=False).tolist()):
        try:
            sample = dataset[index]
            image, labels = (reduce(array, plots.PICTURE_SIDE) for array in sound(sample, split))
            name = sample["name"]
            cells += [(name if len(name) <= 40 else f"…{name[-39:]}", image, None), ("", image, labels)]
        except (ValueError, OSError) as error:
            cells += [(f"image {index}", str(error), None), ("", "", None)]
    title = f"{split.name}: {len(cells) // 2} of {length} images"
    return plots.gallery(cells, split.classes, split.palette, split.names(split.unseen), title)
