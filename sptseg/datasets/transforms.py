"""Augmentation and preprocessing of (image, label) pairs: torchvision v2 transforms on tv_tensors.

All randomness comes from torch's global generator, so that a data loader's worker seeds govern it."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from sptseg.datasets.splits import IGNORE

Statistics = tuple[float, float, float]

# ZegCLIP's protocol normalises with ImageNet's statistics although CLIP was trained with its own.
IMAGENET_MEAN: Statistics = (0.485, 0.456, 0.406)
IMAGENET_STD: Statistics = (0.229, 0.224, 0.225)
CLIP_MEAN: Statistics = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Statistics = (0.26862954, 0.26130258, 0.27577711)
STRIP = 32  # times as long as wide: such pictures are not enlarged by their short side


@dataclass(frozen=True)
class Augmentation:
    """How pictures are brought to the model; the defaults are the protocol of the literature.

    crop: side of the square training crop, and the least short side of a test picture.
    resize_base: (long, short) side that a picture is fitted into, keeping its ratio; None: its own size.
    scale: range of the random factor on top, in training.
    largest_share: a training crop with more of one class is drawn again, up to ten times.
    flip: probability of a horizontal flip.
    distortion: probability of each of the four photometric distortions.
    mean, std: per channel, of values in 0..1."""

    crop: int = 512
    resize_base: tuple[int, int] | None = (2048, 512)
    scale: tuple[float, float] = (0.5, 2.0)
    largest_share: float = 0.75
    flip: float = 0.5
    distortion: float = 0.5
    mean: Statistics = IMAGENET_MEAN
    std: Statistics = IMAGENET_STD


def fitted_size(
    height: int, width: int, base: tuple[int, int] | None, *, factor: float = 1.0, least_short: int = 1
) -> tuple[int, int]:
    """(height, width) after fitting into `base` = (long, short) times `factor`, keeping the ratio.

    `least_short` wins over `base`: so long is the short side at least, but for strips of more than STRIP to 1, which
    would become thousands of windows."""
    long, short = max(height, width), min(height, width)
    fit = 1.0 if base is None else min(base[0] / long, base[1] / short)
    ratio = max(fit * factor, min(least_short / short, STRIP * least_short / long))
    return max(1, int(height * ratio + 0.5)), max(1, int(width * ratio + 0.5))


class RandomRescale(v2.Transform):
    """Fits image and mask into `base` times a factor drawn from `scale`; unlike v2.ScaleJitter, portraits upright."""

    def __init__(self, base: tuple[int, int] | None, scale: tuple[float, float]) -> None:
        super().__init__()
        self.base, self.scale = base, scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = F.get_size(flat_inputs[0])
        low, high = self.scale
        factor = low + (high - low) * torch.rand(()).item()
        return {"size": list(fitted_size(height, width, self.base, factor=factor))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.resize(inpt, params["size"])  # images bilinear and antialiased, masks nearest


class VariedCrop(v2.Transform):
    """Random crop, drawn again, up to `tries` times, while one class fills more than `largest_share` of its labelled
    pixels; a picture smaller than `size` keeps its size along that side."""

    def __init__(self, size: int, largest_share: float, tries: int = 10) -> None:
        super().__init__()
        self.size, self.largest_share, self.tries = size, largest_share, tries

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = F.get_size(flat_inputs[0])
        masks = [inpt for inpt in flat_inputs if isinstance(inpt, tv_tensors.Mask)]
        box = {"height": min(self.size, height), "width": min(self.size, width)}
        choices = (height - box["height"] + 1, width - box["width"] + 1)
        for _ in range(self.tries + 1):
            box["top"], box["left"] = (int(torch.randint(n, ())) for n in choices)
            if choices == (1, 1) or not masks or self._is_varied(F.crop(masks[0], **box)):
                break
        return box

    def _is_varied(self, mask: torch.Tensor) -> bool:
        counts = torch.bincount(mask.flatten().long(), minlength=IGNORE + 1)[:IGNORE]
        return bool(counts.max() <= self.largest_share * counts.sum()) and bool(counts.any())

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.crop(inpt, **params)


def _photometric_distortion(probability: float) -> v2.Transform:
    """Brightness, contrast, saturation and hue, each by chance; contrast before or after the two others. Channels keep
    their places, unlike in v2.RandomPhotometricDistort: a green sky is not what "a photo of a sky" means."""

    def by_chance(**strength: Any) -> v2.Transform:
        return v2.RandomApply([v2.ColorJitter(**strength)], p=probability)

    contrast = by_chance(contrast=(0.5, 1.5))
    colour = [by_chance(saturation=(0.5, 1.5)), by_chance(hue=(-0.1, 0.1))]
    order = v2.RandomChoice([v2.Compose([contrast, *colour]), v2.Compose([*colour, contrast])])
    return v2.Compose([by_chance(brightness=(0.875, 1.125)), order])


def _padded(inpt: torch.Tensor, size: int, fill: int) -> torch.Tensor:
    height, width = F.get_size(inpt)
    return F.pad(inpt, [0, 0, max(0, size - width), max(0, size - height)], fill=fill)


def _fitted(image: torch.Tensor, base: tuple[int, int] | None, least_short: int) -> torch.Tensor:
    height, width = F.get_size(image)
    return F.resize(image, list(fitted_size(height, width, base, least_short=least_short)))


def _normalised(augmentation: Augmentation) -> list[v2.Transform]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(augmentation.mean), list(augmentation.std))]


def train_transform(augmentation: Augmentation) -> v2.Transform:
    """(Image uint8 (3,H,W), Mask (H,W)) -> (Image float32 (3,S,S), Mask (S,S)), S = `augmentation.crop`.

    Random resize, crop, flip and distortion, then normalisation; what the crop lacks at the right and the bottom
    is padded with 0 in the image, so with the mean colour, and with 255 in the mask."""
    size, colour = augmentation.crop, _photometric_distortion(augmentation.distortion)
    moves = [RandomRescale(augmentation.resize_base, augmentation.scale), VariedCrop(size, augmentation.largest_share)]
    pad_image = v2.Lambda(partial(_padded, size=size, fill=0), tv_tensors.Image)
    pad_mask = v2.Lambda(partial(_padded, size=size, fill=IGNORE), tv_tensors.Mask)
    flip = v2.RandomHorizontalFlip(augmentation.flip)
    return v2.Compose([*moves, flip, colour, *_normalised(augmentation), pad_image, pad_mask])


def test_transform(augmentation: Augmentation) -> v2.Transform:
    """(Image uint8 (3,H,W), Mask (H,W)) -> (Image float32 (3,h,w), the same Mask); also of an Image alone.

    Only the image is fitted into `augmentation.resize_base`, its short side at least `augmentation.crop`: results
    are compared at the label's own size."""
    fit = partial(_fitted, base=augmentation.resize_base, least_short=augmentation.crop)
    return v2.Compose([v2.Lambda(fit, tv_tensors.Image), *_normalised(augmentation)])
