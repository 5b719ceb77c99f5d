"""Public data sets as their authors release them, or as others' converters prepare them; all data sets by name.

`root` is a path, an item and what is ignored as in `folders`; FileNotFoundError says what is missing, and where it
comes from."""

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import Literal, Self

import numpy as np
import tyro
from torch.utils.data import Dataset

from sptseg.datasets import folders, splits
from sptseg.datasets.folders import ImageMaskFiles, ImageMaskFolder, Sample, Scenes, by_suffix, lines, paired, require
from sptseg.datasets.images import StrPath, open_ade20k_mask, open_mask
from sptseg.datasets.splits import BY_NAME, FACTS, IGNORE, WIDE_IGNORE, Published, Split, ignored_label, names, plain
from sptseg.system import is_main_process

# Mask values of the classes in the order of `splits`. COCO-Stuff's PNGs hold id - 1 of the ids 1 to 182; no mask
# has the eleven left out (README and labels.txt of github.com/nightrome/cocostuff). Cityscapes: labels.py of
# github.com/mcordts/cityscapesScripts. PASCAL Context's are looked up by name in the labels.txt that comes with it.
COCO_STUFF_VALUES = [i - 1 for i in range(1, 183) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)]
CITYSCAPES_VALUES = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
ADE20K_847_VALUES = [*map(int, FACTS["ade20k-847"]["values"].split())]

PREPARED = "from mmsegmentation's converter"
RELEASED = "as released"
PHOTOGRAPHS, MASKS, LIST = "the photographs", "the masks", "image names"
UPWARDS = ("", "../", "../../")  # what comes in an archive of its own may lie above
Released = Literal["voc2012", "coco-stuff", "context", "ade20k", "ade20k-847", "cityscapes"]


def where(name: tyro.conf.Positional[Released]) -> None:
    """Says what to download of a data set, how large it is, into which folders it goes, and how to check it.

    Args:
        name: the data set."""
    print(FACTS[name]["where"])


def released(name: Released) -> Callable[[Callable[..., ImageMaskFiles]], Callable[..., ImageMaskFiles]]:
    """Of a function that finds a public data set's files: refuses other subsets, and says where missing files are."""

    def named(find: Callable[..., ImageMaskFiles]) -> Callable[..., ImageMaskFiles]:
        @wraps(find)
        def checked(root: StrPath, subset: str, *options: str, **named_options: str) -> ImageMaskFiles:
            subsets = FACTS[name]["subsets"]
            if subset not in subsets:
                raise ValueError(f"{name}: subset is {subset!r}; wanted one of {', '.join(map(repr, subsets))}")
            try:
                return find(Path(root), subset, *options, **named_options)
            except FileNotFoundError as error:
                hint = f"What to download, into which folders: sptseg data where {name}"
                raise FileNotFoundError(f"{error}. {hint}") from error

        return checked

    return named


@released("voc2012")
def voc2012(root: Path, subset: Literal["train", "trainaug", "val"]) -> ImageMaskFiles:
    """PASCAL VOC 2012; `root` is .../VOCdevkit/VOC2012. Background is ignored.

    "trainaug" adds SBD: SegmentationClassAug and trainaug.txt (or train.txt and aug.txt) from mmsegmentation's
    converter, or without that folder benchmark_RELEASE, as released, in `root`, beside it or one above. VOC's own
    masks come before SBD's."""
    wanted = {"JPEGImages/": PHOTOGRAPHS, "SegmentationClass/": MASKS}
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
    return ImageMaskFiles(pairs, splits.voc2012(), labels_of(range(1, 21), ignored=(0, IGNORE)), found)


