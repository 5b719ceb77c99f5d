"""The loss terms the slow, obvious way: all maps at full size, in the logits' own type, with autograd's gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Labels (B, S, S') -> targets (B, C, S, S') of 0 and 1, zeros where the label is 255."""
    return torch.stack([labels == c for c in range(classes)], dim=1).float()


def focal_loss(logits: Tensor, target: Tensor, pairs: Tensor) -> Tensor:
    """Mean over pixels, summed over (image, class), divided by `pairs`."""
    return sigmoid_focal_loss(logits, target, alpha=0.25, gamma=2.0).mean(dim=(2, 3)).sum() / pairs


def blur(maps: Tensor) -> Tensor:
    """An 11 x 11 Gaussian window, sigma 1.5, with 5 zeros of padding, on every map of (B, C, S, S')."""
    d = torch.arange(-5, 6, dtype=maps.dtype)
    window = torch.exp(-(d[:, None] ** 2 + d[None] ** 2) / (2 * 1.5**2))
    window = (window / window.sum()).expand(maps.shape[1], 1, 11, 11)
    return F.conv2d(maps, window, padding=5, groups=maps.shape[1])


def ssim_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 - mean structural similarity of logits and target, over all classes and pixels."""
    x, y = blur(logits), blur(target)
    variance_x = blur(logits * logits) - x * x
    variance_y = blur(target * target) - y * y
    covariance = blur(logits * target) - x * y
    luminance = (2 * x * y + 0.01**2) / (x * x + y * y + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (variance_x + variance_y + 0.03**2)
    return 1 - (luminance * structure).mean()


def dice_loss(logits: Tensor, target: Tensor, pairs: Tensor) -> Tensor:
    """1 - (2 sum(p t) + 1) / (sum p + sum t + 1) of present (image, class) pairs, summed, divided by `pairs`."""
    p, t = logits.sigmoid().flatten(2), target.flatten(2)
    dice = (2 * (p * t).sum(dim=2) + 1) / (p.sum(dim=2) + t.sum(dim=2) + 1)
    return ((1 - dice) * t.any(dim=2)).sum() / pairs


def segmentation_loss(logits: Tensor, labels: Tensor, kind: str, *, pairs: Tensor | None = None) -> dict[str, Tensor]:
    """The twin of `sptseg.losses.segmentation_loss`, without its checks."""
    large = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    target = one_hot(labels, logits.shape[1]).to(logits.dtype)
    pairs = target.flatten(2).any(dim=2).sum().clamp(min=1) if pairs is None else pairs
    second = {"ssim": ssim_loss(large, target)} if kind == "spt" else {"dice": dice_loss(large, target, pairs)}
    terms = {"focal": 100 * focal_loss(large, target, pairs), **second}
    return {**terms, "total": torch.stack(list(terms.values())).sum()}
