"""Pure tensor functions: products and attention, tokens and grids, windows, Fourier filters, frequency bands, resizing.

Symbols: B batch, C channels or classes, N = H * W tokens of an H x W grid."""

from collections.abc import Sequence
from functools import lru_cache, reduce

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]
MKL_AND_ONEDNN = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()  # torch on x86


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of x (..., I), weight (O, I) and bias (O,): (..., O); in float32 on x86 CPUs as a 1 x 1 convolution.
    Torch has MKL multiply matrices and oneDNN convolve, and on AMD's processors MKL takes twice as long."""
    exact = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if not exact or not on_x86(x):
        return F.linear(x, weight, bias)
    pixels = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # (1, I, 1, M), channels last in memory
    return F.conv2d(pixels, weight[:, :, None, None], bias).permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention of query (..., N, d), key and value (..., M, d), `bias` (N, M) added to the logits
    of all heads: (..., N, d)."""
    return attend_by([(query, key)], value, bias)


def attend_by(pairs: Sequence[tuple[Tensor, Tensor]], value: Tensor, bias: Tensor | None = None) -> Tensor:
    """The sum of `attend(query, key, value, bias)` over several pairs of query and key.

    Torch's fused kernel is slow on x86 CPUs. There all heads at once, or one after the other if their weights would not
    stay in the cache, take down to half of its time, with one product of the values for all pairs. Under autograd this
    keeps all weights (in float32 50 MB for 1024 tokens and 12 heads), so more than 1200 keys go to the fused kernel."""
    keys, scale = value.shape[-2], value.shape[-1] ** -0.5
    if not on_x86(value) or (keys > 1200 and torch.is_grad_enabled()):
        return reduce(torch.add, (F.scaled_dot_product_attention(q, k, value, bias) for q, k in pairs))

    def weights(logits: Tensor) -> Tensor:
        return (logits if bias is None else logits + bias).softmax(dim=-1).to(value.dtype)

    if keys < 512:
        return reduce(torch.add, (weights((q * scale) @ k.mT) for q, k in pairs)) @ value
    queries, by_head = pairs[0][0], [part.flatten(0, -3).unbind(0) for q, k in pairs for part in (q * scale, k)]
    mixed = []
    for v, *head in zip(value.mT.flatten(0, -3).unbind(0), *by_head, strict=True):
        summed = reduce(torch.add, (weights(linear(q, k)) for q, k in zip(head[::2], head[1::2], strict=True)))
        mixed.append(linear(summed, v))
    return torch.stack(mixed).view_as(queries)


def split_heads(x: Tensor, parts: int, head_width: int) -> tuple[Tensor, ...]:
    """(..., M, parts * heads * d) -> `parts` tensors (..., heads, M, d)."""
    x = x.unflatten(-1, (parts, -1, head_width))  # (..., M, parts, heads, d)
    return tuple(part.transpose(-3, -2) for part in x.unbind(-3))


def join_heads(x: Tensor) -> Tensor:
    """(..., heads, M, d) -> (..., M, heads * d)."""
    return x.transpose(-3, -2).flatten(-2)


def on_x86(x: Tensor) -> bool:
    return x.device.type == "cpu" and MKL_AND_ONEDNN


def tokens_to_grid(tokens: Tensor, grid: Grid) -> Tensor:
    """(B, N, C) -> (B, C, H, W), rows first."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def grid_to_tokens(features: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, N, C), rows first."""
    return features.flatten(2).transpose(1, 2)


def pad_to_multiple(features: Tensor, multiple: int) -> Tensor:
    """Zero-pads (B, H, W, C) below and on the right until H and W are multiples of `multiple`."""
    return F.pad(features, (0, 0, 0, -features.shape[2] % multiple, 0, -features.shape[1] % multiple))