@released("coco-stuff")
def coco_stuff(root: Path, subset: Literal["train", "val"]) -> ImageMaskFiles:
    """COCO-Stuff 164K; `root` holds images/train2017 and annotations/train2017.

    The masks are *_labelTrainIds.png from mmsegmentation's converter, or without these stuffthingmaps_trainval2017 as
    released, there or in a folder of that name."""
    maps = " or ".join(f"{folder}{subset}2017/" for folder in ("annotations/", "stuffthingmaps_trainval2017/", ""))
    images, masks = require(root, {f"images/{subset}2017/ or {subset}2017/": PHOTOGRAPHS, maps: MASKS})
    photographs, converted = by_suffix(images, ".jpg"), by_suffix(masks, "_labelTrainIds.png")
    labels = labels_of(range(171) if converted else COCO_STUFF_VALUES, ignored=(IGNORE,))
    pairs = paired(photographs, photographs, converted or by_suffix(masks, ".png"), images, masks)
    return ImageMaskFiles(pairs, splits.coco_stuff(), labels, PREPARED if converted else RELEASED)


@released("context")
def context(
    root: Path, subset: Literal["train", "val"], unseen: Literal["otseg", "cascade"] = "otseg"
) -> ImageMaskFiles:
    """PASCAL Context, 59 classes; `root` is .../VOCdevkit/VOC2010. All else is ignored.

    The masks are SegmentationClassContext from mmsegmentation's converter, or without that folder trainval/*.mat of 459
    ids and labels.txt with their names as released, in `root`, beside it or one above."""
    wanted, split = {"JPEGImages/": PHOTOGRAPHS}, splits.context(unseen)
    if (root / "SegmentationClassContext").is_dir():
        wanted |= {"SegmentationClassContext/": MASKS, f"ImageSets/SegmentationContext/{subset}.txt": LIST}
        images, masks, names = require(root, wanted)
        suffix, found, labels = ".png", PREPARED, labels_of(range(1, 60), ignored=(0, IGNORE))
    else:
        mats_are = f"Context's masks; or SegmentationClassContext/ {PREPARED}"
        wanted |= {" or ".join(f"{up}trainval/" for up in UPWARDS): mats_are, f"ImageSets/Main/{subset}.txt": LIST}
        images, masks, names = require(root, wanted)
        (file,) = require(masks.parent, {"labels.txt": "names of the 459 ids"})
        ids = {name.replace(" ", ""): int(id) for id, _, name in (line.partition(":") for line in lines(file))}
        plain = [name.replace(" ", "") for name in split.classes]  # "pottedplant" there
        if unnamed := [name for name in plain if name not in ids]:
            raise ValueError(f"{file} lacks {', '.join(unnamed)}; wanted the 459 names in trainval.tar.gz")
        suffix, found = ".mat", RELEASED
        labels = labels_of([ids[name] for name in plain], ignored=range(1 + max(ids.values())))
    pairs = paired(names_in(names), by_suffix(images, ".jpg"), by_suffix(masks, suffix), images, masks)
    return ImageMaskFiles(pairs, split, labels, found)


@released("ade20k")
def ade20k(root: Path, subset: Literal["training", "validation"]) -> ImageMaskFiles:
    """ADE20K's scene parsing benchmark; `root` is .../ADEChallengeData2016. "Other" (0) is ignored."""
    images, masks = require(root, {f"images/{subset}/": PHOTOGRAPHS, f"annotations/{subset}/": MASKS})
    photographs = by_suffix(images, ".jpg")
    pairs = paired(photographs, photographs, by_suffix(masks, ".png"), images, masks)
    return ImageMaskFiles(pairs, splits.ade20k(), labels_of(range(1, 151), ignored=(0, IGNORE)), RELEASED)


