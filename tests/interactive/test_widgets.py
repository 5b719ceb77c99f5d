"""Controls moved in this process: pictures and sentences must follow; where no event loop runs, predictions at once."""

import asyncio
import io
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ipywidgets
import nbformat
import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image
from toys import SPLIT, Toys, toy_model
from voila.app import Voila

from sptseg import SptSeg, scenes, segment
from sptseg.analysis import failures, spectra
from sptseg.datasets import enlarge, png, png_bytes, splits
from sptseg.interactive import FailureBrowser, LossExplorer, PromptPlayground, widgets
from sptseg.interactive import app as explore_app
from sptseg.interactive.masks import BRANCHES, PAUSE, BranchExplorer
from sptseg.interactive.parts import Explorer, TitledPicture, named_overlay, table
from sptseg.interactive.widgets import FilterExplorer, FrequencyExplorer, Gain, visited
from sptseg.training import segmentation_loss

CLASSES = SPLIT.classes


@pytest.fixture
def model() -> SptSeg:
    return toy_model().eval()


def toy() -> tuple[np.ndarray, np.ndarray]:
    """A picture (32, 32, 3) and its labels (32, 32)."""
    sample = Toys()[1]
    return sample["image"].permute(1, 2, 0).numpy(), sample["label"].numpy()


def stripes(period: int, size: int = 64) -> np.ndarray:
    """Grey waves along x, of a whole number of pixels: (size, size, 3)."""
    wave = 128 + 100 * np.cos(2 * np.pi * np.arange(size) / period)
    return np.rint(wave).astype(np.uint8)[None, :, None].repeat(size, axis=0).repeat(3, axis=2)


@contextmanager
def renewed(explorer: Explorer) -> Iterator[set[str]]:
    """The titles of the pictures that change meanwhile."""
    before, titles = {title: panel.image.value for title, panel in explorer.panels.items()}, set()
    yield titles
    titles |= {title for title, panel in explorer.panels.items() if panel.image.value != before[title]}


def test_a_gain_has_the_values_of_its_definition() -> None:
    y, x = np.mgrid[:16, :16]
    across, down, fine = np.cos(np.pi * x / 4), np.cos(np.pi * y / 4), np.cos(np.pi * x)  # 1/8, 1/8, 1/2 cycles
    maps = torch.tensor(3 + across + down + fine)[None, ..., None]

    def left(*factors: float) -> torch.Tensor:
        return torch.tensor(3 + factors[0] * across + factors[1] * down + factors[2] * fine)[None, ..., None]

    cases = {
        Gain(0.1, 0.2, inside=0.5, outside=2): (0.5, 0.5, 2),
        Gain(0.1, direction=180, width=60, inside=0, outside=1): (0, 1, 0),
        Gain(0.125, edge=0.2): (0.5, 0.5, 1),  # halfway up at the cut-off
        Gain(0.175, edge=0.2, inside=2, outside=0): (2 * (0.5 - 0.5 * np.cos(np.pi / 4)),) * 2 + (2,),
        Gain(0, 0.125): (0, 0, 0),  # low <= radius < high
    }
    for gain, factors in cases.items():
        torch.testing.assert_close(gain(maps.float()), left(*factors).float(), atol=1e-5, rtol=0)
    for grid in ((8, 8), (5, 8), (8, 5)):
        member = Gain(0.1, 0.6, 0.1, 30, 40).member(grid)
        np.testing.assert_array_equal(member, np.roll(member[::-1, ::-1], (1, 1), (0, 1)))  # real maps stay real


def test_noise_has_the_energy_of_the_change_and_amplitudes_can_be_another_s() -> None:
    generator = torch.Generator().manual_seed(1)
    maps, other = torch.randn(2, 2, 8, 6, 3, generator=generator).unbind(0)
    after = Gain(0.2)(maps)
    noisy = widgets.noise_instead(maps, after)
    torch.testing.assert_close((noisy - maps).square().sum((1, 2)), (after - maps).square().sum((1, 2)))
    torch.testing.assert_close(noisy.mean((1, 2)), maps.mean((1, 2)), atol=1e-6, rtol=0)
    assert torch.equal(widgets.noise_instead(maps, maps), maps)
    mixed = torch.fft.fft2(widgets.with_amplitudes_of(other, maps), dim=(1, 2))
    torch.testing.assert_close(mixed.abs(), torch.fft.fft2(other, dim=(1, 2)).abs(), atol=1e-4, rtol=1e-4)
    unit = torch.fft.fft2(maps, dim=(1, 2))
    torch.testing.assert_close(mixed / mixed.abs(), unit / unit.abs(), atol=1e-3, rtol=0)


