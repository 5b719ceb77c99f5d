"""Data sets of images and label masks: the picture-book scenes, folders, VOC, COCO-Stuff, Context, ADE20K, ...

An item is {"image": Image uint8 (3,H,W), "label": Mask int64 (H,W), "name": str}; label values index the data set's
`split.classes`, `split.ignore` (255) is ignored. A `transform` gets and returns (image, label).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

from sptseg import scenes
from sptseg.datasets import layouts, splits
from sptseg.datasets.images import StrPath, images_by_name, listed, open_image, open_mask
from sptseg.datasets.layouts import Files, all_lines, by_suffix, lines, paired, require
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
    """`length` scenes of `sptseg.scenes`, size x size; evaluation and training streams never share a picture.

    `one_colour`: the same scenes, but all stuff is gray and differs in texture only.
    """

    def __init__(
        self,
        length: int,
        seed: int = 0,
        stream: Literal["evaluation", "training"] = "evaluation",
        size: int = 128,
        transform: Transform | None = None,
        one_colour: bool = False,
    ) -> None:
        if length < 1 or seed < 0:
            raise ValueError(f"Scenes: length is {length}, seed {seed}; wanted at least 1, and 0")
        if stream not in _STREAMS:
            raise ValueError(f"Scenes: stream is {stream!r}; wanted one of {', '.join(map(repr, _STREAMS))}")
        self.split, self.transform = splits.scenes(), transform
        self.length, self.seed, self.stream, self.size = length, seed, stream, size
        self.one_colour = one_colour
        kind = f"{stream}-one-colour" if one_colour else stream
        self.names = tuple(f"{kind}-{seed}-{index}" for index in range(length))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(f"Scenes: index is {index}; wanted 0 to {self.length - 1}")
        seed = _STREAMS.index(self.stream), self.seed, index
        image, label = scenes.draw(seed, self.size, self.one_colour)
        channels_first = torch.from_numpy(image.transpose(2, 0, 1).copy())
        return _sample(tv_tensors.Image(channels_first), label, self.names[index], self.transform)


class ImageMaskFiles(Dataset[Sample]):
    """Images and index masks file by file, as `layouts` finds them; `found` names the layout.

    Mask values that are neither a class nor ignored raise ValueError when the mask is read. `max_pixels` is the limit
    of `open_image`, `mapped` what `map_values` was given.
    """

    max_pixels: int | None = None
    mapped: tuple[str, ...] = ()

    def __init__(self, files: Files, split: Split, transform: Transform | None = None) -> None:
        self.names = tuple(files.pairs)
        self.split = split
        self.transform = transform
        self.found = files.found
        self._files = list(files.pairs.values())
        self._labels = files.labels

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
                f"{path} has {told}, which {self.split.name}'s masks {self.found} never have: get the file again"
                if self.found
                else f"{path} has {told}, no class of split {self.split.name!r} (0 to {count - 1}; {ignore} is "
                f"ignored); say what they mean: --values {wrong[0]}=ignore, in Python value_map={{{wrong[0]}: "
                f"{ignore}}}, or name their classes in the split"
            )
            error.values = found
            raise error
        return self._labels[values]


class ImageMaskFolder(ImageMaskFiles):
    """Images and index masks in `root`/images and `root`/masks, matched by file name without suffix; masks are PNGs.

    split: the classes; None reads them from `root`/classes.txt (see `folder_split`).
    names: only these images (names without suffix), in this order; None: all, sorted.
    value_map: label of a mask value; values not named stay as they are.
    Raises FileNotFoundError for missing folders, images or masks; a faulty file raises ValueError when it is read.
    """

    def __init__(
        self,
        root: StrPath,
        split: Split | None = None,
        *,
        names: Sequence[str] | None = None,
        value_map: Mapping[int, int] | None = None,
        transform: Transform | None = None,
    ) -> None:
        root = Path(root)
        images, masks = require(root, {"images/": "the images", "masks/": "the masks"})
        split = folder_split(root) if split is None else split
        image_paths = images_by_name(images)
        wanted, mask_paths = sorted(image_paths) if names is None else names, by_suffix(masks, ".png")
        pairs = paired(wanted, image_paths, mask_paths, images, f"{masks}/NAME.png")
        super().__init__(Files(pairs, np.arange(split.ignore + 1)), split, transform)
        self.map_values(value_map or {})


class UnknownValues(ValueError):
    """A mask with values that are no labels."""

    values: Sequence[int] = ()  # all that it has


def folder_split(root: StrPath) -> Split:
    """The split that `root`/classes.txt names, one class a line, line n for label value n-1.

    Unseen are the classes in `root`/unseen.txt; without that file all are seen.
    """
    root = Path(root)
    require(root, {"classes.txt": "class names, one a line, or give the split yourself"})
    classes = _class_names(root / "classes.txt")
    unseen = lines(root / "unseen.txt") if (root / "unseen.txt").is_file() else ()
    return Split.from_names(root.resolve().name, classes, unseen, f"{root / 'classes.txt'}")


def _class_names(path: Path) -> list[str]:
    """One a line, "0: sky" too if all lines are numbered from 0; refuses lines that would shift those after them."""
    lines = all_lines(path)
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


def _released(
    name: layouts.Released, find: Callable[[Path, str], Files], split: Split, root: StrPath, subset: str,
    transform: Transform | None,
) -> ImageMaskFiles:  # fmt: skip
    """One subset of a public data set; of missing files it says where they come from."""
    subsets = splits.FACTS[name]["subsets"]
    if subset not in subsets:
        raise ValueError(f"{name}: subset is {subset!r}; wanted one of {', '.join(map(repr, subsets))}")
    try:
        return ImageMaskFiles(find(Path(root), subset), split, transform)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. What to download, into which folders: sptseg data where {name}") from error


def voc2012(
    root: StrPath, subset: Literal["train", "trainaug", "val"], transform: Transform | None = None
) -> ImageMaskFiles:
    """PASCAL VOC 2012; `root` is .../VOCdevkit/VOC2012. Background is ignored.

    "trainaug" adds SBD: SegmentationClassAug and trainaug.txt (or train.txt and aug.txt) from mmsegmentation's
    converter, or without that folder benchmark_RELEASE, as released, in `root`, beside it or one above.
    """
    return _released("voc2012", layouts.voc2012, splits.voc2012(), root, subset, transform)


def coco_stuff(root: StrPath, subset: Literal["train", "val"], transform: Transform | None = None) -> ImageMaskFiles:
    """COCO-Stuff 164K; `root` holds images/train2017 and annotations/train2017.

    The masks are *_labelTrainIds.png from mmsegmentation's converter, or without these stuffthingmaps_trainval2017 as
    released, there or in a folder of that name.
    """
    return _released("coco-stuff", layouts.coco_stuff, splits.coco_stuff(), root, subset, transform)


def context(
    root: StrPath,
    subset: Literal["train", "val"],
    unseen: Literal["otseg", "cascade"] = "otseg",
    transform: Transform | None = None,
) -> ImageMaskFiles:
    """PASCAL Context, 59 classes; `root` is .../VOCdevkit/VOC2010. All else is ignored.

    The masks are SegmentationClassContext from mmsegmentation's converter, or without that folder trainval/*.mat and
    labels.txt as released, in `root`, beside it or one above.
    """
    return _released("context", layouts.context, splits.context(unseen), root, subset, transform)


def ade20k(
    root: StrPath, subset: Literal["training", "validation"], transform: Transform | None = None
) -> ImageMaskFiles:
    """ADE20K's scene parsing benchmark; `root` is .../ADEChallengeData2016. "Other" (0) is ignored."""
    return _released("ade20k", layouts.ade20k, splits.ade20k(), root, subset, transform)


def cityscapes(root: StrPath, subset: Literal["train", "val"], transform: Transform | None = None) -> ImageMaskFiles:
    """Cityscapes, fine annotations; `root` holds leftImg8bit/ and gtFine/. All but the 19 classes is ignored."""
    return _released("cityscapes", layouts.cityscapes, splits.cityscapes(), root, subset, transform)


def camvid(root: StrPath, transform: Transform | None = None) -> ImageMaskFolder:
    """CamVid in the SegNet tutorial's form; `root` holds images/ and masks/. Unlabelled (11) is ignored."""
    return ImageMaskFolder(root, splits.camvid(), value_map={11: IGNORE}, transform=transform)