@released("ade20k-847")
def ade20k_847(root: Path, subset: Literal["training", "validation"]) -> ImageMaskFiles:
    """ADE20K with its 847 frequent classes; `root` is .../ADE20K_2021_17_01. All else is ignored (65535).

    images_detectron2 and annotations_detectron2 from MaskFormer's converter, or without these images/ADE as released.
    """
    if (root / "annotations_detectron2").is_dir():
        wanted = {f"images_detectron2/{subset}/": PHOTOGRAPHS, f"annotations_detectron2/{subset}/": MASKS}
        pattern, suffix, found, read = "*", ".tif", "from MaskFormer's converter", open_mask
        labels = labels_of(range(847), ignored=(WIDE_IGNORE,))
    else:
        wanted = {f"images/ADE/{subset}/": "photographs and masks"}
        pattern, suffix, found, read = "*/*/*", "_seg.png", RELEASED, open_ade20k_mask
        labels = labels_of(ADE20K_847_VALUES, ignored=range(26 * 256))
    folders = require(root, wanted)
    photographs, masks = by_suffix(folders[0], ".jpg", pattern), by_suffix(folders[-1], suffix, pattern)
    pairs = paired(sorted(photographs), photographs, masks, folders[0], folders[-1])
    return ImageMaskFiles(pairs, splits.ade20k_847(), labels, found, read)


@released("cityscapes")
def cityscapes(root: Path, subset: Literal["train", "val"]) -> ImageMaskFiles:
    """Cityscapes, fine annotations; `root` holds leftImg8bit/ and gtFine/. All but the 19 classes is ignored."""
    images, masks = require(root, {f"leftImg8bit/{subset}/": PHOTOGRAPHS, f"gtFine/{subset}/": MASKS})
    photographs, ids = by_suffix(images, "_leftImg8bit.png", "*/*"), by_suffix(masks, "_gtFine_labelIds.png", "*/*")
    pairs = paired(photographs, photographs, ids, images, masks)
    return ImageMaskFiles(pairs, splits.cityscapes(), labels_of(CITYSCAPES_VALUES, ignored=range(34)), RELEASED)


def camvid(root: StrPath) -> ImageMaskFolder:
    """CamVid in the SegNet tutorial's form; `root` holds images/ and masks/. Unlabelled (11) is ignored."""
    return ImageMaskFolder(root, splits.camvid(), value_map={11: IGNORE})


def labels_of(values: Sequence[int], ignored: Iterable[int]) -> np.ndarray:
    """int64 (256,) or longer: i for values[i], 255 (or 65535) for ignored values, len(values) for all others."""
    ignored = list(ignored)
    table = np.full(max(256, 1 + max(*values, *ignored)), len(values))
    table[ignored] = ignored_label(len(values))
    table[list(values)] = range(len(values))
    return table


def names_in(path: Path) -> list[str]:
    """Image names in a list; DeepLab's have "/JPEGImages/NAME.jpg /SegmentationClassAug/NAME.png"."""
    return [Path(line.split()[0]).stem for line in lines(path)]


Layout = Literal["folder", Published]
DATA_SETS: dict[str, Callable[..., ImageMaskFiles]] = {  # of a root and a subset
    "folder": lambda root, *_: ImageMaskFolder(root), "camvid": lambda root, *_: camvid(root),
    "voc2012": voc2012, "coco-stuff": coco_stuff, "context-otseg": context,
    "context-cascade": partial(context, unseen="cascade"), "ade20k": ade20k,
    "ade20k-847": ade20k_847, "cityscapes": cityscapes,
}  # fmt: skip
# What SCLIP's evaluation, and those after it, tell CLIP of classes, by layout, as `Data.prompts`; where VOC's list has
# words of its own, other data sets' (cls_*.txt of github.com/wangf3014/SCLIP) have the names without their blanks.
WORDS = {"voc2012": FACTS["voc2012"]["words"]} | {
    layout: ", ".join(f"{name}={name.replace(' ', '')}" for name in BY_NAME[layout]().classes if " " in name)
    for layout in ("coco-stuff", "context-otseg", "context-cascade", "ade20k", "cityscapes")
}


