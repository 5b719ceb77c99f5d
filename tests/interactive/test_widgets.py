"""Controls moved in this process: pictures and sentences must follow; where no event loop runs, predictions at once."""

from __future__ import annotations

import asyncio
import io

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from toys import SPLIT, Toys, toy_model

from sptseg.analysis import failures
from sptseg.datasets import plots
from sptseg.inference.segmentation import segment
from sptseg.interactive.failure_browser import FailureBrowser
from sptseg.interactive.panels import LONGEST, PAUSE, Panel, named_overlay, shrunk, spectrum_picture, table
from sptseg.interactive.widgets import PRESETS, FilterExplorer, FrequencyExplorer, PromptPlayground
from sptseg.model.spt_seg import SptSeg

CLASSES = SPLIT.classes


@pytest.fixture
def model() -> SptSeg:
    return toy_model().eval()


def toy(size: tuple[int, int] = (32, 32), index: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """A picture (H, W, 3) and its labels (H, W)."""
    sample = Toys(sizes=(size,))[index]
    return sample["image"].permute(1, 2, 0).numpy(), sample["label"].numpy()


def stripes(period: int, size: int = 64) -> np.ndarray:
    """Grey waves along x, of a whole number of pixels: (size, size, 3)."""
    wave = 128 + 100 * np.cos(2 * np.pi * np.arange(size) / period)
    return np.rint(wave).astype(np.uint8)[None, :, None].repeat(size, axis=0).repeat(3, axis=2)


def decoded(panel: Panel) -> np.ndarray:
    """What the page shows."""
    return np.asarray(Image.open(io.BytesIO(panel.image.value)))


def all_bytes(panels: dict[str, Panel]) -> dict[str, bytes]:
    return {name: panel.image.value for name, panel in panels.items()}


def renewed(panels: dict[str, Panel], before: dict[str, bytes]) -> set[str]:
    return {name for name, value in all_bytes(panels).items() if value != before[name]}


# FrequencyExplorer ---------------------------------------------------------------------------------------------------


def test_the_band_slider_takes_waves_out_of_the_picture(model: SptSeg) -> None:
    explorer = FrequencyExplorer(model, stripes(8), CLASSES)  # all power at 1/8
    explorer.band.value = (0.1, 0.2)
    assert np.ptp(explorer.filtered) == 200 and "100.0%" in explorer.note.value
    explorer.band.value = (0.2, 0.3)
    assert np.ptp(explorer.filtered) <= 1 and "0.0%" in explorer.note.value
    explorer.remove.value = True
    assert np.abs(explorer.filtered.astype(int) - stripes(8)).max() <= 1
    assert explorer.sentence().startswith("Removed: 0.200 to 0.300 cycles per pixel, waves of 3.33 to 5 pixels")


def test_every_picture_but_the_first_follows_the_band(model: SptSeg) -> None:
    image, label = toy()
    explorer = FrequencyExplorer(model, image, CLASSES, label)
    before = all_bytes(explorer.panels)
    explorer.choose(0.0, 0.1)
    assert renewed(explorer.panels, before) == {"spectrum", "filtered picture", "prediction"}
    np.testing.assert_array_equal(explorer.result.labels, segment(model, explorer.filtered, CLASSES).labels)


def test_a_preset_changes_band_and_kind_in_one_step(model: SptSeg, monkeypatch: pytest.MonkeyPatch) -> None:
    explorer = FrequencyExplorer(model, toy()[0], CLASSES)
    updates = []
    monkeypatch.setattr(FrequencyExplorer, "update", lambda self: updates.append((self.band.value, self.remove.value)))
    for button in explorer.presets:
        button.click()
    assert updates == [((low, high), remove) for low, high, remove, _ in PRESETS.values()]


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
    kept, table_of = label != 255, explorer.table.value
    for i, before, after in explorer.changes():
        for result, iou in ((explorer.whole, before), (explorer.result, after)):
            found, true = (result.labels == i) & kept, label == i
            expected = (found & true).sum() / (found | true).sum() if (found | true).any() else float("nan")
            assert iou == pytest.approx(expected, nan_ok=True)
        assert (f"{100 * (after - before):+.1f} points" if after == after and before == before else "–") in table_of
    assert "boat*" not in CLASSES and explorer.names[2] == "boat*"
    without = FrequencyExplorer(model, image, CLASSES)
    assert sum(before for _, before, _ in without.changes()) == pytest.approx(1)


def test_large_pictures_shrink_together_with_their_labels(model: SptSeg) -> None:
    image, label = toy((2 * LONGEST, LONGEST))
    small, small_label = shrunk(image, label, len(CLASSES))
    assert small.shape == (LONGEST, LONGEST // 2, 3) and small_label.shape == (LONGEST, LONGEST // 2)
    assert set(small_label.ravel().tolist()) <= set(label.ravel().tolist())
    with pytest.raises(ValueError, match=r"the label is \(9, 9\) and the image \(32, 32\); wanted equal sizes"):
        FrequencyExplorer(model, toy()[0], CLASSES, np.zeros((9, 9), int))
    with pytest.raises(ValueError, match="the label holds 7; 5 classes have the labels 0 to 4"):
        FrequencyExplorer(model, toy()[0], CLASSES, np.full((32, 32), 7))


def test_in_a_running_loop_the_prediction_waits_for_a_pause(model: SptSeg, monkeypatch: pytest.MonkeyPatch) -> None:
    explorer = FrequencyExplorer(model, toy()[0], CLASSES)
    seen = []
    explorer._predict_soon.function = lambda: seen.append(explorer.band.value)

    async def drag() -> bytes:
        for high in (0.5, 0.4, 0.3):
            explorer.band.value = (0.0, high)
        shown = explorer.panels["filtered picture"].image.value
        assert not seen
        await asyncio.sleep(3 * PAUSE)
        return shown

    before = explorer.panels["filtered picture"].image.value
    assert asyncio.run(drag()) != before  # at once
    assert seen == [(0.0, 0.3)]  # once, with the last value


# The others ----------------------------------------------------------------------------------------------------------


def test_the_filter_explorer_shows_what_the_prompt_adds(model: SptSeg) -> None:
    explorer = FilterExplorer(model, [toy()[0], stripes(8, 32)])
    before = all_bytes(explorer.panels)
    explorer.channel.value = (explorer.channel.value + 1) % 32
    assert renewed(explorer.panels, before) >= {"filter: amplitude", "tokens before", "added by prompt"}
    before = all_bytes(explorer.panels)
    explorer.picture.value = 1
    assert {"tokens before", "tokens after"} <= renewed(explorer.panels, before) <= set(before) - {"filter: amplitude"}
    for block in (0, 1):
        explorer.block.value = block
        tokens, added, gate = explorer.tokens()  # (8, 8, 32) twice, (32,)
        spectrum = torch.fft.fft2(tokens * gate, dim=(0, 1))
        kernel = torch.from_numpy(np.fft.ifftshift(explorer.response, axes=(0, 1)))
        torch.testing.assert_close(added, torch.fft.ifft2(spectrum * kernel, dim=(0, 1)).real, atol=1e-5, rtol=1e-4)


def test_a_model_without_spectral_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match="this model has no spectral prompt"):
        FilterExplorer(toy_model(spectral_layers=()))


def test_the_playground_segments_what_is_typed() -> None:
    playground = PromptPlayground(toy_model(start="dense_clip").eval(), toy()[0], ["grass", "water"])
    before = all_bytes(playground.panels)
    playground.words.value = "tree, a boat , house,"
    assert playground.result.classes == ("tree", "a boat", "house")
    assert renewed(playground.panels, before) == {"masks", "score"}
    before = all_bytes(playground.panels)
    others = [name for name in playground.scored.options if name != playground.scored.value]
    playground.scored.value = others[0]
    assert renewed(playground.panels, before) == {"score"}


@pytest.mark.parametrize(
    ("typed", "said"),
    [("tree, zebra", "does not know &#x27;zebra&#x27;"), ("tree, tree", "given twice: tree"), (" ,", "is empty")],
)
def test_the_playground_says_what_it_cannot_do_and_keeps_its_pictures(model: SptSeg, typed: str, said: str) -> None:
    playground = PromptPlayground(model, toy()[0], ["grass", "water"])
    before = all_bytes(playground.panels)
    playground.words.value = typed
    assert "Not done" in playground.note.value and said in playground.note.value
    assert "The pictures still show: grass, water" in playground.note.value
    assert not renewed(playground.panels, before)
    playground.words.value = "house; tree"
    assert "Not done" not in playground.note.value


def test_the_failure_browser_steps_from_the_worst_picture_to_the_best(model: SptSeg) -> None:
    predictions = failures.collect(model, Toys(6), SPLIT)
    browser = FailureBrowser(predictions)
    wrong = [np.mean((p.label != p.predicted)[p.label != 255]) for p in predictions.pictures]
    seen = []
    for _ in predictions.pictures:
        seen.append(wrong[browser.position])
        assert f"{seen[-1]:.1%} of its labelled pixels" in browser.note.value
        browser.forth.click()
    assert seen == sorted(wrong, reverse=True) and browser.rank.value == 6  # and stops at the end
    before = all_bytes(browser.panels)
    browser.back.click()
    assert browser.rank.value == 5 and renewed(browser.panels, before)


def test_the_failure_browser_sorts_by_kind(model: SptSeg) -> None:
    browser = FailureBrowser(failures.collect(model, Toys(6), SPLIT))
    assert browser.kind.label == "errors of all kinds"  # an option whose value is None would look empty
    browser.rank.value = 3
    for kind in failures.KINDS:
        browser.kind.value = kind
        assert browser.rank.value == 1 and browser.position == browser.errors.worst(kind)[0]


# All -----------------------------------------------------------------------------------------------------------------


def test_every_widget_has_a_still_figure_and_words_for_where_no_kernel_runs(model: SptSeg) -> None:
    image, label = toy()
    for widget in (
        FrequencyExplorer(model, image, CLASSES, label),
        FrequencyExplorer(model, image, CLASSES),
        FilterExplorer(model, [image]),
        PromptPlayground(model, image, ["grass", "water"]),
        FailureBrowser(failures.collect(model, Toys(3), SPLIT)),
    ):
        figure = widget.figure()
        assert isinstance(figure, Figure) and len(figure.axes) >= 4
        assert len(plots.png_bytes(figure, dpi=30)) > 3000
        assert f"{type(widget).__name__} (its controls need a running kernel" in repr(widget)


def test_the_figure_shows_the_state_of_the_controls_even_before_the_pause_is_over(model: SptSeg) -> None:
    explorer = FrequencyExplorer(model, toy()[0], CLASSES)

    async def cell() -> None:
        explorer.choose(0.0, 0.05)
        explorer.figure()

    asyncio.run(cell())
    np.testing.assert_array_equal(explorer.result.labels, segment(model, explorer.filtered, CLASSES).labels)


def test_overlays_carry_names_and_tables_escape_them() -> None:
    image, labels = np.full((64, 64, 3), 120, np.uint8), np.zeros((64, 64), int)
    plain = named_overlay(image, labels, [""], [(0, 0, 200)])
    named = named_overlay(image, labels, ["name"], [(0, 0, 200)])
    assert plain.shape == named.shape == (384, 384, 3) and (named == 255).any() and not (plain == 255).any()
    assert "<i>" not in table(("class",), [((1, 2, 3), ("<i>",))]) and "#010203" in table((), [((1, 2, 3), ("a",))])


def test_pictures_are_renewed_in_place() -> None:
    panel = Panel("picture")
    panel.show(stripes(8, 32))
    kept, place = panel.image, (panel.image.layout.width, panel.image.layout.height)
    panel.show(stripes(4, 32))
    assert panel.image is kept and (panel.image.layout.width, panel.image.layout.height) == place
    assert decoded(panel).shape == (256, 256, 3)
