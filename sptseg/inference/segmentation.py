"""From a model and a picture of any size to labels: what CLIP is told, `segment`, and masks as files."""

import json
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from pycocotools import mask
from torchvision import tv_tensors

from sptseg.datasets import BACKGROUND, Colour, Note, as_array, ignored_label, plain, plots, splits, test_transform
from sptseg.inference.windows import WindowLogits, augmentation, window_logits
from sptseg.model import Clip, SptSeg, WordTokenizer, synonyms
from sptseg.system import bytes_of, write

WHITE: Colour = (255, 255, 255)
NONE = "none"  # the name of what is none of the classes
Background = Sequence[str] | str | float | None


def told(texts: Sequence[str], background: Sequence[str] = ()) -> tuple[list[str], list[int]]:
    """The words for CLIP, class by class, and the class of each; the background's are of the class after the last. A
    class's score is the highest of its words' (SCLIP, Wang et al., ECCV 2024)."""
    classes = [*map(synonyms, texts), list(background)]
    return [word for words in classes for word in words], [i for i, words in enumerate(classes) for _ in words]


def resolved(background: Background, clip: Clip, texts: Sequence[str]) -> tuple[str, ...] | float | None:
    """The background's words, without those that are a class's, or the least score that a class must reach.

    `background`: words, in a list or a text with commas; "usual" for `BACKGROUND`, or for a CLIP of few words the
    classes of the drawn world that it knows; or the score, 0..1."""
    if isinstance(background, str):
        if re.fullmatch(r"[-+]?\d*\.?\d+", background):
            background = float(background)
        elif plain(background) != "usual":
            background = splits.names(background)
        elif isinstance(clip.tokenizer, WordTokenizer):
            known = clip.tokenizer.ids.keys()
            background = [name for name in splits.scenes().classes if known >= {*name.split()}]
        else:
            background = BACKGROUND
    if background is None or isinstance(background, float | int):
        if background is not None and not 0 <= background <= 1:
            raise ValueError(f"background is the score {background}; wanted one in 0..1, as scores are, or words")
        return background
    taken = {plain(word).casefold() for word in told(texts)[0]}
    left = tuple(word for each in background for word in synonyms(plain(each)) if word.casefold() not in taken)
    if not left:
        raise ValueError("background has no word that is not a class's; name what else is in pictures: sky, wall, ...")
    return left


