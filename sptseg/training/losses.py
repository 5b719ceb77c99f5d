"""The loss terms of SPT-SEG and ZegCLIP, on mask logits at token resolution.

Logits are upsampled bilinearly (`align_corners=False`) to the labels' size. Targets are one-hot per class; ignored
pixels (255) are zeros for every class: negatives, not left out (released code, kept).

Values and exact gradients are computed together, a few maps at a time: no map of all classes exists at full size, and
no graph is kept. `tests/plain.py` holds the straightforward twin."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sptseg.datasets import IGNORE
from sptseg.model import LossKind, interpolation, maps_at_once

FOCAL_WEIGHT = 100.0  # of SSIM and dice: 1
ALPHA = 0.25  # focal: weight of positives; 1 - ALPHA of negatives
C1, C2 = 0.01**2, 0.03**2  # SSIM
SIGMA, RADIUS = 1.5, 5
TILE = 32  # side of a tile, pixels


def segmentation_loss(
    logits: Tensor, labels: Tensor, kind: LossKind = "spt", *, pairs: Tensor | None = None
) -> dict[str, Tensor]:
    """Weighted loss terms: `focal` and `ssim` (SPT-SEG) or `dice` (ZegCLIP), and their sum `total`.

    With logits (B, C, h, w), labels (B, S, S') from 0 to C-1, 255 ignored, target t, p = sigmoid(logits), and n pairs
    (image, class) present; `pairs` is n where it is counted over more than this batch, at least 1:
        focal = 100 / n * sum over pairs of mean over pixels of alpha_t (1 - p_t)² (-log p_t)
        ssim  = 1 - mean over pairs and pixels of SSIM(logits, t): raw logits, odd but released, and kept
        dice  = 1 / n * sum over present pairs of 1 - (2 sum(p t) + 1) / (sum p + sum t + 1)"""
    if kind not in ("spt", "zegclip"):
        raise ValueError(f"loss kind is {kind!r}; wanted 'spt' or 'zegclip'")
    check_labels(labels, logits.shape[1], len(logits))
    if pairs is None:
        pairs = present_pairs(labels, logits.shape[1]).sum().clamp(min=1)
    with torch.autocast(logits.device.type, enabled=False):
        focal, second = _MaskLosses.apply(logits.float(), labels, pairs.to(logits.device), kind == "spt")
    focal = FOCAL_WEIGHT * focal
    return {"focal": focal, "ssim" if kind == "spt" else "dice": second, "total": torch.stack([focal, second]).sum()}


def present_pairs(labels: Tensor, classes: int) -> Tensor:
    """Which classes each label map (B, S, S') holds: (B, C) bool."""
    counts = torch.zeros(len(labels), 256, dtype=torch.bool, device=labels.device)
    counts.scatter_(1, labels.flatten(1).long(), torch.ones_like(labels.flatten(1), dtype=torch.bool))
    return counts[:, :classes]


def check_labels(labels: Tensor, classes: int, batch: int) -> None:
    """Refuses labels of the wrong shape or outside 0..C-1 and 255."""
    if labels.ndim != 3 or len(labels) != batch:
        raise ValueError(f"labels have shape {tuple(labels.shape)}; wanted ({batch}, height, width), as many as logits")
    wrong = labels[(labels != IGNORE) & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        valid = f"with {classes} classes 0 to {classes - 1} and {IGNORE} (ignored) are valid"
        raise ValueError(f"labels hold the value {wrong[0]}; {valid}; map unseen classes to {IGNORE} first")


class _MaskLosses(torch.autograd.Function):
    """(focal, ssim or dice) of low-resolution logits, with their gradients made in the forward pass.

    Focal loss and SSIM first take every map as if its target were empty. What the target changes is added in tiles
    around its pixels, few in all, so that time hardly grows with the classes in a picture."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, pairs: Tensor, ssim: bool) -> tuple[Tensor, Tensor]:
        (batch, classes), size = logits.shape[:2], (labels.shape[-2], labels.shape[-1])
        axes = [axis(a, b, logits.device) for a, b in zip(logits.shape[-2:], size, strict=True)]
        up = Upsampling(*(whole for whole, _ in axes))
        maps = logits.flatten(0, 1)  # (B * C, h, w)
        values = logits.new_zeros(2)
        gradients = torch.zeros(2, *maps.shape, device=logits.device)
        for chunk, absent in chunks(present_pairs(labels, classes).flatten(), size):
            low = maps[chunk]
            x = up(low)
            target = None if absent else labels[chunk // classes] == (chunk % classes)[:, None, None]
            negative, by_x = focal_term(x if target is None else x.masked_fill(target, -torch.inf), 1 - ALPHA)
            terms = [(negative, up.back(by_x))]
            if ssim:
                value, by_mean, by_square = empty_ssim(*up.moments(low))
                terms.append((value.sum(), up.moments_back(low, by_mean, by_square)))
            elif target is not None:
                terms.append(dice_term(x, target.float(), up))
            for i, (value, gradient) in enumerate(terms):
                values[i] += value
                gradients[i, chunk] = gradient
        for chunk, target, tile in tiles(labels, classes, *(each for _, each in axes)):
            low = maps[chunk]
            x = tile(low)
            core = F.pad(target[:, RADIUS:-RADIUS, RADIUS:-RADIUS], [RADIUS] * 4)  # what lies around is the neighbours'
            positive, by_x = focal_term((-x).masked_fill(~core, -torch.inf), ALPHA)
            terms = [(positive, tile.back(-by_x))] + ([ssim_of_target(low, x, target.float(), tile)] if ssim else [])
            pairs_of_chunk, which = chunk.unique_consecutive(return_inverse=True)
            sums = F.one_hot(which, len(pairs_of_chunk)).T.float()  # a product, as scattered sums differ run by run
            for i, (value, gradient) in enumerate(terms):
                values[i] += value
                gradients[i, pairs_of_chunk] += (sums @ gradient.flatten(1)).unflatten(1, gradient.shape[1:])
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
    """(positions of (image, class) pairs in `present` (B * C,), whether their classes are absent), a few at a time."""
    at_once = maps_at_once(size[0] * size[1], present.device)
    for absent in (False, True):
        for chunk in (present != absent).nonzero().flatten().split(at_once):
            if len(chunk):
                yield chunk, absent


class Axis(NamedTuple):
    """Bilinear upsampling along one axis as a matrix `up` (S, h), and what SSIM's window makes of it.

    A row of `up` has at most two entries that are not zero, side by side. So the square of an upsampled map is itself a
    linear function of few numbers: the products of neighbours in the small map. `blurred` (S, h) and `blurred_squares`
    (S, 2h-1) are both after the window (S, S), so that window means need no map of full size. Of tiles, all have one
    dimension more in front; `up` and the columns of `window` reach RADIUS further, zero outside of the picture."""

    up: Tensor
    blurred: Tensor
    blurred_squares: Tensor
    window: Tensor


@lru_cache(maxsize=16)
def axis(source: int, target: int, device: torch.device) -> tuple[Axis, Axis]:
    """Upsampling from `source` to `target` pixels: the whole axis, and its tiles."""
    offset = torch.arange(-RADIUS, RADIUS + 1, dtype=torch.float32)
    weights = torch.exp(-(offset**2) / (2 * SIGMA**2))
    position = torch.arange(target)
    distance = (position[:, None] - position[None]).abs()
    band = (weights / weights.sum())[RADIUS:][distance.clamp(max=RADIUS)]
    window = torch.where(distance <= RADIUS, band, 0.0).to(device)  # zeros beyond the border
    up = interpolation(source, target, device)
    squares = torch.cat([up * up, 2 * up[:, :-1] * up[:, 1:]], dim=1)
    whole, rest = Axis(up, window @ up, window @ squares, window), -target % TILE
    blurred, blurred_squares = (F.pad(each, (0, 0, 0, rest)).unflatten(0, (-1, TILE)) for each in whole[1:3])
    reached = F.pad(up, (0, 0, RADIUS, rest + RADIUS)).unfold(0, TILE + 2 * RADIUS, TILE).mT
    around, starts = F.pad(window, (RADIUS, rest + RADIUS, 0, rest)), range(0, target, TILE)
    around = torch.stack([around[i : i + TILE, i : i + TILE + 2 * RADIUS] for i in starts])
    return whole, Axis(reached, blurred, blurred_squares, around)


class Upsampling(NamedTuple):
    """Bilinear upsampling of maps as a matrix product per axis, its transpose, and both with SSIM's window on top."""

    rows: Axis
    columns: Axis

    def __call__(self, low: Tensor) -> Tensor:
        """(n, h, w) -> (n, S, S')."""
        return self.rows.up @ low @ self.columns.up.mT

    def back(self, gradient: Tensor) -> Tensor:
        """Transpose of `__call__`: (n, S, S') -> (n, h, w)."""
        return self.rows.up.mT @ gradient @ self.columns.up

    def moments(self, low: Tensor) -> tuple[Tensor, Tensor]:
        """Window means of the upsampled maps and of their squares: two of (n, S, S')."""
        mean = self.rows.blurred @ low @ self.columns.blurred.mT
        return mean, self.rows.blurred_squares @ neighbour_products(low) @ self.columns.blurred_squares.mT

    def moments_back(self, low: Tensor, by_mean: Tensor, by_square: Tensor) -> Tensor:
        """Gradient (n, h, w) of `moments` at `low`, from those by its two results."""
        by_product = self.rows.blurred_squares.mT @ by_square @ self.columns.blurred_squares
        with torch.enable_grad():
            leaf = low.detach().requires_grad_()
            (of_square,) = torch.autograd.grad(neighbour_products(leaf), leaf, by_product)
        return self.rows.blurred.mT @ by_mean @ self.columns.blurred + of_square


def neighbour_products(low: Tensor) -> Tensor:
    """Products of neighbours in small maps (n, h, w), as `Axis` wants them: (n, 2h-1, 2w-1), that is
    [[own squares, with the right neighbour], [with the one below, mean of both diagonals]]."""
    up, down = low[:, :-1], low[:, 1:]
    diagonals = (up[..., :-1] * down[..., 1:] + up[..., 1:] * down[..., :-1]) / 2
    above = torch.cat([low * low, low[..., :-1] * low[..., 1:]], dim=2)
    return torch.cat([above, torch.cat([up * down, diagonals], dim=2)], dim=1)


def tiles(labels: Tensor, classes: int, rows: Axis, columns: Axis) -> Iterator[tuple[Tensor, Tensor, Upsampling]]:
    """Where pixels of a class lie in a tile or at most RADIUS from it, a few tiles at a time:
    (positions of their (image, class) pairs, targets (n, T + 2 RADIUS, T + 2 RADIUS), upsampling to these tiles)."""
    side, (height, width) = TILE + 2 * RADIUS, labels.shape[1:]
    padding = (RADIUS, -width % TILE + RADIUS, RADIUS, -height % TILE + RADIUS)
    parts = F.pad(labels, padding, value=IGNORE).unfold(1, side, TILE).unfold(2, side, TILE)  # (B, rows, columns, ...)
    holds = present_pairs(parts.flatten(0, 2), classes).unflatten(0, parts.shape[:3]).movedim(3, 1)
    found = holds.nonzero()
    for chunk in found.split(maps_at_once(side * side, labels.device)) if len(found) else ():
        image, name, row, column = chunk.T
        target = parts[image, row, column] == name[:, None, None]
        place = Upsampling(*(Axis(*(m[i] for m in axis)) for axis, i in ((rows, row), (columns, column))))
        yield image * classes + name, target, place


def focal_term(z: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Focal loss of negatives with logits z (of positives: -z; -inf does not count), and its gradient: the sum of
    weight q² softplus(z) with q = sigmoid(z); weight q² (2 (1 - q) softplus(z) + q)."""
    q, cost = z.sigmoid(), softplus(z)
    weighted = (q * q).mul_(weight)
    value = (weighted * cost).sum()
    return value, (1 - q).mul_(2).mul_(cost).add_(q).mul_(weighted)


def softplus(z: Tensor) -> Tensor:
    """log(1 + e^z), five times as fast as torch's on a CPU and as exact down to 1e-7, where this ends in 0:
    log1p(e) = log(u) e / (u - 1) with u = 1 + e as it was rounded (Kahan)."""
    e = z.abs().neg_().exp_()
    u = 1 + e
    return e.mul_(u.log()).div_((u - 1).clamp_(min=torch.finfo(z.dtype).eps)).add_(z.clamp(min=0))


def dice_term(x: Tensor, target: Tensor, up: Upsampling) -> tuple[Tensor, Tensor]:
    """Sum of 1 - dice over maps (n, S, S') that hold their class, and its gradient (n, h, w)."""
    p = x.sigmoid()
    overlap = 2 * (p * target).sum(dim=(1, 2), keepdim=True) + 1
    total = p.sum(dim=(1, 2), keepdim=True) + target.sum(dim=(1, 2), keepdim=True) + 1
    return (1 - overlap / total).sum(), up.back((overlap / total - 2 * target) / total * p * (1 - p))


def empty_ssim(a: Tensor, square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SSIM with an empty target, C1 C2 / ((a² + C1) (var x + C2)), at each pixel; its derivatives by a and E[x²]."""
    squared = a * a
    d2 = (square - squared).add_(C2)
    d1 = squared.add_(C1)
    value = (d1 * d2).reciprocal_().mul_(C1 * C2)
    by_square = (value / d2).neg_()
    by_mean = d1.reciprocal_().mul_(value).add_(by_square).mul_(a).mul_(-2)
    return value, by_mean, by_square


def ssim_of_target(low: Tensor, x: Tensor, target: Tensor, tile: Upsampling) -> tuple[Tensor, Tensor]:
    """What targets change of the sum of `empty_ssim`, in tiles, and its gradient (n, h, w). SSIM = l s, with means a, b
    and moments E[x²], E[xt] in the window, E[t²] = b as t is 0 or 1: l = (2ab + C1) / (a² + b² + C1),
    s = (2 (E[xt] - ab) + C2) / (var x + var t + C2)."""
    down, right = tile.rows.window, tile.columns.window
    a, square = tile.moments(low)
    b, product = (down @ maps @ right.mT for maps in (target, x * target))
    d1 = a * a + b * b + C1
    d2 = square - a * a + b - b * b + C2
    luminance, structure = (2 * a * b + C1) / d1, (2 * (product - a * b) + C2) / d2
    value = luminance * structure
    by_square = -value / d2
    by_product = 2 * luminance / d2
    by_mean = 2 * b * structure / d1 - 2 * a * value / d1 - b * by_product - 2 * a * by_square
    empty, empty_by_mean, empty_by_square = empty_ssim(a, square)
    gradient = tile.moments_back(low, by_mean - empty_by_mean, by_square - empty_by_square)
    changed = torch.where(b > 0, value - empty, 0)  # elsewhere, and outside of the picture, by rounding only
    return changed.sum(), gradient + tile.back(target * (down.mT @ by_product @ right))
