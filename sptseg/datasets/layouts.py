"""Where the files of a data set lie as its authors release it, and which label each value in its masks means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro

from sptseg.datasets import splits
from sptseg.datasets.images import by_name, listed
from sptseg.datasets.splits import FACTS, IGNORE, composed

# Mask values of the classes in the order of `splits`. COCO-Stuff's PNGs hold id - 1 of the ids 1 to 182; no mask
# has the eleven left out (README and labels.txt of github.com/nightrome/cocostuff). Cityscapes: labels.py of
# github.com/mcordts/cityscapesScripts. PASCAL Context's are looked up by name in the labels.txt that comes with it.
COCO_STUFF_VALUES = [i - 1 for i in range(1, 183) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)]
CITYSCAPES_VALUES = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]

PREPARED = "from mmsegmentation's converter"
RELEASED = "as released"
LIST = "image names"
UPWARDS = ("", "../", "../../")  # what comes in an archive of its own may lie above
Released = Literal["voc2012", "coco-stuff", "context", "ade20k", "cityscapes"]


def where(name: tyro.conf.Positional[Released]) -> None:
    """Says what to download of a data set, how large it is, into which folders it goes, and how to check it.

    Args:
        name: the data set.
    """
    print(FACTS[name]["where"])


class Files(NamedTuple):
    """Files of a data set, and what they say.

    Attributes:
        pairs: by name, the image's and the mask's path.
        labels: the label of every mask value; for unknown values the number of classes, which is no label.
        found: the layout.
    """

    pairs: dict[str, tuple[Path, Path]]
    labels: np.ndarray
    found: str = ""


def voc2012(root: Path, subset: str) -> Files:
    """VOC 2012; trainaug: its own training masks before SBD's, which are read as released or from the converter."""
    wanted = {"JPEGImages/": "the photographs", "SegmentationClass/": "the masks"}
    train, val, aug, trainaug = (f"ImageSets/Segmentation/{name}.txt" for name in ("train", "val", "aug", "trainaug"))
    found = RELEASED
    if subset != "trainaug":
        images, own, list_file = require(root, wanted | {{"train": train, "val": val}[subset]: LIST})
        names, masks, places = names_in(list_file), by_suffix(own, ".png"), f"{own}"
    elif (root / "SegmentationClassAug").is_dir():
        wanted |= {"SegmentationClassAug/": "SBD's masks", f"{trainaug} or {aug}": LIST}
        images, own, more, list_file = require(root, wanted)
        first = [] if list_file == root / trainaug else require(root, {train: LIST})
        names = [name for file in (*first, list_file) for name in names_in(file)]
        masks, places, found = by_suffix(more, ".png") | by_suffix(own, ".png"), f"{own} or {more}", PREPARED
    else:
        sbd = " or ".join(f"{up}{name}/dataset/" for name in ("benchmark_RELEASE", "VOCaug") for up in UPWARDS)
        wanted |= {sbd: f"SBD's masks; or SegmentationClassAug/ {PREPARED}", train: LIST, val: LIST}
        images, own, sbd, *list_files = require(root, wanted)
        more, *sbd_files = require(sbd, {"cls/": "*.mat", "train.txt": LIST, "val.txt": LIST})
        known = [names_in(file) for file in list_files]
        names = known[0] + sorted({name for file in sbd_files for name in names_in(file)}.difference(*known))
        masks, places = by_suffix(more, ".mat") | by_suffix(own, ".png"), f"{own} or {more}"
    pairs = paired(names, by_suffix(images, ".jpg"), masks, images, places)
    return Files(pairs, labels_of(range(1, 21), ignored=(0, IGNORE)), found)


def coco_stuff(root: Path, subset: str) -> Files:
    """COCO-Stuff 164K: photographs of 2017 and stuffthingmaps_trainval2017, or the converter's *_labelTrainIds.png."""
    maps = " or ".join(f"{folder}{subset}2017/" for folder in ("annotations/", "stuffthingmaps_trainval2017/", ""))
    images, masks = require(root, {f"images/{subset}2017/ or {subset}2017/": "the photographs", maps: "the masks"})
    photographs, converted = by_suffix(images, ".jpg"), by_suffix(masks, "_labelTrainIds.png")
    values = range(171) if converted else COCO_STUFF_VALUES
    pairs = paired(photographs, photographs, converted or by_suffix(masks, ".png"), images, masks)
    return Files(pairs, labels_of(values, ignored=(IGNORE,)), PREPARED if converted else RELEASED)


