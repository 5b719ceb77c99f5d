"""Spectra of waves, noise and filters known beforehand; models without a band or a part."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from toys import SPLIT, Toys, toy_model

from sptseg.analysis import spectra
from sptseg.datasets import images
from sptseg.datasets.folders import Scenes
from sptseg.datasets.splits import IGNORE
from sptseg.inference.evaluation import evaluate
from sptseg.model.encoder import SpectralPrompt


def wave(rows: float, columns: float, height: int = 64, width: int = 64, phase: float = 0.0) -> np.ndarray:
    """A cosine with so many cycles over the height and over the width: (height, width)."""
    y, x = np.mgrid[:height, :width]
    return np.cos(2 * np.pi * (rows * y / height + columns * x / width) + phase)


@pytest.mark.parametrize(("rows", "columns"), [(8, 0), (0, 8), (6, -8), (0, 32)])
def test_a_wave_lands_in_its_ring(rows: int, columns: int) -> None:
    found = spectra.radial_power(3 + wave(rows, columns), window=False)
    ring = round(math.hypot(rows, columns))
    energy = found.power * found.count
    assert found.frequency[ring] == ring / 64
    assert np.isclose(energy[ring], energy.sum())


def test_a_ring_of_a_wide_picture_holds_equal_frequencies_of_both_axes() -> None:
    for map in (wave(8, 0, 32, 96), wave(0, 24, 32, 96)):  # both 1/4 cycle per pixel
        found = spectra.radial_power(map, window=False)
        assert found.frequency[np.argmax(found.power)] == 0.25


@pytest.mark.parametrize("shape", [(16, 16), (15, 15), (12, 20), (9, 14)])
def test_the_rings_add_up_to_the_variance(shape: tuple[int, int]) -> None:
    """Parseval; even and odd sides count their frequencies differently."""
    maps = np.random.default_rng(0).normal(2, 3, (2, *shape))
    found = spectra.radial_power(maps, window=False)
    assert found.count.sum() == math.prod(shape)
    assert np.allclose((found.power * found.count).sum(-1) / math.prod(shape), maps.var(axis=(1, 2)))


@pytest.mark.parametrize("window", [False, True])
def test_white_noise_is_flat_at_its_variance(window: bool) -> None:
    noise = np.random.default_rng(1).normal(5, 2, (200, 24, 24))
    found = spectra.radial_power(noise, window=window).mean()
    start = 2 if window else 1  # a window takes some of what is next to the mean with the mean
    assert np.allclose(found.power[start:13], 4, rtol=0.1)  # up to 0.5; in the corners few frequencies make a mean
    assert abs(found.slope(0.1, 0.5)) < 0.05


def test_a_window_keeps_a_wave_that_fits_the_picture_badly_near_its_ring() -> None:
    """8.5 cycles: without a window the jump at the border spreads over all rings."""
    map = wave(0, 8.5)
    far = [spectra.radial_power(map, window=w).share(0.3, 0.75) for w in (False, True)]
    assert far[1] < far[0] / 50


def test_slope_of_a_power_law() -> None:
    radius = np.hypot(np.fft.fftfreq(128)[:, None], np.fft.fftfreq(128))
    radius[0, 0] = np.inf
    phases = np.exp(2j * np.pi * np.random.default_rng(2).random((40, 128, 128)))
    maps = np.fft.ifft2(phases / radius, axes=(1, 2)).real
    found = spectra.radial_power(maps)
    assert found.slope() == pytest.approx(-2, abs=0.1)
    assert found.slope() == pytest.approx(found.mean().slope())
    with pytest.raises(ValueError, match="at least 3"):
        found.slope(0.1, 0.105)
    with pytest.raises(ValueError, match="4 x 4"):
        spectra.radial_power(maps[0, :3])


def test_share_of_two_waves() -> None:
    """Amplitudes 1 and 2: variances 1/2 and 2."""
    found = spectra.radial_power(wave(4, 0) + 2 * wave(0, 20), window=False)
    assert found.share(0, 0.2) == pytest.approx(0.2)
    assert found.share(0, spectra.FINEST) == pytest.approx(1)


def test_relative_to_white_noise() -> None:
    """Half of the variance in the 2 frequencies of one wave, of 256 frequencies in all: 64 times white noise's."""
    found = spectra.radial_power(5 * wave(4, 0, 16, 16) + 5 * wave(0, 2, 16, 16), window=False).relative()
    assert (found.power * found.count)[4] == pytest.approx(0.5 * 256)
    assert (found.power @ found.count) / found.count.sum() == pytest.approx(1)


