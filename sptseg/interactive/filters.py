"""Filters by frequency and direction, what to compare them with, and a place for them before an encoder's blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sptseg.model import Grid, PromptedEncoder, SpectralPrompt, ops

Array = np.ndarray
HIGHEST = 0.71  # cycles per sample: just above sqrt(0.5), the corner of the spectrum


@dataclass(frozen=True)
class Gain:
    """What each wave is multiplied by: `inside` a band of frequencies and directions, or `outside` of it.

    The band: low <= radius < high in cycles per sample, over `edge` cycles a raised cosine instead of a step; waves
    whose direction is within `width` / 2 degrees of `direction` (0: they change across, 90: down), 180 for all. The
    mean (frequency 0) stays.
    """

    low: float = 0.0
    high: float = HIGHEST
    edge: float = 0.0
    direction: float = 0.0
    width: float = 180.0
    inside: float = 1.0
    outside: float = 0.0

    def member(self, grid: Grid) -> Array:
        """How far each fft2 frequency of a grid lies in the band, 0..1: (H, W), equal at opposite frequencies."""
        down, across = np.fft.fftfreq(grid[0])[:, None], np.fft.fftfreq(grid[1])
        radius = np.hypot(down, across)
        turn = np.abs((np.degrees(np.arctan2(down, across)) - self.direction + 90) % 180 - 90)
        member = self._above(radius, self.low) * (1 - self._above(radius, self.high)) * (turn <= self.width / 2 + 1e-9)
        return (member + np.roll(member[::-1, ::-1], (1, 1), (0, 1))) / 2  # the finest waves have two directions

    def _above(self, radius: Array, cut: float) -> Array:
        if cut <= 0 or cut >= HIGHEST:  # nothing is beyond these ends
            return np.full(radius.shape, float(cut <= 0))
        if self.edge == 0:
            return (radius >= cut).astype(float)
        return 0.5 - 0.5 * np.cos(np.pi * np.clip((radius - cut) / self.edge + 0.5, 0, 1))

    def factors(self, grid: Grid, mean: float | None = 1.0) -> Array:
        """The factor of every fft2 frequency, that of the mean given (None: as its neighbours'): (H, W)."""
        factors = self.outside + (self.inside - self.outside) * self.member(grid)
        if mean is not None:
            factors[0, 0] = mean
        return factors

    def half(self, grid: Grid, device: torch.device, mean: float | None = 1.0) -> Tensor:
        """The same for rfft2 and all channels: (H, W//2+1, 1)."""
        factors = self.factors(grid, mean)[:, : grid[1] // 2 + 1, None]
        return torch.tensor(factors, dtype=torch.float32, device=device)

    def __call__(self, maps: Tensor) -> Tensor:
        """Filters maps (B, H, W, C), each channel by itself."""
        return ops.fourier_filter(maps, self.half((maps.shape[1], maps.shape[2]), maps.device))


def noise_instead(before: Tensor, after: Tensor) -> Tensor:
    """Noise added to `before`, with as much energy in every map as the change to `after` (B, H, W, C); means stay."""
    noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(0)).to(before)
    noise -= noise.mean((1, 2), keepdim=True)
    energy = ((each.square().sum((1, 2), keepdim=True)) for each in (after - before, noise))
    return before + noise * (next(energy) / next(energy)).sqrt()


def with_amplitudes_of(other: Tensor, maps: Tensor) -> Tensor:
    """The amplitudes of one, the phases of another, both (B, H, W, C)."""
    amplitudes, phases = (torch.fft.rfft2(each, dim=(1, 2)) for each in (other, maps))
    return torch.fft.irfft2(torch.polar(amplitudes.abs(), phases.angle()), s=maps.shape[1:3], dim=(1, 2))


class _Visitor(nn.Module):
    """Stands in for an encoder's spectral prompt: acts as it does where it does, and lets `visit` see every block."""

    def __init__(self, encoder: PromptedEncoder, visit: Callable[[int, Tensor], Tensor]) -> None:
        super().__init__()
        self.prompt, self.layers, self.visit = encoder.spectral_prompt, encoder.spectral_layers, visit
        self.block = 0

    def filter(self, grid: Grid) -> Tensor | None:  # asked for once, before the first block
        self.block = 0
        return None if self.prompt is None else self.prompt.filter(grid)

    def forward(self, patches: Tensor, class_token: Tensor, weight: Tensor) -> Tensor:
        block, self.block = self.block, self.block + 1
        if self.prompt is not None and block in self.layers:
            patches = self.prompt(patches, class_token, weight)
        return self.visit(block, patches)


@contextmanager
def visited(encoder: PromptedEncoder, visit: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Until the block ends, the encoder's block k gets `visit(k, X)` for its patch tokens X (B, H, W, D), if its tower
    has a class token and is not read by GEM."""
    kept = encoder.spectral_prompt, encoder.spectral_layers
    stand_in: nn.Module = _Visitor(encoder, visit)
    encoder.spectral_layers = frozenset(range(len(encoder.tower.blocks)))
    try:
        encoder.spectral_prompt = stand_in  # pyright: ignore[reportAttributeAccessIssue]
        yield
    finally:
        encoder.spectral_prompt, encoder.spectral_layers = kept


@contextmanager
def edited(prompt: SpectralPrompt, gain: Gain) -> Iterator[None]:
    """Until the block ends, the learned filter F is multiplied by a gain, at frequency 0 too."""
    whole = prompt.filter
    try:
        prompt.filter = lambda grid: whole(grid) * gain.half(grid, prompt.weight.device, mean=None)
        yield
    finally:
        del prompt.filter  # the method of the class comes back
