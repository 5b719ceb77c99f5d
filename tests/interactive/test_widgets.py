"""Controls moved in this process: pictures and sentences must follow; where no event loop runs, predictions at once."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from toys import SPLIT, Toys, toy_model

from sptseg.analysis import failures
from sptseg.datasets import plots
from sptseg.inference.segmentation import segment
from sptseg.interactive.failure_browser import FailureBrowser
from sptseg.interactive.parts import LONGEST, PAUSE, Explorer, TitledPicture, named_overlay, spectrum_picture, table
from sptseg.interactive.widgets import BAND_PRESETS, FilterExplorer, FrequencyExplorer, PromptPlayground
from sptseg.model.spt_seg import SptSeg

CLASSES = SPLIT.classes


@pytest.fixture
def model() -> SptSeg:
    return toy_model().eval()


def toy(size: tuple[int, int] = (32, 32)) -> tuple[np.ndarray, np.ndarray]:
    """A picture (H, W, 3) and its labels (H, W)."""
    sample = Toys(sizes=(size,))[1]
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


def test_the_band_slider_takes_waves_out_of_the_picture(model: SptSeg) -> None:
    explorer = FrequencyExplorer(model, stripes(8), CLASSES)  # all power at 1/8
    explorer.band.value = (0.1, 0.2)
    assert np.ptp(explorer.filtered) == 200 and "100.0%" in explorer.note.value
    explorer.band.value = (0.2, 0.3)
    assert np.ptp(explorer.filtered) <= 1 and "0.0%" in explorer.note.value
    explorer.remove.value = True
    assert np.abs(explorer.filtered.astype(int) - stripes(8)).max() <= 1
    assert explorer.sentence().startswith("Removed: 0.200 to 0.300 cycles per pixel, waves of 3.33 to 5 pixels")


def test_all_pictures_but_the_first_follow_the_band_once_whatever_a_preset_changes(model: SptSeg) -> None:
    explorer, updates = FrequencyExplorer(model, toy()[0], CLASSES), []
    with renewed(explorer) as titles:
        explorer.choose(0.0, 0.1)
    assert titles == {"spectrum", "filtered picture", "prediction"}
    assert (explorer.result.labels == segment(model, explorer.filtered, CLASSES).labels).all()
    explorer.update = lambda: updates.append((explorer.band.value, explorer.remove.value))
    for button in explorer.presets:
        button.click()
    assert updates == [((low, high), remove) for low, high, remove, _ in BAND_PRESETS.values()]


def test_the_spectrum_is_bright_in_the_middle_ring_of_the_waves_and_dark_where_cut(model: SptSeg) -> None:
    colours, radius = spectrum_picture(stripes(8))
    light = colours.sum(axis=2, dtype=int)
    assert light[32, 32 + 8] == light[32, 32 - 8] == light.max()  # 64 / 8 waves across
    np.testing.assert_allclose([radius[32, 40], radius[32, 32], radius[0, 32]], [1 / 8, 0, 0.5])
    explorer = FrequencyExplorer(model, stripes(8), CLASSES)
    explorer.choose(0.1, 0.2, remove=True)
    shown = explorer.marked_spectrum().sum(axis=2, dtype=int)
    assert shown[32, 40] < light[32, 40] / 2 and shown[32, 56] == light[32, 56]


def test_the_change_of_a_class_is_that_of_its_iou_or_area(model: SptSeg) -> None:
    image, label = toy()
    explorer = FrequencyExplorer(model, image, CLASSES, label, unseen=SPLIT.names(SPLIT.unseen))
    explorer.choose(0.0, 0.05)
    for i, *ious in explorer.changes():
        for result, iou in zip((explorer.whole, explorer.result), ious, strict=True):
            found, true = (result.labels == i) & (label != 255), label == i
            expected = (found & true).sum() / (found | true).sum() if (found | true).any() else np.nan
            assert iou == pytest.approx(expected, nan_ok=True)
        change = ious[1] - ious[0]
        assert ("–" if change != change else f"{100 * change:+.1f} points") in explorer.table.value
    areas = [area for _, area, _ in FrequencyExplorer(model, image, CLASSES).changes()]
    assert sum(areas) == pytest.approx(1) and explorer.names[2] == "boat*"


def test_large_pictures_shrink_together_with_their_labels(model: SptSeg) -> None:
    image, label = toy((2 * LONGEST, LONGEST))
    explorer = FrequencyExplorer(model, image, CLASSES, label)
    assert explorer.picture.shape == (LONGEST, LONGEST // 2, 3) and explorer.label.shape == (LONGEST, LONGEST // 2)
    assert set(explorer.label.ravel().tolist()) <= set(label.ravel().tolist())


def test_in_a_running_loop_the_prediction_waits_for_a_pause(model: SptSeg) -> None:
    explorer, seen = FrequencyExplorer(model, toy()[0], CLASSES), []
    predict, explorer._predict_soon.function = explorer.predict, lambda: seen.append(explorer.band.value)

    async def drag() -> None:
        with renewed(explorer) as titles:
            for high in (0.5, 0.4, 0.3):
                explorer.band.value = (0.0, high)
        assert "filtered picture" in titles and not seen  # at once; later
        await asyncio.sleep(3 * PAUSE)
        assert seen == [(0.0, 0.3)]  # once, with the last value
        explorer._predict_soon.function = predict
        explorer.choose(0.0, 0.05)
        explorer.figure()  # shows the state of the controls even before the pause is over

    asyncio.run(drag())
    assert (explorer.result.labels == segment(model, explorer.filtered, CLASSES).labels).all()


def test_the_filter_explorer_shows_what_the_prompt_adds(model: SptSeg) -> None:
    explorer = FilterExplorer(model, [toy()[0], stripes(8, 32)])
    with renewed(explorer) as titles:
        explorer.channel.value = (explorer.channel.value + 1) % 32
    assert titles >= {"filter: amplitude", "tokens before", "added by prompt"}
    with renewed(explorer) as titles:
        explorer.picture.value = 1
    assert {"picture", "tokens before", "tokens after"} <= titles <= set(explorer.panels) - {"filter: amplitude"}
    for block in (0, 1):
        explorer.block.value = block
        tokens, added, gate = explorer.tokens()  # (8, 8, 32) twice, (32,)
        spectrum = torch.fft.fft2(tokens * gate, dim=(0, 1))
        kernel = torch.from_numpy(np.fft.ifftshift(explorer.response, axes=(0, 1)))
        torch.testing.assert_close(added, torch.fft.ifft2(spectrum * kernel, dim=(0, 1)).real, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="this model has no spectral prompt"):
        FilterExplorer(toy_model(spectral_layers=()))


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


def test_the_failure_browser_steps_from_the_worst_picture_to_the_best(model: SptSeg) -> None:
    browser, seen = FailureBrowser(failures.collect(model, Toys(6), SPLIT)), []
    wrong = [np.mean((p.label != p.predicted)[p.label != 255]) for p in browser.predictions.pictures]
    for _ in wrong:
        seen.append(wrong[browser.position])
        assert f"{seen[-1]:.1%} of its labelled pixels" in browser.note.value
        browser.forth.click()
    assert seen == sorted(wrong, reverse=True) and browser.rank.value == 6  # and stops at the end
    with renewed(browser) as titles:
        browser.back.click()
    assert browser.rank.value == 5 and titles
    assert browser.kind.label == "errors of all kinds"  # an option whose value is None would look empty
    for kind in failures.KINDS:
        browser.kind.value = kind
        worst = failures.worst_pictures(browser.errors, browser.labelled, kind)
        assert browser.rank.value == 1 and browser.position == worst[0]


def test_every_widget_has_a_still_figure_and_words_for_where_no_kernel_runs(model: SptSeg) -> None:
    image, label = toy()
    explorers = FrequencyExplorer(model, image, CLASSES, label), FrequencyExplorer(model, image, CLASSES)
    others = FilterExplorer(model, [image]), PromptPlayground(model, image, ["grass", "water"])
    for widget in (*explorers, *others, FailureBrowser(failures.collect(model, Toys(3), SPLIT))):
        figure = widget.figure()
        assert len(figure.axes) >= 4 and len(plots.png_bytes(figure, dpi=30)) > 3000
        assert f"{type(widget).__name__} (its controls need a running kernel" in repr(widget)


def test_overlays_carry_names_tables_escape_them_and_pictures_are_renewed_in_place() -> None:
    image, labels, panel = np.full((64, 64, 3), 120, np.uint8), np.zeros((64, 64), int), TitledPicture("picture")
    plain = named_overlay(image, labels, [""], [(0, 0, 200)])
    named = named_overlay(image, labels, ["name"], [(0, 0, 200)])
    assert plain.shape == named.shape == (384, 384, 3) and (named == 255).any() and not (plain == 255).any()
    assert "<i>" not in table(("class",), [((1, 2, 3), ("<i>",))]) and "#010203" in table((), [((1, 2, 3), ("a",))])
    panel.show(stripes(8, 32))
    kept, place = panel.image, (panel.image.layout.width, panel.image.layout.height)
    panel.show(stripes(4, 32))
    assert panel.image is kept and (kept.layout.width, kept.layout.height) == place
    assert np.asarray(Image.open(io.BytesIO(kept.value))).shape == (256, 256, 3)