def test_a_band_and_the_rest_make_the_picture() -> None:
    image = np.random.default_rng(3).integers(80, 170, (32, 48, 3), np.uint8)  # leaves room above and below
    kept, rest = (spectra.filter_picture(image, 0.1, 0.3, reject).astype(int) for reject in (False, True))
    assert np.abs(kept + rest - image.mean(axis=(0, 1)) - image).max() <= 1.5  # both keep the mean, both are rounded
    assert np.array_equal(spectra.filter_picture(image, 0, spectra.FINEST), image)
    assert np.array_equal(spectra.filter_picture(image[..., 0], 0.1, 0.3), kept[..., 0])


def test_a_filtered_picture_is_cut_off_at_black_and_white() -> None:
    """Sharp black and white stripes over- and undershoot when their finest waves are gone; bytes would wrap around."""
    image = np.zeros((32, 32), np.uint8)
    image[:, 16:] = 255
    found = spectra.filter_picture(image, 0.2, spectra.FINEST, reject=True)
    assert found[:, 2:14].max() < 60 and found[:, 18:30].min() > 195
    assert found.min() == 0 and found.max() == 255


def test_luminance() -> None:
    image = np.array([[[255, 0, 0], [0, 255, 0], [255, 255, 255]]], np.uint8)
    assert np.allclose(images.luminance(image), [[0.299, 0.587, 1]])
    assert np.allclose(images.luminance(image[..., 0]), [[1, 0, 1]])


def test_octaves_cover_the_plane_once() -> None:
    edges = [edge for band in spectra.OCTAVES for edge in band]
    assert edges[0] == 0 and edges[-1] > math.sqrt(0.5) and edges[1:-1:2] == edges[2::2]


def test_pictures_without_a_band() -> None:
    plain = Scenes(1, seed=3)
    lacking = spectra.WithoutBand(plain, (0.1, 0.2))
    assert len(lacking) == 1 and torch.equal(lacking[0]["label"], plain[0]["label"])
    power = [
        spectra.radial_power(each[0]["image"], window=False).mean().power for each in (plain, lacking)
    ]  # 128 px: the band is rings 12.8 to 25.6
    assert np.all(power[1][14:25] < 0.1 * power[0][14:25])
    assert np.allclose(power[1][2:12], power[0][2:12], rtol=0.1)


def test_counts_add_up_to_what_evaluate_scores() -> None:
    model, dataset = toy_model().eval(), Toys(5, ((32, 32), (40, 33)))
    counts = spectra.class_counts(model, dataset, SPLIT, batch_size=2)
    expected = evaluate(model, dataset, SPLIT, batch_size=2, progress=False)
    assert counts.shape == (5, 3, 5)
    assert np.allclose(spectra.iou_from_counts(counts.sum(0)), list(expected.iou.values()), equal_nan=True)
    labels = [int((dataset[i]["label"] != IGNORE).sum()) for i in range(5)]
    assert counts[:, 1].sum(-1).tolist() == counts[:, 2].sum(-1).tolist() == labels
    assert np.array_equal(spectra.class_counts(model, dataset, SPLIT, limit=4, batch_size=2), counts[:4])


def test_iou_of_hand_counts() -> None:
    counts = np.array([[2, 0, 0], [4, 0, 3], [3, 0, 0]])  # hits, true, predicted
    assert np.allclose(spectra.iou_from_counts(counts), [2 / 5, np.nan, 0], equal_nan=True)


