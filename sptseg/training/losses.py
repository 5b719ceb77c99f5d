"""The loss terms of SPT-SEG and ZegCLIP, on mask logits at token resolution.

Logits are upsampled bilinearly (`align_corners=False`) to the labels' size. Targets are one-hot per class; ignored
pixels (255) are zeros for every class: negatives, not left out (released code, kept).

Values and exact gradients are computed together, a few maps at a time: no map of all classes exists at full size, and
no graph is kept. `tests/plain.py` holds the straightforward twin.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sptseg.datasets import IGNORE
from sptseg.model import LossKind, interpolation, maps_at_once

FOCAL_WEIGHT, SSIM_WEIGHT, DICE_WEIGHT = 100.0, 1.0, 1.0
ALPHA = 0.25  # focal: weight of positives; 1 - ALPHA of negatives
C1, C2 = 0.01**2, 0.03**2  # SSIM
SIGMA, RADIUS = 1.5, 5
TILE = 32  # rows that are blurred together: a matrix product with 42 columns, where the whole band has as many as rows


def segmentation_loss(
    logits: Tensor, labels: Tensor, kind: LossKind = "spt", *, pairs: Tensor | None = None
) -> dict[str, Tensor]:
    """Weighted loss terms: `focal` and `ssim` (SPT-SEG) or `dice` (ZegCLIP), and their sum `total`.

    With target t, p = sigmoid(logits), and n pairs (image, class) present:
        focal = 100 / n * sum over pairs of mean over pixels of alpha_t (1 - p_t)² (-log p_t)
        ssim  = 1 - mean over pairs and pixels of SSIM(logits, t): raw logits, odd but released, and kept
        dice  = 1 / n * sum over present pairs of 1 - (2 sum(p t) + 1) / (sum p + sum t + 1)

    Args:
        logits: mask logits (B, C, h, w) at token resolution.
        labels: (B, S, S'), 0 to C-1, 255 ignored.
        pairs: n, where it is counted over more than this batch (averaged over processes and accumulated micro-batches);
            None counts it here, at least 1.
    """
    if kind not in ("spt", "zegclip"):
        raise ValueError(f"loss kind is {kind!r}; wanted 'spt' or 'zegclip'")
    check_labels(labels, logits.shape[1], len(logits))
    if pairs is None:
        pairs = present_pairs(labels, logits.shape[1]).sum().clamp(min=1)
    with torch.autocast(logits.device.type, enabled=False):
        focal, second = _MaskLosses.apply(logits.float(), labels, pairs.to(logits.device), kind == "spt")
    second_name, second_weight = ("ssim", SSIM_WEIGHT) if kind == "spt" else ("dice", DICE_WEIGHT)
    terms = {"focal": FOCAL_WEIGHT * focal, second_name: second_weight * second}
    return {**terms, "total": torch.stack(list(terms.values())).sum()}


def present_pairs(labels: Tensor, classes: int) -> Tensor:
    """Which classes each label map (B, S, S') holds: (B, C) bool."""
    counts = torch.zeros(len(labels), 256, dtype=torch.bool, device=labels.device)
    counts.scatter_(1, labels.flatten(1).long(), torch.ones_like(labels.flatten(1), dtype=torch.bool))
    return counts[:, :classes]


def check_labels(labels: Tensor, classes: int, batch: int) -> None:
    """Refuses labels of the wrong shape or outside 0..C-1 and 255."""
    if labels.ndim != 3 or len(labels) != batch:
        raise ValueError(f"labels have shape {tuple(labels.shape)}; wanted ({batch}, height, width), as many as logits")
    wrong = (labels != IGNORE) & ((labels < 0) | (labels >= classes))
    if wrong.any():
        raise ValueError(
            f"labels hold the value {int(labels[wrong][0])}; with {classes} classes 0 to {classes - 1} and {IGNORE} "
            f"(ignored) are valid; map unseen classes to {IGNORE} first"
        )


class _MaskLosses(torch.autograd.Function):
    """(focal, ssim or dice) of low-resolution logits, with their gradients made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, pairs: Tensor, ssim: bool) -> tuple[Tensor, Tensor]:
        (batch, classes), size = logits.shape[:2], (labels.shape[-2], labels.shape[-1])
        up = Upsampling.between(logits.shape[-2:], size, logits.device)
        maps = logits.flatten(0, 1)  # (B * C, h, w)
        values = logits.new_zeros(2)
        gradients = torch.zeros(2, *maps.shape, device=logits.device)
        for chunk, absent in chunks(present_pairs(labels, classes).flatten(), size):
            low = maps[chunk]
            x = up(low)
            target = None if absent else (labels[chunk // classes] == (chunk % classes)[:, None, None]).float()
            terms = [focal_term(x, target, up), ssim_term(low, x, target, up) if ssim else dice_term(x, target, up)]
            for i, (value, gradient) in enumerate(terms):
                values[i] += value
                gradients[i, chunk] = gradient
        pixels = size[0] * size[1]
        focal_scale = 1 / (pixels * pairs)
        second_scale = values.new_tensor(-1 / (pixels * batch * classes)) if ssim else 1 / pairs
        focal, second = gradients.view(2, *logits.shape)
        ctx.save_for_backward(focal * focal_scale, second * second_scale)
        return values[0] * focal_scale, values[1] * second_scale + float(ssim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        focal, second = ctx.saved_tensors
        return outer[0] * focal + outer[1] * second, None, None, None


def chunks(present: Tensor, size: tuple[int, int]) -> Iterator[tuple[Tensor, bool]]:
    """(positions of (image, class) pairs in `present` (B * C,), whether their classes are absent), a few at a time.

    Absent classes have an empty target, which takes less than half of the work.
    """
    at_once = maps_at_once(size[0] * size[1], present.device)
    for absent in (False, True):
        for chunk in (present != absent).nonzero().flatten().split(at_once):
            if len(chunk):
                yield chunk, absent


@dataclass(frozen=True)
class Upsampling:
    """Bilinear upsampling of maps as a matrix product per axis, its transpose, and both with the SSIM window on top.

    rows (S, h), columns (S', w); `blurred_rows`, `blurred_columns` are these after the Gaussian window.

    A row of these matrices has at most two entries that are not zero, side by side. So the square of an upsampled map
    is itself a linear function of few numbers: the products of neighbours in the small map. The window applied to it is
    a matrix product of its own, `moment_rows` (S, 2h-1) and `moment_columns` (S', 2w-1), and never sees full size.
    """

    rows: Tensor
    columns: Tensor
    blurred_rows: Tensor
    blurred_columns: Tensor
    moment_rows: Tensor
    moment_columns: Tensor

    @classmethod
    def between(cls, source: Sequence[int], target: Sequence[int], device: torch.device) -> Upsampling:
        rows, columns = (interpolation(a, b, device) for a, b in zip(source, target, strict=True))
        squares = [torch.cat([m * m, 2 * m[:, :-1] * m[:, 1:]], dim=1) for m in (rows, columns)]
        return cls(rows, columns, *(blur_rows(m[None])[0] for m in (rows, columns, *squares)))

    def __call__(self, low: Tensor) -> Tensor:
        """(n, h, w) -> (n, S, S')."""
        return self.rows @ low @ self.columns.T

    def back(self, gradient: Tensor) -> Tensor:
        """Transpose of `__call__`: (n, S, S') -> (n, h, w)."""
        return self.rows.T @ gradient @ self.columns

    def moments(self, low: Tensor) -> tuple[Tensor, Tensor]:
        """Window means of the upsampled maps and of their squares: two of (n, S, S')."""
        mean = self.blurred_rows @ low @ self.blurred_columns.T
        return mean, self.moment_rows @ neighbour_products(low) @ self.moment_columns.T

    def moments_back(self, low: Tensor, by_mean: Tensor, by_square: Tensor) -> Tensor:
        """Gradient (n, h, w) of `moments` at `low`, from those by its two results."""
        by_product = self.moment_rows.T @ by_square @ self.moment_columns
        with torch.enable_grad():
            leaf = low.detach().requires_grad_()
            (of_square,) = torch.autograd.grad(neighbour_products(leaf), leaf, by_product)
        return self.blurred_rows.T @ by_mean @ self.blurred_columns + of_square


def neighbour_products(low: Tensor) -> Tensor:
    """Products of neighbours in small maps (n, h, w), as `Upsampling` wants them: (n, 2h-1, 2w-1).

    [[own squares, with the right neighbour], [with the one below, mean of both diagonals]].
    """
    up, down = low[:, :-1], low[:, 1:]
    diagonals = (up[..., :-1] * down[..., 1:] + up[..., 1:] * down[..., :-1]) / 2
    above = torch.cat([low * low, low[..., :-1] * low[..., 1:]], dim=2)
    return torch.cat([above, torch.cat([up * down, diagonals], dim=2)], dim=1)


def focal_term(x: Tensor, target: Tensor | None, up: Upsampling) -> tuple[Tensor, Tensor]:
    """Sum of the focal loss over maps (n, S, S'), and its gradient (n, h, w).

    With z = x for negatives and -x for positives, q = sigmoid(z): loss = a q² softplus(z),
    d loss / dz = a q² (2 (1 - q) softplus(z) + q).
    """
    z = x if target is None else x * (1 - 2 * target)
    weight = 1 - ALPHA if target is None else 1 - ALPHA + (2 * ALPHA - 1) * target
    q, cost = z.sigmoid(), softplus(z)
    weighted = q * q * weight
    gradient = weighted * (2 * (1 - q) * cost + q)
    return (weighted * cost).sum(), up.back(gradient if target is None else gradient * (1 - 2 * target))


def softplus(z: Tensor) -> Tensor:
    """log(1 + e^z), as exact as torch's, which takes five times as long on a CPU, down to 1e-7, where this ends in 0.

    log1p(e) = log(u) e / (u - 1) with u = 1 + e as it was rounded (Kahan).
    """
    e = z.abs().neg_().exp_()
    u = 1 + e
    return e.mul_(u.log()).div_((u - 1).clamp_(min=torch.finfo(z.dtype).eps)).add_(z.clamp(min=0))


def dice_term(x: Tensor, target: Tensor | None, up: Upsampling) -> tuple[Tensor, Tensor]:
    """Sum of 1 - dice over maps that hold their class, and its gradient (n, h, w); absent classes do not count."""
    if target is None:
        return x.new_zeros(()), x.new_zeros(len(x), up.rows.shape[1], up.columns.shape[1])
    p = x.sigmoid()
    overlap = 2 * (p * target).sum(dim=(1, 2), keepdim=True) + 1
    total = p.sum(dim=(1, 2), keepdim=True) + target.sum(dim=(1, 2), keepdim=True) + 1
    return (1 - overlap / total).sum(), up.back((overlap / total - 2 * target) / total * p * (1 - p))


def ssim_term(low: Tensor, x: Tensor, target: Tensor | None, up: Upsampling) -> tuple[Tensor, Tensor]:
    """Sum of the structural similarity of logits and target over maps and pixels, and its gradient (n, h, w).

    With means a, b, and moments E[x²], E[xt] in the window: l = (2ab + C1) / (a² + b² + C1),
    s = (2 (E[xt] - ab) + C2) / (var x + var t + C2), SSIM = l s. As t is 0 or 1, E[t²] = b.
    """
    a, square = up.moments(low)
    if target is None:
        d1 = a * a + C1
        d2 = square - a * a + C2
        value = (C1 * C2) / (d1 * d2)
        by_square = -value / d2
        by_mean = 2 * a * (-value / d1 - by_square)
        return value.sum(), up.moments_back(low, by_mean, by_square)
    b, product = blur(target), blur(x * target)
    d1 = a * a + b * b + C1
    d2 = square - a * a + b - b * b + C2
    luminance, structure = (2 * a * b + C1) / d1, (2 * (product - a * b) + C2) / d2
    value = luminance * structure
    by_square = -value / d2
    by_product = 2 * luminance / d2
    by_mean = 2 * b * structure / d1 - 2 * a * value / d1 - b * by_product - 2 * a * by_square
    return value.sum(), up.moments_back(low, by_mean, by_square) + up.back(target * blur(by_product))


def blur(maps: Tensor) -> Tensor:
    """The 11 x 11 Gaussian window (sigma 1.5, 5 zeros of padding) on maps (n, S, S').

    It is its own transpose, so gradients go through it as values do.
    """
    return blur_rows(blur_rows(maps).transpose(1, 2)).transpose(1, 2)


def blur_rows(maps: Tensor) -> Tensor:
    """The one-dimensional window down the rows of (n, S, S'): a product with a banded matrix, the band cut in tiles."""
    length = maps.shape[1]
    band = gaussian_band(min(length, TILE) + 2 * RADIUS, maps.device)[RADIUS:]
    tiles = []
    for start in range(0, length, TILE):
        first, last = max(0, start - RADIUS), min(length, start + TILE + RADIUS)
        rows = min(TILE, length - start)
        columns = slice(first - start + RADIUS, last - start + RADIUS)
        tiles.append(band[:rows, columns] @ maps[:, first:last])
    return torch.cat(tiles, dim=1)


@lru_cache(maxsize=16)
def gaussian_band(length: int, device: torch.device) -> Tensor:
    """Symmetric (length, length) matrix that applies the one-dimensional window, zeros beyond the border."""
    offset = torch.arange(-RADIUS, RADIUS + 1, dtype=torch.float32)
    window = torch.exp(-(offset**2) / (2 * SIGMA**2))
    position = torch.arange(length)
    distance = (position[:, None] - position[None]).abs()
    band = (window / window.sum())[RADIUS:][distance.clamp(max=RADIUS)]
    return torch.where(distance <= RADIUS, band, 0.0).to(device)
