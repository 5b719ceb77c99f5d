"""Data sets of images and label masks: scenes that are drawn, files, and others kept in one file, or spoilt on purpose.

An item is {"image": Image uint8 (3,H,W), "label": Mask int64 (H,W), "name": str}; label values index the data set's
`split.classes`, `split.ignore` (255) is ignored."""

import io
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, TypedDict, get_args

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageFilter
from torch.utils.data import Dataset
from torchvision import tv_tensors

from sptseg import scenes
from sptseg.datasets import splits
from sptseg.datasets.images import Note, StrPath, by_name, images_by_name, listed, open_image, open_mask
from sptseg.datasets.splits import Split, composed
from sptseg.system import bytes_of, write

Stream = Literal["evaluation", "training"]
Corruption = Literal["blur", "noise", "jpeg", "contrast", "colour"]
STRENGTHS: dict[Corruption, tuple[float, float, float]] = {  # weak, middle, strong
    "blur": (0.7, 1.2, 2.0),  # standard deviation of a Gaussian, pixels
    "noise": (8, 16, 32),  # standard deviation of Gaussian noise, of 255
    "jpeg": (50, 25, 10),  # quality
    "contrast": (0.7, 0.5, 0.3),  # share that is left of the distance from the picture's mean colour
    "colour": (15, 30, 60),  # length of the shift of all pixels, of 255 a channel, in a random direction
}


class Sample(TypedDict):
    """One item of a data set."""

    image: torch.Tensor
    label: torch.Tensor
    name: str


class Scenes(Dataset[Sample]):
    """`length` scenes of `sptseg.scenes`, size x size; evaluation and training streams never share a picture.
    `one_colour`: the same scenes, but all stuff is gray and differs in texture only."""

    def __init__(
        self, length: int, seed: int = 0, stream: Stream = "evaluation", size: int = 128, one_colour: bool = False
    ) -> None:
        if length < 1 or seed < 0:
            raise ValueError(f"Scenes: length is {length}, seed {seed}; wanted at least 1, and 0")
        self.split, self.one_colour, self.size = splits.scenes(), one_colour, size
        self.seed = get_args(Stream).index(stream), seed
        kind = f"{stream}-one-colour" if one_colour else stream
        self.names = tuple(f"{kind}-{seed}-{index}" for index in range(length))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"Scenes: index is {index}; wanted 0 to {len(self) - 1}")
        image, label = scenes.draw((*self.seed, index), self.size, self.one_colour)
        channels_first = torch.from_numpy(image.transpose(2, 0, 1).copy())
        return {"image": tv_tensors.Image(channels_first), "label": _mask(label), "name": self.names[index]}


def _mask(label: np.ndarray) -> tv_tensors.Mask:
    return tv_tensors.Mask(torch.from_numpy(label.astype(np.int64)))


class ImageMaskFiles(Dataset[Sample]):
    """Images and index masks file by file: (image, mask) paths by name; `labels[v]` is the label of mask value v.

    Values without one raise ValueError when a mask is read. `found` names the layout, `read` opens masks, `max_pixels`
    is the limit of `open_image`, `mapped` what `map_values` was given."""

    max_pixels: int | None = None
    mapped: tuple[str, ...] = ()

    def __init__(
        self,
        pairs: Mapping[str, tuple[Path, Path]],
        split: Split,
        labels: np.ndarray,
        found: str = "",
        read: Callable[[Path, int | None], np.ndarray] = open_mask,
    ) -> None:
        self.names, self.split, self.found = tuple(pairs), split, found
        self._files, self._labels, self._read = list(pairs.values()), labels, read

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
        label = self._label(mask_path)
        height, width = label.shape
        if (width, height) != image.size:
            told = f"{mask_path} is {width} x {height} pixels, its image {image_path} is {image.width} x {image.height}"
            wanted = "wanted equal sizes: export the mask at the image's size"
            raise ValueError(f"{told} (upright, as its EXIF orientation says); {wanted}")
        return {"image": tv_tensors.Image(image), "label": _mask(label), "name": self.names[index]}

    def _label(self, path: Path) -> np.ndarray:
        """Label values (H,W) of a mask file."""
        values, count, ignore = self._read(path, self.max_pixels), len(self.split.classes), self.split.ignore
        known = (self._labels < count) | (self._labels == ignore)
        if values.min() >= 0 and values.max() < len(known) and known[values].all():
            return self._labels[values]
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


