"""From a model and a picture of any size to labels: sliding windows, scores, `segment`.

Window logits are kept at token resolution; scores at full size exist for a few classes at a time only, so memory does
not grow with classes x height x width.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torchvision import tv_tensors

from sptseg.datasets import Colour, Note, as_array, ignored_label, plain, plots, spread_palette, test_transform
from sptseg.inference.windows import WindowLogits, augmentation, window_logits
from sptseg.inference.words import NONE, Background, resolved, told
from sptseg.model import SptSeg, synonyms
from sptseg.system import write

WHITE: Colour = (255, 255, 255)


@dataclass(frozen=True)
class Segmentation:
    """A picture, the class of each of its pixels, and what it takes to look at them.

    image (H, W, 3) uint8; labels (H, W) int64, positions in `classes`, and `none` where no class is. `background`: the
    words for everything else, or the score that a class had to reach; None: every pixel has a class.
    """

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
        buffer = io.BytesIO()
        if self.none > 255:
            picture = Image.fromarray(self.labels.astype(np.uint16))
        else:
            picture = Image.fromarray(self.labels.astype(np.uint8), mode="P")
            colours = [*self.palette, *[WHITE] * (256 - len(self.palette))]
            picture.putpalette([value for colour in colours for value in colour])
        picture.save(buffer, "png")
        write(path, buffer.getvalue())

    def save_scores(self, path: str | PathLike[str]) -> None:
        """Writes an .npz: "scores" (C, h, w), the means in each patch that the model saw, of the C "names"."""
        logits, count = self.logits, len(self.classes) + isinstance(self.background, tuple)
        sides = zip(logits.size, logits.window, logits.logits.shape[-2:], strict=True)
        h, w = (math.ceil(side * tokens / window) for side, window, tokens in sides)
        maps = (logits.best(logits.size, classes=[i])[0].cpu() for i in range(count))
        scores = torch.stack([F.adaptive_avg_pool2d(each[None], (h, w))[0] for each in maps]).numpy()
        buffer = io.BytesIO()
        np.savez_compressed(buffer, scores=scores, names=np.array([*self.named.values()])[:count])
        write(path, buffer.getvalue())


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
        palette: a colour per class.
    """
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
    colours = spread_palette(len(classes)) if palette is None else tuple(palette)
    score, labels = logits.best(size)
    if background is not None:
        none = labels == len(classes) if isinstance(background, tuple) else score < background
        labels.masked_fill_(none, ignored_label(len(classes)))
    return Segmentation(pixels, labels.cpu().numpy(), classes, colours, logits, background)
