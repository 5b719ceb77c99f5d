"""Spectral analysis, as arrays and tables: pictures, token maps, the learned filter, and models without a band or part.

Frequencies are in cycles per sample (pixel or token): 0.5 is the finest stripe, one sample up and one down. Powers are
scaled so that white noise of variance v has power v at every frequency, whatever the size and the window."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Any, Literal, Self, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.functional import center_crop

from sptseg.datasets import Sample, test_transform
from sptseg.inference import augmentation
from sptseg.model import Grid, HighLowAttention, PromptedEncoder, SpectralPrompt, SptSeg, band_filter, tokens_to_grid

Array = np.ndarray
Band = tuple[float, float]
Part = Literal["high", "low", "spectral_prompts", "deep_prompts"]
FINEST = 0.75  # above every radial frequency: the corners of the plane lie at sqrt(0.5)
EDGES = (0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, FINEST)
OCTAVES: tuple[Band, ...] = tuple(pairwise(EDGES))


@dataclass(frozen=True)
class RadialPower:
    """Power over rings of equal frequency: `frequency` (R,) in cycles per sample, ring k at k / min(H, W), `power`
    (..., R), the mean over the ring, and `count` (R,), the frequencies in it.

    Without a window, the sum of count * power divided by the sum of count is the variance."""

    frequency: Array
    power: Array
    count: Array

    def mean(self) -> Self:
        """Averaged over all maps: power (R,)."""
        return replace(self, power=self.power.reshape(-1, len(self.frequency)).mean(0))

    def relative(self) -> Self:
        """Averaged over all maps, as a multiple of the power that white noise of the same variance would have."""
        mean = self.mean()
        return replace(self, power=mean.power * self.count.sum() / (mean.power @ self.count))

    def share(self, low: float, high: float) -> float:
        """Share of the variance at low <= frequency < high, 0..1, over all maps."""
        energy = self.mean().power * self.count
        return float(energy[(self.frequency >= low) & (self.frequency < high)].sum() / energy.sum())

    def slope(self, low: float = 0.02, high: float = 0.4) -> float:
        """Exponent s of the law power ~ frequency^s between two frequencies, by a straight line through the logarithms,
        each octave with equal weight; natural photographs have s near -2."""
        kept = (self.frequency >= low) & (self.frequency <= high)
        frequency, power = self.frequency[kept], self.mean().power[kept]
        return float(np.polyfit(np.log(frequency), np.log(power), 1, w=frequency**-0.5)[0])


def _rings(grid: Grid) -> Array:
    """The ring of every fft2 frequency of a grid (H, W): its radius in steps of 1 / min(H, W) cycles per sample."""
    radius = np.hypot(np.fft.fftfreq(grid[0])[:, None], np.fft.fftfreq(grid[1]))
    return np.rint(radius * min(grid)).astype(int)


def radial_power(maps: Array | Tensor, *, window: bool = True) -> RadialPower:
    """Radial power spectra of maps (..., H, W), real: the mean taken out, then a Hann window against leakage. Without a
    window the borders of a picture, which do not fit together, show up as power at all frequencies."""
    maps = torch.as_tensor(maps).detach().cpu().double()
    grid = maps.shape[-2], maps.shape[-1]
    taper = torch.ones(grid, dtype=torch.float64)
    if window:
        taper = torch.outer(*(torch.hann_window(n, dtype=torch.float64) for n in grid))
    mean = (maps * taper).sum((-2, -1), keepdim=True) / taper.sum()
    power = torch.fft.fft2((maps - mean) * taper).abs().square() / taper.square().sum()
    ring = torch.from_numpy(_rings(grid)).flatten()
    count = torch.bincount(ring)
    total = power.new_zeros(*power.shape[:-2], len(count)).index_add_(-1, ring, power.flatten(-2))
    return RadialPower(np.arange(len(count)) / min(grid), (total / count.clamp(min=1)).numpy(), count.numpy())


def filter_picture(image: Array, low: float, high: float, reject: bool = False) -> Array:
    """A picture (H, W) or (H, W, 3), uint8, with only a band of frequencies, or (`reject`) without it. Each channel by
    itself; its mean stays; what leaves 0..255 is cut off there."""
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
    patch tokens; "deep_prompts": no prompt tokens. A part that the model lacks is refused."""
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
            whole = getattr(attention, part)
            setattr(attention, part, lambda x, whole=whole: torch.zeros_like(whole(x)))
        if "spectral_prompts" in parts:
            encoder.spectral_layers = frozenset()
        if "deep_prompts" in parts:
            encoder.prompts = None
        yield
    finally:
        for attention, part in branches:
            delattr(attention, part)  # the method of the class comes back
        encoder.spectral_layers, encoder.prompts = layers, prompts


def model_inputs(model: SptSeg, dataset: Dataset[Sample], count: int) -> Tensor:
    """The first pictures as the model gets them, of larger ones the middle: (B, 3, *image_size), on its device."""
    prepare = test_transform(augmentation(model.config))
    prepared = [prepare(tv_tensors.Image(dataset[i]["image"])) for i in range(count)]
    return torch.stack([center_crop(image, list(model.config.image_size)) for image in prepared]).to(model.device)


