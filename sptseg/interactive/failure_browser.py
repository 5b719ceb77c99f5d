"""A widget that steps through a model's failures; `sptseg.widgets` holds the others."""

from __future__ import annotations

import ipywidgets
import numpy as np
import torch
from ipywidgets import HTML, Layout
from matplotlib.figure import Figure

from sptseg.analysis import KINDS, Predictions, error_map, errors
from sptseg.datasets import IGNORE, luminance, plots, spread_palette
from sptseg.inference import confusion, iou_per_class
from sptseg.interactive.panels import (
    WIDE,
    Explorer,
    Panel,
    message,
    named_overlay,
    pairs,
    percent,
    row,
    table,
    unseen_note,
)

Array = np.ndarray
ALL = "errors of all kinds"
KIND_COLOURS = spread_palette(len(KINDS))


class FailureBrowser(Explorer):
    """Steps through pictures, those with the most errors of a kind first.

    Args:
        predictions: from `failures.collect`.
        radius: pixels from the true border within which an error counts as one of the border.
    """

    def __init__(self, predictions: Predictions, radius: int = 4) -> None:
        self.predictions, self.radius, split = predictions, radius, predictions.split
        self.errors = errors(predictions, radius)
        self.names = [plots.marked(name, split.names(split.unseen)) for name in split.classes]
        self.kind = ipywidgets.Dropdown(
            options=[(ALL, ALL), *((f"{i}  {kind}", kind) for i, kind in enumerate(KINDS, start=1))],
            description="Sort by", tooltip="What the pictures are sorted by", layout=Layout(width="320px"), **WIDE,
        )  # fmt: skip
        self.rank = ipywidgets.IntSlider(
            1, 1, len(predictions.pictures), description="Place", tooltip="1 is the worst picture", **WIDE
        )
        self.back = ipywidgets.Button(description="◀ worse", tooltip="The picture before")
        self.forth = ipywidgets.Button(description="better ▶", tooltip="The next picture")
        self.back.on_click(lambda _: self.step(-1))
        self.forth.on_click(lambda _: self.step(1))
        self.panels = {name: Panel(name) for name in ("picture", "truth", "prediction", "errors")}
        self.note, self.kinds, self.table = HTML(), HTML(), HTML()
        controls = row([self.kind, self.rank, self.back, self.forth])
        super().__init__([controls, self.note, pairs(self.panels.values()), row([self.kinds, self.table])])
        self.kind.observe(self._sorted, "value")
        self.rank.observe(self.update, "value")
        self.update()

    def step(self, by: int) -> None:
        """Goes some places on; stops at both ends."""
        self.rank.value = min(max(self.rank.value + by, 1), self.rank.max)

    def _sorted(self, _change: object) -> None:
        if self.rank.value == 1:
            self.update()
        self.rank.value = 1

    @property
    def position(self) -> int:
        """Which of the predictions' pictures is shown."""
        return self.errors.worst(None if self.kind.value == ALL else self.kind.value)[self.rank.value - 1]

    def update(self, _change: object = None) -> None:
        """Shows the picture at this place, its truth, prediction and errors, and their figures."""
        picture, split = self.predictions.pictures[self.position], self.predictions.split
        for panel, shown in zip(self.panels.values(), self._pictures(), strict=True):
            panel.show(shown)
        self.note.value = message(self.sentence())
        here = self.errors.counts[self.position] / max(int(self.errors.labelled[self.position]), 1)
        rows = [
            (colour, (f"{i}  {kind}: {meaning}", percent(share), percent(everywhere)))
            for i, (colour, share, (kind, everywhere), meaning) in enumerate(
                zip(KIND_COLOURS, here.tolist(), self.errors.shares().items(), KINDS.values(), strict=True), start=1
            )
        ]
        self.kinds.value = table(("error", "of this picture", "of all errors"), rows)
        iou = iou_per_class(torch.from_numpy(confusion(picture.label, picture.predicted, len(split.classes))))
        found = plots.present(picture.label, picture.predicted)
        rows = [(split.palette[i], (self.names[i], percent(float(iou[i])))) for i in found]
        self.table.value = table(("class", "IoU in this picture"), rows, unseen_note(self.names))

    def _pictures(self) -> list[Array]:
        picture, split = self.predictions.pictures[self.position], self.predictions.split
        kinds = error_map(picture.label, picture.predicted, split, self.radius)
        wrong = np.where((kinds == 0) | (kinds == IGNORE), IGNORE, kinds - 1)
        faint = (luminance(picture.image) * 100 + 130).astype(np.uint8)[..., None].repeat(3, axis=2)
        return [
            picture.image,
            named_overlay(picture.image, picture.label, self.names, split.palette),
            named_overlay(picture.image, picture.predicted, self.names, split.palette),
            named_overlay(faint, wrong, "1 2 3 4 5 6".split(), KIND_COLOURS),
        ]

    def sentence(self) -> str:
        """Which picture this is, and how much of it is wrong."""
        wrong, labelled = int(self.errors.counts[self.position].sum()), int(self.errors.labelled[self.position])
        name = self.predictions.pictures[self.position].name
        place = f"place {self.rank.value} of {self.rank.max}"
        return f"{name}, {place}: {wrong / max(labelled, 1):.1%} of its labelled pixels are wrong."

    def figure(self) -> Figure:
        """The same as a still picture."""
        figure = plots.Plot(11.5, 2.8)
        figure.suptitle(self.sentence(), fontsize=10, color=plots.INK)
        *axes, key = figure.subplots(1, 5, width_ratios=[1, 1, 1, 1, 0.9])
        for ax, title, picture in zip(axes, self.panels, self._pictures(), strict=True):
            plots.show_image(ax, picture, title)
        plots.legend(key, [f"{i}  {kind}" for i, kind in enumerate(KINDS, start=1)], KIND_COLOURS)
        return figure
