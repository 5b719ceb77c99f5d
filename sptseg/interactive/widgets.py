"""Frequencies and learned parts, explored by hand: what becomes of the masks? Core ipywidgets only.

>>> explorer = FrequencyExplorer(model, image, classes, label)
>>> explorer  # as a cell's last expression: sliders and pictures
>>> explorer.figure()  # the same state as a still picture, for where no kernel runs

A control first renews the pictures (`update`), and the masks follow after a pause (`predict`); both can be called
without a browser. Pictures are the bytes of image widgets and are renewed in place, so nothing flickers."""

import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np
import torch
from ipywidgets import Layout
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from sptseg.analysis import filter_response, prompt_states, spectral_prompt_of
from sptseg.datasets import luminance, plots, test_transform
from sptseg.inference import augmentation, pad_to_patches, segment
from sptseg.interactive import parts
from sptseg.interactive.masks import MaskExplorer
from sptseg.model import Grid, PromptedEncoder, SpectralPrompt, ops

Array = np.ndarray
HIGHEST = 0.71  # cycles per sample: just above sqrt(0.5), the corner of the spectrum
PICTURE = -1  # what is filtered: the picture, or the tokens before one of the blocks 0, 1, ...
PRESETS = tomllib.loads(Path(__file__).with_name("widgets.toml").read_text("utf-8"))  # what buttons set
BAND_PRESETS, FILTER_PRESETS = ({name: tuple(each) for name, each in kind.items()} for kind in PRESETS.values())


@dataclass(frozen=True)
class Gain:
    """What each wave is multiplied by: `inside` a band of frequencies and directions, or `outside` of it.

    The band: low <= radius < high in cycles per sample, over `edge` cycles a raised cosine instead of a step; waves
    whose direction is within `width` / 2 degrees of `direction` (0: they change across, 90: down), 180 for all. The
    mean (frequency 0) stays."""

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


