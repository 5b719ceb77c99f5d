"""From a model and a picture of any size to labels: sliding windows, scores, `segment`.

Window logits are kept at token resolution; scores at full size exist for a few classes at a time only, so memory does
not grow with classes x height x width.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torchvision import tv_tensors

from sptseg.datasets import Colour, Note, as_array, plain, plots, spread_palette, test_transform
from sptseg.inference.windows import WindowLogits, augmentation, window_logits
from sptseg.model import SptSeg
from sptseg.system import write


@dataclass(frozen=True)
class Segmentation:
    """A picture, the class of each of its pixels, and what it takes to look at them.

    image (H, W, 3) uint8; labels (H, W) int64, positions in `classes`.
    """

    image: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    palette: tuple[Colour, ...]
    logits: WindowLogits = field(repr=False)

    def scores(self, name: str) -> np.ndarray:
        """Score of a class at each pixel: (H, W) float32 in 0..1."""
        if plain(name) not in self.classes:
            raise ValueError(f"{name!r} was not among the classes; they were {', '.join(self.classes)}")
        position = self.classes.index(plain(name))
        return self.logits.scores(slice(position, position + 1), self.labels.shape)[0].cpu().numpy()

    def areas(self) -> dict[str, float]:
        """Share of the picture, 0..1, per class."""
        counts = np.bincount(self.labels.ravel(), minlength=len(self.classes))
        return dict(zip(self.classes, (counts / self.labels.size).tolist(), strict=True))

    def overlay(self) -> np.ndarray:
        """The picture with the classes' colours over it: (H, W, 3) uint8."""
        return plots.overlay(self.image, self.labels, self.palette)

    def show(self) -> Figure:
        """Picture, mask and legend."""
        return plots.show_segmentation(self.image, self.labels, self.classes, self.palette)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the overlay with its legend (PNG, or another format that matplotlib knows by its suffix)."""
        plots.save_figure(self.show(), path, dpi=150, bbox_inches="tight")

    def save_labels(self, path: str | PathLike[str]) -> None:
        """Writes the labels as a PNG: 8 bits with the palette, or 16 bits where there are more than 256 classes."""
        buffer = io.BytesIO()
        if len(self.classes) > 256:
            picture = Image.fromarray(self.labels.astype(np.uint16))
        else:
            picture = Image.fromarray(self.labels.astype(np.uint8), mode="P")
            picture.putpalette([value for colour in self.palette for value in colour])
        picture.save(buffer, "png")
        write(path, buffer.getvalue())


def segment(
    model: SptSeg,
    image: np.ndarray | Image.Image | str | PathLike[str],
    classes: Sequence[str],
    *,
    full_resolution: bool = False,
    palette: Sequence[Colour] | None = None,
) -> Segmentation:
    """Segments a picture into classes given by name.

    Args:
        image: (H, W, 3) uint8, a PIL image or a file.
        classes: names or phrases, each once; every pixel gets one of them, which a `Note` says of a single one.
        full_resolution: look at the picture pixel by pixel in many windows, instead of resizing its short side to the
            model's window as in the protocol: finer, slower, and with less context. Labels have the picture's size in
            either case; a picture smaller than the window is enlarged.
        palette: a colour per class.
    """
    if isinstance(classes, str):
        raise ValueError(f"classes is the text {classes!r}; wanted a list of names, such as ['tree', 'car']")
    classes = tuple(map(plain, classes))
    if palette is not None and len(palette) != len(classes):
        raise ValueError(f"the palette has {len(palette)} colours for {len(classes)} classes; wanted one each")
    pixels = as_array(image)
    text = model.class_embeddings(classes)
    if len(classes) == 1:
        only = f"every pixel gets {classes[0]!r}, as no other is named; commas separate names"
        warnings.warn(Note("classes", only), stacklevel=2)
    prepare = test_transform(augmentation(model.config, full_resolution=full_resolution))
    prepared = prepare(tv_tensors.Image(torch.tensor(pixels).permute(2, 0, 1)))
    (logits,) = window_logits(model, prepared[None], text)
    size = (pixels.shape[0], pixels.shape[1])
    colours = spread_palette(len(classes)) if palette is None else tuple(palette)
    return Segmentation(pixels, logits.labels(size).cpu().numpy(), classes, colours, logits)