@dataclass(frozen=True)
class Segmentation:
    """A picture, the class of each of its pixels, and what it takes to look at them.

    image (H, W, 3) uint8; labels (H, W) int64, positions in `classes`, and `none` where no class is. `background`: the
    words for everything else, or the score that a class had to reach; None: every pixel has a class."""

    image: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    palette: tuple[Colour, ...]
    logits: WindowLogits = field(repr=False)
    background: tuple[str, ...] | float | None = None

    @property
    def none(self) -> int:
        """The label of pixels without a class: 255, or 65535 of more than 255 classes."""
        return ignored_label(len(self.classes))

    @property
    def named(self) -> dict[int, str]:
        """The names of the labels: the classes', and "none" if there is a background."""
        return dict(enumerate(self.classes)) | ({} if self.background is None else {self.none: NONE})

    def scores(self, name: str) -> np.ndarray:
        """Score of a class at each pixel, or with "none" of the background's words: (H, W) float32 in 0..1."""
        known = (*self.classes, NONE) if isinstance(self.background, tuple) else self.classes
        if plain(name) not in known:
            raise ValueError(f"{name!r} was not among the classes; they were {', '.join(self.classes)}")
        return self.logits.best(self.labels.shape, classes=[known.index(plain(name))])[0].cpu().numpy()

    def areas(self) -> dict[str, float]:
        """Share of the picture, 0..1, per class, and of "none" if there is a background."""
        counts = np.bincount(self.labels.ravel(), minlength=self.none + 1)
        return {name: counts[label].item() / self.labels.size for label, name in self.named.items()}

    def overlay(self) -> np.ndarray:
        """The picture with the classes' colours over it, white where there is none: (H, W, 3) uint8."""
        return plots.overlay(self.image, *self._shown())

    def show(self) -> Figure:
        """Picture, mask and legend."""
        labels, palette = self._shown()
        return plots.show_segmentation(self.image, labels, [*self.named.values()], palette)

    def _shown(self) -> tuple[np.ndarray, list[Colour]]:
        """Labels and colours, in which "none" is a class like the others."""
        if self.background is None:
            return self.labels, [*self.palette]
        return np.where(self.labels == self.none, len(self.classes), self.labels), [*self.palette, WHITE]

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the overlay with its legend (PNG, or another format that matplotlib knows by its suffix)."""
        plots.save_figure(self.show(), path, dpi=150, bbox_inches="tight")

    def save_labels(self, path: str | PathLike[str]) -> None:
        """Writes the labels as a PNG: 8 bits with the palette, or 16 bits where there are more than 255 classes."""
        if self.none > 255:
            picture = Image.fromarray(self.labels.astype(np.uint16))
        else:
            picture = Image.fromarray(self.labels.astype(np.uint8), mode="P")
            colours = [*self.palette, *[WHITE] * (256 - len(self.palette))]
            picture.putpalette([value for colour in colours for value in colour])
        write(path, bytes_of(partial(picture.save, format="png")))

    def save_scores(self, path: str | PathLike[str]) -> None:
        """Writes an .npz: "scores" (C, h, w), the means in each patch that the model saw, of the C "names"."""
        logits, count = self.logits, len(self.classes) + isinstance(self.background, tuple)
        sides = zip(logits.size, logits.window, logits.logits.shape[-2:], strict=True)
        h, w = (math.ceil(side * tokens / window) for side, window, tokens in sides)
        maps = (logits.best(logits.size, classes=[i])[0].cpu() for i in range(count))
        scores = torch.stack([F.adaptive_avg_pool2d(each[None], (h, w))[0] for each in maps]).numpy()
        names = np.array([*self.named.values()])[:count]
        write(path, bytes_of(partial(np.savez_compressed, scores=scores, names=names)))


def segment(
    model: SptSeg,
    image: np.ndarray | Image.Image | str | PathLike[str],
    classes: Sequence[str],
    *,
    background: Background = None,
    full_resolution: bool = False,
    palette: Sequence[Colour] | None = None,
) -> Segmentation:
    """Segments a picture into classes given by name.

    Args:
        image: (H, W, 3) uint8, a PIL image or a file.
        classes: names or phrases, each once. "car|automobile" is one class of two words, called car; its score is the
            highest of theirs. Without a background every pixel gets a class, which a `Note` says of a single one.
        background: what is none of the classes: words for it, such as ["sky", "wall"]; "usual" for the 26 of
            `sptseg.splits.BACKGROUND` (the tiny CLIP: the other things that it knows); or the score, 0..1, that a class
            must reach.
        full_resolution: look at the picture pixel by pixel in many windows, instead of resizing its short side to the
            model's window as in the protocol: finer, slower, and with less context. Labels have the picture's size in
            either case; a picture smaller than the window is enlarged.
        palette: a colour per class."""
    if isinstance(classes, str):
        raise ValueError(f"classes is the text {classes!r}; wanted a list of names, such as ['tree', 'car']")
    texts = tuple(map(plain, classes))
    classes = tuple(plain(synonyms(text)[0]) for text in texts)
    if palette is not None and len(palette) != len(classes):
        raise ValueError(f"the palette has {len(palette)} colours for {len(classes)} classes; wanted one each")
    pixels = as_array(image)
    background = resolved(background, model.clip, texts)
    if background is not None and NONE in classes:
        raise ValueError(f"a class is called {NONE!r}, as is what is none of the classes; give it another name")
    words, owners = told(texts, background if isinstance(background, tuple) else ())
    text = model.class_embeddings(words)
    if len(classes) == 1 and background is None:
        only = f"every pixel gets {classes[0]!r}, as no other is named; commas separate names, or name a background"
        warnings.warn(Note("classes", only), stacklevel=2)
    prepare = test_transform(augmentation(model.config, full_resolution=full_resolution))
    prepared = prepare(tv_tensors.Image(torch.tensor(pixels).permute(2, 0, 1)))
    (logits,) = window_logits(model, prepared[None], text, owners=owners)
    size = (pixels.shape[0], pixels.shape[1])
    colours = splits.spread_palette(len(classes)) if palette is None else tuple(palette)
    score, labels = logits.best(size)
    if background is not None:
        none = labels == len(classes) if isinstance(background, tuple) else score < background
        labels.masked_fill_(none, ignored_label(len(classes)))
    return Segmentation(pixels, labels.cpu().numpy(), classes, colours, logits, background)


class CocoMasks:
    """One annotation for each class in each picture; category i + 1 is class i, and what has no class has none."""

    def __init__(self, classes: Sequence[str]) -> None:
        categories = [{"id": i, "name": name} for i, name in enumerate(classes, start=1)]
        self.content: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "categories": categories}

    def add(self, file_name: str, labels: np.ndarray) -> None:
        """Adds a picture with labels (H, W), those of no class 255 or above all classes."""
        images, annotations, categories = self.content.values()
        height, width = labels.shape
        images.append({"id": len(images) + 1, "file_name": file_name, "height": height, "width": width})
        for label in np.flatnonzero(np.bincount(labels.ravel(), minlength=len(categories))[: len(categories)]).tolist():
            runs: Any = mask.encode(np.asfortranarray(labels == label))
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": len(images), "category_id": label + 1, "iscrowd": 0,
                    "segmentation": runs | {"counts": runs["counts"].decode()}, "area": int(mask.area(runs)),
                    "bbox": [*map(int, mask.toBbox(runs))],
                }
            )  # fmt: skip

    def json(self) -> str:
        return json.dumps(self.content) + "\n"
