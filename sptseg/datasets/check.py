"""Is a data set whole, and do its label values mean what its split says? `check` counts, `contact_sheet` shows."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from sptseg.datasets import plots
from sptseg.datasets.folders import ImageMaskFolder, Sample
from sptseg.datasets.splits import Colour, Split, ignored_label, spread_palette

SHOWN = 12  # entries of a list
SIDE = 480  # pixels of a picture in a sheet
COUNT_FROM_ONE = "give value_map={0: 255, 1: 0, 2: 1, ...}"


@dataclass
class DataReport:
    """What a data set holds. `faults` stop a training run or spoil it; `warnings` ask for a look.

    Attributes:
        total, looked_at: images in the data set, and how many of them were read.
        sizes: (width, height) of every sound image.
        pixels, images: per class, its pixels and the images that hold it.
        ignored: share of pixels that no class has.
        all_ignored: names of images without a labelled pixel.
    """

    split: Split
    total: int
    looked_at: int
    sizes: list[tuple[int, int]]
    pixels: list[int]
    images: list[int]
    ignored: float
    all_ignored: list[str]
    faults: list[str]
    warnings: list[str]

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
        rows = zip(self.split.classes, self.shares, self.images, strict=True)
        classes = [
            {"label": i, "name": name, "unseen": i in self.split.unseen, "share": share, "images": images}
            for i, (name, share, images) in enumerate(rows)
        ]
        kept = ("total", "looked_at", "ignored", "all_ignored", "never_seen", "faults", "warnings")
        plain = {name: getattr(self, name) for name in kept}
        sizes = {name: list(size) for name, size in self.size_range().items()}
        return {**plain, "never_seen": list(self.never_seen), "sizes": sizes, "classes": classes}

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
                rest = [f"- and {len(texts) - SHOWN} more"] if len(texts) > SHOWN else []
                lines += ["", f"{title}: {len(texts)}", "", *(f"- {text}" for text in texts[:SHOWN]), *rest]
        return "\n".join(lines)


def check_dataset(dataset: Dataset[Sample], *, limit: int | None = None, progress: bool = True) -> DataReport:
    """Reads a data set, or `limit` of its images spread evenly, and counts; faulty files are collected, not raised."""
    split = split_of(dataset)
    report = survey(dataset, split, spread(len(dataset), limit), progress)  # pyright: ignore[reportArgumentType]
    if report.never_seen:
        report.warnings.append(f"classes without a pixel in the images read: {listed(report.never_seen)}")
    if report.never_seen == split.classes[:1] and any(report.images):
        report.warnings.append(
            f"label 0 ({split.classes[0]!r}) alone never occurs: if the masks count from 1, every class has its "
            f"neighbour's name; then {COUNT_FROM_ONE}"
        )
    return report


def split_of(dataset: Dataset[Sample]) -> Split:
    split = getattr(dataset, "split", None)
    if not isinstance(split, Split):
        raise ValueError(f"{type(dataset).__name__} has no split; wanted a data set of sptseg.datasets")
    return split


def spread(length: int, limit: int | None) -> list[int]:
    """`limit` indices below `length`, evenly spaced; all of them if there are fewer, or without a limit."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; wanted at least 1")
    count = length if limit is None else min(limit, length)
    return [i * length // count for i in range(count)]


def listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def survey(dataset: Dataset[Sample], split: Split, indices: Sequence[int], progress: bool) -> DataReport:
    """The report on some items, whose label values are those of `split`."""
    counts = np.zeros(split.ignore + 1, np.int64)
    images = np.zeros(len(split.classes), np.int64)
    sizes, all_ignored, faults = [], [], []
    palettes: dict[int, dict[Colour, str]] = defaultdict(dict)
    strays: set[int] = set()
    folder = dataset if isinstance(dataset, ImageMaskFolder) else None
    for index in tqdm(indices, desc="checking", disable=not progress, mininterval=1):
        mask = folder._files[index][1] if folder else None
        try:
            sample = dataset[index]
            image, label = sound(sample, split)
        except Exception as error:  # whatever one file does, the next one is looked at
            kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
            faults.append(f"image {index}: {kind}{error}")
            if folder and mask:
                values, _ = mask_values(mask, ("L", "P"))
                strays |= {v for v in values if len(split.classes) <= folder._labels[v] < split.ignore}
            continue
        found = np.bincount(label.ravel(), minlength=split.ignore + 1)
        counts += found
        images += found[: len(split.classes)] > 0
        sizes.append((image.shape[1], image.shape[0]))
        if not found[: split.ignore].any():
            all_ignored.append(sample["name"])
        if folder and mask:
            values, colours = mask_values(mask, ("P",))
            if any(len(set(colour)) > 1 for colour in colours):  # a grey ramp means nothing
                for value, colour in zip(values, colours, strict=False):
                    if folder._labels[value] != split.ignore:
                        palettes[value].setdefault(colour, mask.name)
    notes = palette_warnings(palettes, split, folder._labels) if folder else []
    if all_ignored:
        notes.append(f"{len(all_ignored)} images have no labelled pixel: {listed(all_ignored)}")
    if strays == {len(split.classes)}:
        notes.append(
            f"the only mask value out of range is {len(split.classes)}, one above the last class: if the masks count "
            f"from 1, and 0 is background, ignoring it would leave every name shifted by one; then {COUNT_FROM_ONE}"
        )
    pixels = counts[: len(split.classes)].tolist()
    ignored = float(counts[split.ignore] / max(1, counts.sum()))
    length: int = len(dataset)  # pyright: ignore[reportArgumentType]
    found = (sizes, pixels, images.tolist(), ignored, all_ignored, faults, notes)
    return DataReport(split, length, len(indices), *found)


def sound(sample: Sample, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """A sample's image (H,W,3) uint8 and labels (H,W); refuses what no training run could use."""
    image, label = np.asarray(sample["image"]), np.asarray(sample["label"])
    name, last = sample["name"], len(split.classes) - 1
    if image.dtype != np.uint8 or image.ndim != 3 or len(image) != 3:
        raise ValueError(
            f"{name}: the image is {image.dtype} {image.shape}; wanted uint8 (3, height, width): give the data set no "
            "transform"
        )
    if label.shape != image.shape[1:] or label.dtype.kind not in "iu" or not label.size:
        raise ValueError(
            f"{name}: labels are {label.dtype} {label.shape}, the image {image.shape[1:]}; wanted integers, equal sizes"
        )
    wrong = label[(label < 0) | ((label > last) & (label != split.ignore))]
    if wrong.size:
        raise ValueError(
            f"{name}: label value {wrong[0]} is no class of split {split.name!r} (0 to {last}, {split.ignore} is "
            "ignored); map it in the data set, or name its class in the split"
        )
    return image.transpose(1, 2, 0), label


def mask_values(path: Path, modes: Collection[str]) -> tuple[list[int], list[Colour]]:
    """The values in a mask file of one of the modes, and their palette colours (fewer where it has none)."""
    try:
        with warnings.catch_warnings(action="error"), Image.open(path) as mask:
            values = [v for v, n in enumerate(mask.histogram()) if n] if mask.mode in modes else []
            flat = (mask.getpalette("RGB") if mask.mode == "P" else None) or []
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Warning):
        return [], []  # the data set has said what is wrong with it
    return values, [(flat[3 * v], flat[3 * v + 1], flat[3 * v + 2]) for v in values if 3 * v + 2 < len(flat)]


def palette_warnings(palettes: Mapping[int, Mapping[Colour, str]], split: Split, labels: np.ndarray) -> list[str]:
    """Where the colours in palette masks speak against the meaning of the values.

    A colour that another class of the split has always does; any other colour only if the split's own are those of the
    data set (and not made by `spread_palette`); and so does a value whose colour differs from file to file.
    """
    made_up = split.palette == spread_palette(len(split.classes))
    differing, changing = [], []
    for value, found in sorted(palettes.items()):
        label = int(labels[value])
        if len(found) > 1:
            changing.append(f"{value} is " + ", ".join(f"{colour} in {name}" for colour, name in [*found.items()][:2]))
        for colour, name in found.items():
            owners = [split.classes[i] for i, own in enumerate(split.palette) if own == colour]
            if split.classes[label] not in owners and (owners or not made_up):
                whose = f", the colour of {owners[0]!r}" if owners else f", not {split.palette[label]}"
                differing.append(f"{value} ({split.classes[label]!r}) is {colour} in {name}{whose}")
    notes = []
    if changing:
        notes.append(
            f"mask values change their palette colour from file to file ({'; '.join(changing[:3])}): were values given "
            "file by file, as when colour masks are quantised? then they mean nothing"
        )
    if differing:
        notes.append(
            f"the masks' palettes disagree with split {split.name!r} for {len(differing)} colours: mask value "
            f"{'; '.join(differing[:3])}: see that the values mean these classes"
        )
    return notes


Panel = tuple[str, np.ndarray | str, np.ndarray | None]  # title, picture or what is wrong with it, labels


def contact_sheet(dataset: Dataset[Sample], count: int = 12, seed: int = 0) -> Figure:
    """Some images, drawn by seed, beside their masks with class names; a file that cannot be read says why."""
    if count < 1:
        raise ValueError(f"count is {count}; wanted at least 1 picture")
    split = split_of(dataset)
    length: int = len(dataset)  # pyright: ignore[reportArgumentType]
    panels: list[Panel] = []
    for index in sorted(np.random.default_rng(seed).choice(length, min(count, length), replace=False).tolist()):
        try:
            sample = dataset[index]
            panels.append((sample["name"], *shrunk(*sound(sample, split))))
        except (ValueError, OSError) as error:
            panels.append((f"image {index}", str(error), None))
    unseen = split.names(split.unseen)
    return sheet(panels, split.classes, split.palette, unseen, f"{split.name}: {len(panels)} of {length} images")


def shrunk(image: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Image (H,W,3) and labels (H,W) for a sheet: the long side at most SIDE pixels."""
    ratio = SIDE / max(labels.shape)
    if ratio >= 1:
        return image, labels
    size = [max(1, round(length * ratio)) for length in labels.shape]
    small = F.resize(tv_tensors.Image(image.transpose(2, 0, 1).copy()), size)
    return small.numpy().transpose(1, 2, 0), F.resize(tv_tensors.Mask(labels[None].copy()), size)[0].numpy()


def sheet(
    panels: Sequence[Panel], names: Sequence[str], palette: Sequence[Colour], unseen: Collection[str], title: str
) -> Figure:
    """Pictures beside their masks, two pairs a row, and one legend."""
    pairs = min(2, len(panels))
    rows = math.ceil(len(panels) / pairs)
    shapes = [labels.shape for _, _, labels in panels if labels is not None]
    aspect = float(np.clip(np.median([h / w for h, w in shapes]), 0.4, 1.6)) if shapes else 1.0
    ignore = ignored_label(len(names))
    labelled = [x.ravel() for _, _, x in panels if x is not None]
    found = plots.present(np.concatenate([np.array([ignore]), *labelled]), ignore=ignore)
    wide = 1.7 * (1 + len(found) // 15)
    figure = plots.Plot(
        6.2 * pairs + wide, max(rows * (3.1 * aspect + 0.25) + 0.4, 0.19 * min(len(found), 15) + 0.9), title
    )
    grid = figure.add_gridspec(rows, 2 * pairs + 1, width_ratios=[3.1] * 2 * pairs + [wide])
    for i, (name, picture, labels) in enumerate(panels):
        row, column = divmod(i, pairs)
        left, right = (figure.add_subplot(grid[row, 2 * column + side]) for side in (0, 1))
        right.set_axis_off()
        if isinstance(picture, str) or labels is None:
            plots.show_image(left, np.full((3, 4, 3), 238, np.uint8), name)
            left.text(1.5, 1, fill(str(picture), 40), ha="center", va="center", fontsize=6.5)
            continue
        plots.show_image(left, picture, name if len(name) <= 40 else f"…{name[-39:]}")
        plots.show_image(right, plots.overlay(picture, labels, palette))
        plots.write_names(right, labels, names, unseen)
    plots.legend(figure.add_subplot(grid[:, -1]), [names[i] for i in found], [palette[i] for i in found], unseen)
    return figure
