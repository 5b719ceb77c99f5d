"""Class names and losses, tried out by hand. Core ipywidgets only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets
import numpy as np
from ipywidgets import Layout
from matplotlib.figure import Figure

from sptseg.datasets import as_array, names, plots, spread_palette
from sptseg.inference import segment
from sptseg.interactive import parts
from sptseg.model import SptSeg

Array = np.ndarray


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


class LossExplorer(parts.Explorer):
    """Focal loss of one class's scores, pixel by pixel, while its gamma and alpha are moved.

    alpha_t (1 - p_t)^gamma (-log p_t), where p_t is the probability given to the truth, and alpha_t is alpha where the
    class is and 1 - alpha where it is not. Source: the focal loss paper; the method has gamma 2 and alpha 0.25.

    Args:
        scores: the class's probability at each pixel (H, W), 0..1.
        target: where the class is (H, W), bool.
    """

    def __init__(self, image: Array, scores: Array, target: Array) -> None:
        self.target = target
        self.given = np.where(target, scores, 1 - scores).clip(1e-7)  # p_t
        self.outlined = np.where(plots.borders(target, 2)[..., None], 255, image).astype(np.uint8)
        self.gamma = parts.slider(2, 5, 0.1, "gamma", "The higher, the less a pixel costs that is nearly right")
        self.alpha = parts.slider(0.25, 1, 0.05, "alpha", "Weight of pixels of the class; the others have 1 - alpha")
        super().__init__([[self.gamma, self.alpha]], "picture", "probability of the truth", "loss per pixel")
        self.panels["picture"].show(self.outlined)
        self.panels["probability of the truth"].show_map(self.given, 0, 1, "cividis")
        for control in (self.gamma, self.alpha):
            control.observe(self.update, "value")
        self.update()

    def losses(self) -> Array:
        """Of each pixel (H, W), in nats."""
        weight = np.where(self.target, self.alpha.value, 1 - self.alpha.value)
        return weight * (1 - self.given) ** self.gamma.value * -np.log(self.given)

    def update(self, _change: object = None) -> None:
        """Shows each pixel's loss, and which pixels pay how much of it."""
        losses, sure, rows = self.losses(), self.given > 0.9, []
        self.panels["loss per pixel"].show_map(losses, 0, float(losses.max()), "cividis")
        for name, there in (("of the class", self.target), ("not of the class", ~self.target)):
            for kind, which in (("truth above 0.9", sure), ("truth at most 0.9", ~sure)):
                paid = losses[there & which].sum() / max(losses.sum(), 1e-12)
                rows.append((f"{name}, {kind}", parts.percent((there & which).mean()), parts.percent(paid)))
        coloured = zip(spread_palette(len(rows)), rows, strict=True)
        self.table.value = parts.table(("pixels", "of the picture", "of the loss"), coloured)
        self.note.value = parts.message(f"Mean over all pixels: {losses.mean():.4g}.")

    def figure(self, losses: Mapping[str, Array] | None = None) -> Figure:
        """The same as a still picture; with losses by title those, each on its own scale, instead of the one shown."""
        losses = {"loss per pixel": self.losses()} if losses is None else losses
        maps: list[parts.Map] = [("probability of the truth", self.given, 0, 1, "cividis")]
        maps += [(title, values, 0, float(values.max()), "cividis") for title, values in losses.items()]
        return parts.map_row({"picture": self.outlined}, maps, "What each pixel pays (nats)")
