"""Class names, losses and failures, looked into by hand. Core ipywidgets only."""

from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets
import numpy as np
from ipywidgets import Layout
from matplotlib.figure import Figure

from sptseg.analysis import KINDS, Predictions, error_counts, error_map, error_shares, worst_pictures
from sptseg.datasets import IGNORE, as_array, luminance, names, plots, reduce, spread_palette
from sptseg.inference import confusion_matrix, iou_per_class, segment
from sptseg.interactive import parts
from sptseg.model import SptSeg

Array = np.ndarray
ALL = "errors of all kinds"
KIND_COLOURS = spread_palette(len(KINDS))
NUMBERED = [f"{i}  {kind}" for i, kind in enumerate(KINDS, start=1)]


class PromptPlayground(parts.Explorer):
    """Type class names, and see masks and scores. What the model cannot read is told in a sentence.

    Args:
        image: a picture, as for `segment`; over 512 pixels it is shrunk to that.
        classes: the names to begin with."""

    def __init__(self, model: SptSeg, image: Any, classes: Sequence[str] = ("sky", "grass", "tree", "house")) -> None:
        self.model, self.picture = model, reduce(as_array(image), parts.LONGEST)
        self.result = segment(model, self.picture, classes)
        self.words = ipywidgets.Text(
            ", ".join(classes), description="Classes", placeholder="sky, boat", layout=Layout(width="600px"),
            tooltip="Names or phrases, commas between them; Enter segments", continuous_update=False, **parts.WIDE,
        )  # fmt: skip
        self.scored = parts.dropdown({}, "Score of", "The class whose score is shown")
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
            self.note.value = parts.message(f"⚠ Not done: {error}. {kept}")
            return
        self.note.value = parts.message("Every pixel gets the class with the highest score, even if that is low.")
        self.panels["masks"].show(self._masks())
        self.scores = {name: result.scores(name) for name in result.classes}
        colours = dict(zip(result.classes, result.palette, strict=True))
        rows = [
            (colours[name], (name, parts.percent(area), parts.percent(self.scores[name].max())))
            for name, area in self.largest()
        ]
        self.table.value = parts.table(("class", "area", "highest score"), rows)
        chosen = self.scored.value
        self.scored.options = result.classes
        self.scored.value = chosen if chosen in result.classes else self.largest()[0][0]
        self.show_score()

    def largest(self) -> list[tuple[str, float]]:
        """Names with their shares of the picture, the largest first."""
        return sorted(self.result.areas().items(), key=lambda each: -each[1])

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
        largest = self.largest()[:4]
        title = "Areas: " + ", ".join(f"{name} {parts.percent(area)}" for name, area in largest)
        pictures = {"picture": self.picture, "masks": self._masks()}
        return parts.still(title, pictures, [self._score(name) for name, _ in largest])[0]


class LossExplorer(parts.Explorer):
    """Focal loss of one class's scores, pixel by pixel, while its gamma and alpha are moved.

    alpha_t (1 - p_t)^gamma (-log p_t), where p_t is the probability given to the truth, and alpha_t is alpha where the
    class is and 1 - alpha where it is not. Source: the focal loss paper; the method has gamma 2 and alpha 0.25.

    Args:
        scores: the class's probability at each pixel (H, W), 0..1.
        target: where the class is (H, W), bool."""

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
        return parts.still("What each pixel pays (nats)", {"picture": self.outlined}, maps)[0]


class FailureBrowser(parts.Explorer):
    """Steps through pictures, those with the most errors of a kind first.

    Args:
        predictions: from `failures.collect`.
        radius: pixels from the true border within which an error counts as one of the border."""

    def __init__(self, predictions: Predictions, radius: int = 4) -> None:
        self.predictions, self.radius, split = predictions, radius, predictions.split
        self.errors = error_counts(predictions, radius)
        self.labelled = predictions.confusions().sum(axis=(1, 2))
        self.names = [plots.marked(name, split.names(split.unseen)) for name in split.classes]
        kinds = {ALL: ALL} | dict(zip(NUMBERED, KINDS, strict=True))  # an option whose value is None would look empty
        self.kind = parts.dropdown(kinds, "Sort by", "What the pictures are sorted by")
        most, tooltip = len(predictions.pictures), "1 is the worst picture; arrow keys step"
        self.rank = ipywidgets.IntSlider(1, 1, most, description="Place", tooltip=tooltip, **parts.WIDE)
        super().__init__([[self.kind, self.rank]], "picture", "truth", "prediction", "errors")
        self.kind.observe(self._sorted, "value")
        self.rank.observe(self.update, "value")
        self.update()

    def _sorted(self, _change: object) -> None:
        self.rank.value = 1
        self.update()

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

    def _pictures(self) -> dict[str, Array]:
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
        figure, key = parts.still(self.sentence(), self._pictures(), chart=True)
        plots.legend(key, NUMBERED, KIND_COLOURS)
        return figure