class UnknownValues(ValueError):
    """A mask with values that are no labels."""

    values: Sequence[int] = ()  # all that it has


class ImageMaskFolder(ImageMaskFiles):
    """Images and index masks in `root`/images and `root`/masks, matched by file name without suffix; masks are PNGs.

    split: the classes; None reads them from `root`/classes.txt (see `folder_split`).
    names: only these images (names without suffix), in this order; None: all, sorted.
    value_map: label of a mask value; values not named stay as they are.
    Raises FileNotFoundError for missing folders, images or masks; a faulty file raises ValueError when it is read."""

    def __init__(
        self,
        root: StrPath,
        split: Split | None = None,
        *,
        names: Sequence[str] | None = None,
        value_map: Mapping[int, int] | None = None,
    ) -> None:
        root = Path(root)
        images, masks = require(root, {"images/": "the images", "masks/": "the masks"})
        split = folder_split(root) if split is None else split
        image_paths = images_by_name(images)
        wanted, mask_paths = sorted(image_paths) if names is None else names, by_suffix(masks, ".png")
        pairs = paired(wanted, image_paths, mask_paths, images, f"{masks}/NAME.png")
        if names is None and (others := sorted(mask_paths.keys() - pairs.keys())):
            warnings.warn(Note(masks, f"left out {len(others)} masks without an image: {listed(others)}"), stacklevel=2)
        super().__init__(pairs, split, np.arange(split.ignore + 1))
        self.map_values(value_map or {})


def corrupt(image: np.ndarray, kind: Corruption, strength: int, seed: int | Sequence[int] = 0) -> np.ndarray:
    """A picture (H, W, 3) uint8, spoilt as in `STRENGTHS`, of strength 1 to 3; `seed`: of noise and the shift."""
    amount, rng, values = STRENGTHS[kind][strength - 1], np.random.default_rng(seed), image.astype(np.float32)
    if kind == "blur":
        return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(amount)))
    if kind == "jpeg":
        jpeg = bytes_of(partial(Image.fromarray(image).save, format="JPEG", quality=int(amount)))
        return np.asarray(Image.open(io.BytesIO(jpeg)))
    if kind == "noise":
        values += np.float32(amount) * rng.standard_normal(image.shape, np.float32)
    elif kind == "contrast":
        mean = values.mean((0, 1))
        values = mean + np.float32(amount) * (values - mean)
    else:
        direction = rng.standard_normal(3)
        values += (amount * direction / np.linalg.norm(direction)).astype(np.float32)
    return np.rint(values).clip(0, 255).astype(np.uint8)


class Corrupted(Dataset[Sample]):
    """A data set whose pictures are spoilt, each from a seed of its own."""

    def __init__(self, dataset: Dataset[Sample], kind: Corruption, strength: int) -> None:
        self.dataset, self.strength = dataset, strength
        self.kind: Corruption = kind
        self.names = tuple(f"{name}-{kind}-{strength}" for name in dataset.names)  # pyright: ignore

    def __getitem__(self, index: int) -> Sample:
        sample = self.dataset[index]
        image = corrupt(sample["image"].permute(1, 2, 0).numpy(), self.kind, self.strength, seed=index)
        return {**sample, "image": tv_tensors.Image(torch.from_numpy(image.copy()).permute(2, 0, 1))}


class Pool(Dataset[Sample]):
    """A data set of pictures of one size, equal to the bit, read from one file (N, 4, H, W) uint8 of colours and label;
    the first process that asks for the file makes it, others wait for it."""

    def __init__(self, dataset: Dataset[Sample], file: Path) -> None:
        self.names: tuple[str, ...] = dataset.names  # pyright: ignore
        with FileLock(file.with_suffix(".lock")):
            if not file.is_file():
                samples = (dataset[i] for i in range(len(self.names)))
                pixels = [np.concatenate([s["image"], s["label"][None].to(torch.uint8)]) for s in samples]
                write(file, bytes_of(partial(np.save, arr=np.stack(pixels))))
        self.pixels = np.load(file, mmap_mode="r")
        if len(self.pixels) != len(self.names):
            raise ValueError(f"{file} holds {len(self.pixels)} pictures; wanted {len(self.names)}: delete it")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        pixels = torch.from_numpy(np.array(self.pixels[index]))
        image, label = tv_tensors.Image(pixels[:3]), tv_tensors.Mask(pixels[3].long())
        return {"image": image, "label": label, "name": self.names[index]}