def to_windows(features: Tensor, size: int) -> Tensor:
    """(B, H, W, C) -> (B, H/size * W/size, size², C): windows side by side, rows first, H and W multiples of `size`."""
    batch, height, width, channels = features.shape
    windows = features.view(batch, height // size, size, width // size, size, channels)
    return windows.transpose(2, 3).reshape(batch, -1, size * size, channels)


def from_windows(windows: Tensor, size: int, grid: Grid) -> Tensor:
    """The inverse of `to_windows`: (B, H/size * W/size, size², C) -> (B, H, W, C)."""
    height, width = grid
    batch, _, _, channels = windows.shape
    features = windows.view(batch, height // size, width // size, size, size, channels)
    return features.transpose(2, 3).reshape(batch, height, width, channels)


def fourier_filter(features: Tensor, weight: Tensor) -> Tensor:
    """Filters a grid per channel in the frequency domain: irfft2(rfft2(features) * weight), both orthonormal.

    features (B, H, W, C) real, weight (H, W//2+1, C) complex; float32 inside, also under autocast; of the features'
    type. Source: paper section "Spectral Prompt Tuning"; the filter is GFNet's global one."""
    height, width = features.shape[1:3]
    with torch.autocast(features.device.type, enabled=False):
        spectrum = torch.fft.rfft2(features.float(), dim=(1, 2), norm="ortho") * weight
        if features.device.type == "cpu":
            filtered = torch.fft.irfft2(spectrum, s=(height, width), dim=(1, 2), norm="ortho")
        else:
            filtered = irfft2_by_axes(spectrum, width)
    return filtered.to(features.dtype)


def irfft2_by_axes(spectrum: Tensor, width: int) -> Tensor:
    """`torch.fft.irfft2`, orthonormal, of (B, H, W//2+1, C) complex: (B, H, W, C); first and last columns made real. A
    spectrum times a learned filter is that of no real map. CPUs' libraries take the real part; GPUs' do anything."""
    rows = torch.fft.ifft(spectrum, dim=1, norm="ortho")
    edge = 2 * torch.arange(rows.shape[2], device=rows.device) % width == 0  # frequencies that are their own mirror
    return torch.fft.irfft(torch.where(edge[:, None], rows.real + 0j, rows), n=width, dim=2, norm="ortho")


def resample_filter(weight: Tensor, source: Grid, target: Grid) -> Tensor:
    """Resamples a complex filter (H, W//2+1, C) from one grid to another, linearly over cycles per token, so that it
    treats a pattern of a given wavelength as before. The vertical axis is periodic; the horizontal one is half of a
    Hermitian spectrum, and ends at its last sample."""
    if source == target:
        return weight
    (rows, columns), (new_rows, new_columns) = source, target
    vertical = torch.fft.fftfreq(new_rows, device=weight.device) * rows  # position on the old, periodic axis
    horizontal = torch.fft.rfftfreq(new_columns, device=weight.device) * columns

    def resampled(values: Tensor, position: Tensor, dim: int) -> Tensor:
        below, last = position.floor().long(), values.shape[dim] - 1
        share = (position - below).view(-1, 1, 1) if dim == 0 else (position - below).view(1, -1, 1)
        near = [i % (last + 1) if dim == 0 else i.clamp(max=last) for i in (below, below + 1)]
        low, high = (values.index_select(dim, i) for i in near)
        return low * (1 - share) + high * share

    return resampled(resampled(weight, vertical, 0), horizontal, 1)


def radial_frequency(grid: Grid, device: torch.device | None = None) -> Tensor:
    """Radius of every rfft2 frequency of a grid, in cycles per sample: (H, W//2+1), 0 to sqrt(0.5)."""
    height, width = grid
    vertical = torch.fft.fftfreq(height, device=device)[:, None]
    return torch.hypot(vertical, torch.fft.rfftfreq(width, device=device)[None])


def band_filter(images: Tensor, low: float, high: float, reject: bool = False) -> Tensor:
    """Keeps (or, with `reject`, removes) radial frequencies low <= r < high, in cycles per sample, 0 to sqrt(0.5), of
    images (..., H, W); the mean stays."""
    if not 0 <= low <= high:
        raise ValueError(f"a band needs 0 <= low <= high in cycles per sample, got {low} to {high}")
    radius = radial_frequency((images.shape[-2], images.shape[-1]), images.device)
    inside = (radius >= low) & (radius < high)
    keep = (~inside if reject else inside) | (radius == 0)
    spectrum = torch.fft.rfft2(images.float())
    return torch.fft.irfft2(spectrum * keep, s=images.shape[-2:]).to(images.dtype)


def resize_positions(embedding: Tensor, source: Grid, target: Grid, mode: str = "bilinear") -> Tensor:
    """Resizes the patch part of a position embedding (P + H*W, D) to another grid; a class token's (P = 1) stays.
    Source: released code, "bilinear"; training-free read-outs are published with "bicubic". `align_corners=False`."""
    first = embedding.shape[0] - source[0] * source[1]
    if source == tuple(target):
        return embedding
    patches = tokens_to_grid(embedding[None, first:], source)
    resized = F.interpolate(patches.float(), size=target, mode=mode, align_corners=False)
    return torch.cat([embedding[:first], grid_to_tokens(resized)[0].to(embedding.dtype)])


PIXELS_AT_ONCE = 2**18  # what stays in the cache of a CPU core


def maps_at_once(pixels: int, device: torch.device) -> int:
    """How many maps of so many pixels to work on together: few on a CPU, whose cache is small, many to fill a GPU."""
    return max(1, (PIXELS_AT_ONCE if device.type == "cpu" else 128 * PIXELS_AT_ONCE) // pixels)


@lru_cache(maxsize=16)
def interpolation(source: int, target: int, device: torch.device) -> Tensor:
    """Matrix (target, source) of one-dimensional linear interpolation, `align_corners=False`."""
    identity = torch.eye(source)[None]
    return F.interpolate(identity, size=target, mode="linear", align_corners=False)[0].T.contiguous().to(device)
