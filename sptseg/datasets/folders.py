"""Data sets of images and label masks: the picture-book scenes, folders, VOC, COCO-Stuff, Context, ADE20K, CamVid.

An item is {"image": Image uint8 (3,H,W), "label": Mask int64 (H,W), "name": str}; label values index the data set's
`split.classes`, `split.ignore` (255) is ignored. A `transform` gets and returns (image, label).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

from sptseg import scenes
from sptseg.datasets import splits
from sptseg.datasets.images import StrPath, by_name, composed, images_by_name, listed, open_image, open_mask
from sptseg.datasets.splits import IGNORE, Split

Transform = Callable[[tv_tensors.Image, tv_tensors.Mask], tuple[torch.Tensor, torch.Tensor]]
_STREAMS = ("evaluation", "training")


class Sample(TypedDict):
    """One item of a data set."""

    image: torch.Tensor
    label: torch.Tensor
    name: str


def _sample(image: tv_tensors.Image, label: np.ndarray, name: str, transform: Transform | None) -> Sample:
    pair = image, tv_tensors.Mask(torch.from_numpy(label.astype(np.int64)))
    new_image, new_label = pair if transform is None else transform(*pair)
    return {"image": new_image, "label": new_label, "name": name}


class Scenes(Dataset[Sample]):
    """`length` scenes of `sptseg.scenes`, size x size; evaluation and training streams never share a picture."""

    def __init__(
        self,
        length: int,
        seed: int = 0,
        stream: Literal["evaluation", "training"] = "evaluation",
        size: int = 128,
        transform: Transform | None = None,
    ) -> None:
        if length < 1:
            raise ValueError(f"Scenes: length is {length}; wanted at least 1")
        if stream not in _STREAMS:
            raise ValueError(f"Scenes: stream is {stream!r}; wanted one of {', '.join(map(repr, _STREAMS))}")
        self.split, self.transform = splits.scenes(), transform
        self.length, self.seed, self.stream, self.size = length, seed, stream, size
        self.names = tuple(f"{stream}-{seed}-{index}" for index in range(length))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(f"Scenes: index is {index}; wanted 0 to {self.length - 1}")
        image, label = scenes.draw(seed=(_STREAMS.index(self.stream), self.seed, index), size=self.size)
        channels_first = torch.from_numpy(image.transpose(2, 0, 1).copy())
        return _sample(tv_tensors.Image(channels_first), label, self.names[index], self.transform)


class ImageMaskFolder(Dataset[Sample]):
    """Images and index masks in two folders below `root`, matched by file name without suffix.

    split: the classes; None reads them from `root`/classes.txt (see `folder_split`).
    images: the images' folder.
    masks: the masks' folder, or several, of which the first that has a mask counts.
    names: only these images (names without suffix), in this order; None: all, sorted.
    mask_suffix: what follows the image's name in the mask's file name, letter case ignored.
    value_map: label of a mask value; values not named stay as they are.
    Raises FileNotFoundError for missing folders, images or masks; a faulty file raises ValueError when it is read.
    `max_pixels` is the limit of `open_image`, `mapped` what `map_values` was given.
    """

    max_pixels: int | None = None
    mapped: tuple[str, ...] = ()

    def __init__(
        self,
        root: StrPath,
        split: Split | None = None,
        *,
        images: str = "images",
        masks: str | Sequence[str] = "masks",
        names: Sequence[str] | None = None,
        mask_suffix: str = ".png",
        value_map: Mapping[int, int] | None = None,
        transform: Transform | None = None,
    ) -> None:
        root = Path(root)
        mask_folders = [masks] if isinstance(masks, str) else list(masks)
        _require(root, {f"{images}/": "the images"} | {f"{folder}/": "the masks" for folder in mask_folders})
        self.split, self.transform = folder_split(root) if split is None else split, transform
        self._labels = np.arange(self.split.ignore + 1)
        self.map_values(value_map or {})

        image_paths = images_by_name(root / images)
        mask_paths: dict[str, Path] = {}
        for folder in reversed(mask_folders):
            mask_paths |= _by_suffix(root / folder, mask_suffix)
        self.names = tuple(sorted(image_paths) if names is None else map(composed, names))
        if not self.names:
            raise FileNotFoundError(f"no images from {root / images}; wanted at least one name listed")
        _refuse_missing(f"images in {root / images}", [name for name in self.names if name not in image_paths])
        _refuse_missing(
            f"masks NAME{mask_suffix} in {' or '.join(str(root / folder) for folder in mask_folders)} for images",
            [name for name in self.names if name not in mask_paths],
        )
        self._files = [(image_paths[name], mask_paths[name]) for name in self.names]

    def map_values(self, value_map: Mapping[int, int]) -> None:
        """Gives values in the masks' files other labels, such as {255: 1}; values not named keep theirs."""
        count, ignore = len(self.split.classes), self.split.ignore
        for value, label in value_map.items():
            if not 0 <= value <= 65535 or not (0 <= label < count or label == ignore):
                wanted = f"values from 0 to 65535, and labels from 0 to {count - 1}, or {ignore} (ignored)"
                raise ValueError(f"mask value {value} cannot mean {label}; wanted {wanted}")
        self._labels = np.append(self._labels, np.arange(len(self._labels), max(value_map, default=0) + 1))
        self._labels[list(value_map)] = list(value_map.values())
        self.mapped += tuple(f"{value}={label}" for value, label in value_map.items())

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Sample:
        image_path, mask_path = self._files[index]
        image = open_image(image_path, self.max_pixels)
        label = self._open_label(mask_path)
        height, width = label.shape
        if (width, height) != image.size:
            raise ValueError(
                f"{mask_path} is {width} x {height} pixels, its image {image_path} is {image.width} x {image.height} "
                "(upright, as its EXIF orientation says); wanted equal sizes: export the mask at the image's size"
            )
        return _sample(tv_tensors.Image(image), label, self.names[index], self.transform)

    def _open_label(self, path: Path) -> np.ndarray:
        """Label values (H,W) of a mask file."""
        values, count, ignore = open_mask(path, self.max_pixels), len(self.split.classes), self.split.ignore
        known = (self._labels < count) | (self._labels == ignore)
        if values.min() < 0 or values.max() >= len(known) or not known[values].all():
            found = np.unique(values).tolist()
            wrong = [value for value in found if not (0 <= value < len(known) and known[value])]
            told = f"mask value{'s' * (len(wrong) > 1)} {listed([*map(str, wrong)], 5)}"
            error = UnknownValues(
                f"{path} has {told}, no class of split {self.split.name!r} (0 to {count - 1}; {ignore} is ignored); "
                f"say what they mean: --values {wrong[0]}=ignore, in Python value_map={{{wrong[0]}: {ignore}}}, or "
                "name their classes in the split"
            )
            error.values = found
            raise error
        return self._labels[values]


