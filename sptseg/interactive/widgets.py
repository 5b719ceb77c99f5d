"""Frequencies, filters and class names, explored by hand. Core ipywidgets only.

>>> explorer = FrequencyExplorer(model, image, classes, label)
>>> explorer  # as a cell's last expression: sliders and pictures
>>> explorer.figure()  # the same state as a still picture, for where no kernel runs

A control first renews the pictures (`update`), and the prediction follows after a pause (`predict`); both can be called
without a browser. Pictures are the bytes of image widgets and are renewed in place, so nothing flickers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import islice
from typing import Any

import ipywidgets
import numpy as np
import torch
from ipywidgets import Layout
from matplotlib.figure import Figure
from torch import Tensor
from torchvision import tv_tensors

from sptseg import scenes
from sptseg.analysis import filter_picture, filter_response, prompt_states, radial_power, spectral_prompt_of
from sptseg.datasets import Split, as_array, names, plots, test_transform
from sptseg.inference import Segmentation, augmentation, confusion_matrix, iou_per_class, pad_to_patches, segment
from sptseg.interactive import parts
from sptseg.model import SptSeg

Array = np.ndarray
HIGHEST = 0.71  # cycles per pixel: just above sqrt(0.5), the corner of the spectrum
BAND_PRESETS: dict[str, tuple[float, float, bool, str]] = {  # name: low, high (cycles per pixel), remove, what it shows
    "everything": (0.0, HIGHEST, False, "The picture as it is"),
    "blur": (0.0, 0.04, False, "Only slow changes: light and large shapes"),
    "middle band": (0.04, 0.14, False, "Only textures and the parts of things"),
    "edges": (0.14, HIGHEST, False, "Only fine detail"),
    "no middle band": (0.04, 0.14, True, "Large shapes and fine detail without what lies between"),
}


class FrequencyExplorer(parts.Explorer):
    """Cut a band of frequencies out of a picture, and watch picture, spectrum and the model's masks change.

    Args:
        image: a picture, as for `segment`; over 512 pixels it is shrunk to that.
        classes: names; every pixel gets one of them.
        label: the true class of each pixel (H, W), positions in `classes`, 255 ignored; with it, each class's IoU is
            shown before and after the cut, else its area.
        unseen: classes unseen in training, which are marked.
    """

    def __init__(
        self, model: SptSeg, image: Any, classes: Sequence[str], label: Any = None, unseen: Collection[str] = ()
    ) -> None:
        self.model, self.classes = model, tuple(classes)
        self.names = [plots.marked(name, unseen) for name in self.classes]
        self.picture = self.filtered = parts.made_smaller(as_array(image))
        self.label = None if label is None else parts.made_smaller(np.asarray(label, np.int32))
        self.spectrum, self.radius = parts.spectrum_picture(self.picture)
        self.power = radial_power(self.picture.transpose(2, 0, 1).astype(float), window=False)
        self.whole = self.result = segment(model, self.picture, self.classes)
        self.band = ipywidgets.FloatRangeSlider(
            value=(0.0, HIGHEST), min=0, max=HIGHEST, step=0.005, readout_format=".3f",
            description="Band (cycles/pixel)", tooltip="Low and high cut-off; arrow keys move the handle in focus",
            layout=Layout(width="600px"), **parts.WIDE,
        )  # fmt: skip
        self.remove: Any = ipywidgets.ToggleButtons(
            options=[("keep the band", False), ("remove the band", True)],
            tooltips=["Show only what lies in the band", "Show only what lies outside of the band"],
        )
        self.presets = [ipywidgets.Button(description=name, tooltip=BAND_PRESETS[name][-1]) for name in BAND_PRESETS]
        for button in self.presets:
            button.on_click(lambda clicked: self.choose(*BAND_PRESETS[clicked.description][:3]))
        controls = [[self.band, self.remove], [ipywidgets.Label("Presets"), *self.presets]]
        super().__init__(controls, "picture", "spectrum", "filtered picture", "prediction")
        self.panels["picture"].show(self.picture)
        self._choosing, self._predict_soon = False, parts.AfterPause(self.predict)
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
        self.note.value = parts.message(self.sentence())

    def predict(self) -> None:
        """Segments the filtered picture; shows the masks and what became of each class."""
        self.result = segment(self.model, self.filtered, self.classes)
        self.panels["prediction"].show(self._masks())
        rows = []
        for i, before, after in self.changes():
            shares = parts.percent(before), parts.percent(after), parts.points(after - before)
            rows.append((self.result.palette[i], (self.names[i], *shares)))
        head = ("Share of the picture" if self.label is None else "IoU", "whole picture", "filtered", "change")
        self.table.value = parts.table(head, rows, parts.unseen_note(self.names))

    def _masks(self) -> Array:
        return parts.named_overlay(self.filtered, self.result.labels, self.names, self.result.palette)

    def changes(self) -> list[tuple[int, float, float]]:
        """Classes in truth or prediction: position, IoU (area if there is no label) before and after the cut, 0..1."""
        truth = self.whole.labels if self.label is None else self.label
        before, after = (self._measure(result) for result in (self.whole, self.result))
        return [(i, before[i], after[i]) for i in plots.present(truth, self.whole.labels, self.result.labels)]

    def _measure(self, result: Segmentation) -> list[float]:
        if self.label is None:
            return list(result.areas().values())
        split = Split.from_names("given", self.classes)
        return iou_per_class(confusion_matrix(self.label, result.labels, split)).tolist()

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
        pictures = (self.picture, self.marked_spectrum(), self.filtered, self._masks())
        titled, size = dict(zip(self.panels, pictures, strict=True)), (13.5, max(3.3, 1.1 + 0.2 * len(rows)))
        figure, (chart,) = parts.picture_row(titled, self.sentence(), size, [0.9])
        below = ["share of the picture (%)" if self.label is None else "IoU (%)", parts.unseen_note(self.names)]
        parts.before_and_after(chart, rows, "\n".join(below))
        return figure


class FilterExplorer(parts.Explorer):
    """One channel of the learned spectral filter: amplitude, phase, and what it adds to a picture's token map.

    Args:
        images: pictures to choose from, as for `segment`; None for twelve drawn scenes.
    """

    def __init__(self, model: SptSeg, images: Sequence[Any] | None = None) -> None:
        self.model, prompt = model, spectral_prompt_of(model.encoder)
        given = [scenes.draw(seed)[0] for seed in range(12)] if images is None else images
        self.images = [parts.made_smaller(as_array(image)) for image in given]
        self.response = np.fft.fftshift(filter_response(prompt), axes=(0, 1))  # (H, W, D), frequency 0 in the middle
        gain = np.abs(self.response).mean(axis=(0, 1))  # (D,)
        self.strongest = np.argsort(-gain)[:5].tolist()
        wide = {"layout": Layout(width="420px"), **parts.WIDE}
        self.block: Any = ipywidgets.Dropdown(
            options=[(f"before block {i}", i) for i in sorted(model.encoder.spectral_layers)],
            description="Prompt", **parts.WIDE, tooltip="One filter serves all blocks; the tokens differ",
        )  # fmt: skip
        self.channel = ipywidgets.IntSlider(
            self.strongest[0], 0, len(gain) - 1, description="Channel", tooltip="One of the encoder's channels", **wide
        )
        self.picture = ipywidgets.IntSlider(
            0, 0, len(self.images) - 1, description="Picture", tooltip="Whose tokens are filtered", **wide
        )
        self._tokens: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        super().__init__([[self.block, self.channel, self.picture]], "picture", *(name for name, *_ in self.maps()))
        for control in (self.block, self.channel, self.picture):
            control.observe(self.update, "value")
        self.update()

    @torch.inference_mode()
    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Patch tokens before the prompt and what it adds to them, both (H, W, D), and the class token's gate (D,)."""
        key = (self.picture.value, self.block.value)
        if key not in self._tokens:
            image = tv_tensors.Image(torch.tensor(self.images[key[0]]).permute(2, 0, 1))
            prepared = test_transform(augmentation(self.model.config))(image)[None]
            prepared = pad_to_patches(prepared, self.model.encoder.patch_size).to(self.model.device)
            before, added, gate = next(islice(prompt_states(self.model.encoder, prepared), key[1], None))
            self._tokens[key] = (before[0].float().cpu(), added[0].float().cpu(), gate[0].float().cpu())
        return self._tokens[key]

    def update(self, _change: object = None) -> None:
        """Shows the chosen block, channel and picture."""
        self.panels["picture"].show(self.images[self.picture.value])
        for name, values, low, high, colour_map in self.maps():
            self.panels[name].show_map(values, low, high, colour_map)
        self.note.value = parts.message(self.sentence())

    def maps(self) -> list[parts.Map]:
        """The filter, and the tokens before and after."""
        response = self.response[..., self.channel.value]  # (H, W)
        before, added, _ = (each[..., self.channel.value].numpy() for each in self.tokens())
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
        return parts.map_row({"picture": self.images[self.picture.value]}, self.maps(), self.sentence())


