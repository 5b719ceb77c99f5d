"""From a model and a picture of any size to labels: sliding windows, scores, `segment`.

Window logits are kept at token resolution; scores at full size exist for a few classes at a time only, so memory does
not grow with classes x height x width.
"""

from __future__ import annotations

import io
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from sptseg import plots
from sptseg.datasets import open_image
from sptseg.encoder import SpectralPrompt
from sptseg.files import write
from sptseg.losses import interpolation, maps_at_once
from sptseg.model import ModelConfig, SptSeg, upsample
from sptseg.splits import Colour, spread_palette
from sptseg.transforms import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Augmentation, test_transform

STRIDE_SHARE = 426 / 512  # of the window: the protocol's stride
Precision = Literal["no", "bf16", "fp16"]
Box = tuple[int, int, int, int]


def augmentation(config: ModelConfig, *, full_resolution: bool = False) -> Augmentation:
    """The protocol's crop and test size for a model, in proportion to its `image_size` (512: into 2048 x 512)."""
    side = min(config.image_size)
    mean, std = (CLIP_MEAN, CLIP_STD) if config.normalization == "clip" else (IMAGENET_MEAN, IMAGENET_STD)
    return Augmentation(crop=side, resize_base=None if full_resolution else (4 * side, side), mean=mean, std=std)


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one axis: every `stride`, the last one flush with the end."""
    if length <= window:
        return [0]
    return [*range(0, length - window, stride), length - window]


def windows_of(size: tuple[int, int], window: tuple[int, int]) -> list[Box]:
    """Boxes (top, left, height, width) that cover a picture; smaller than `window` only where the picture is."""
    (height, width), (window_height, window_width) = size, window
    return [
        (top, left, min(window_height, height), min(window_width, width))
        for top in window_starts(height, window_height, max(1, round(STRIDE_SHARE * window_height)))
        for left in window_starts(width, window_width, max(1, round(STRIDE_SHARE * window_width)))
    ]


def pad_to_patches(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Pads (B, 3, H, W) with zeros (the mean colour) below and on the right to multiples of the patch size."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % patch[1], 0, -height % patch[0]))


@dataclass(frozen=True)
class WindowLogits:
    """Mask logits of every window at token resolution, from which scores of any class are drawn at any size.

    logits (windows, C, h, w); `window` is the padded pixel size that they stand for; `boxes` lie in a picture of
    `size`. `offset` (C,) is subtracted from the scores.
    """

    logits: Tensor
    boxes: list[Box]
    window: tuple[int, int]
    size: tuple[int, int]
    offset: Tensor

    def scores(self, classes: slice, size: tuple[int, int]) -> Tensor:
        """Sigmoid scores of some classes (c, *size): averaged where windows overlap, lowered by the offset, resized."""
        logits, device = self.logits[:, classes], self.logits.device
        rows, columns = (  # upsampling as two matrix products: several times as fast on a CPU
            interpolation(a, b, device) for a, b in zip(self.logits.shape[-2:], self.window, strict=True)
        )
        if len(self.boxes) == 1:
            _, _, height, width = self.boxes[0]
            total = (rows[:height] @ logits[0] @ columns[:width].T).sigmoid_()
        else:
            total = logits.new_zeros(logits.shape[1], *self.size, dtype=torch.float32)
            count = logits.new_zeros(self.size, dtype=torch.float32)
            for window, (top, left, height, width) in zip(logits, self.boxes, strict=True):
                here = slice(top, top + height), slice(left, left + width)
                total[:, *here] += (rows[:height] @ window @ columns[:width].T).sigmoid_()
                count[here] += 1
            total /= count
        total -= self.offset[classes, None, None]
        return total if size == self.size else upsample(total[None], size)[0]

    def labels(self, size: tuple[int, int], classes_at_once: int | None = None) -> Tensor:
        """Position of the highest score per pixel: (*size) int64, first of equals."""
        return self.best(size, classes_at_once)[1]

    def best(self, size: tuple[int, int], classes_at_once: int | None = None) -> tuple[Tensor, Tensor]:
        """The highest score per pixel (*size) and its class's position, int64, first of equals.

        Classes are looked at a few at a time (by default `maps_at_once`): no map of all of them exists.
        """
        device = self.logits.device
        if classes_at_once is None:
            classes_at_once = maps_at_once(max(size[0] * size[1], self.size[0] * self.size[1]), device)
        best = torch.full(size, -torch.inf, device=device)
        labels = torch.zeros(size, dtype=torch.long, device=device)
        for start in range(0, self.logits.shape[1], classes_at_once):
            scores = self.scores(slice(start, start + classes_at_once), size)
            if len(scores) == 1:
                labels.masked_fill_(scores[0] > best, start)
                torch.maximum(best, scores[0], out=best)
            else:
                value, index = scores.max(dim=0)
                labels = torch.where(value > best, index + start, labels)
                best = torch.maximum(best, value)
        return best, labels


def at_precision(model: SptSeg, precision: Precision) -> SptSeg:
    """A copy of a model for inference, whose weights are kept in a narrower type: "bf16" or "fp16"; "no": the model.

    The spectral filter and its Fourier transforms, the scale of the logits, the logits and the text tower (shared with
    the model) stay in float32. Layer norms compute in float32 inside.
    """
    if precision == "no":
        return model
    narrow = SptSeg(model.config, deepcopy(model.encoder), deepcopy(model.decoder), model.clip)
    narrow.about = model.about
    exact = {id(p) for m in narrow.modules() if isinstance(m, SpectralPrompt) for p in m.parameters()}
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    for parameter in narrow.requires_grad_(False).parameters():
        if id(parameter) not in exact and parameter.ndim:
            parameter.data = parameter.data.to(dtype)
    return narrow.eval()


@torch.inference_mode()
def window_logits(
    model: SptSeg, images: Tensor, text: Tensor, *, offset: Tensor | None = None, window_batch: int = 4
) -> list[WindowLogits]:
    """Runs a model over pictures of one size in windows of its `image_size`, `window_batch` windows at a time.

    images (B, 3, H, W) normalised, text (C, E), offset (C,) or None -> one `WindowLogits` per picture. Where memory
    runs out, the number of windows at a time is halved, with a warning.
    """
    size = (images.shape[-2], images.shape[-1])
    boxes = windows_of(size, model.config.image_size)
    crops = [image[:, top : top + h, left : left + w] for image in images for top, left, h, w in boxes]
    parts, done = [], 0
    while done < len(crops):
        batch = pad_to_patches(torch.stack(crops[done : done + window_batch]), model.encoder.patch_size)
        try:
            parts.append(model(batch.to(model.device, non_blocking=True), text).float())
            done += len(batch)
        except RuntimeError as error:
            if len(batch) == 1 or not ran_out_of_memory(error):
                raise
            window_batch = len(batch) // 2
            warnings.warn(
                f"memory ran out with {len(batch)} windows at once; going on with {window_batch}", stacklevel=2
            )
    logits = torch.cat(parts).unflatten(0, (len(images), len(boxes)))
    patch_height, patch_width = model.encoder.patch_size
    window = (logits.shape[-2] * patch_height, logits.shape[-1] * patch_width)
    offset = torch.zeros(len(text)) if offset is None else offset
    return [WindowLogits(per_image, boxes, window, size, offset.to(logits.device)) for per_image in logits]


def ran_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU's memory, or the host's, was too small; torch has a class for the former only."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


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
        if name not in self.classes:
            raise ValueError(f"{name!r} was not among the classes; they were {', '.join(self.classes)}")
        position = self.classes.index(name)
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


def as_array(image: np.ndarray | Image.Image | str | PathLike[str]) -> np.ndarray:
    """A picture as (H, W, 3) uint8, from an array, a PIL image or a file."""
    if isinstance(image, str | PathLike):
        return np.asarray(open_image(Path(image)))
    array = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or 0 in array.shape:
        raise ValueError(f"the image is {array.dtype} of shape {array.shape}; wanted uint8 of shape (height, width, 3)")
    return np.ascontiguousarray(array)  # torch takes no negative strides, as mirrored and BGR views have


def read_ahead(files: Sequence[Path], ahead: int = 2) -> Iterator[Future[np.ndarray]]:
    """Each file's picture to come, as of `as_array`; a thread reads up to `ahead` further ones while one is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = deque(pool.submit(as_array, file) for file in files[:ahead])
        for following in [*files[ahead:], *[None] * min(ahead, len(files))]:
            if following is not None:
                coming.append(pool.submit(as_array, following))
            yield coming.popleft()


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
        classes: names or phrases, each once; every pixel gets one of them.
        full_resolution: look at the picture pixel by pixel in many windows, instead of resizing its short side to the
            model's window as in the protocol: finer, slower, and with less context. Labels have the picture's size in
            either case; a picture smaller than the window is enlarged.
        palette: a colour per class.
    """
    if isinstance(classes, str):
        raise ValueError(f"classes is the text {classes!r}; wanted a list of names, such as ['tree', 'car']")
    classes = tuple(classes)
    if palette is not None and len(palette) != len(classes):
        raise ValueError(f"the palette has {len(palette)} colours for {len(classes)} classes; wanted one each")
    pixels = as_array(image)
    text = model.class_embeddings(classes)
    prepare = test_transform(augmentation(model.config, full_resolution=full_resolution))
    prepared = prepare(tv_tensors.Image(torch.tensor(pixels).permute(2, 0, 1)))
    (logits,) = window_logits(model, prepared[None], text)
    size = (pixels.shape[0], pixels.shape[1])
    colours = spread_palette(len(classes)) if palette is None else tuple(palette)
    return Segmentation(pixels, logits.labels(size).cpu().numpy(), classes, colours, logits)
