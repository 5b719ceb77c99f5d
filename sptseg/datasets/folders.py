"""Data sets of images and label masks: the picture-book scenes, folders, VOC, COCO-Stuff, Context, ADE20K, ...

An item is {"image": Image uint8 (3,H,W), "label": Mask int64 (H,W), "name": str}; label values index the data set's
`split.classes`, `split.ignore` (255) is ignored. A `transform` gets and returns (image, label).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

from sptseg import scenes
from sptseg.datasets import layouts, splits
from sptseg.datasets.images import IMAGE_SUFFIXES, StrPath, _indices, _matlab, open_image
from sptseg.datasets.layouts import Files, by_suffix, lines, paired, require
from sptseg.datasets.splits import IGNORE, Split

Transform = Callable[[tv_tensors.Image, tv_tensors.Mask], tuple[torch.Tensor, torch.Tensor]]
_STREAMS = ("evaluation", "training")


class Sample(TypedDict):
    """One item of a data set."""

    image: torch.Tensor
    label: torch.Tensor
    name: str


def _sample(image: tv_tensors.Image, label: np.ndarray, name: str, transform: Transform | None) -> Sample:
    mask = tv_tensors.Mask(torch.from_numpy(label.astype(np.int64)))
    if transform is None:
        return {"image": image, "label": mask, "name": name}
    new_image, new_label = transform(image, mask)
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
        self.split = splits.scenes()
        self.length = length
        self.seed = seed
        self.stream = stream
        self.size = size
        self.transform = transform
        self.names = tuple(f"{stream}-{seed}-{index}" for index in range(length))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(f"Scenes: index is {index}; wanted 0 to {self.length - 1}")
        image, label = scenes.draw(seed=(_STREAMS.index(self.stream), self.seed, index), size=self.size)
        channels_first = torch.from_numpy(image.transpose(2, 0, 1).copy())
        return _sample(tv_tensors.Image(channels_first), label, self.names[index], self.transform)


class ImageMaskFiles(Dataset[Sample]):
    """Images and index masks file by file, as `layouts` finds them; `found` names the layout.

    Mask values that are neither a class nor ignored raise ValueError when the mask is read.
    """

    def __init__(self, files: Files, split: Split, transform: Transform | None = None) -> None:
        self.names = tuple(files.pairs)
        self.split = split
        self.transform = transform
        self.found = files.found
        self._files = list(files.pairs.values())
        self._labels = files.labels

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Sample:
        image_path, mask_path = self._files[index]
        image = open_image(image_path)
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
        values = _matlab(path) if path.suffix.lower() == ".mat" else _indices(path)  # (H,W)
        if values.min() < 0 or values.max() >= len(self._labels):
            raise self._out_of_range(path, int(values.min() if values.min() < 0 else values.max()))
        counts = np.bincount(values.ravel(), minlength=len(self._labels))
        known = (self._labels < len(self.split.classes)) | (self._labels == self.split.ignore)
        wrong = np.flatnonzero((counts > 0) & ~known)
        if wrong.size:
            raise self._out_of_range(path, int(wrong[0]))
        return self._labels[values]

    def _out_of_range(self, path: Path, value: int) -> ValueError:
        masks = f"{self.split.name}'s masks {self.found}"
        return ValueError(f"{path} has mask value {value}, which {masks} never have: get the file again")


class ImageMaskFolder(ImageMaskFiles):
    """Images and index masks in two folders below `root`, matched by file name without suffix.

    split: the classes; None reads them from `root`/classes.txt (see `folder_split`).
    images: the images' folder.
    masks: the masks' folder.
    names: only these images (names without suffix), in this order; None: all, sorted.
    mask_suffix: what follows the image's name in the mask's file name, letter case ignored.
    value_map: label of a mask value; values not named stay as they are.
    Raises FileNotFoundError for missing folders, images or masks; a faulty file raises ValueError when it is read.
    """

    def __init__(
        self,
        root: StrPath,
        split: Split | None = None,
        *,
        images: str = "images",
        masks: str = "masks",
        names: Sequence[str] | None = None,
        mask_suffix: str = ".png",
        value_map: Mapping[int, int] | None = None,
        transform: Transform | None = None,
    ) -> None:
        root = Path(root)
        require(root, {f"{images}/": "the images", f"{masks}/": "the masks"})
        split = folder_split(root) if split is None else split
        image_paths = _by_stem(root / images)
        listed, mask_paths = sorted(image_paths) if names is None else names, by_suffix(root / masks, mask_suffix)
        pairs = paired(listed, image_paths, mask_paths, root / images, f"{root / masks}/NAME{mask_suffix}")
        super().__init__(Files(pairs, _label_table(value_map or {}, split.ignore)), split, transform)

    def _out_of_range(self, path: Path, value: int) -> ValueError:
        last, ignore = len(self.split.classes) - 1, self.split.ignore
        return ValueError(
            f"{path} has mask value {value}, which is no class of split {self.split.name!r} (0 to {last}, {ignore} is "
            f"ignored); give value_map={{{value}: {ignore}}} to ignore it, or name its class in the split"
        )


def folder_split(root: StrPath, unseen: Sequence[str] | None = None) -> Split:
    """The split that `root`/classes.txt names, one class a line, line n for label value n-1.

    unseen: names of unseen classes; None reads `root`/unseen.txt, and without that file all classes are seen.
    """
    root = Path(root)
    require(root, {"classes.txt": "class names, one a line, or give the split yourself"})
    classes = lines(root / "classes.txt")
    if unseen is None:
        unseen = lines(root / "unseen.txt") if (root / "unseen.txt").is_file() else ()
    return Split.from_names(root.resolve().name, classes, unseen, f"{root / 'classes.txt'}")


@contextmanager
def _from(name: layouts.Released) -> Iterator[None]:
    """Adds to what is said of missing files where they come from; as a decorator."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. What to download, into which folders: sptseg data where {name}") from error