class PromptPlayground(parts.Explorer):
    """Type class names, and see masks and scores. What the model cannot read is told in a sentence.

    Args:
        image: a picture, as for `segment`; over 512 pixels it is shrunk to that.
        classes: the names to begin with.
    """

    def __init__(self, model: SptSeg, image: Any, classes: Sequence[str] = ("sky", "grass", "tree", "house")) -> None:
        self.model, self.picture = model, parts.made_smaller(as_array(image))
        self.result = segment(model, self.picture, classes)
        self.words = ipywidgets.Text(
            ", ".join(classes), description="Classes", placeholder="sky, boat", layout=Layout(width="600px"),
            tooltip="Names or phrases, commas between them; Enter segments", continuous_update=False, **parts.WIDE,
        )  # fmt: skip
        tooltip = "The class whose score is shown"
        self.scored = ipywidgets.Dropdown(description="Score of", tooltip=tooltip, **parts.WIDE)
        super().__init__([[self.words, self.scored]], "picture", "masks", "score")
        self.panels["picture"].show(self.picture)
        self.words.observe(self.update, "value")
        self.scored.observe(self.show_score, "value")
        self.update()

    def update(self, _change: object = None) -> None:
        """Segments the picture into the names typed; where that fails, says why and leaves the pictures."""
        try:
            self.result = result = segment(self.model, self.picture, names(self.words.value))
        except ValueError as error:
            kept = f"The pictures still show: {', '.join(self.result.classes)}."
            self.note.value = parts.message(f"{error}. {kept}", warning=True)
            return
        self.note.value = parts.message("Every pixel gets the class with the highest score, even if that is low.")
        self.panels["masks"].show(self._masks())
        self.scores = {name: result.scores(name) for name in result.classes}
        areas, colours = result.areas(), dict(zip(result.classes, result.palette, strict=True))
        largest = sorted(areas, key=lambda name: -areas[name])
        shares = {name: (parts.percent(areas[name]), parts.percent(self.scores[name].max())) for name in largest}
        rows = [(colours[name], (name, *shares[name])) for name in largest]
        self.table.value = parts.table(("class", "area", "highest score"), rows)
        chosen = self.scored.value
        self.scored.options = result.classes
        self.scored.value = chosen if chosen in result.classes else largest[0]
        self.show_score()

    def _masks(self) -> Array:
        return parts.named_overlay(self.picture, self.result.labels, self.result.classes, self.result.palette)

    def _score(self, name: str) -> parts.Map:
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
        title = "Areas: " + ", ".join(f"{name} {parts.percent(areas[name])}" for name in largest)
        pictures = {"picture": self.picture, "masks": self._masks()}
        return parts.map_row(pictures, [self._score(name) for name in largest], title)
