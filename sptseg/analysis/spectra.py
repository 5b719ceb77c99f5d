"""Spectral analysis, as arrays and tables: pictures, token maps, the learned filter, and models without a band or part.

Frequencies are in cycles per sample (pixel or token): 0.5 is the finest stripe, one sample up and one down. Powers are
scaled so that white noise of variance v has power v at every frequency, whatever the size and the window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.functional import center_crop

from sptseg.datasets import IGNORE, Sample, Split, test_transform
from sptseg.inference import augmentation, first_indices, predictions
from sptseg.model import (
    Grid,
    HighLowAttention,
    PromptedEncoder,
    SpectralPrompt,
    SptSeg,
    band_filter,
    radial_frequency,
    tokens_to_grid,
)

Array = np.ndarray
Band = tuple[float, float]
Part = Literal["high", "low", "spectral_prompts", "deep_prompts"]
FINEST = 0.75  # above every radial frequency: the corners of the plane lie at sqrt(0.5)
EDGES = (0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, FINEST)
OCTAVES: tuple[Band, ...] = tuple(pairwise(EDGES))


@dataclass(frozen=True)
class RadialPower:
    """Power over rings of equal frequency.

    frequency (R,) in cycles per sample, ring k at k / min(H, W), which may reach sqrt(0.5); power (..., R), the mean
    over the ring; count (R,), the frequencies in the ring, over the whole plane. Without a window, the sum of
    count * power divided by the sum of count is the variance.
    """

    frequency: Array
    power: Array
    count: Array

    def mean(self) -> RadialPower:
        """Averaged over all maps: power (R,)."""
        return RadialPower(self.frequency, self.power.reshape(-1, len(self.frequency)).mean(0), self.count)

    def relative(self) -> RadialPower:
        """Averaged over all maps, as a multiple of the power that white noise of the same variance would have."""
        mean = self.mean()
        return RadialPower(self.frequency, mean.power * self.count.sum() / (mean.power @ self.count), self.count)

    def share(self, low: float, high: float) -> float:
        """Share of the variance at low <= frequency < high, 0..1, over all maps."""
        energy = self.mean().power * self.count
        return float(energy[(self.frequency >= low) & (self.frequency < high)].sum() / energy.sum())

    def slope(self, low: float = 0.02, high: float = 0.4) -> float:
        """Exponent s of the law power ~ frequency^s between two frequencies; natural photographs have s near -2.

        A straight line through the logarithms of the mean power, each octave with equal weight.
        """
        kept = (self.frequency >= low) & (self.frequency <= high)
        if low <= 0 or kept.sum() < 3:
            raise ValueError(
                f"{kept.sum()} rings lie between {low} and {high} cycles per sample; a slope needs at least 3, above 0"
            )
        frequency, power = self.frequency[kept], self.mean().power[kept]
        return float(np.polyfit(np.log(frequency), np.log(power), 1, w=frequency**-0.5)[0])


def _ring_means(values: Tensor, grid: Grid) -> tuple[Array, Tensor, Array]:
    """Values (..., H, W//2+1) at rfft2 frequencies -> frequency (R,), mean over each ring (..., R), count (R,)."""
    steps = min(grid)
    ring = (radial_frequency(grid) * steps).round().long().flatten()
    columns = torch.full((grid[1] // 2 + 1,), 2.0, dtype=torch.float64)  # a frequency and its mirror image
    columns[0] = 1  # holds its own mirror images, as does the last column of an even width
    columns[-1] = 1 + grid[1] % 2
    weight = columns.expand(grid[0], -1).flatten()
    count = torch.zeros(int(ring.max()) + 1, dtype=torch.float64).index_add_(0, ring, weight)
    flat = values.detach().cpu().double().flatten(-2) * weight
    total = torch.zeros(*flat.shape[:-1], len(count), dtype=torch.float64).index_add_(-1, ring, flat)
    return np.arange(len(count)) / steps, total / count.clamp(min=1), count.numpy()


def radial_power(maps: Array | Tensor, *, window: bool = True) -> RadialPower:
    """Radial power spectra of maps (..., H, W), real: the mean taken out, then a Hann window against leakage.

    Without a window the borders of a picture, which do not fit together, show up as power at all frequencies.
    """
    maps = torch.as_tensor(maps).detach().cpu().double()
    grid = height, width = maps.shape[-2], maps.shape[-1]
    if min(grid) < 4:
        raise ValueError(f"the maps are {height} x {width}; a radial spectrum needs at least 4 x 4")
    taper = torch.ones(grid, dtype=torch.float64)
    if window:
        taper = torch.outer(*(torch.hann_window(n, dtype=torch.float64) for n in grid))
    mean = (maps * taper).sum((-2, -1), keepdim=True) / taper.sum()
    power = torch.fft.rfft2((maps - mean) * taper).abs().square() / taper.square().sum()
    frequency, rings, count = _ring_means(power, grid)
    return RadialPower(frequency, rings.numpy(), count)


def filter_picture(image: Array, low: float, high: float, reject: bool = False) -> Array:
    """A picture (H, W) or (H, W, 3), uint8, with only a band of frequencies, or (`reject`) without it.

    Each channel by itself; its mean stays; what leaves 0..255 is cut off there.
    """
    channels_first = torch.tensor(image).movedim(-1, 0) if image.ndim == 3 else torch.tensor(image)
    kept = band_filter(channels_first.float(), low, high, reject).round_().clamp_(0, 255).to(torch.uint8)
    return (kept.movedim(0, -1) if image.ndim == 3 else kept).contiguous().numpy()


@dataclass(frozen=True)
class WithoutBand(Dataset[Sample]):
    """A data set whose pictures lack a band of frequencies."""

    dataset: Dataset[Sample]
    band: Band

    def __len__(self) -> int:
        return len(self.dataset)  # pyright: ignore[reportArgumentType]

    def __getitem__(self, index: int) -> Sample:
        sample = self.dataset[index]
        image = filter_picture(sample["image"].permute(1, 2, 0).numpy(), *self.band, reject=True)
        return {**sample, "image": torch.from_numpy(image).permute(2, 0, 1)}


def class_counts(
    model: SptSeg, dataset: Dataset[Sample], split: Split, *, limit: int | None = None, batch_size: int = 16
) -> Array:
    """Pixels per picture and class, (P, 3, C): hits, true, predicted; all that IoU needs, and it adds up."""
    rows = []
    for sample, logits in predictions(
        model, dataset, split, indices=first_indices(dataset, limit), batch_size=batch_size
    ):
        label = torch.as_tensor(sample["label"])
        predicted = logits.labels((label.shape[0], label.shape[1])).cpu()[label != IGNORE]
        label = label[label != IGNORE].long()
        pixels = (label[label == predicted], label, predicted)
        rows.append(torch.stack([torch.bincount(each, minlength=len(split.classes)) for each in pixels]))
    return torch.stack(rows).numpy()


def iou_from_counts(counts: Array) -> Array:
    """Counts (..., 3, C) -> IoU (..., C), nan for classes in neither label nor prediction."""
    hits, true, predicted = np.moveaxis(counts.astype(float), -2, 0)
    union = true + predicted - hits
    return np.divide(hits, union, out=np.full_like(hits, np.nan), where=union > 0)


@dataclass(frozen=True)
class Change:
    """How the mean IoU of a group of classes changes, with the ends of its confidence interval; all -1..1."""

    change: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.change:+.1f} ({100 * self.low:+.1f} to {100 * self.high:+.1f})"


def iou_change(
    before: Array, after: Array, classes: Sequence[int], *, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> Change:
    """Mean IoU over `classes` after less before, with a bootstrap interval; counts (P, 3, C) of the same pictures.

    Pictures are drawn with replacement, the same ones on both sides, and classes count where these pictures really show
    them. The interval tells how much other pictures of the kind would move the figure; it says nothing of other
    training runs. nan if none of the classes occurs.
    """
    if before.shape != after.shape:
        raise ValueError(
            f"counts of shape {before.shape} and {after.shape}; wanted the same pictures and classes twice"
        )
    pictures = len(before)
    often = np.random.default_rng(seed).multinomial(pictures, np.full(pictures, 1 / pictures), draws)
    often = np.concatenate([np.ones((1, pictures)), often])  # the first row is the data set itself

    def means(counts: Array) -> Tensor:  # (1 + draws,)
        sums = np.einsum("dp,pkc->dkc", often, counts[:, :, list(classes)], optimize=True)
        return torch.from_numpy(np.where(sums[:, 1] > 0, iou_from_counts(sums), np.nan)).nanmean(dim=-1)

    change = means(after) - means(before)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    return Change(change[0].item(), *change[1:].nanquantile(ends).tolist())


def parts_of(model: SptSeg) -> tuple[Part, ...]:
    """What of a model can be switched off."""
    encoder = model.encoder
    branches = any(isinstance(module, HighLowAttention) for module in model.modules())
    there = (branches, branches, encoder.spectral_prompt is not None, hasattr(encoder, "prompt_projection"))
    return tuple(part for part, is_there in zip(get_args(Part), there, strict=True) if is_there)


@contextmanager
def switched_off(model: SptSeg, *parts: Part) -> Iterator[None]:
    """The model without some of its parts, until the block ends, also by an exception; nothing is trained anew.

    "high", "low": that branch of every spectral guided layer gives zeros; "spectral_prompts": nothing is added to the
    patch tokens; "deep_prompts": no prompt tokens. A part that the model lacks is refused.
    """
    encoder = model.encoder
    for part in parts:
        if part not in parts_of(model):
            has = ", ".join(parts_of(model)) or "none of them"
            raise ValueError(f"{part!r} cannot be switched off; of {', '.join(get_args(Part))}, this model has {has}")
    attentions = [module for module in model.modules() if isinstance(module, HighLowAttention)]
    branches = [(attention, part) for attention in attentions for part in parts if part in ("high", "low")]
    branches = [(attention, part) for attention, part in branches if part not in vars(attention)]  # not off already
    layers, prompts = encoder.spectral_layers, encoder.prompts
    try:
        for attention, part in branches:
            setattr(attention, part, _zeros_like(getattr(attention, part)))
        if "spectral_prompts" in parts:
            encoder.spectral_layers = frozenset()
        if "deep_prompts" in parts:
            encoder.prompts = None
        yield
    finally:
        for attention, part in branches:
            delattr(attention, part)  # the method of the class comes back
        encoder.spectral_layers, encoder.prompts = layers, prompts


def _zeros_like(branch: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.zeros_like(branch(x))


def model_inputs(model: SptSeg, dataset: Dataset[Sample], count: int) -> Tensor:
    """The first pictures as the model gets them, of larger ones the middle: (B, 3, *image_size), on its device."""
    prepare = test_transform(augmentation(model.config))
    prepared = [prepare(tv_tensors.Image(dataset[i]["image"])) for i in range(count)]
    return torch.stack([center_crop(image, list(model.config.image_size)) for image in prepared]).to(model.device)


@torch.inference_mode()
def depth_spectra(encoder: PromptedEncoder, images: Tensor) -> list[RadialPower]:
    """Radial power of the patch tokens before the first block and after every block: L + 1 spectra, power (B, D, R).

    images (B, 3, S, S') normalised. In cycles per token.
    """
    return [radial_power(tokens_to_grid(x, encoder.grid_of(images))) for _, x in _depths(encoder, images)]


def _depths(encoder: PromptedEncoder, images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(class token (B, D), patch tokens (B, N, D)) before the first block and after every block."""
    height, width = encoder.grid_of(images)
    for x in (encoder.embed(images), *encoder.states(images)):
        yield x[:, 0], x[:, -height * width :]


@dataclass(frozen=True)
class PromptEffect:
    """What the spectral prompt adds before a block, or would add (`used` false): it is one filter for all blocks.

    energy is |S|² / |X|², its energy as a share of the patch tokens'; alignment is the cosine of S and X, -1..1: near 1
    it mostly makes X louder. tokens and added are the radial powers of X and S, each averaged (R,).
    """

    block: int
    used: bool
    energy: float
    alignment: float
    tokens: RadialPower
    added: RadialPower


@torch.inference_mode()
def prompt_effects(encoder: PromptedEncoder, images: Tensor) -> list[PromptEffect]:
    """The spectral prompt's effect on the tokens before every block; images (B, 3, S, S') normalised."""
    prompt = spectral_prompt_of(encoder)
    grid = encoder.grid_of(images)
    weight = prompt.filter(grid)
    effects = []
    blocks = range(len(encoder.visual.transformer.resblocks))
    for block, (class_token, tokens) in zip(blocks, _depths(encoder, images), strict=False):  # not after the last
        x = tokens.unflatten(1, grid)  # (B, H, W, D)
        s = prompt(x, class_token, weight) - x
        energy_x, energy_s = x.square().sum().item(), s.square().sum().item()
        alignment = (x * s).sum().item() / max(energy_x * energy_s, 1e-30) ** 0.5
        powers = [radial_power(tokens_to_grid(each.flatten(1, 2), grid)).mean() for each in (x, s)]
        used = block in encoder.spectral_layers
        effects.append(PromptEffect(block, used, energy_s / energy_x, alignment, *powers))
    return effects


def spectral_prompt_of(encoder: PromptedEncoder) -> SpectralPrompt:
    """The encoder's spectral prompt; refuses an encoder that has none."""
    if encoder.spectral_prompt is None:
        raise ValueError("this model has no spectral prompt; wanted one with spectral_layers, such as the embedded one")
    return encoder.spectral_prompt


@torch.no_grad()
def filter_response(prompt: SpectralPrompt, class_token: Tensor | None = None) -> Array:
    """The learned filter F at every frequency and channel, (H, W, D) complex, on the grid that it was made for.

    As it acts: of a filter for real maps, only the part that is symmetric about frequency 0 counts. The order is fft's,
    frequency 0 first. With a class token c (D,), the response of the whole layer, 1 + c F: what a wave in the patch
    tokens is multiplied by before the block sees it.
    """
    kernel = torch.fft.irfft2(prompt.filter(prompt.grid), s=prompt.grid, dim=(0, 1))  # (H, W, D) real
    response = torch.fft.fft2(kernel, dim=(0, 1))
    if class_token is not None:
        response = 1 + class_token * response
    return response.cpu().numpy()


@dataclass(frozen=True)
class FilterRadial:
    """Gain (a factor) and phase (degrees, 0..180) of a filter by radius: frequency (R,) in cycles per token; means (R,)
    and quantiles 0.1, 0.5, 0.9 (3, R), over all channels and all frequencies of a ring.

    The phase is without its sign, which is the opposite at the opposite frequency: 0 adds to a wave, 90 shifts it by a
    quarter of its length, 180 subtracts.
    """

    frequency: Array
    gain: Array
    gain_quantiles: Array
    phase: Array
    phase_quantiles: Array


def filter_radial(response: Array) -> FilterRadial:
    """Gain and phase by radius of a response (H, W, D) complex, as `filter_response` gives it."""
    height, width = response.shape[:2]
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    ring = np.rint(radius * min(height, width)).astype(int)
    rings = [response[ring == k] for k in range(ring.max() + 1)]  # each (frequencies, D)
    gains = [np.abs(each) for each in rings]
    phases = [np.abs(np.angle(each, deg=True)) for each in rings]
    columns = []
    for each in (gains, phases):
        columns += [np.array([values.mean() for values in each])]
        columns += [np.stack([np.quantile(values, (0.1, 0.5, 0.9)) for values in each], axis=1)]
    return FilterRadial(np.arange(len(rings)) / min(height, width), *columns)