class UnknownValues(ValueError):
    """A mask with values that are no labels."""

    values: Sequence[int] = ()  # all that it has


def folder_split(root: StrPath, unseen: Sequence[str] | None = None) -> Split:
    """The split that `root`/classes.txt names, one class a line, line n for label value n-1.

    unseen: names of unseen classes; None reads `root`/unseen.txt, and without that file all classes are seen.
    """
    root = Path(root)
    _require(root, {"classes.txt": "class names, one a line, or give the split yourself"})
    classes = _class_names(root / "classes.txt")
    if unseen is None:
        unseen = _lines(root / "unseen.txt") if (root / "unseen.txt").is_file() else ()
    return Split.from_names(root.resolve().name, classes, unseen, f"{root / 'classes.txt'}")


def _class_names(path: Path) -> list[str]:
    """One a line, "0: sky" too if all lines are numbered from 0; refuses lines that would shift those after them."""
    lines = _all_lines(path)
    numbers = [re.fullmatch(r"(\d+)(?:\s*[:=,;)]|\.?\s)\s*(.*)", line) for line in lines]
    if [each and int(each[1]) for each in numbers] == [*range(len(lines))]:
        lines, numbers = [each[2] for each in numbers if each], []
    often = len(lines) < 2 * sum(map(bool, numbers))  # else "4 wheeler" is a name
    odd = r".*[:=,;]\s*\d+|#.*|\d+(\s*[:=,;)]|\.\s).*" + (r"|\d+\s.*" if often else "")
    for number, line in enumerate(lines, start=1):
        if not line or re.fullmatch(odd, line):
            raise ValueError(
                f"{path}, line {number} is {line!r}; wanted the name of the class with mask value {number - 1}: line n "
                "names value n - 1, so no blank lines, no remarks, and no numbers, unless all lines count from 0"
            )
    return lines