@dataclass(frozen=True)
class Data:
    """Which pictures and classes.

    Attributes:
        data: "scenes" (the picture-book world) or a folder.
        layout: how the folder is laid out: "folder" for images/, masks/ and classes.txt, or a data set's own layout.
        subset: of a data set that has several, such as train, trainaug or val; by default the layout's usual one.
        images: how many scenes to draw (data "scenes" only).
        seed: of the scenes.
        unseen: names of the unseen classes, comma-separated, instead of the data set's own; "none" for none.
        prompts: other words for CLIP, comma-separated, such as "tv monitor=television|screen" (the best counts).
        values: labels that values in the masks' files stand for, comma-separated, such as "255=1,3=ignore".
        reduce_zero_label: the masks count classes from 1: 0 is ignored, 1 stands for label 0, and so on.
        max_pixels: pictures with more pixels are refused; by default with more than 89 millions."""

    data: str = "scenes"
    layout: Layout = "folder"
    subset: str = ""
    images: int = 300
    seed: int = 0
    unseen: str = ""
    prompts: str = ""
    values: str = ""
    reduce_zero_label: bool = False
    max_pixels: int | None = None

    def resolved(self, stream: folders.Stream) -> Self:
        """The same with the subset named."""
        usual = FACTS.get(self.layout, {}).get("subsets", ("", ""))
        return replace(self, subset=self.subset or usual[-1 if stream == "evaluation" else -2])

    def load(self, stream: folders.Stream) -> tuple[Dataset[Sample], Split]:
        """The data set and its split."""
        if self.data == "scenes":
            if self != Data(images=self.images, seed=self.seed, unseen=self.unseen, prompts=self.prompts):
                options = "--layout, --subset, --values, --reduce-zero-label and --max-pixels"
                raise ValueError(f"{options} are for files; scenes have none: give --data their folder")
            dataset = Scenes(self.images, self.seed, stream)
        else:
            if self.subset and "subsets" not in FACTS.get(self.layout, {}):
                raise ValueError(f"{self.data}, as {self.layout}, has no subsets: leave out --subset {self.subset}")
            subset = self.resolved(stream).subset
            dataset = DATA_SETS[self.layout](self.data, subset)
            if dataset.found and is_main_process():
                masks = f"masks {dataset.found}, such as {dataset._files[-1][1]}"
                print(f"{self.layout}, {stream}: {len(dataset)} images, {masks}", file=sys.stderr)
            dataset.max_pixels = self.max_pixels
            dataset.map_values(self.value_map(dataset.split))
        split = dataset.split
        if self.unseen:
            split = split.with_unseen([] if self.unseen == "none" else names(self.unseen))
        if self.prompts:
            pairs = [pair.partition("=") for pair in names(self.prompts)]
            told = {plain(name): words.strip() for name, _, words in pairs}
            if len(told) < len(pairs) or not all(told.values()):
                wanted = "NAME=WORDS, each name once, such as car=automobile|van"
                raise ValueError(f"--prompts is {self.prompts!r}; wanted {wanted}")
            split = split.with_prompts({**dict(split.prompts), **told})
        return dataset, split

    def value_map(self, split: Split) -> dict[int, int]:
        """Labels by mask value, as `values` and `reduce_zero_label` say."""
        found = {0: split.ignore, **{i + 1: i for i in range(len(split.classes))}} if self.reduce_zero_label else {}
        pairs = names(self.values.replace("ignore", str(split.ignore)))
        sound = [re.fullmatch(r"(\d+) ?= ?(\d+)", pair) for pair in pairs]
        given = {int(each[1]): int(each[2]) for each in sound if each}
        if len(given) < len(pairs):
            wanted = "VALUE=LABEL or VALUE=ignore, each value once, such as 255=1,3=ignore"
            raise ValueError(f"--values is {self.values!r}; wanted {wanted}")
        return found | given


SCENES_TO_TRAIN = Data(images=5000)
SCENES_TO_SCORE = Data(seed=1000)  # the table's, apart from those that choices are made on