@torch.inference_mode()
def depth_spectra(encoder: PromptedEncoder, images: Tensor) -> list[RadialPower]:
    """Radial power (B, D, R) of the patch tokens before the first block and after every one, in cycles per token.
    images (B, 3, S, S') normalised."""
    return [radial_power(tokens_to_grid(x, encoder.grid_of(images))) for _, x in _depths(encoder, images)]


def _depths(encoder: PromptedEncoder, images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(class token (B, D), patch tokens (B, N, D)) before the first block and after every block."""
    height, width = encoder.grid_of(images)
    for x in (encoder.embed(images), *encoder.states(images)):
        yield x[:, 0], x[:, -height * width :]


def prompt_states(encoder: PromptedEncoder, images: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Before every block: patch tokens X, what the spectral prompt adds or would add to them, S, and its gate c. images
    (B, 3, S, S') normalised; X and S (B, H, W, D), c (B, D)."""
    prompt, grid = spectral_prompt_of(encoder), encoder.grid_of(images)
    weight = prompt.filter(grid)
    for class_token, tokens in islice(_depths(encoder, images), len(encoder.tower.blocks)):
        x = tokens.unflatten(1, grid)
        yield x, prompt(x, class_token, weight) - x, class_token


@torch.inference_mode()
def prompt_effects(encoder: PromptedEncoder, images: Tensor) -> pd.DataFrame:
    """What the spectral prompt adds before each block, or would add; images (B, 3, S, S') normalised. A row per block.

    Columns: `used`, whether the block uses it; `energy` |S|² / |X|², added as a share of the patch tokens';
    `alignment`, the cosine of S and X, -1..1: near 1 it mostly makes X louder."""
    rows = []
    for block, (x, s, _) in enumerate(prompt_states(encoder, images)):
        energy_x, energy_s = x.square().sum().item(), s.square().sum().item()
        alignment = (x * s).sum().item() / max(energy_x * energy_s, 1e-30) ** 0.5
        rows.append((block in encoder.spectral_layers, energy_s / energy_x, alignment))
    return pd.DataFrame(rows, columns=["used", "energy", "alignment"])


def spectral_prompt_of(encoder: PromptedEncoder) -> SpectralPrompt:
    """The encoder's spectral prompt; refuses an encoder that has none."""
    if encoder.spectral_prompt is None:
        raise ValueError("this model has no spectral prompt; wanted one with spectral_layers, such as the embedded one")
    return encoder.spectral_prompt


@torch.no_grad()
def filter_response(prompt: SpectralPrompt, class_token: Tensor | None = None) -> Array:
    """The learned filter F at every frequency and channel, (H, W, D) complex, in fft's order: of a filter for real maps
    only the part that is symmetric about frequency 0 acts.

    With a class token c (D,), 1 + c F: what a wave in the patch tokens is multiplied by before the block sees it."""
    weight = prompt.filter(prompt.grid).cpu()  # where irfft2 takes the symmetric part
    response = torch.fft.fft2(torch.fft.irfft2(weight, s=prompt.grid, dim=(0, 1)), dim=(0, 1))  # (H, W, D)
    if class_token is not None:
        response = 1 + class_token.cpu() * response
    return response.numpy()


def filter_radial(response: Array) -> pd.DataFrame:
    """Gain and phase by radius (in cycles per token), of a response (H, W, D) complex as `filter_response` gives it.

    Columns: means `gain` (a factor) and `phase` (degrees, 0..180) over the channels and frequencies of a ring, and
    their quantiles 0.1 and 0.9, `gain_low`, `gain_high` and so on. The phase is without its sign, which is the opposite
    at the opposite frequency: 0 adds to a wave, 90 shifts it by a quarter of its length, 180 subtracts."""
    grid = response.shape[:2]
    ring = _rings(grid).repeat(response.shape[2])
    columns = {}
    for name, values in (("gain", np.abs(response)), ("phase", np.abs(np.angle(response, deg=True)))):
        rings = pd.Series(values.ravel()).groupby(ring)
        columns |= {name: rings.mean(), f"{name}_low": rings.quantile(0.1), f"{name}_high": rings.quantile(0.9)}
    return pd.DataFrame(columns).rename_axis("frequency").rename(index=lambda k: k / min(grid))


def spectral_summary(model: SptSeg, dataset: Dataset[Sample], count: int = 16) -> dict[str, float]:
    """What a trained spectral prompt does, in few numbers; none for a model without one: mean `gain` and `phase` of F
    (`filter_radial`) below 0.25 cycles per token and above, and on the first `count` pictures the `energy` and
    `alignment` of what is added before the blocks that use it (`prompt_effects`)."""
    if model.encoder.spectral_prompt is None:
        return {}
    response = filter_response(model.encoder.spectral_prompt)
    radius = np.hypot(np.fft.fftfreq(response.shape[0])[:, None], np.fft.fftfreq(response.shape[1]))
    found: dict[str, Any] = {}
    for band, inside in (("low", radius < 0.25), ("high", radius >= 0.25)):
        values = response[inside]
        found |= {f"gain_{band}": np.abs(values).mean(), f"phase_{band}": np.abs(np.angle(values, deg=True)).mean()}
    pictures = model_inputs(model, dataset, min(count, len(dataset)))  # pyright: ignore[reportArgumentType]
    effects = prompt_effects(model.encoder, pictures).query("used")
    found |= {
        f"{name}_block_{block}": row[name] for block, row in effects.iterrows() for name in ("energy", "alignment")
    }
    return {name: float(value) for name, value in found.items()}
