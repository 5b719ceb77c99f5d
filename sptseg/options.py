"""What the command line's options name: data sets and models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch.utils.data import Dataset

from sptseg import datasets
from sptseg.datasets import Sample
from sptseg.hub import load_model
from sptseg.model import DENSE_CLIP, SPT_RELEASED, SptSeg, build_model
from sptseg.splits import Split

Layout = Literal["folder", "voc2012", "coco-stuff", "context-otseg", "context-cascade", "ade20k", "camvid"]
NamedLayouts: dict[str, Callable[[Path, str], Dataset[Sample]]] = {
    "voc2012": lambda root, subset: datasets.voc2012(root, subset),  # type: ignore[arg-type]
    "coco-stuff": lambda root, subset: datasets.coco_stuff(root, subset),  # type: ignore[arg-type]
    "context-otseg": lambda root, subset: datasets.context(root, subset, "otseg"),  # type: ignore[arg-type]
    "context-cascade": lambda root, subset: datasets.context(root, subset, "cascade"),  # type: ignore[arg-type]
    "ade20k": lambda root, subset: datasets.ade20k(root, subset),  # type: ignore[arg-type]
    "camvid": lambda root, subset: datasets.camvid(root),
}
SUBSETS = {"voc2012": ("trainaug", "val"), "ade20k": ("training", "validation")}  # for training, for evaluation


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
        prompts: other words for CLIP, comma-separated, such as "tv monitor=television".
    """

    data: str = "scenes"
    layout: Layout = "folder"
    subset: str = ""
    images: int = 300
    seed: int = 0
    unseen: str = ""
    prompts: str = ""

    def load(self, stream: Literal["evaluation", "training"]) -> tuple[Dataset[Sample], Split]:
        """The data set and its split."""
        if self.data == "scenes":
            dataset = datasets.Scenes(self.images, self.seed, stream)
        elif self.layout == "folder":
            dataset = datasets.ImageMaskFolder(self.data)
        else:
            subset = SUBSETS.get(self.layout, ("train", "val"))[stream == "evaluation"]
            dataset = NamedLayouts[self.layout](Path(self.data), self.subset or subset)
        split: Split = dataset.split  # type: ignore[attr-defined]
        if self.unseen:
            split = split.with_unseen([] if self.unseen == "none" else names(self.unseen))
        if self.prompts:
            pairs = [pair.partition("=") for pair in names(self.prompts)]
            split = split.with_prompts({name.strip(): words.strip() for name, _, words in pairs})
        return dataset, split


SCENES_TO_TRAIN = Data(images=5000)
SCENES_TO_SCORE = Data(seed=1000)  # the table's, apart from those that choices are made on


@dataclass(frozen=True)
class Which:
    """Which model.

    Attributes:
        model: "embedded" (SPT-SEG on the tiny CLIP), "embedded-zegclip", "dense-clip" (no training), "untrained"
            (SPT-SEG with random prompts and decoder, to try sizes), or a checkpoint's path. Default: "embedded", or
            "dense-clip" if `clip` is given.
        clip: for "dense-clip" and "untrained": "tiny" or an open_clip model, such as ViT-B-16-quickgelu.
        clip_weights: its weights: an open_clip tag such as openai (downloaded once), a file, or "none" for random ones.
    """

    model: str = ""
    clip: str = ""
    clip_weights: str = ""

    def load(self) -> SptSeg:
        if not self.clip:
            if self.clip_weights:
                raise ValueError(f"--clip-weights {self.clip_weights} needs --clip, such as ViT-B-16-quickgelu")
            if self.model == "untrained":
                return build_model(SPT_RELEASED).eval()
            return load_model(self.model or "embedded")
        presets = {"": DENSE_CLIP, "dense-clip": DENSE_CLIP, "untrained": SPT_RELEASED}
        if self.model not in presets:
            raise ValueError(f"model {self.model} has its own CLIP: leave out --clip, or take dense-clip or untrained")
        weights = clip_weights(self.clip, self.clip_weights)
        size = (128, 128) if self.clip == "tiny" else (512, 512)
        return build_model(replace(presets[self.model], clip=self.clip, clip_weights=weights, image_size=size)).eval()


def clip_weights(clip: str, weights: str) -> str | None:
    """The weights asked for; a real CLIP must name them, so that nobody trains on random ones unawares."""
    if clip != "tiny" and not weights:
        raise ValueError(
            f"--clip {clip} needs --clip-weights: an open_clip tag such as openai, a file, or none for random weights"
        )
    return None if weights in ("", "none") else weights


def names(text: str) -> list[str]:
    """Comma-separated names."""
    return [name.strip() for name in text.split(",") if name.strip()]