@torch.no_grad()
def test_tokens_are_filtered_before_one_block_and_the_encoder_is_as_before_afterwards(model: SptSeg) -> None:
    encoder, gain = model.encoder, Gain(0.1, 0.3, inside=0, outside=2)
    images, seen = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), []
    x, prompts = encoder.embed(images), encoder.prompt_projection(encoder.prompts)
    for i, block in enumerate(encoder.tower.blocks):  # the plain twin
        tokens = x[:, -64:].unflatten(1, (8, 8))
        if i in encoder.spectral_layers:
            prompt = spectra.spectral_prompt_of(encoder)
            tokens = prompt(tokens, x[:, 0], prompt.filter((8, 8)))
        tokens = gain(tokens) if i == 1 else tokens
        x = block(torch.cat([x[:, :1], prompts[i].expand(2, -1, -1), tokens.flatten(1, 2)], dim=1))

    def visit(block: int, tokens: torch.Tensor) -> torch.Tensor:
        seen.append(block)
        return gain(tokens) if block == 1 else tokens

    whole = encoder(images)[0]
    with pytest.raises(KeyError), visited(encoder, visit):
        found = [*encoder.states(images)][-1]
        raise KeyError
    torch.testing.assert_close(found[:, -64:], x[:, -64:], atol=1e-4, rtol=1e-4)
    assert seen == [*range(len(encoder.tower.blocks))]
    assert torch.equal(encoder(images)[0], whole)


@torch.no_grad()
def test_the_learned_filter_is_multiplied_and_comes_back(model: SptSeg) -> None:
    images, prompt = torch.randn(1, 3, 32, 32), spectra.spectral_prompt_of(model.encoder)
    prompt.weight.mul_(20)
    whole = model.encoder(images)[0]
    with widgets.edited(prompt, Gain(0, 0.25, inside=3, outside=0)):
        low = model.encoder(images)[0]
    assert torch.equal(model.encoder(images)[0], whole) and not torch.allclose(whole, low, atol=1e-3)
    below = np.hypot(*np.meshgrid(np.fft.rfftfreq(8), np.fft.fftfreq(8))) < 0.25
    prompt.weight.mul_(3 * torch.tensor(below)[..., None, None])
    torch.testing.assert_close(low, model.encoder(images)[0])


def test_the_band_slider_changes_waves_of_the_picture(model: SptSeg) -> None:
    explorer = FrequencyExplorer(model, stripes(8), CLASSES)  # all power at 1/8
    explorer.band.value = (0.1, 0.2)
    assert np.ptp(explorer.filtered) == 200 and "100.0%" in explorer.note.value
    explorer.inside.value = 0.5
    assert np.ptp(explorer.filtered) == 100 and "25.0%" in explorer.note.value
    explorer.band.value = (0.2, 0.3)
    assert np.ptp(explorer.filtered) <= 1 and "0.0%" in explorer.note.value
    explorer.outside.value = 1
    assert np.abs(explorer.filtered.astype(int) - stripes(8)).max() <= 1
    said = "0.200 to 0.300 cycles per pixel (waves of 3.33 to 5 pixels) times 0.5, all else times 1"
    assert explorer.sentence().startswith(said)
    light = explorer.spectrum.sum(axis=2, dtype=int)
    assert light[32, 32 + 8] == light[32, 32 - 8] == light.max()  # 64 / 8 waves across
    explorer.choose(0.1, 0.2, 0, 1)
    shown = explorer.marked_spectrum().sum(axis=2, dtype=int)[2::4, 2::4]  # 4 pixels a frequency
    assert shown[32, 40] < light[32, 40] / 2 and shown[32, 56] == light[32, 56], "dark where it is cut"