@_from("voc2012")
def voc2012(
    root: StrPath, subset: Literal["train", "trainaug", "val"], transform: Transform | None = None
) -> ImageMaskFiles:
    """PASCAL VOC 2012; `root` is .../VOCdevkit/VOC2012. Background is ignored.

    "trainaug" adds SBD: SegmentationClassAug and trainaug.txt (or train.txt and aug.txt) from mmsegmentation's
    converter, or without that folder benchmark_RELEASE, as released, in `root`, beside it or one above.
    """
    _one_of("voc2012", subset, ("train", "trainaug", "val"))
    return ImageMaskFiles(layouts.voc2012(Path(root), subset), splits.voc2012(), transform)


@_from("coco-stuff")
def coco_stuff(root: StrPath, subset: Literal["train", "val"], transform: Transform | None = None) -> ImageMaskFiles:
    """COCO-Stuff 164K; `root` holds images/train2017 and annotations/train2017.

    The masks are *_labelTrainIds.png from mmsegmentation's converter, or without these stuffthingmaps_trainval2017 as
    released, there or in a folder of that name.
    """
    _one_of("coco_stuff", subset, ("train", "val"))
    return ImageMaskFiles(layouts.coco_stuff(Path(root), subset), splits.coco_stuff(), transform)


@_from("context")
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
    _one_of("context", subset, ("train", "val"))
    split = splits.context(unseen)
    return ImageMaskFiles(layouts.context(Path(root), subset, split.classes), split, transform)


@_from("ade20k")
def ade20k(
    root: StrPath, subset: Literal["training", "validation"], transform: Transform | None = None
) -> ImageMaskFiles:
    """ADE20K's scene parsing benchmark; `root` is .../ADEChallengeData2016. "Other" (0) is ignored."""
    _one_of("ade20k", subset, ("training", "validation"))
    return ImageMaskFiles(layouts.ade20k(Path(root), subset), splits.ade20k(), transform)


@_from("cityscapes")
def cityscapes(root: StrPath, subset: Literal["train", "val"], transform: Transform | None = None) -> ImageMaskFiles:
    """Cityscapes, fine annotations; `root` holds leftImg8bit/ and gtFine/. All but the 19 classes is ignored."""
    _one_of("cityscapes", subset, ("train", "val"))
    return ImageMaskFiles(layouts.cityscapes(Path(root), subset), splits.cityscapes(), transform)


def camvid(root: StrPath, transform: Transform | None = None) -> ImageMaskFolder:
    """CamVid in the SegNet tutorial's form; `root` holds images/ and masks/. Unlabelled (11) is ignored."""
    return ImageMaskFolder(root, splits.camvid(), value_map={11: IGNORE}, transform=transform)


def _by_stem(folder: Path) -> dict[str, Path]:
    """The folder's images by name without suffix."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."):
            if path.stem in found:
                raise ValueError(f"{found[path.stem]} and {path} have the same name but for the suffix; rename one")
            found[path.stem] = path
    if not found:
        raise FileNotFoundError(f"no images from {folder}; wanted files ending in {', '.join(IMAGE_SUFFIXES)}")
    return found


def _label_table(value_map: Mapping[int, int], ignore: int = IGNORE) -> np.ndarray:
    """uint8 (256,), or uint16 (65536,): the label of every mask value."""
    for value, label in value_map.items():
        if not (0 <= value <= ignore and 0 <= label <= ignore):
            raise ValueError(f"value_map has {value}: {label}; wanted mask values and labels from 0 to {ignore}")
    table = np.arange(ignore + 1, dtype=np.uint8 if ignore == IGNORE else np.uint16)
    table[list(value_map)] = list(value_map.values())
    return table


def _one_of(dataset: str, subset: str, subsets: Sequence[str]) -> None:
    if subset not in subsets:
        raise ValueError(f"{dataset}: subset is {subset!r}; wanted one of {', '.join(map(repr, subsets))}")