def pictures_of_one_class(hits: np.ndarray) -> np.ndarray:
    """Counts (P, 3, 1) of pictures with 10 true and 10 predicted pixels."""
    return np.stack([hits, np.full_like(hits, 10), np.full_like(hits, 10)], axis=1)[..., None]


def test_change_between_hand_counts() -> None:
    before, after = (pictures_of_one_class(np.array([hits, hits])) for hits in (10, 5))
    found = spectra.iou_change(before, after, [0])
    expected = 5 / 15 - 1  # every draw of two equal pictures gives this
    assert (found.change, found.low, found.high) == pytest.approx((expected,) * 3)
    assert str(found) == "-66.7 (-66.7 to -66.7)"
    assert math.isnan(spectra.iou_change(before * 0, after * 0, [0]).change)
    with pytest.raises(ValueError, match="same pictures"):
        spectra.iou_change(before, after[:1], [0])


def test_a_class_that_no_picture_shows_does_not_count() -> None:
    before = np.zeros((2, 3, 2), int)
    before[:, :, 0] = 10
    after = before.copy()
    after[:, 2, 1] = 5  # predicted, and nowhere true: the change of class 0 is still nothing
    assert spectra.iou_change(before, after, [0, 1]).change == 0


def test_the_interval_covers_the_truth() -> None:
    """Of 60 samples of 40 pictures from a known distribution, about 95 % of the intervals hold its IoU's change."""
    rng = np.random.default_rng(4)
    ten = np.full(10**5, 10)
    sure, unsure = pictures_of_one_class(ten), pictures_of_one_class(rng.integers(2, 10, 10**5))
    truth = (spectra.iou_from_counts(unsure.sum(0)) - spectra.iou_from_counts(sure.sum(0))).item()
    held = 0
    for i in range(60):
        chosen = rng.integers(0, 10**5, 40)
        found = spectra.iou_change(sure[chosen], unsure[chosen], [0], draws=300, seed=i)
        held += found.low <= truth <= found.high
        assert found.low < found.change < found.high
    assert 51 <= held < 60


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("part", ["high", "low", "spectral_prompts", "deep_prompts"])
def test_a_part_is_off_and_comes_back(part: spectra.Part, pictures: torch.Tensor) -> None:
    model = toy_model().eval()
    text = model.class_embeddings(SPLIT.texts())
    names = set(model.state_dict())
    with torch.inference_mode():
        whole = model(pictures, text)
        with pytest.raises(RuntimeError, match="stop"), spectra.switched_off(model, part):
            assert not torch.allclose(model(pictures, text), whole, rtol=1e-3)
            with spectra.switched_off(model, part):  # off already
                pass
            assert not torch.allclose(model(pictures, text), whole, rtol=1e-3), "still off"
            raise RuntimeError("stop")
        assert torch.equal(model(pictures, text), whole)
    assert set(model.state_dict()) == names


def test_without_prompts_the_encoder_is_one_built_without(pictures: torch.Tensor) -> None:
    model, plain = toy_model().eval(), toy_model(prompt_tokens=0, spectral_layers=()).eval()
    with torch.inference_mode(), spectra.switched_off(model, "spectral_prompts", "deep_prompts"):
        assert torch.allclose(model.encoder(pictures)[0], plain.encoder(pictures)[0], atol=1e-6)


def test_a_branch_that_is_off_gives_zeros_in_its_channels() -> None:
    """8 heads of width 4: 7 low-frequency heads fill channels 4 to 31 of 32."""
    model, tokens = toy_model().eval(), torch.randn(1, 16, 32)
    attention: Any = model.decoder.layers[0].attention
    whole = attention(tokens, (4, 4))
    with spectra.switched_off(model, "low"):
        found = attention(tokens, (4, 4))
    assert torch.equal(found[..., :4], whole[..., :4]) and not found[..., 4:].any() and whole[..., 4:].all()