def test_the_pictures_follow_the_band_once_whatever_a_preset_changes(model: SptSeg) -> None:
    explorer, updates = FrequencyExplorer(model, toy()[0], CLASSES), []
    with renewed(explorer) as titles:
        explorer.choose(0.0, 0.1)
    assert titles - {"score"} == {"spectrum", "after", "masks after"}
    assert (explorer.result.labels == segment(model, explorer.filtered, CLASSES).labels).all()
    explorer.update = lambda: updates.append((*explorer.band.value, explorer.inside.value, explorer.outside.value))
    for button in (each for row in explorer.children for each in row.children if isinstance(each, ipywidgets.Button)):
        button.click()
    assert updates == [values[:4] for values in widgets.BAND_PRESETS.values()]


def test_tokens_before_a_block_are_filtered_shown_and_segmented(model: SptSeg) -> None:
    explorer = FrequencyExplorer(model, [toy()[0], stripes(8, 32)], CLASSES, [toy()[1], None])
    explorer.choose(0.1, 0.3, 0, 1)
    with renewed(explorer) as titles:
        explorer.place.value = 1
    assert titles >= {"before", "spectrum", "after"} and "cycles per token" in explorer.note.value
    with visited(model.encoder, lambda block, tokens: explorer.gain(tokens) if block == 1 else tokens):
        expected = segment(model, explorer.picture, CLASSES)
    torch.testing.assert_close(explorer.result.logits.logits, expected.logits.logits)
    tokens = explorer.tokens[0][1]
    change = explorer.gain(tokens).var((1, 2), correction=0).sum() / tokens.var((1, 2), correction=0).sum()
    assert explorer.energy == pytest.approx(float(change), rel=1e-3) and explorer.amplitudes.disabled
    explorer.choice.value = 1
    assert explorer.label is None and "Share of the picture" in explorer.table.value
    explorer.place.value, explorer.amplitudes.value = -1, 0
    assert "amplitudes of picture 1, the phases of this one" in explorer.note.value


def test_scores_against_the_cut_off_and_changes_of_iou_are_those_of_the_masks(model: SptSeg) -> None:
    image, label = toy()
    explorer = FrequencyExplorer(model, image, CLASSES, label, unseen=SPLIT.names(SPLIT.unseen))
    explorer.scored.value = 1
    scores, true = explorer.result.scores("water"), (label == 1) & (label != 255)
    explorer.cut.value = cut = round(float(np.median(scores)), 2)
    above, asked = scores > cut, label != 255
    iou = (above & true).sum() / ((above | true) & asked).sum()
    said = f"{100 * above.mean():.1f} % above, IoU {100 * iou:.1f} %"
    assert explorer.panels["score"].title.value.endswith(f"({said}; before {said})")
    explorer.choose(0.0, 0.05)
    for i, *ious in explorer.changes():
        for result, iou in zip((explorer.whole, explorer.result), ious, strict=True):
            found, true = (result.labels == i) & (label != 255), label == i
            expected = (found & true).sum() / (found | true).sum() if (found | true).any() else np.nan
            assert iou == pytest.approx(expected, nan_ok=True)
        change = ious[1] - ious[0]
        assert ("–" if change != change else f"{100 * change:+.1f} points") in explorer.table.value
    assert explorer.names[2] == "boat*"


def test_branches_are_switched_off(model: SptSeg) -> None:
    explorer = BranchExplorer(model, toy()[0], CLASSES)
    for name, without in BRANCHES.items():
        explorer.branches.value = name
        with spectra.switched_off(model, *without):
            expected = segment(model, toy()[0], CLASSES).logits.logits
        torch.testing.assert_close(explorer.result.logits.logits, expected)
        assert name in explorer.note.value


def test_the_loss_explorer_computes_the_library_s_focal_loss() -> None:
    image, label = toy()
    logits = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 3
    target = label == 1
    explorer = LossExplorer(image, logits[0, 0].sigmoid().numpy(), target)
    labels = torch.where(torch.tensor(target), 0, 255)[None]
    focal = segmentation_loss(logits, labels, "zegclip")["focal"]  # 100 times the mean
    assert 100 * explorer.losses().mean() == pytest.approx(float(focal), rel=1e-4)
    explorer.gamma.value, explorer.alpha.value = 0, 0.5
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits[0, 0], torch.tensor(target).float())
    assert explorer.losses().mean() == pytest.approx(float(entropy) / 2, rel=1e-4)
    assert f"{entropy / 2:.4g}" in explorer.note.value


