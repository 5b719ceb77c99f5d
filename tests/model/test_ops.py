"""Tokens and grids, windows, Fourier filters against plain twins, frequency bands, positions."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from sptseg.model import ops

side = st.integers(1, 9)
grids = st.tuples(side, side)
few = settings(max_examples=25, deadline=None)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (4, 5), (2, 3, 4), (1, 1)])
def test_linear_equals_torchs_in_value_and_gradient(shape: tuple[int, ...], bias: bool) -> None:
    x, weight, cotangent = torch.randn(*shape, 7), torch.randn(6, 7), torch.randn(*shape, 6)
    inputs = [x.requires_grad_(), weight.requires_grad_(), *([torch.randn(6).requires_grad_()] if bias else [])]
    ours, plain = ops.linear(*inputs), F.linear(*inputs)
    assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    assert_close(torch.autograd.grad(ours, inputs, cotangent), torch.autograd.grad(plain, inputs, cotangent))
    with torch.autocast("cpu"):
        assert ops.linear(x, weight).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [3, 600, 1300])  # below and above where heads go one by one; by the fused kernel
@pytest.mark.parametrize("biased", [False, True])
def test_attention_equals_plain_attention_in_value_and_gradient(tokens: int, dtype: torch.dtype, biased: bool) -> None:
    """By two pairs of query and key."""
    parts = [torch.randn(2, 3, n, 8, dtype=dtype).requires_grad_() for n in (5, tokens, 5, tokens, tokens)]
    bias = torch.randn(5, tokens, dtype=dtype) if biased else None
    ours = ops.attend_by([(parts[0], parts[1]), (parts[2], parts[3])], parts[4], bias)
    wide = [part.detach().double().requires_grad_() for part in parts]
    logits = [wide[i] @ wide[i + 1].mT / math.sqrt(8) + (0 if bias is None else bias.double()) for i in (0, 2)]
    plain = (logits[0].softmax(dim=-1) + logits[1].softmax(dim=-1)) @ wide[4]
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    assert_close(ours.double(), plain, **tolerance)
    cotangent = torch.randn(ours.shape, dtype=dtype)
    gradients = torch.autograd.grad(ours, parts, cotangent)
    for gradient, expected in zip(gradients, torch.autograd.grad(plain, wide, cotangent.double()), strict=True):
        assert_close(gradient.double(), expected, **tolerance)


def random_filter(grid: ops.Grid, channels: int = 2) -> Tensor:
    return torch.randn(grid[0], grid[1] // 2 + 1, channels, dtype=torch.complex64)


@few
@given(grids, st.integers(1, 4))
def test_windows_round_trip_over_padding(grid: ops.Grid, size: int) -> None:
    features = torch.randn(2, *grid, 3)
    height, width = (math.ceil(length / size) * size for length in grid)
    padded = torch.zeros(2, height, width, 3)
    padded[:, : grid[0], : grid[1]] = features
    assert torch.equal(ops.pad_to_multiple(features, size), padded)
    windows = ops.to_windows(padded, size)
    twin = padded.unfold(1, size, size).unfold(2, size, size)  # (B, rows, columns, E, size, size)
    assert torch.equal(windows, twin.flatten(4).mT.flatten(1, 2))
    assert torch.equal(ops.from_windows(windows, size, (height, width)), padded)
    features = ops.tokens_to_grid(ops.grid_to_tokens(padded.permute(0, 3, 1, 2)), (height, width))
    assert torch.equal(features.permute(0, 2, 3, 1), padded)


@few
@given(grids)
def test_fourier_filter_equals_numpy(grid: ops.Grid) -> None:
    features, weight = torch.randn(2, *grid, 2), random_filter(grid)
    spectrum = np.fft.rfft2(features.double().numpy(), axes=(1, 2), norm="ortho") * weight.numpy()
    twin = np.fft.irfft2(spectrum, s=grid, axes=(1, 2), norm="ortho")
    assert_close(ops.fourier_filter(features, weight).double(), torch.from_numpy(twin), atol=1e-5, rtol=0)


@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (32, 32), (3, 2), (2, 1)])
def test_both_inverses_take_the_real_part_at_the_edges(grid: ops.Grid) -> None:
    """A learned filter makes the first and last columns of the spectrum non-Hermitian, which libraries may read
    differently; the twin says it: inverse along the columns, then along the rows the real part of the full sum."""
    given = torch.randn(2, grid[0], grid[1] // 2 + 1, 3, dtype=torch.complex64, requires_grad=True)
    spectrum = torch.fft.ifft(given, dim=1, norm="ortho")
    mirrored = spectrum[:, :, 1 : (grid[1] + 1) // 2].flip(2).conj()
    twin = torch.fft.ifft(torch.cat([spectrum, mirrored], dim=2), dim=2, norm="ortho").real
    cotangent = torch.randn_like(twin)
    (expected,) = torch.autograd.grad(twin, given, cotangent)
    of_cpus, of_gpus = torch.fft.irfft2(given, s=grid, dim=(1, 2), norm="ortho"), ops.irfft2_by_axes(given, grid[1])
    for found in (of_cpus, of_gpus):
        assert_close(found, twin, atol=1e-5, rtol=0)
        assert_close(torch.autograd.grad(found, given, cotangent), (expected,), atol=1e-5, rtol=0)


def test_fourier_filter_stays_in_float32_under_autocast_and_keeps_the_type() -> None:
    features, weight = torch.randn(1, 6, 6, 2), random_filter((6, 6))
    expected = ops.fourier_filter(features, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.fourier_filter(features, weight), expected)
        assert_close(ops.fourier_filter(features.bfloat16(), weight), expected.bfloat16(), atol=0.2, rtol=0.05)


@pytest.mark.parametrize("source", [(8, 8), (9, 6)])
@pytest.mark.parametrize("target", [(16, 16), (17, 15), (12, 7), (5, 6)])
def test_low_frequencies_stay_aligned_across_odd_and_even_grids(source: ops.Grid, target: ops.Grid) -> None:
    """A filter linear in |frequency|, up to where both grids sample it, is met exactly."""

    def cone(height: int, width: int) -> Tensor:
        """(H, W//2+1, 1), of vertical and horizontal frequency in cycles per token."""
        return (1 - torch.fft.fftfreq(height)[:, None].abs() - 2j * torch.fft.rfftfreq(width))[..., None]

    weight, expected = cone(*source), cone(*target)
    assert torch.equal(ops.resample_filter(weight, source, source), weight)
    resampled = ops.resample_filter(weight, source, target)
    # the highest sample of an odd axis lies below 0.5; between it and its mirror image, interpolation is flat
    rows, columns = ((length // 2) / length + 1e-6 for length in source)
    covered = (torch.fft.fftfreq(target[0]).abs() <= rows)[:, None] & (torch.fft.rfftfreq(target[1]) <= columns)
    assert_close(resampled[covered], expected[covered], atol=1e-5, rtol=0)


def test_band_filter_cuts_waves_and_keeps_the_type() -> None:
    x = torch.arange(16.0)
    slow, fast = torch.cos(2 * torch.pi * x / 16).expand(16, 16), torch.cos(2 * torch.pi * x * 5 / 16).expand(16, 16)
    image = 0.5 + slow + fast
    assert_close(ops.band_filter(image, 0, 0.2), 0.5 + slow, atol=1e-5, rtol=0)
    assert_close(ops.band_filter(image, 0.2, 1), 0.5 + fast, atol=1e-5, rtol=0)
    assert_close(ops.band_filter(image, 5 / 16, 1), 0.5 + fast, atol=1e-5, rtol=0)  # the lower limit belongs to it
    assert_close(ops.band_filter(image, 0.2, 1, reject=True), 0.5 + slow, atol=1e-5, rtol=0)
    assert ops.band_filter(image.half(), 0, 1).dtype == torch.half
    for low, high in ((0.3, 0.2), (-0.1, 0.2), (float("nan"), 1)):
        with pytest.raises(ValueError, match="0 <= low <= high in cycles per sample"):
            ops.band_filter(image, low, high)


@few
@given(grids, grids)
def test_positions_resize_bilinearly(source: ops.Grid, target: ops.Grid) -> None:
    """A plane over the grid stays one where the new centres lie between the old ones; the class token's row stays."""

    def plane(grid: ops.Grid) -> Tensor:
        centres = [(torch.arange(length) + 0.5) / length for length in grid]
        return torch.stack(torch.meshgrid(*centres, indexing="ij"), dim=-1).flatten(0, 1)

    token, ends = torch.tensor([[7.0, -7.0]]), 0.5 / torch.tensor(source)
    resized = ops.resize_positions(torch.cat([token, plane(source)]), source, target)
    assert torch.equal(resized[:1], token)
    assert_close(resized[1:], plane(target).clamp(ends, 1 - ends), atol=1e-5, rtol=0)