@contextmanager
def visited(encoder: PromptedEncoder, visit: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Until the block ends, the encoder's block k gets `visit(k, X)` for its patch tokens X (B, H, W, D)."""
    encoder.visit = visit
    try:
        yield
    finally:
        encoder.visit = None


@contextmanager
def edited(prompt: SpectralPrompt, gain: Gain) -> Iterator[None]:
    """Until the block ends, the learned filter F is multiplied by a gain, at frequency 0 too."""
    whole = prompt.filter
    try:
        prompt.filter = lambda grid: whole(grid) * gain.half(grid, prompt.weight.device, mean=None)
        yield
    finally:
        del prompt.filter  # the method of the class comes back


class FrequencyExplorer(MaskExplorer):
    """Filter a picture, or its tokens before a block, by frequency and direction, and watch the model's masks change.

    Waves in the band are multiplied by one factor, all others by another. As a control, noise of the same energy takes
    the filter's place; and a picture can be given the amplitudes of another one, and keep its phases. Tokens are
    filtered as the block gets them: after a spectral prompt."""

    titles = ("before", "spectrum", "after")

    def controls(self) -> list[list[Any]]:
        self.tokens: dict[int, dict[int, Tensor]] = {}  # of a picture's first window before each block, (1, H, W, D)
        encoder = self.model.encoder
        blocks = range(0 if encoder.readout == "gem" else len(encoder.tower.blocks))
        places = {"the picture": PICTURE} | {f"tokens before block {i}": i for i in blocks}
        self.place = parts.dropdown(places, "Filter", "What is filtered")
        self.band = ipywidgets.FloatRangeSlider(
            value=(0.0, HIGHEST), min=0, max=HIGHEST, step=0.005, readout_format=".3f", description="Band",
            tooltip="Low and high cut-off in cycles per pixel or token; arrow keys move the handle in focus",
            layout=Layout(width="450px"), **parts.WIDE,
        )  # fmt: skip
        self.inside = parts.slider(1, 3, 0.05, "Band times", "0 removes its waves, 1 leaves them, 2 doubles them")
        self.outside = parts.slider(0, 3, 0.05, "All else times", "The factor of the waves outside of the band")
        self.edge = parts.slider(0, 0.3, 0.01, "Soft edge", "Cycles over which the band begins and ends; 0 is a step")
        self.direction = parts.slider(0, 180, 5, "Direction", "Degrees; 0: waves that change across, 90: down")
        self.width = parts.slider(180, 180, 5, "Directions", "How many degrees around that direction; 180 is all")
        self.noise = ipywidgets.Checkbox(description="noise of equal energy instead", indent=False)
        given = {"its own": PICTURE} | {f"those of picture {i + 1}": i for i in range(len(self.pictures))}
        self.amplitudes = parts.dropdown(given, "Amplitudes", "The phases stay the picture's own")
        return [
            [self.place, self.band, self.inside, self.outside],
            [self.edge, self.direction, self.width, self.noise, self.amplitudes],
            parts.presets(BAND_PRESETS, self.choose),
        ]

    def choose(self, low: float, high: float, inside: float = 1, outside: float = 0) -> None:
        """Sets both cut-offs, in cycles per pixel or token, and the factors in the band and outside of it."""
        self.move({self.band: (low, min(high, HIGHEST)), self.inside: inside, self.outside: outside})

    @property
    def gain(self) -> Gain:
        factors = (self.edge, self.direction, self.width, self.inside, self.outside)
        return Gain(*self.band.value, *(each.value for each in factors))

    def tokens_before(self, block: int) -> Tensor:
        """The tokens of the picture's first window as a block gets them: (1, H, W, D)."""
        kept = self.tokens.setdefault(self.choice.value, {})

        def keep(block: int, x: Tensor) -> Tensor:
            kept.setdefault(block, x[:1])
            return x

        if not kept:
            with visited(self.model.encoder, keep):
                segment(self.model, self.picture, self.classes)
        return kept[block]

    def act(self, maps: Tensor) -> Tensor:
        """The filter, or noise in its place, on maps (B, H, W, C)."""
        after = self.gain(maps)
        return noise_instead(maps, after) if self.noise.value else after

    def update(self) -> None:
        """Filters the picture or the tokens; shows them before and after, and the spectrum with the band."""
        block, picture = self.place.value, self.picture
        self.amplitudes.disabled = block != PICTURE
        maps = torch.tensor(picture)[None].float() if block == PICTURE else self.tokens_before(block)
        before = maps
        if block == PICTURE and self.amplitudes.value != PICTURE:
            other = Image.fromarray(self.pictures[self.amplitudes.value]).resize(picture.shape[1::-1])
            before = with_amplitudes_of(torch.tensor(np.asarray(other))[None].float(), maps)
        after = self.act(before)
        spread = [(each - each.mean((1, 2), keepdim=True)).square().sum().item() for each in (maps, after)]
        self.energy = spread[1] / max(spread[0], 1e-9)
        self.filtered = after[0].round().clamp(0, 255).byte().numpy() if block == PICTURE else picture
        if block == PICTURE:
            pictures, amplitudes = (picture, self.filtered), luminance(before[0].numpy())
        else:
            first, second = before[0].cpu().numpy(), after[0].cpu().numpy()
            pictures, amplitudes = map(parts.crisp, parts.token_pictures(first, second)), first.transpose(2, 0, 1)
        self.spectrum = parts.spectrum_picture(amplitudes)
        self.shown = dict(zip(("before", "after"), pictures, strict=True)) | {"spectrum": self.marked_spectrum()}
        remark = "" if block == PICTURE else "(tokens: three main axes as colours)"
        for title, shown in self.shown.items():
            self.panels[title].show(shown, remark if title != "spectrum" else "")
        super().update()

    @contextmanager
    def changed(self) -> Iterator[Array]:
        block = self.place.value
        if block == PICTURE:
            yield self.filtered
            return
        with visited(self.model.encoder, lambda i, x: self.act(x) if i == block else x):
            yield self.picture

    def marked_spectrum(self) -> Array:
        """The spectrum, darker where waves are weakened, whiter where they are boosted, the band in white lines."""
        grid = self.spectrum.shape[:2]
        member, factor = (np.fft.fftshift(each) for each in (self.gain.member(grid), self.gain.factors(grid, None)))
        shown = self.spectrum * (1 + 2 * factor.clip(0, 1))[..., None] / 3
        shown = parts.crisp(shown + (255 - shown) * (0.6 - 0.6 / factor.clip(1))[..., None])
        shown[plots.borders(parts.crisp(member >= 0.5))] = 255
        return np.rint(shown).astype(np.uint8)

    def sentence(self) -> str:
        """What the filter does, in words and figures."""
        gain, unit = self.gain, "pixel" if self.place.value == PICTURE else "token"
        longest = f"to {1 / gain.low:.3g} {unit}s" if gain.low else f"{unit}s and longer"
        waves = f"waves of {1 / min(gain.high, 0.5**0.5):.3g} {longest}" if gain.low < gain.high else "nothing"
        turned = f", within {gain.width / 2:g}° of {gain.direction:g}°" if gain.width < 180 else ""
        told = (
            f"{gain.low:.3f} to {gain.high:.3f} cycles per {unit} ({waves}{turned}) times {gain.inside:g}, all else "
            f"times {gain.outside:g}; the mean stays. "
        )
        told += "In its place: noise with the energy of that change. " if self.noise.value else ""
        if unit == "pixel" and self.amplitudes.value != PICTURE:
            told = f"The amplitudes of picture {self.amplitudes.value + 1}, the phases of this one. {told}"
        told += f"What varies has {self.energy:.1%} of the energy that it had."
        if unit == "token":
            several = len(self.whole.logits.boxes) > 1
            return told + (" The tokens shown are those of the picture's first window." if several else "")
        sees = min(self.model.config.image_size) / min(self.picture.shape[:2]) / 2
        limit = f" The model looks at fewer pixels: nothing above {sees:.3g} reaches it." if sees < 0.5 else ""
        return told + limit


class FilterExplorer(MaskExplorer):
    """The learned spectral filter F: one channel's amplitude and phase, what it adds to a picture's tokens; F weakened,
    boosted or zeroed below and above a radius, and the masks."""

    titles = ("filter: amplitude", "filter: phase, degrees", "tokens before", "added by prompt", "tokens after")

    def controls(self) -> list[list[Any]]:
        self.prompt = spectral_prompt_of(self.model.encoder)
        gain = np.abs(filter_response(self.prompt)).mean(axis=(0, 1))  # (D,)
        self.strongest = np.argsort(-gain)[:5].tolist()
        blocks = {f"before block {i}": i for i in sorted(self.model.encoder.spectral_layers)}
        self.block = parts.dropdown(blocks, "Prompt", "One filter serves all blocks; the tokens differ")
        self.channel = ipywidgets.IntSlider(
            self.strongest[0], 0, len(gain) - 1, description="Channel", tooltip="One of the encoder's channels",
            layout=Layout(width="420px"), **parts.WIDE,
        )  # fmt: skip
        self.radius = parts.slider(0.25, HIGHEST, 0.005, "Radius", "Cycles per token")
        self.below = parts.slider(1, 20, 0.1, "F below it times", "0 takes these waves out of F")
        self.above = parts.slider(1, 20, 0.1, "F above it times", "0 takes these waves out of F")
        edit = [self.radius, self.below, self.above]
        return [[self.block, self.channel], edit, parts.presets(FILTER_PRESETS, self.choose)]

    def choose(self, below: float, above: float) -> None:
        """Sets the factors of F below and above the radius."""
        self.move({self.below: below, self.above: above})

    @contextmanager
    def changed(self) -> Iterator[Array]:
        with edited(self.prompt, Gain(0, self.radius.value, inside=self.below.value, outside=self.above.value)):
            yield self.picture

    @torch.inference_mode()
    def update(self) -> None:
        """Shows the chosen block, channel and picture, with F as it is edited."""
        image = tv_tensors.Image(torch.tensor(self.picture).permute(2, 0, 1))
        prepared = test_transform(augmentation(self.model.config))(image)[None]
        prepared = pad_to_patches(prepared, self.model.encoder.patch_size).to(self.model.device)
        with self.changed():
            self.response = np.fft.fftshift(filter_response(self.prompt), axes=(0, 1))  # (H, W, D), 0 in the middle
            states = next(islice(prompt_states(self.model.encoder, prepared), self.block.value, None))
        self.tokens = tuple(each[0].float().cpu() for each in states)  # X and S (H, W, D), the class token's gate (D,)
        for name, values, low, high, colour_map in self.maps():
            self.panels[name].show_map(values, low, high, colour_map)
        super().update()

    def maps(self) -> list[parts.Map]:
        """The filter, and the tokens before and after."""
        response = self.response[..., self.channel.value]  # (H, W)
        before, added, _ = (each[..., self.channel.value].numpy() for each in self.tokens)
        after = before + added
        highest, most = float(max(abs(before).max(), abs(after).max())), float(abs(added).max())
        return [
            ("filter: amplitude", abs(response), 0, float(abs(response).max()), "cividis"),
            ("filter: phase, degrees", np.rad2deg(np.angle(response)), -180, 180, "twilight_shifted"),
            ("tokens before", before, -highest, highest, "RdBu_r"),
            ("added by prompt", added, -most, most, "RdBu_r"),
            ("tokens after", after, -highest, highest, "RdBu_r"),
        ]

    def sentence(self) -> str:
        """What F, as edited, does to all tokens and to this channel's, in figures."""
        channel, (x, s, gate) = self.channel.value, self.tokens
        share, of_all = (
            100 * float(added.square().sum() / before.square().sum())
            for before, added in ((x[..., channel], s[..., channel]), (x, s))
        )
        edit = (self.below.value, self.above.value)
        radius = f"{self.radius.value:.3g} cycles per token"
        edited = f"F is multiplied by {edit[0]:g} below {radius} and by {edit[1]:g} above. " if edit != (1, 1) else ""
        return (
            f"{edited}Channel {channel}: before filtering, the tokens are multiplied by the class token's value, "
            f"{float(gate[channel]):.3g}. What is added has {share:.2g} % of the tokens' energy, over all channels "
            f"{of_all:.2g} %. Blue is below 0, red above. Channels with the strongest filters: "
            f"{', '.join(map(str, self.strongest))}."
        )

    def figure(self) -> Figure:
        """The same as a still picture."""
        self.update()
        return parts.still(self.sentence(), {"picture": self.picture}, self.maps())[0]