def test_in_a_running_loop_the_prediction_waits_for_a_pause(model: SptSeg) -> None:
    explorer, seen = FrequencyExplorer(model, toy()[0], CLASSES), []
    predict, explorer.predict = explorer.predict, lambda: seen.append(explorer.band.value)

    async def drag() -> None:
        with renewed(explorer) as titles:
            for high in (0.5, 0.4, 0.3):
                explorer.band.value = (0.0, high)
        assert "after" in titles and not seen  # at once; later
        await asyncio.sleep(3 * PAUSE)
        assert seen == [(0.0, 0.3)]  # once, with the last value
        explorer.predict = predict
        explorer.choose(0.0, 0.05)
        explorer.figure()  # shows the state of the controls even before the pause is over

    asyncio.run(drag())
    assert (explorer.result.labels == segment(model, explorer.filtered, CLASSES).labels).all()


def test_the_filter_explorer_shows_what_the_prompt_adds(model: SptSeg) -> None:
    explorer = FilterExplorer(model, [toy()[0], stripes(8, 32)], CLASSES)
    with renewed(explorer) as titles:
        explorer.channel.value = (explorer.channel.value + 1) % 32
    assert titles >= {"filter: amplitude", "tokens before", "added by prompt"}
    with renewed(explorer) as titles:
        explorer.choice.value = 1
    assert {"masks before", "tokens before", "tokens after"} <= titles <= set(explorer.panels) - {"filter: amplitude"}
    explorer.choose(10, 0)
    explorer.block.value = 1
    tokens, added, gate = explorer.tokens  # (8, 8, 32) twice, (32,)
    spectrum = torch.fft.fft2(tokens * gate, dim=(0, 1))
    kernel = torch.from_numpy(np.fft.ifftshift(explorer.response, axes=(0, 1)))
    torch.testing.assert_close(added, torch.fft.ifft2(spectrum * kernel, dim=(0, 1)).real, atol=1e-5, rtol=1e-4)
    explorer.choose(*widgets.FILTER_PRESETS["zero"][:2])
    assert not explorer.tokens[1].any() and "F is multiplied by 0 below 0.25 cycles" in explorer.note.value
    with spectra.switched_off(model, "spectral_prompts"):
        without = segment(model, explorer.picture, explorer.classes).logits.logits
    torch.testing.assert_close(explorer.result.logits.logits, without)
    with pytest.raises(ValueError, match="this model has no spectral prompt"):
        FilterExplorer(toy_model(spectral_layers=()), toy()[0])


def test_the_playground_segments_what_is_typed_and_says_what_it_cannot() -> None:
    playground = PromptPlayground(toy_model(start="dense_clip").eval(), toy()[0], ["grass", "water"])
    with renewed(playground) as titles:
        playground.words.value = "tree, a boat , house,"
    assert playground.result.classes == ("tree", "a boat", "house") and titles == {"masks", "score"}
    with renewed(playground) as titles:
        playground.scored.value = next(name for name in playground.scored.options if name != playground.scored.value)
    assert titles == {"score"}
    for typed, said in (("tree, zebra", "know &#x27;zebra&#x27;"), ("tree, tree", "twice: tree"), (" ,", "is empty")):
        with renewed(playground) as titles:
            playground.words.value = typed
        note = playground.note.value
        assert "Not done" in note and said in note and "still show: tree, a boat, house" in note and not titles
    playground.words.value = "house, tree"
    assert "Not done" not in playground.note.value


def test_the_failure_browser_goes_from_the_worst_picture_to_the_best(model: SptSeg) -> None:
    browser, seen = FailureBrowser(failures.collect(model, Toys(6), SPLIT)), []
    wrong = [np.mean((p.label != p.predicted)[p.label != 255]) for p in browser.predictions.pictures]
    for browser.rank.value in range(1, 7):
        seen.append(wrong[browser.position])
        assert f"{seen[-1]:.1%} of its labelled pixels" in browser.note.value
    assert seen == sorted(wrong, reverse=True) and browser.kind.label == "errors of all kinds"
    for browser.kind.value in failures.KINDS:
        worst = failures.worst_pictures(browser.errors, browser.labelled, browser.kind.value)
        assert browser.rank.value == 1 and browser.position == worst[0]