_CONVERTER = "are made by mmsegmentation's python tools/dataset_converters/"


@contextmanager
def _comes_from(source: str) -> Iterator[None]:
    """Adds to what is said of missing files how they are made; as a decorator."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. {source}") from error


@_comes_from(f"SegmentationClassAug and aug.txt {_CONVERTER}voc_aug.py data/VOCdevkit data/VOCdevkit/VOCaug")
def voc2012(
    root: StrPath, subset: Literal["train", "trainaug", "val"], transform: Transform | None = None
) -> ImageMaskFolder:
    """PASCAL VOC 2012 in the devkit's layout; `root` is .../VOCdevkit/VOC2012. Background is ignored.

    "trainaug" adds the SBD masks in SegmentationClassAug; its list is trainaug.txt, or train.txt and aug.txt.
    """
    _one_of("voc2012", subset, ("train", "trainaug", "val"))
    root, lists = Path(root), "ImageSets/Segmentation"
    wanted = {"JPEGImages/": "the photographs", "SegmentationClass/": "the masks"}
    masks, list_files = ["SegmentationClass"], [f"{lists}/{subset}.txt"]
    if subset == "trainaug":
        masks.append("SegmentationClassAug")
        wanted["SegmentationClassAug/"] = "the SBD masks as index PNGs"
        if not (root / list_files[0]).is_file() and (root / lists / "aug.txt").is_file():
            list_files = [f"{lists}/train.txt", f"{lists}/aug.txt"]
    names = _listed(root, wanted, list_files)
    values = _without_background(20)
    return ImageMaskFolder(
        root, splits.voc2012(), images="JPEGImages", masks=masks, names=names, value_map=values, transform=transform
    )


@_comes_from(f"*_labelTrainIds.png {_CONVERTER}coco_stuff164k.py data/coco_stuff164k")
def coco_stuff(root: StrPath, subset: Literal["train", "val"], transform: Transform | None = None) -> ImageMaskFolder:
    """COCO-Stuff 164k as mmsegmentation prepares it: images/train2017, annotations/train2017/*_labelTrainIds.png."""
    _one_of("coco_stuff", subset, ("train", "val"))
    images, masks, suffix = f"images/{subset}2017", f"annotations/{subset}2017", "_labelTrainIds.png"
    split = splits.coco_stuff()
    return ImageMaskFolder(root, split, images=images, masks=masks, mask_suffix=suffix, transform=transform)


@_comes_from(
    f"Masks and lists {_CONVERTER}pascal_context.py data/VOCdevkit data/VOCdevkit/VOC2010/trainval_merged.json"
)
def context(
    root: StrPath,
    subset: Literal["train", "val"],
    unseen: Literal["otseg", "cascade"] = "otseg",
    transform: Transform | None = None,
) -> ImageMaskFolder:
    """PASCAL Context, 59 classes, as mmsegmentation prepares it; `root` is .../VOCdevkit/VOC2010."""
    _one_of("context", subset, ("train", "val"))
    masks = "SegmentationClassContext"
    wanted = {"JPEGImages/": "the photographs", f"{masks}/": "index masks from mmsegmentation's converter"}
    names = _listed(Path(root), wanted, [f"ImageSets/SegmentationContext/{subset}.txt"])
    split, values = splits.context(unseen), _without_background(59)
    return ImageMaskFolder(
        root, split, images="JPEGImages", masks=masks, names=names, value_map=values, transform=transform
    )


@_comes_from("Unpack http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip: it holds all of them")
def ade20k(
    root: StrPath, subset: Literal["training", "validation"], transform: Transform | None = None
) -> ImageMaskFolder:
    """ADE20K's scene parsing benchmark; `root` is .../ADEChallengeData2016. "Other" (0) is ignored."""
    _one_of("ade20k", subset, ("training", "validation"))
    images, masks, values = f"images/{subset}", f"annotations/{subset}", _without_background(150)
    split = splits.ade20k()
    return ImageMaskFolder(root, split, images=images, masks=masks, value_map=values, transform=transform)


def camvid(root: StrPath, transform: Transform | None = None) -> ImageMaskFolder:
    """CamVid in the SegNet tutorial's form; `root` holds images/ and masks/. Unlabelled (11) is ignored."""
    return ImageMaskFolder(root, splits.camvid(), value_map={11: IGNORE}, transform=transform)


def _require(root: Path, parts: Mapping[str, str]) -> None:
    """Refuses a root that lacks some of the files and folders (ending in /) named, saying which and why."""
    is_there = {True: Path.is_dir, False: Path.is_file}
    missing = [f"{part} ({why})" for part, why in parts.items() if not is_there[part.endswith("/")](root / part)]
    if missing:
        got = "has no" if root.is_dir() else "does not exist; it lacks"
        raise FileNotFoundError(
            f"{root} {got} {', '.join(missing)}; wanted a folder with {', '.join(parts)}: "
            "check the path, or put the data there"
        )


def _refuse_missing(what: str, names: Sequence[str]) -> None:
    if names:
        raise FileNotFoundError(f"missing {what}: {len(names)} ({listed(names, 5)}); add them or take these names out")


def _by_suffix(folder: Path, suffix: str) -> dict[str, Path]:
    """The folder's files ending in `suffix`, by what comes before it; refuses two of one name."""
    files = sorted(path for path in folder.iterdir() if path.name.lower().endswith(suffix.lower()))
    return by_name((path.name[: -len(suffix)], path) for path in files)


def _all_lines(path: Path) -> list[str]:
    """Lines without blanks around them, of a text in UTF-8 or, as its first bytes say, UTF-16."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8")
    except UnicodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError(f"{path} is no text in UTF-8 or UTF-16: save it as UTF-8")
    return [line.strip() for line in re.split(r"\r\n|\r|\n", text.lstrip("\ufeff").rstrip())]


def _lines(path: Path) -> list[str]:
    return [line for line in _all_lines(path) if line]


def _listed(root: Path, folders: Mapping[str, str], lists: Sequence[str]) -> list[str]:
    """Image names from list files below `root`, after checking that these and the folders are there."""
    _require(root, {**folders, **dict.fromkeys(lists, "image names, one a line")})
    # DeepLab's lists hold "/JPEGImages/NAME.jpg /SegmentationClassAug/NAME.png"
    return [Path(line.split()[0]).stem for file in lists for line in _lines(root / file)]


def _without_background(classes: int) -> dict[int, int]:
    """Mask values 1..classes become labels 0..classes-1, 0 is ignored."""
    return {0: IGNORE, **{value: value - 1 for value in range(1, classes + 1)}}


def _one_of(dataset: str, subset: str, subsets: Sequence[str]) -> None:
    if subset not in subsets:
        raise ValueError(f"{dataset}: subset is {subset!r}; wanted one of {', '.join(map(repr, subsets))}")
