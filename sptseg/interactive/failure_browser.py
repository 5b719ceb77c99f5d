"""A widget that steps through a model's failures."""

from __future__ import annotations

import ipywidgets
import numpy as np
from ipywidgets import Layout
from matplotlib.figure import Figure

from sptseg.analysis import KINDS, Predictions, error_counts, error_map, error_shares, worst_pictures
from sptseg.datasets import IGNORE, luminance, plots, spread_palette
from sptseg.inference import confusion_matrix, iou_per_class
from sptseg.interactive import parts

ALL = "errors of all kinds"
KIND_COLOURS = spread_palette(len(KINDS))
NUMBERED = [f"{i}  {kind}" for i, kind in enumerate(KINDS, start=1)]


class FailureBrowser(parts.Explorer):
    """Steps through pictures, those with the most errors of a kind first.

    Args:
        predictions: from `failures.collect`.
        radius: pixels from the true border within which an error counts as one of the border.
    """

    def __init__(self, predictions: Predictions, radius: int = 4) -> None:
        self.predictions, self.radius, split = predictions, radius, predictions.split
        self.errors = error_counts(predictions, radius)
        self.labelled = predictions.confusions().sum(axis=(1, 2))
        self.names = [plots.marked(name, split.names(split.unseen)) for name in split.classes]
        kinds, number = [(ALL, ALL), *zip(NUMBERED, KINDS, strict=True)], len(predictions.pictures)
        self.kind = ipywidgets.Dropdown(
            options=kinds, description="Sort by", tooltip="What the pictures are sorted by",
            layout=Layout(width="320px"), **parts.WIDE,
        )  # fmt: skip
        tooltip = "1 is the worst picture"
        self.rank = ipywidgets.IntSlider(1, 1, number, description="Place", tooltip=tooltip, **parts.WIDE)
        self.back = ipywidgets.Button(description="◀ worse", tooltip="The picture before")
        self.forth = ipywidgets.Button(description="better ▶", tooltip="The next picture")
        self.back.on_click(lambda _: self.step(-1))
        self.forth.on_click(lambda _: self.step(1))
        super().__init__([[self.kind, self.rank, self.back, self.forth]], "picture", "truth", "prediction", "errors")
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
        kind = None if self.kind.value == ALL else self.kind.value
        return worst_pictures(self.errors, self.labelled, kind)[self.rank.value - 1]

    def update(self, _change: object = None) -> None:
        """Shows the picture at this place, its truth, prediction and errors, and their figures."""
        position, split = self.position, self.predictions.split
        picture = self.predictions.pictures[position]
        for title, shown in self._pictures().items():
            self.panels[title].show(shown)
        self.note.value = parts.message(self.sentence())
        here = self.errors.loc[position] / max(self.labelled[position], 1)
        columns = (KIND_COLOURS, NUMBERED, KINDS.values(), here, error_shares(self.errors))
        rows = [
            (colour, (f"{kind}: {meaning}", parts.percent(share), parts.percent(everywhere)))
            for colour, kind, meaning, share, everywhere in zip(*columns, strict=True)
        ]
        kinds = parts.table(("error", "of this picture", "of all errors"), rows)
        iou = iou_per_class(confusion_matrix(picture.label, picture.predicted, split)).tolist()
        found = plots.present(picture.label, picture.predicted)
        rows = [(split.palette[i], (self.names[i], parts.percent(iou[i]))) for i in found]
        self.table.value = kinds + parts.table(("class", "IoU in this picture"), rows, parts.unseen_note(self.names))

    def _pictures(self) -> dict[str, np.ndarray]:
        picture, split = self.predictions.pictures[self.position], self.predictions.split
        kinds = error_map(picture.label, picture.predicted, split, self.radius)
        wrong = np.where((kinds == 0) | (kinds == IGNORE), IGNORE, kinds - 1)
        faint = (luminance(picture.image) * 100 + 130).astype(np.uint8)[..., None].repeat(3, axis=2)
        return {
            "picture": picture.image,
            "truth": parts.named_overlay(picture.image, picture.label, self.names, split.palette),
            "prediction": parts.named_overlay(picture.image, picture.predicted, self.names, split.palette),
            "errors": parts.named_overlay(faint, wrong, "1 2 3 4 5 6".split(), KIND_COLOURS),
        }

    def sentence(self) -> str:
        """Which picture this is, and how much of it is wrong."""
        position, place = self.position, f"place {self.rank.value} of {self.rank.max}"
        share = self.errors.loc[position].sum() / max(self.labelled[position], 1)
        return f"{self.predictions.pictures[position].name}, {place}: {share:.1%} of its labelled pixels are wrong."

    def figure(self) -> Figure:
        """The same as a still picture."""
        figure, (key,) = parts.picture_row(self._pictures(), self.sentence(), (11.5, 2.8), [0.9])
        plots.legend(key, NUMBERED, KIND_COLOURS)
        return figure
