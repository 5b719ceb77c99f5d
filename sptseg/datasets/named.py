"""Data sets by name, as commands and presets choose them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from torch.utils.data import Dataset

from sptseg.datasets import folders
from sptseg.datasets.folders import ImageMaskFiles, Sample
from sptseg.datasets.splits import Split, names, plain

Stream = Literal["evaluation", "training"]
Layout = Literal[
    "folder", "voc2012", "coco-stuff", "context-otseg", "context-cascade", "ade20k", "cityscapes", "camvid"
]
DATA_SETS: dict[str, Callable[..., ImageMaskFiles]] = {
    "voc2012": folders.voc2012, "coco-stuff": folders.coco_stuff, "context-otseg": folders.context,
    "context-cascade": partial(folders.context, unseen="cascade"), "ade20k": folders.ade20k,
    "cityscapes": folders.cityscapes, "camvid": lambda root, *_: folders.camvid(root),  # it has no subsets
}  # fmt: skip
SUBSETS = {  # for training, for evaluation
    "folder": ("", ""), "camvid": ("", ""), "voc2012": ("trainaug", "val"), "ade20k": ("training", "validation"),
}  # fmt: skip


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
        max_pixels: pictures with more pixels are refused; by default with more than 89 millions.
    """

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

    def resolved(self, stream: Stream) -> Data:
        """The same with the subset named."""
        return replace(self, subset=self.subset or SUBSETS.get(self.layout, ("train", "val"))[stream == "evaluation"])

    def load(self, stream: Stream) -> tuple[Dataset[Sample], Split]:
        """The data set and its split."""
        if self.data == "scenes":
            dataset = folders.Scenes(self.images, self.seed, stream)
        elif self.layout == "folder":
            dataset = folders.ImageMaskFolder(self.data)
        else:
            subset = self.resolved(stream).subset
            dataset = DATA_SETS[self.layout](Path(self.data), *([subset] if subset else []))
        if isinstance(dataset, ImageMaskFiles) and dataset.found and os.environ.get("RANK", "0") == "0":
            masks = f"masks {dataset.found}, such as {dataset._files[-1][1]}"
            print(f"{self.layout}, {stream}: {len(dataset)} images, {masks}", file=sys.stderr)
        split: Split = dataset.split  # type: ignore[attr-defined]
        if isinstance(dataset, ImageMaskFiles):
            dataset.max_pixels = self.max_pixels
            dataset.map_values(self.value_map(split))
        elif self.values or self.reduce_zero_label or self.subset or self.layout != "folder":
            options = "--layout, --subset, --values and --reduce-zero-label"
            raise ValueError(f"{options} are for masks in files; scenes have none: give --data their folder")
        if self.unseen:
            split = split.with_unseen([] if self.unseen == "none" else names(self.unseen))
        if self.prompts:
            pairs = [pair.partition("=") for pair in names(self.prompts)]
            if not all(words.strip() for _, _, words in pairs):
                raise ValueError(f"--prompts is {self.prompts!r}; wanted NAME=WORDS, such as car=automobile|van")
            told = {plain(name): words.strip() for name, _, words in pairs}
            split = split.with_prompts({**dict(split.prompts), **told})
        return dataset, split

    def value_map(self, split: Split) -> dict[int, int]:
        """Labels by mask value, as `values` and `reduce_zero_label` say."""
        found = {0: split.ignore, **{i + 1: i for i in range(len(split.classes))}} if self.reduce_zero_label else {}
        pairs = names(self.values.replace("ignore", str(split.ignore)))
        sound = [pair.split("=") for pair in pairs if re.fullmatch(r"\d+ ?= ?\d+", pair)]
        given = {int(value): int(label) for value, label in sound}
        if len(given) < len(pairs):
            wanted = "VALUE=LABEL or VALUE=ignore, each value once, such as 255=1,3=ignore"
            raise ValueError(f"--values is {self.values!r}; wanted {wanted}")
        return found | given


SCENES_TO_TRAIN = Data(images=5000)
SCENES_TO_SCORE = Data(seed=1000)  # the table's, apart from those that choices are made on