def test_parts_that_are_not_there_are_refused() -> None:
    model = toy_model(decoder="cross_attention", spectral_layers=())
    for part in ("high", "spectral_prompts", "decoder"):
        with pytest.raises(ValueError, match="this model has deep_prompts"), spectra.switched_off(model, part):
            pass
    with pytest.raises(ValueError, match="no spectral prompt"):
        spectra.prompt_effects(model.encoder, torch.zeros(1, 3, 32, 32))


def test_model_inputs_are_of_one_size() -> None:
    model = toy_model()
    found = spectra.model_inputs(model, Toys(3, ((32, 32), (40, 64))), 3)
    assert found.shape == (3, 3, 32, 32)
    assert found.mean().abs() < 3 and found.dtype == torch.float32  # normalised


def test_depth_spectra_are_those_of_the_states(pictures: torch.Tensor) -> None:
    encoder = toy_model(spectral_layers=(0,)).eval().encoder
    found = spectra.depth_spectra(encoder, pictures)
    assert [each.power.shape[:2] for each in found] == [(2, 32)] * 4  # before the first of 3 blocks, and after each
    with torch.inference_mode():
        last = list(encoder.states(pictures))[-1][:, -64:]  # (B, N, D), 8 x 8 tokens
    maps = last.unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    assert np.allclose(found[-1].power, spectra.radial_power(maps).power)


def test_prompt_effect_by_hand(pictures: torch.Tensor) -> None:
    """A filter of 0.5 everywhere adds X c / 2: with class tokens of 1, a quarter of X's energy, in X's direction."""
    encoder = toy_model().eval().encoder
    with torch.no_grad():
        encoder.spectral_prompt.weight.copy_(torch.tensor([0.5, 0.0]))
    before_first = encoder.embed(pictures)
    encoder.embed = lambda images: torch.cat([torch.ones(2, 1, 32), before_first[:, 1:]], dim=1)
    first, _, third = spectra.prompt_effects(encoder, pictures)
    assert (first.block, first.used, third.used) == (0, True, False)
    assert first.energy == pytest.approx(0.25, rel=1e-5) and first.alignment == pytest.approx(1, abs=1e-5)
    assert np.allclose(first.added.power, first.tokens.power / 4, rtol=1e-4)


def prompt_of(weight: complex | torch.Tensor, grid: tuple[int, int] = (6, 8), width: int = 3) -> SpectralPrompt:
    prompt = SpectralPrompt(grid, width)
    with torch.no_grad():
        full = torch.zeros(grid[0], grid[1] // 2 + 1, width, dtype=torch.complex64) + weight
        prompt.weight.copy_(torch.view_as_real(full))
    return prompt


@pytest.mark.parametrize("gain", [0.3, -2.0])
def test_a_constant_gain_is_that_gain_everywhere(gain: float) -> None:
    response = spectra.filter_response(prompt_of(gain))
    assert response.shape == (6, 8, 3) and np.allclose(response, gain, atol=1e-6)
    found = spectra.filter_radial(response)
    assert np.allclose(found.gain, abs(gain), atol=1e-6) and np.allclose(found.gain_quantiles, abs(gain), atol=1e-6)
    assert np.allclose(found.phase, 0 if gain > 0 else 180, atol=1e-3)


def test_a_shift_by_one_token_is_all_phase() -> None:
    """x(t - 1): gain 1 everywhere, phase 360 degrees times the horizontal frequency, so 45 at 1/8."""
    shift = torch.exp(-2j * torch.pi * torch.fft.rfftfreq(8))[None, :, None]
    response = spectra.filter_response(prompt_of(shift, (8, 8)))
    assert np.allclose(np.abs(response), 1, atol=1e-6)
    assert np.allclose(np.degrees(np.angle(response[0, 1])), -45, atol=1e-4)
    x = torch.randn(1, 8, 8, 3)
    prompt = prompt_of(shift, (8, 8))
    added = prompt(x, torch.ones(1, 3), prompt.filter((8, 8))) - x
    assert torch.allclose(added, x.roll(1, dims=2), atol=1e-5)


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