def context(root: Path, subset: str) -> Files:
    """PASCAL Context: 459 ids in trainval/*.mat with their names in labels.txt, or the converter's 59 in PNGs."""
    images = {"JPEGImages/": "the photographs"}
    if (root / "SegmentationClassContext").is_dir():
        wanted = {"SegmentationClassContext/": "the masks", f"ImageSets/SegmentationContext/{subset}.txt": LIST}
        images, masks, names = require(root, images | wanted)
        suffix, found, labels = ".png", PREPARED, labels_of(range(1, 60), ignored=(0, IGNORE))
    else:
        mats_are = f"Context's masks; or SegmentationClassContext/ {PREPARED}"
        wanted = {" or ".join(f"{up}trainval/" for up in UPWARDS): mats_are, f"ImageSets/Main/{subset}.txt": LIST}
        images, masks, names = require(root, images | wanted)
        (file,) = require(masks.parent, {"labels.txt": "names of the 459 ids"})
        ids = {name.replace(" ", ""): int(id) for id, _, name in (line.partition(":") for line in lines(file))}
        plain = [name.replace(" ", "") for name in splits.context().classes]  # "pottedplant" there
        if unnamed := [name for name in plain if name not in ids]:
            raise ValueError(f"{file} lacks {', '.join(unnamed)}; wanted the 459 names in trainval.tar.gz")
        suffix, found = ".mat", RELEASED
        labels = labels_of([ids[name] for name in plain], ignored=range(1 + max(ids.values())))
    pairs = paired(names_in(names), by_suffix(images, ".jpg"), by_suffix(masks, suffix), images, masks)
    return Files(pairs, labels, found)


def ade20k(root: Path, subset: str) -> Files:
    """ADE20K's scene parsing benchmark as released."""
    images, masks = require(root, {f"images/{subset}/": "the photographs", f"annotations/{subset}/": "the masks"})
    photographs = by_suffix(images, ".jpg")
    pairs = paired(photographs, photographs, by_suffix(masks, ".png"), images, masks)
    return Files(pairs, labels_of(range(1, 151), ignored=(0, IGNORE)), RELEASED)


def cityscapes(root: Path, subset: str) -> Files:
    """Cityscapes' fine annotations as released: *_leftImg8bit.png and *_gtFine_labelIds.png in a folder a city."""
    images, masks = require(root, {f"leftImg8bit/{subset}/": "the photographs", f"gtFine/{subset}/": "the masks"})
    photographs, labels = by_suffix(images, "_leftImg8bit.png", "*/*"), by_suffix(masks, "_gtFine_labelIds.png", "*/*")
    pairs = paired(photographs, photographs, labels, images, masks)
    return Files(pairs, labels_of(CITYSCAPES_VALUES, ignored=range(34)), RELEASED)


def labels_of(values: Sequence[int], ignored: Iterable[int]) -> np.ndarray:
    """int64 (256,) or longer: i for values[i], 255 for ignored values, len(values) for all others."""
    ignored = list(ignored)
    table = np.full(max(256, 1 + max(*values, *ignored)), len(values))
    table[ignored] = IGNORE
    table[list(values)] = range(len(values))
    return table


def require(root: Path, parts: Mapping[str, str]) -> list[Path]:
    """Paths of files and folders (ending in /) below a root, of "a/ or b/" the first that is there.

    Raises FileNotFoundError that says which are missing, and what for.
    """
    is_there = {True: Path.is_dir, False: Path.is_file}
    found = {
        part: [root / place for place in part.split(" or ") if is_there[place.endswith("/")](root / place)]
        for part in parts
    }
    missing = [f"{part} ({meaning})" for part, meaning in parts.items() if not found[part]]
    if missing:
        got = "has no" if root.is_dir() else f"{'is no folder' if root.exists() else 'does not exist'}; it lacks"
        inside = sorted(path.name for path in root.iterdir())[:8] if root.is_dir() else []
        raise FileNotFoundError(
            f"{root} {got} {', '.join(missing)}; wanted a folder with {', '.join(parts)}, found "
            f"{', '.join(inside) or 'nothing'}: check the path, or put the data there"
        )
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


def names_in(path: Path) -> list[str]:
    """Image names in a list; DeepLab's have "/JPEGImages/NAME.jpg /SegmentationClassAug/NAME.png"."""
    return [Path(line.split()[0]).stem for line in lines(path)]