def folder_split(root: StrPath) -> Split:
    """The split that `root`/classes.txt names, one class a line, line n for label value n-1; "0: sky" too if all count.

    Unseen are the classes in `root`/unseen.txt; without that file all are seen. Raises ValueError for a line that would
    shift those after it."""
    root = Path(root)
    (path,) = require(root, {"classes.txt": "class names, one a line, or give the split yourself"})
    classes = all_lines(path)
    numbers = [re.fullmatch(r"(\d+)(?:\s*[:=,;)]|\.?\s)\s*(.*)", line) for line in classes]
    if [each and int(each[1]) for each in numbers] == [*range(len(classes))]:
        classes, numbers = [each[2] for each in numbers if each], []
    often = len(classes) < 2 * sum(map(bool, numbers))  # else "4 wheeler" is a name
    odd = r".*[:=,;]\s*\d+|#.*|\d+(\s*[:=,;)]|\.\s).*" + (r"|\d+\s.*" if often else "")
    odd += r"|[-*\"'\[{].*|.*[,;:\"'\]}]|.*[^\S \xa0\u3000].*"  # of lists in other notations; columns
    for number, line in enumerate(classes, start=1):
        if not line or re.fullmatch(odd, line):
            raise ValueError(
                f"{path}, line {number} is {line!r}; wanted the name of the class with mask value {number - 1}: line n "
                "names value n - 1, so no blank lines, remarks, marks, columns or numbers, but where all count from 0"
            )
    unseen = lines(root / "unseen.txt") if (root / "unseen.txt").is_file() else ()
    return Split.from_names(root.resolve().name, classes, unseen, f"{path}")


def require(root: Path, parts: Mapping[str, str]) -> list[Path]:
    """Paths of files and folders (ending in /) below a root, of "a/ or b/" the first that is there. Raises
    FileNotFoundError that says which are missing, and what for."""
    found = {part: [root / place for place in part.split(" or ") if (root / place).exists()] for part in parts}
    missing = [f"{part} ({meaning})" for part, meaning in parts.items() if not found[part]]
    if missing:
        got = "has no" if root.is_dir() else f"{'is no folder' if root.exists() else 'does not exist'}; it lacks"
        inside = sorted(path.name for path in root.iterdir())[:8] if root.is_dir() else []
        told = f"{root} {got} {', '.join(missing)}; wanted a folder with {', '.join(parts)}, found"
        raise FileNotFoundError(f"{told} {', '.join(inside) or 'nothing'}: check the path, or put the data there")
    return [paths[0] for paths in found.values()]


def paired(
    names: Iterable[str], images: Mapping[str, Path], masks: Mapping[str, Path], images_at: object, masks_at: object
) -> dict[str, tuple[Path, Path]]:
    """(image, mask) by name; refuses names that lack one, and no names at all."""
    names = [*map(composed, names)]
    if not names:
        raise FileNotFoundError(f"no images from {images_at}; wanted at least one name listed")
    for what, found in ((f"images in {images_at}", images), (f"masks in {masks_at} for images", masks)):
        if missing := [name for name in names if name not in found]:
            told = f"{len(missing)} ({listed(missing, 5)})"
            raise FileNotFoundError(f"missing {what}: {told}; add them or take these names out")
    return {name: (images[name], masks[name]) for name in names}


def by_suffix(folder: Path, suffix: str, pattern: str = "*") -> dict[str, Path]:
    """Files below a folder ending in `suffix`, letter case ignored, by what comes before it; hidden ones left out."""
    found = sorted(path for path in folder.glob(pattern) if path.name.lower().endswith(suffix.lower()))
    return by_name((path.name[: -len(suffix)], path) for path in found if not path.name.startswith("."))


def all_lines(path: Path) -> list[str]:
    """Lines without blanks around them, of a text in UTF-8 or, as its first bytes say, UTF-16."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8")
    except UnicodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError(f"{path} is no text in UTF-8 or UTF-16: save it as UTF-8")
    return [line.strip() for line in re.split(r"\r\n|\r|\n", text.lstrip("\ufeff").rstrip())]


def lines(path: Path) -> list[str]:
    """A text file's lines that are not blank."""
    return [line for line in all_lines(path) if line]
