"""Pictures of any size through a model in sliding windows, and the logits put together again."""

import warnings
from collections.abc import Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from sptseg.datasets import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Augmentation, Note
from sptseg.model import PROTOCOL_STRIDE, Clip, ModelConfig, SpectralPrompt, SptSeg, ops, tower, upsample
from sptseg.model import clip as clips

Precision = Literal["no", "bf16", "fp16"]
Box = tuple[int, int, int, int]


def fitted(config: ModelConfig, clip: Clip) -> ModelConfig:
    """A configuration for a tiny CLIP, for any: its name, weights, statistics, and windows of 512 pixels or, which
    is said, of the next multiple of its patch size."""
    if clip.name in clips.EMBEDDED_CLIPS:
        return replace(config, clip=clip.name)
    height, width = (512 + -512 % side for side in tower(clip.visual).patch_size)
    if (height, width) != (512, 512):
        said = f"it sees windows of {height} x {width} pixels: 512 is no multiple of its patch size"
        warnings.warn(Note(clip.name, said), stacklevel=2)
    size = (height, width)
    return replace(config, clip=clip.name, clip_weights=clip.weights, image_size=size, normalization="clip")


def augmentation(config: ModelConfig, *, full_resolution: bool = False) -> Augmentation:
    """The protocol's crop and test size for a model, in proportion to its `image_size` (512: into 2048 x 512)."""
    side, short = min(config.image_size), config.short_side or min(config.image_size)
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if config.normalization == "clip":
        about = clips.about_weights(config.clip, config.clip_weights)
        mean, std = about.get("mean", CLIP_MEAN), about.get("std", CLIP_STD)
    return Augmentation(crop=side, resize_base=None if full_resolution else (4 * short, short), mean=mean, std=std)


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one axis: every `stride`, the last one flush with the end."""
    if length <= window:
        return [0]
    return [*range(0, length - window, stride), length - window]


def windows_of(size: tuple[int, int], window: tuple[int, int], stride: float = PROTOCOL_STRIDE) -> list[Box]:
    """Boxes (top, left, height, width) that cover a picture, a `stride` (a share of the window) from one to the next;
    smaller than `window` only where the picture is."""
    (height, width), (window_height, window_width) = size, window
    return [
        (top, left, min(window_height, height), min(window_width, width))
        for top in window_starts(height, window_height, max(1, round(stride * window_height)))
        for left in window_starts(width, window_width, max(1, round(stride * window_width)))
    ]


def pad_to_patches(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Pads (B, 3, H, W) with zeros (the mean colour) below and on the right to multiples of the patch size."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % patch[1], 0, -height % patch[0]))


@dataclass(frozen=True)
class WindowLogits:
    """Mask logits of every window at token resolution, from which scores of any word are drawn at any size.

    logits (windows, W, h, w); `window` is the padded pixel size that they stand for; `boxes` lie in a picture of
    `size`. `offset` (W,) is subtracted from the scores. `owners[i]` is the class of word i, ascending; None: each is a
    class of its own, so W is C. `softmax`: scores are not each word's sigmoid, but a softmax over all words."""

    logits: Tensor
    boxes: list[Box]
    window: tuple[int, int]
    size: tuple[int, int]
    offset: Tensor
    owners: Sequence[int] | None = None
    softmax: bool = False
    normalisers: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def words(self, classes: Collection[int] | None = None) -> list[int]:
        """The words of some classes (None: of all)."""
        owners = range(self.logits.shape[1]) if self.owners is None else self.owners
        return [i for i, owner in enumerate(owners) if classes is None or owner in classes]

    def scores(self, words: slice | list[int], size: tuple[int, int]) -> Tensor:
        """Scores of some words (w, *size): averaged where windows overlap, resized, lowered by the offset. A softmax is
        taken last, of logits that were averaged and resized."""
        scores = self.averaged(words, size)
        if self.softmax:
            if size not in self.normalisers:
                maps = (self.averaged([word], size)[0] for word in self.words())
                self.normalisers[size] = reduce(torch.logaddexp, maps)
            scores = (scores - self.normalisers[size]).exp_()
        return scores.sub_(self.offset[words, None, None])

    def averaged(self, words: slice | list[int], size: tuple[int, int]) -> Tensor:
        """Sigmoid scores, or for a softmax the logits, averaged where windows overlap, and resized: (w, *size)."""
        squash = (lambda maps: maps) if self.softmax else torch.sigmoid_
        logits, device = self.logits[:, words], self.logits.device
        rows, columns = (  # upsampling as two matrix products: several times as fast on a CPU
            ops.interpolation(a, b, device) for a, b in zip(self.logits.shape[-2:], self.window, strict=True)
        )
        if len(self.boxes) == 1:
            _, _, height, width = self.boxes[0]
            total = squash(rows[:height] @ logits[0] @ columns[:width].T)
        else:
            total = logits.new_zeros(logits.shape[1], *self.size, dtype=torch.float32)
            count = logits.new_zeros(self.size, dtype=torch.float32)
            for window, (top, left, height, width) in zip(logits, self.boxes, strict=True):
                here = slice(top, top + height), slice(left, left + width)
                total[:, *here] += squash(rows[:height] @ window @ columns[:width].T)
                count[here] += 1
            total /= count
        return total if size == self.size else upsample(total[None], size)[0]

    def labels(self, size: tuple[int, int], classes_at_once: int | None = None) -> Tensor:
        """The class with the highest score per pixel: (*size) int64, first of equals."""
        return self.best(size, classes_at_once)[1]

    def best(
        self, size: tuple[int, int], classes_at_once: int | None = None, classes: Collection[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The highest score per pixel (*size) and its class, int64, first of equals; among some classes, or all. Words
        are looked at a few at a time (by default `maps_at_once`): no map of all of them exists."""
        device, words = self.logits.device, self.words(classes)
        if classes_at_once is None:
            classes_at_once = ops.maps_at_once(max(size[0] * size[1], self.size[0] * self.size[1]), device)
        best = torch.full(size, -torch.inf, device=device)
        labels = torch.zeros(size, dtype=torch.long, device=device)
        for start in range(0, len(words), classes_at_once):
            scores = self.scores(words[start : start + classes_at_once], size)
            if len(scores) == 1:
                labels.masked_fill_(scores[0] > best, start)
                torch.maximum(best, scores[0], out=best)
            else:
                value, index = scores.max(dim=0)
                labels = torch.where(value > best, index + start, labels)
                best = torch.maximum(best, value)
        owners = words if self.owners is None else [self.owners[word] for word in words]
        return best, labels if owners == [*range(len(owners))] else torch.tensor(owners, device=device)[labels]


def at_precision(model: SptSeg, precision: Precision) -> SptSeg:
    """A copy of a model for inference, whose weights are kept in a narrower type: "bf16" or "fp16"; "no": the model.
    The spectral filter, its Fourier transforms, the logits, their scale and the text tower (shared) stay in float32."""
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
    model: SptSeg,
    images: Tensor,
    text: Tensor,
    *,
    offset: Tensor | None = None,
    owners: Sequence[int] | None = None,
    window_batch: int = 4,
) -> list[WindowLogits]:
    """Runs a model over pictures of one size in windows of its `image_size`, `window_batch` windows at a time.

    images (B, 3, H, W) normalised, text (W, E), offset (W,) or None, `owners` as in `WindowLogits` -> one a picture.
    Where memory runs out, the number of windows at a time is halved, with a warning."""
    size, patch = (images.shape[-2], images.shape[-1]), model.encoder.patch_size
    boxes = windows_of(size, model.config.image_size, model.config.window_stride)
    crops = [image[:, top : top + h, left : left + w] for image in images for top, left, h, w in boxes]
    parts, done = [], 0
    while done < len(crops):
        batch = pad_to_patches(torch.stack(crops[done : done + window_batch]), patch)
        try:
            parts.append(model(batch.to(model.device, non_blocking=True), text).float())
            done += len(batch)
        except RuntimeError as error:
            if len(batch) == 1 or not should_reduce_batch_size(error):
                raise
            window_batch = len(batch) // 2
            said = f"memory ran out with {len(batch)} windows at once; going on with {window_batch}"
            warnings.warn(said, stacklevel=2)
    logits = torch.cat(parts).unflatten(0, (len(images), len(boxes)))
    window = (logits.shape[-2] * patch[0], logits.shape[-1] * patch[1])
    offset = (torch.zeros(len(text)) if offset is None else offset).to(logits.device)
    softmax = model.config.softmax_scale is not None
    return [WindowLogits(each, boxes, window, size, offset, owners, softmax) for each in logits]
