"""Spectra of waves, noise and filters known beforehand; models without a band or a part."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from toys import SPLIT, Toys, toy_model

from sptseg.analysis import spectra
from sptseg.datasets import Scenes, luminance
from sptseg.model import SpectralPrompt


def wave(rows: float, columns: float, height: int = 64, width: int = 64, phase: float = 0.0) -> np.ndarray:
    """A cosine with so many cycles over the height and over the width: (height, width)."""
    y, x = np.mgrid[:height, :width]
    return np.cos(2 * np.pi * (rows * y / height + columns * x / width) + phase)


@pytest.mark.parametrize(
    ("map", "frequency"),
    [
        (wave(8, 0), 8 / 64), (wave(0, 8), 8 / 64), (wave(6, -8), 10 / 64), (wave(0, 32), 0.5),
        (wave(8, 0, 32, 96), 0.25), (wave(0, 24, 32, 96), 0.25),  # in a wide picture too
    ],
)  # fmt: skip
def test_a_wave_lands_in_the_ring_of_its_frequency(map: np.ndarray, frequency: float) -> None:
    found = spectra.radial_power(3 + map, window=False)
    energy = found.power * found.count
    assert energy[found.frequency == frequency].item() == pytest.approx(energy.sum())


@pytest.mark.parametrize("shape", [(16, 16), (15, 15), (12, 20), (9, 14)])
def test_the_rings_add_up_to_the_variance(shape: tuple[int, int]) -> None:
    """Parseval; even and odd sides count their frequencies differently."""
    maps = np.random.default_rng(0).normal(2, 3, (2, *shape))
    found = spectra.radial_power(maps, window=False)
    assert np.allclose((found.power * found.count).sum(-1) / math.prod(shape), maps.var(axis=(1, 2)))


@pytest.mark.parametrize("window", [False, True])
def test_white_noise_is_flat_at_its_variance(window: bool) -> None:
    noise = np.random.default_rng(1).normal(5, 2, (200, 24, 24))
    found = spectra.radial_power(noise, window=window).mean()
    start = 2 if window else 1  # a window takes some of what is next to the mean with the mean
    assert np.allclose(found.power[start:13], 4, rtol=0.1)  # up to 0.5; in the corners few frequencies make a mean
    assert abs(found.slope(0.1, 0.5)) < 0.05
    far = spectra.radial_power(wave(0, 8.5), window=window).share(0.3, 0.75)  # its jump at the border is at all rings
    assert far < 1e-6 if window else far > 0.01


def test_slope_of_a_power_law() -> None:
    radius = np.hypot(np.fft.fftfreq(128)[:, None], np.fft.fftfreq(128))
    radius[0, 0] = np.inf
    phases = np.exp(2j * np.pi * np.random.default_rng(2).random((40, 128, 128)))
    maps = np.fft.ifft2(phases / radius, axes=(1, 2)).real
    assert spectra.radial_power(maps).slope() == pytest.approx(-2, abs=0.1)


def test_shares_of_two_waves_and_powers_relative_to_white_noise() -> None:
    """Amplitudes 1 and 2: variances 1/2 and 2. A fifth of the variance in 2 of 4096 frequencies."""
    found = spectra.radial_power(wave(4, 0) + 2 * wave(0, 20), window=False)
    assert found.share(0, 0.2) == pytest.approx(0.2) and found.share(0, spectra.FINEST) == pytest.approx(1)
    noise = found.relative()
    assert (noise.power * noise.count)[4] == pytest.approx(0.2 * 4096)
    assert (noise.power @ noise.count) / noise.count.sum() == pytest.approx(1)


def test_a_band_and_the_rest_make_the_picture() -> None:
    image = np.random.default_rng(3).integers(80, 170, (32, 48, 3), np.uint8)  # leaves room above and below
    kept, rest = (spectra.filter_picture(image, 0.1, 0.3, reject).astype(int) for reject in (False, True))
    assert np.abs(kept + rest - image.mean(axis=(0, 1)) - image).max() <= 1.5  # both keep the mean, both are rounded
    assert np.array_equal(spectra.filter_picture(image, 0, spectra.FINEST), image)
    assert np.array_equal(spectra.filter_picture(image[..., 0], 0.1, 0.3), kept[..., 0])
    stripes = np.zeros((32, 32), np.uint8)  # over- and undershoot without their finest waves; bytes would wrap around
    stripes[:, 16:] = 255
    found = spectra.filter_picture(stripes, 0.2, spectra.FINEST, reject=True)
    assert found[:, 2:14].max() < 60 and found[:, 18:30].min() > 195
    colours = np.array([[[255, 0, 0], [0, 255, 0], [255, 255, 255]]], np.uint8)
    assert np.allclose(luminance(colours), [[0.299, 0.587, 1]])


def test_bands_cover_the_plane_once_and_pictures_can_lack_one() -> None:
    edges = [edge for band in spectra.OCTAVES for edge in band]
    assert edges[0] == 0 and edges[-1] > math.sqrt(0.5) and edges[1:-1:2] == edges[2::2]
    plain = Scenes(1, seed=3)
    lacking = spectra.WithoutBand(plain, (0.1, 0.2))  # of 128 pixels: rings 12.8 to 25.6
    assert len(lacking) == 1 and torch.equal(lacking[0]["label"], plain[0]["label"])
    before, after = (spectra.radial_power(each[0]["image"], window=False).mean().power for each in (plain, lacking))
    assert np.all(after[14:25] < 0.1 * before[14:25]) and np.allclose(after[2:12], before[2:12], rtol=0.1)


@pytest.mark.parametrize("part", ["high", "low", "spectral_prompts", "deep_prompts"])
def test_a_part_is_off_and_comes_back(part: spectra.Part) -> None:
    model, pictures = toy_model().eval(), torch.randn(2, 3, 32, 32)
    text = model.class_embeddings(SPLIT.texts())
    with torch.inference_mode():
        whole = model(pictures, text)
        with pytest.raises(RuntimeError, match="stop"), spectra.switched_off(model, part):
            with spectra.switched_off(model, part):  # off already
                pass
            assert not torch.allclose(model(pictures, text), whole, rtol=1e-3), "still off"
            raise RuntimeError("stop")
        assert torch.equal(model(pictures, text), whole)


def test_without_prompts_the_encoder_is_one_built_without_and_a_branch_that_is_off_gives_zeros() -> None:
    """8 heads of width 4: 7 low-frequency heads fill channels 4 to 31 of 32."""
    model, plain = toy_model().eval(), toy_model(prompt_tokens=0, spectral_layers=()).eval()
    pictures = torch.randn(2, 3, 32, 32)
    with torch.inference_mode(), spectra.switched_off(model, "spectral_prompts", "deep_prompts"):
        assert torch.allclose(model.encoder(pictures)[0], plain.encoder(pictures)[0], atol=1e-6)
    tokens = torch.randn(1, 16, 32), (4, 4)
    attention: Any = model.decoder.layers[0].attention
    with spectra.switched_off(model, "low"):
        found = attention(*tokens)
    assert torch.equal(found[..., :4], attention(*tokens)[..., :4]) and not found[..., 4:].any()


def test_parts_that_are_not_there_are_refused() -> None:
    model = toy_model(decoder="cross_attention", spectral_layers=())
    for part in ("high", "spectral_prompts", "decoder"):
        with pytest.raises(ValueError, match="this model has deep_prompts"), spectra.switched_off(model, part):
            pass
    with pytest.raises(ValueError, match="no spectral prompt"):
        spectra.prompt_effects(model.encoder, torch.zeros(1, 3, 32, 32))


def test_depth_spectra_are_those_of_the_states() -> None:
    model = toy_model(spectral_layers=(0,)).eval()
    pictures = spectra.model_inputs(model, Toys(3, ((32, 32), (40, 64))), 3)
    assert pictures.shape == (3, 3, 32, 32) and pictures.mean().abs() < 3, "normalised and of one size"
    found = spectra.depth_spectra(model.encoder, pictures)
    assert [each.power.shape[:2] for each in found] == [(3, 32)] * 4  # before the first of 3 blocks, and after each
    with torch.inference_mode():
        *_, last = model.encoder.states(pictures)
    maps = last[:, -64:].unflatten(1, (8, 8)).permute(0, 3, 1, 2)  # 8 x 8 tokens
    assert np.allclose(found[-1].power, spectra.radial_power(maps).power)


def test_prompt_effect_by_hand() -> None:
    """A filter of 0.5 everywhere adds X c / 2: with class tokens of 1, a quarter of X's energy, in X's direction."""
    encoder, pictures = toy_model().eval().encoder, torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        encoder.spectral_prompt.weight.copy_(torch.tensor([0.5, 0.0]))
    tokens = torch.cat([torch.ones(2, 1, 32), encoder.embed(pictures)[:, 1:]], dim=1)
    encoder.embed = lambda images: tokens
    effects = spectra.prompt_effects(encoder, pictures)
    assert effects.used.tolist() == [True, True, False]
    assert effects.energy[0] == pytest.approx(0.25, rel=1e-5) and effects.alignment[0] == pytest.approx(1, abs=1e-5)


def test_means_and_quantiles_of_a_ring() -> None:
    """Ring 1 of a grid of 4 x 4 has the 8 neighbours of frequency 0; gains 0 to 7, all but the first with phase -90."""
    response = np.zeros((4, 4, 1), complex)
    response[[0, 0, 1, 3, 1, 1, 3, 3], [1, 3, 0, 0, 1, 3, 1, 3], 0] = -1j * np.arange(8)
    found = spectra.filter_radial(response)
    assert found.index.tolist() == [0, 0.25, 0.5, 0.75]  # to the corner: sqrt(0.5) * 4 is 2.8
    ring = found.loc[0.25]
    assert ring[["gain", "gain_low", "gain_high"]].tolist() == pytest.approx([3.5, 0.7, 6.3])
    assert ring[["phase", "phase_high"]].tolist() == pytest.approx([90 * 7 / 8, 90])


def test_the_response_is_what_the_layer_does_to_a_wave() -> None:
    """Random filter, random class token; also where the half spectrum holds what no real map can have."""
    prompt, token = SpectralPrompt((8, 6), 2), torch.randn(2)
    with torch.no_grad():
        prompt.weight.normal_()
    response = spectra.filter_response(prompt, token)
    for rows, columns in ((0, 0), (2, 1), (3, 0), (4, 3), (1, -2)):
        x = torch.from_numpy(wave(rows, columns, 8, 6, phase=0.7)).float()[None, :, :, None].expand(1, 8, 6, 2)
        y = prompt(x, token[None], prompt.filter((8, 6)))
        gained = (torch.fft.fft2(y, dim=(1, 2)) / torch.fft.fft2(x, dim=(1, 2)))[0, rows, columns]
        assert np.allclose(gained.detach().numpy(), response[rows, columns], atol=1e-4)
