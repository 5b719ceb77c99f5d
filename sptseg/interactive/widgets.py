"""Frequencies, filters, class names and failures, explored by hand. Core ipywidgets only.

>>> explorer = FrequencyExplorer(model, image, classes, label)
>>> explorer  # as a cell's last expression: sliders and pictures
>>> explorer.figure()  # the same state as a still picture, for where no kernel runs

A control first renews the pictures (`update`), and the prediction follows after a pause (`predict`); both can be called
without a browser. Pictures are the bytes of image widgets and are renewed in place, so nothing flickers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import ipywidgets
import numpy as np
import torch
from ipywidgets import HTML, Layout
from matplotlib.figure import Figure
from torch import Tensor
from torchvision import tv_tensors

from sptseg import scenes
from sptseg.analysis import filter_picture, filter_response, radial_power, spectral_prompt_of
from sptseg.datasets import as_array, names, plots, test_transform
from sptseg.inference import Segmentation, augmentation, confusion, iou_per_class, pad_to_patches, segment
from sptseg.interactive.failure_browser import FailureBrowser
from sptseg.interactive.panels import (
    WIDE,
    AfterPause,
    Explorer,
    Map,
    Maps,
    Panel,
    before_and_after,
    message,
    named_overlay,
    pairs,
    percent,
    points,
    row,
    shrunk,
    spectrum_picture,
    table,
    unseen_note,
)
from sptseg.model import SptSeg

__all__ = ["FailureBrowser", "FilterExplorer", "FrequencyExplorer", "PromptPlayground"]

Array = np.ndarray
HIGHEST = 0.71  # cycles per pixel: just above sqrt(0.5), the corner of the spectrum
PRESETS: dict[str, tuple[float, float, bool, str]] = {  # name: low, high (cycles per pixel), remove, what it shows
    "everything": (0.0, HIGHEST, False, "The picture as it is"),
    "blur": (0.0, 0.04, False, "Only slow changes: light and large shapes"),
    "middle band": (0.04, 0.14, False, "Only textures and the parts of things"),
    "edges": (0.14, HIGHEST, False, "Only fine detail"),
    "no middle band": (0.04, 0.14, True, "Large shapes and fine detail without what lies between"),
}


class FrequencyExplorer(Explorer):
    """Cut a band of frequencies out of a picture, and watch picture, spectrum and the model's masks change.

    Args:
        image: a picture, as for `segment`; over 512 pixels it is shrunk to that.
        classes: names; every pixel gets one of them.
        label: the true class of each pixel (H, W), positions in `classes`, 255 ignored; with it, each class's IoU is
            shown before and after the cut, else its area.
        unseen: classes unseen in training, which are marked.
    """

    def __init__(
        self,
        model: SptSeg,
        image: Any,
        classes: Sequence[str],
        label: Array | None = None,
        unseen: Collection[str] = (),
    ) -> None:
        self.model, self.classes = model, tuple(classes)
        self.names = [plots.marked(name, unseen) for name in self.classes]
        self.picture, self.label = shrunk(as_array(image), label, len(self.classes))
        self.spectrum, self.radius = spectrum_picture(self.picture)
        self.power = radial_power(self.picture.transpose(2, 0, 1).astype(float), window=False)
        self.whole = self.result = segment(model, self.picture, self.classes)
        self.filtered = self.picture

        self.band = ipywidgets.FloatRangeSlider(
            value=(0.0, HIGHEST), min=0, max=HIGHEST, step=0.005, readout_format=".3f",
            description="Band (cycles/pixel)", tooltip="Low and high cut-off; arrow keys move the handle in focus",
            layout=Layout(width="600px"), **WIDE,
        )  # fmt: skip
        self.remove: Any = ipywidgets.ToggleButtons(
            options=[("keep the band", False), ("remove the band", True)],
            tooltips=["Show only what lies in the band", "Show only what lies outside of the band"],
        )
        self.presets = [ipywidgets.Button(description=name, tooltip=PRESETS[name][-1]) for name in PRESETS]
        for button in self.presets:
            button.on_click(lambda clicked: self.choose(*PRESETS[clicked.description][:3]))
        self.panels = {name: Panel(name) for name in ("picture", "spectrum", "filtered picture", "prediction")}
        self.panels["picture"].show(self.picture)
        self.note, self.table = HTML(), HTML()
        controls = [row([self.band, self.remove]), row([ipywidgets.Label("Presets"), *self.presets]), self.note]
        super().__init__([*controls, pairs(self.panels.values()), self.table])
        self._choosing, self._predict_soon = False, AfterPause(self.predict)
        for control in (self.band, self.remove):
            control.observe(self._changed, "value")
        self.update()
        self.predict()

    def choose(self, low: float, high: float, remove: bool = False) -> None:
        """Sets both cut-offs, in cycles per pixel, and whether the band is removed instead of kept."""
        self._choosing = True
        self.band.value, self.remove.value = (low, min(high, HIGHEST)), remove
        self._choosing = False
        self._changed()

    def _changed(self, _change: object = None) -> None:
        if not self._choosing:
            self.update()
            self._predict_soon()

    def update(self) -> None:
        """Filters the picture; shows it, and what is left of the spectrum."""
        self.filtered = filter_picture(self.picture, *self.band.value, reject=self.remove.value)
        self.panels["filtered picture"].show(self.filtered)
        self.panels["spectrum"].show(self.marked_spectrum())
        self.note.value = message(self.sentence())

    def predict(self) -> None:
        """Segments the filtered picture; shows the masks and what became of each class."""
        self.result = segment(self.model, self.filtered, self.classes)
        self.panels["prediction"].show(self._masks())
        measure = "Share of the picture" if self.label is None else "IoU"
        rows = [
            (self.result.palette[i], (self.names[i], percent(before), percent(after), points(after - before)))
            for i, before, after in self.changes()
        ]
        self.table.value = table((measure, "whole picture", "filtered", "change"), rows, unseen_note(self.names))

    def _masks(self) -> Array:
        return named_overlay(self.filtered, self.result.labels, self.names, self.result.palette)

    def changes(self) -> list[tuple[int, float, float]]:
        """Classes in truth or prediction: position, IoU (area if there is no label) before and after the cut, 0..1."""
        truth = self.whole.labels if self.label is None else self.label
        before, after = (self._measure(result) for result in (self.whole, self.result))
        return [(i, before[i], after[i]) for i in plots.present(truth, self.whole.labels, self.result.labels)]

    def _measure(self, result: Segmentation) -> list[float]:
        if self.label is None:
            return list(result.areas().values())
        return iou_per_class(torch.from_numpy(confusion(self.label, result.labels, len(self.classes)))).tolist()

    def marked_spectrum(self) -> Array:
        """The spectrum, dark where it is cut away, the cuts in white: (h, w, 3) uint8."""
        low, high = self.band.value
        kept = ((self.radius >= low) & (self.radius < high)) != self.remove.value
        shown = np.where(kept[..., None], self.spectrum, self.spectrum // 3)
        shown[plots.borders(kept)] = 255
        return shown

    def sentence(self) -> str:
        """What the filter does, in words and figures."""
        (low, high), remove = self.band.value, self.remove.value
        share = self.power.share(low, high)
        longest = f"to {1 / low:.3g} pixels" if low else "pixels and longer"
        waves = f", waves of {1 / min(high, 0.5**0.5):.3g} {longest}" if low < high else ": nothing"
        sees = min(self.model.config.image_size) / min(self.picture.shape[:2]) / 2
        limit = f" The model looks at fewer pixels: nothing above {sees:.3g} reaches it." if sees < 0.5 else ""
        return (
            f"{'Removed' if remove else 'Kept'}: {low:.3f} to {high:.3f} cycles per pixel{waves}. "
            f"What is left has {1 - share if remove else share:.1%} of the picture's variance.{limit}"
        )

    def figure(self) -> Figure:
        """The same as a still picture."""
        self.update()
        self.predict()
        rows = [(self.names[i], self.result.palette[i], before, after) for i, before, after in self.changes()]
        figure = plots.Plot(13.5, max(3.3, 1.1 + 0.2 * len(rows)))
        figure.suptitle(self.sentence(), fontsize=10, color=plots.INK)
        *axes, chart = figure.subplots(1, 5, width_ratios=[1, 1, 1, 1, 0.9])
        pictures = (self.picture, self.marked_spectrum(), self.filtered, self._masks())
        for ax, title, picture in zip(axes, self.panels, pictures, strict=True):
            plots.show_image(ax, picture, title)
        measure = "share of the picture (%)" if self.label is None else "IoU (%)"
        before_and_after(chart, rows, "\n".join([measure, unseen_note(self.names)]), "whole picture", "filtered")
        return figure


class FilterExplorer(Explorer):
    """One channel of the learned spectral filter: amplitude, phase, and what it adds to a picture's token map.

    Args:
        images: pictures to choose from, as for `segment`; None for twelve drawn scenes.
    """

    def __init__(self, model: SptSeg, images: Sequence[Any] | None = None) -> None:
        self.model, prompt = model, spectral_prompt_of(model.encoder)
        given = [scenes.draw(seed)[0] for seed in range(12)] if images is None else images
        self.images = [shrunk(as_array(image), None, 0)[0] for image in given]
        self.response = np.fft.fftshift(filter_response(prompt), axes=(0, 1))  # (H, W, D), frequency 0 in the middle
        gain = np.abs(self.response).mean(axis=(0, 1))  # (D,)
        self.strongest = np.argsort(-gain)[:5].tolist()
        layers = sorted(model.encoder.spectral_layers)
        wide = {"layout": Layout(width="420px"), **WIDE}
        self.block: Any = ipywidgets.Dropdown(
            options=[(f"before block {i}", i) for i in layers], description="Prompt", **WIDE,
            tooltip="One filter serves all of these blocks; the tokens that it meets differ",
        )  # fmt: skip
        self.channel = ipywidgets.IntSlider(
            self.strongest[0], 0, len(gain) - 1, description="Channel", tooltip="One of the encoder's channels", **wide
        )
        self.picture = ipywidgets.IntSlider(
            0, 0, len(self.images) - 1, description="Picture", tooltip="Whose tokens are filtered", **wide
        )
        self._tokens: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        self.photograph, self.note = Panel("picture"), HTML()
        self.panels = {name: Panel(name) for name, *_ in self.maps()}
        panels = [self.photograph, *self.panels.values()]
        controls = row([self.block, self.channel, self.picture])
        super().__init__([controls, self.note, row(panels[:3]), row(panels[3:])])
        for control in (self.block, self.channel, self.picture):
            control.observe(self.update, "value")
        self.update()

    @torch.inference_mode()
    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Patch tokens before the prompt and what it adds to them, both (H, W, D), and the class token's gate (D,)."""
        key = (self.picture.value, self.block.value)
        if key not in self._tokens:
            model, encoder = self.model, self.model.encoder
            image = torch.tensor(self.images[key[0]]).permute(2, 0, 1)
            prepared = test_transform(augmentation(model.config))(tv_tensors.Image(image))[None]
            prepared = pad_to_patches(prepared, encoder.patch_size).to(model.device)
            height, width = grid = encoder.grid_of(prepared)
            x = (encoder.embed(prepared), *encoder.states(prepared))[key[1]]
            tokens, gate = x[:, -height * width :].unflatten(1, grid), x[:, 0]
            prompt = spectral_prompt_of(encoder)
            added = prompt(tokens, gate, prompt.filter(grid)) - tokens
            self._tokens[key] = (tokens[0].float().cpu(), added[0].float().cpu(), gate[0].float().cpu())
        return self._tokens[key]

    def update(self, _change: object = None) -> None:
        """Shows the chosen block, channel and picture."""
        self.photograph.show(self.images[self.picture.value])
        for name, values, low, high, colour_map in self.maps():
            self.panels[name].show_map(values, low, high, colour_map)
        self.note.value = message(self.sentence())

    def maps(self) -> list[Map]:
        """The filter, and the tokens before and after."""
        response = self.response[..., self.channel.value]  # (H, W)
        before, added, _ = (each[..., self.channel.value].numpy() for each in self.tokens())
        after = before + added
        spread, most = float(max(abs(before).max(), abs(after).max())), float(abs(added).max())
        return [
            ("filter: amplitude", abs(response), 0, float(abs(response).max()), "cividis"),
            ("filter: phase, degrees", np.rad2deg(np.angle(response)), -180, 180, "twilight_shifted"),
            ("tokens before", before, -spread, spread, "RdBu_r"),
            ("added by prompt", added, -most, most, "RdBu_r"),
            ("tokens after", after, -spread, spread, "RdBu_r"),
        ]

    def sentence(self) -> str:
        """What this channel's filter does to these tokens, in figures."""
        tokens, added, gate = (each[..., self.channel.value] for each in self.tokens())
        share = float(added.square().sum() / tokens.square().sum())
        return (
            f"Channel {self.channel.value}: before filtering, the tokens are multiplied by the class token's value, "
            f"{float(gate):.3g}. What is added has {100 * share:.2g} % of the tokens' energy. "
            f"Blue is below 0, red above. Channels with the strongest filters: {', '.join(map(str, self.strongest))}."
        )

    def figure(self) -> Figure:
        """The same as a still picture."""
        return Maps({"picture": self.images[self.picture.value]}, self.maps(), self.sentence())