def test_every_widget_has_a_still_figure_and_words_for_where_no_kernel_runs(model: SptSeg) -> None:
    image, label = toy()
    explorers = FrequencyExplorer(model, image, CLASSES, label), BranchExplorer(model, image, CLASSES)
    filtered, playground = FilterExplorer(model, image, CLASSES), PromptPlayground(model, image, ["grass", "water"])
    for widget in (*explorers, filtered, playground, FailureBrowser(failures.collect(model, Toys(3), SPLIT))):
        figure = widget.figure()
        assert len(figure.axes) >= 3 and len(png_bytes(figure, dpi=30)) > 3000
        assert f"{type(widget).__name__} (its controls need a running kernel" in repr(widget)


def test_overlays_carry_names_tables_escape_them_and_pictures_are_renewed_in_place() -> None:
    image, labels, panel = np.full((64, 64, 3), 120, np.uint8), np.zeros((64, 64), int), TitledPicture("picture")
    plain = named_overlay(image, labels, [""], [(0, 0, 200)])
    named = named_overlay(image, labels, ["name"], [(0, 0, 200)])
    assert plain.shape == named.shape == (384, 384, 3) and (named == 255).any() and not (plain == 255).any()
    assert "<i>" not in table(("class",), [((1, 2, 3), ("<i>",))]) and "#010203" in table((), [((1, 2, 3), ("a",))])
    kept = panel.image
    panel.show(stripes(4, 32))
    assert panel.image is kept and np.asarray(Image.open(io.BytesIO(kept.value))).shape == (256, 256, 3)


# The app, which test_browser.py visits


def test_the_server_is_for_this_computer_and_notebook_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apps: list[tuple[Any, Any]] = []

    def start(app: Voila) -> None:
        apps.append((app, nbformat.read(app.notebook_path, as_version=4)))
        raise OSError("no more sockets")

    monkeypatch.setattr(Voila, "start", start)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "voila.json").write_text('{"Voila": {"ip": "0.0.0.0", "token": ""}}')
    with pytest.raises(OSError, match="no more sockets"):
        explore_app.explore(port=0, browser=False)
    ((app, notebook),) = apps
    assert app.ip == "127.0.0.1" and len(app.token) >= 32
    assert app.voila_configuration.file_allowlist == [] and app.voila_configuration.strip_sources
    assert app.config.MappingKernelManager.cull_idle_timeout > 0
    assert "'self'" in app.tornado_settings["headers"]["Content-Security-Policy"]
    assert notebook.cells[1].source.endswith("explorer((), 'embedded', '', 7)")
    assert not Path(app.notebook_path).parent.exists(), "removed, though the server failed"


def test_bad_arguments_end_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    explore = ["explore", "--no-browser"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        assert f"port {port} cannot be used" in refused(capsys, *explore, "--port", port)
    assert "none.png" in refused(capsys, *explore, tmp_path / "none.png")
    assert "does not know 'zebra'" in refused(capsys, *explore, "--classes", "tree,zebra")


def test_the_page_has_a_tab_for_each_part_of_the_model_and_pictures_to_choose_from(tmp_path: Path) -> None:
    tabs = explore_app.explorer((), "embedded", "", 7)
    assert tabs.titles == ("Frequencies", "Learned filter", "Branches")
    frequencies = tabs.children[0]
    assert len({id(tab.whole) for tab in tabs.children}) == 1, "segmented once for all"
    assert frequencies.classes == splits.scenes().classes and len(frequencies.pictures) == explore_app.DRAWN
    np.testing.assert_array_equal(frequencies.label, enlarge(scenes.draw(7)[1], 3))
    (tmp_path / "picture.png").write_bytes(png(scenes.draw(3)[0]))
    (given,) = explore_app.explorer((str(tmp_path / "picture.png"),), "embedded-zegclip", "tree, sky", 7).children
    assert given.classes == ("tree", "sky") and given.labels == [None] * (1 + explore_app.DRAWN)
    np.testing.assert_array_equal(given.picture, scenes.draw(3)[0])
