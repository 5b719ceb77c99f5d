"""The loss terms of SPT-SEG and ZegCLIP, on mask logits at token resolution.

Logits are upsampled bilinearly (`align_corners=False`) to the labels' size. Targets are one-hot per class; ignored pixels
(255) are zeros for every class: negatives, not left out (released code, kept).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from sptseg.splits import IGNORE

LossKind = Literal["spt", "zegclip"]
FOCAL_WEIGHT, SSIM_WEIGHT, DICE_WEIGHT = 100.0, 1.0, 1.0


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Labels (B, S, S') -> float targets (B, C, S, S'), zeros where the label is 255."""
    wanted = torch.arange(classes, device=labels.device).view(1, -1, 1, 1)
    return (labels[:, None] == wanted).float()


def present_pairs(labels: Tensor, classes: int) -> Tensor:
    """Which classes each label map holds: (B, C) bool."""
    wanted = torch.arange(classes, device=labels.device)
    return torch.stack([torch.isin(wanted, label) for label in labels])


def focal_loss(logits: Tensor, target: Tensor, pairs: Tensor) -> Tensor:
    """Sigmoid focal loss (alpha 0.25, gamma 2): mean over pixels, summed over (image, class), divided by `pairs`."""
    loss = sigmoid_focal_loss(logits, target, alpha=0.25, gamma=2.0)
    return loss.mean(dim=(2, 3)).sum() / pairs


def gaussian_blur(maps: Tensor) -> Tensor:
    """An 11 x 11 Gaussian window, sigma 1.5, with 5 zeros of padding, on every map of (B, C, S, S')."""
    offset = torch.arange(11, dtype=maps.dtype, device=maps.device) - 5
    window = torch.exp(-(offset**2) / (2 * 1.5**2))
    window = window / window.sum()
    flat = maps.flatten(0, 1)[:, None]
    flat = F.conv2d(flat, window.view(1, 1, 11, 1), padding=(5, 0))
    return F.conv2d(flat, window.view(1, 1, 1, 11), padding=(0, 5)).view_as(maps)


def ssim_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 - mean structural similarity of logits and target, over all classes and pixels.

    On raw logits, not probabilities: odd, in the released code, and kept. C1 = 0.01², C2 = 0.03².
    """
    c1, c2 = 0.01**2, 0.03**2
    mean_x, mean_y = gaussian_blur(logits), gaussian_blur(target)
    variance_x = gaussian_blur(logits * logits) - mean_x**2
    variance_y = gaussian_blur(target * target) - mean_y**2
    covariance = gaussian_blur(logits * target) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return 1 - (luminance * structure).mean()


def dice_loss(logits: Tensor, target: Tensor, present: Tensor, pairs: Tensor) -> Tensor:
    """1 - (2 sum(p t) + 1) / (sum p + sum t + 1) on present (image, class) pairs, summed, divided by `pairs`."""
    p, t = logits.sigmoid().flatten(2), target.flatten(2)
    overlap = (2 * (p * t).sum(dim=-1) + 1) / (p.sum(dim=-1) + t.sum(dim=-1) + 1)
    return ((1 - overlap) * present).sum() / pairs


def segmentation_loss(
    logits: Tensor, labels: Tensor, kind: LossKind = "spt", *, pairs: Tensor | float | None = None
) -> dict[str, Tensor]:
    """Weighted loss terms: `focal` and `ssim` (SPT-SEG) or `dice` (ZegCLIP), and their sum `total`.

    Args:
        logits: mask logits (B, C, h, w) at token resolution.
        labels: (B, S, S'), 0 to C-1, 255 ignored.
        pairs: the number of (image, class) pairs present, where it is counted over more than this batch (averaged over
            processes, or over accumulated micro-batches); counted here if None. At least 1 is used.
    """
    if kind not in ("spt", "zegclip"):
        raise ValueError(f"loss kind is {kind!r}; wanted 'spt' or 'zegclip'")
    classes = logits.shape[1]
    check_labels(labels, classes, len(logits))
    logits = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
    target, present = one_hot(labels, classes), present_pairs(labels, classes)
    count = torch.as_tensor(present.sum() if pairs is None else pairs, device=logits.device).float().clamp(min=1)
    terms = {"focal": FOCAL_WEIGHT * focal_loss(logits, target, count)}
    if kind == "spt":
        with torch.autocast(logits.device.type, enabled=False):  # variances are differences of nearly equal numbers
            terms["ssim"] = SSIM_WEIGHT * ssim_loss(logits, target)
    else:
        terms["dice"] = DICE_WEIGHT * dice_loss(logits, target, present, count)
    return {**terms, "total": torch.stack(list(terms.values())).sum()}


def check_labels(labels: Tensor, classes: int, batch: int) -> None:
    """Refuses labels of the wrong shape or outside 0..C-1 and 255."""
    if labels.ndim != 3 or len(labels) != batch:
        raise ValueError(f"labels have shape {tuple(labels.shape)}; wanted ({batch}, height, width), as many as logits")
    wrong = (labels != IGNORE) & ((labels < 0) | (labels >= classes))
    if wrong.any():
        raise ValueError(
            f"labels hold the value {int(labels[wrong][0])}; with {classes} classes 0 to {classes - 1} and {IGNORE} (ignored) "
            f"are valid; map unseen classes to {IGNORE} first"
        )