class PromptPlayground(Explorer):
    """Type class names, and see masks and scores. What the model cannot read is told in a sentence.

    Args:
        image: a picture, as for `segment`; over 512 pixels it is shrunk to that.
        classes: the names to begin with.
    """

    def __init__(self, model: SptSeg, image: Any, classes: Sequence[str] = ("sky", "grass", "tree", "house")) -> None:
        self.model, self.picture = model, shrunk(as_array(image), None, 0)[0]
        self.result = segment(model, self.picture, classes)
        self.words = ipywidgets.Text(
            ", ".join(classes), description="Classes", continuous_update=False, layout=Layout(width="600px"),
            tooltip="Names or phrases, commas between them; the Enter key segments", placeholder="sky, boat", **WIDE,
        )  # fmt: skip
        self.scored = ipywidgets.Dropdown(description="Score of", tooltip="The class whose score is shown", **WIDE)
        self.panels = {name: Panel(name) for name in ("picture", "masks", "score")}
        self.panels["picture"].show(self.picture)
        self.note, self.table = HTML(), HTML()
        pictures = row([*self.panels.values(), self.table])
        super().__init__([row([self.words, self.scored]), self.note, pictures])
        self.words.observe(self.update, "value")
        self.scored.observe(self.show_score, "value")
        self.update()

    def update(self, _change: object = None) -> None:
        """Segments the picture into the names typed; where that fails, says why and leaves the pictures."""
        try:
            self.result = result = segment(self.model, self.picture, names(self.words.value))
        except ValueError as error:
            self.note.value = message(f"{error}. The pictures still show: {', '.join(self.result.classes)}.", True)
            return
        self.note.value = message("Every pixel gets the class with the highest score, even if that is low.")
        self.panels["masks"].show(self._masks())
        self.scores = {name: result.scores(name) for name in result.classes}
        areas = result.areas()
        rows = sorted(zip(result.classes, result.palette, strict=True), key=lambda row: -areas[row[0]])
        self.table.value = table(
            ("class", "area", "highest score"),
            [(colour, (name, percent(areas[name]), percent(self.scores[name].max()))) for name, colour in rows],
        )
        chosen = self.scored.value
        self.scored.options = result.classes
        self.scored.value = chosen if chosen in result.classes else rows[0][0]
        self.show_score()

    def _masks(self) -> Array:
        return named_overlay(self.picture, self.result.labels, self.result.classes, self.result.palette)

    def _score(self, name: str) -> Map:
        highest = max(float(scores.max()) for scores in self.scores.values())
        return f"score of {name}", self.scores[name], 0, highest, "cividis"

    def show_score(self, _change: object = None) -> None:
        """Shows where the model finds the chosen class, on a scale that all classes share."""
        if self.scored.value is not None:
            self.panels["score"].show_map(*self._score(self.scored.value)[1:])

    def figure(self) -> Figure:
        """The same as a still picture, with the scores of the four largest classes."""
        areas = self.result.areas()
        largest = sorted(areas, key=lambda name: -areas[name])[:4]
        title = "Areas: " + ", ".join(f"{name} {percent(areas[name])}" for name in largest)
        return Maps({"picture": self.picture, "masks": self._masks()}, [self._score(n) for n in largest], title)
