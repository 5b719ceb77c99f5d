"""Masks before and after a change that is made by hand, and the first such change: branches of the decoder."""

import asyncio
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import ipywidgets
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from sptseg.analysis import spectra
from sptseg.datasets import Split, as_array, plots, reduce, splits
from sptseg.inference import Segmentation, confusion_matrix, iou_per_class, segment
from sptseg.interactive import parts
from sptseg.model import SptSeg

Array = np.ndarray
PAUSE = 0.1  # seconds without a new value before the masks follow
BRANCHES = {"both": (), "only high": ("low",), "only low": ("high",), "none": ("high", "low")}  # without which parts


class MaskExplorer(parts.Explorer):
    """Masks before and after a change, each class's figures, and one class's score against a cut-off; a subclass has
    `controls`, shows in `update` what they change, and makes the change in `changed`.

    Args:
        images: a picture, as for `segment`, or a list of them; over 512 pixels they are shrunk to that.
        classes: names; every pixel gets one of them. By default those of the drawn scenes.
        labels: the true class of each pixel (H, W), positions in `classes`, 255 ignored; with them, each class's IoU
            is shown, else its area. For a list of pictures a list, None where there is none.
        unseen: classes unseen in training, which are marked.
        before: what an explorer of the same pictures has of them already, its `before`."""

    titles: tuple[str, ...] = ()  # of the pictures that `update` shows

    def __init__(
        self, model: SptSeg, images: Any, classes: Sequence[str] | None = None, labels: Any = None,
        unseen: Collection[str] = (), before: dict[int, Segmentation] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.classes = model, tuple(classes or splits.scenes().classes)
        self.names = [plots.marked(name, unseen) for name in self.classes]
        images, labels = (images, labels) if isinstance(images, list | tuple) else ([images], [labels])
        self.pictures = [reduce(as_array(image), parts.LONGEST) for image in images]
        labels = [None] * len(images) if labels is None else labels
        self.labels = [None if each is None else reduce(np.asarray(each, np.int32), parts.LONGEST) for each in labels]
        self.choice = parts.dropdown({f"{i + 1} of {len(images)}": i for i in range(len(images))}, "Picture")
        self.scored = parts.dropdown({name: i for i, name in enumerate(self.names)}, "Score of")
        self.cut = parts.slider(0.5, 1, 0.01, "against", "The cut-off: a white line goes around what is above it")
        rows = [*self.controls(), [self.choice, self.scored, self.cut]]
        super().__init__(rows, *self.titles, "masks before", "masks after", "score")
        self.shown: dict[str, Array] = {}  # what `update` shows, by title
        self.before = {} if before is None else before  # of each picture, without a change
        self._moving, self._next = False, None
        self.result = self.whole
        self.scored.value = plots.present(self.whole.labels)[0]
        for control in (*(each for row in rows[:-1] for each in row), self.choice):
            control.observe(self.renew, "value")
        for control in (self.scored, self.cut):
            control.observe(self.show_score, "value")
        self.update()
        self.predict()

    def controls(self) -> list[list[Any]]:
        """Rows of widgets; a new value of any of them renews the pictures."""
        raise NotImplementedError

    @property
    def picture(self) -> Array:
        return self.pictures[self.choice.value]

    @property
    def label(self) -> Array | None:
        return self.labels[self.choice.value]

    @property
    def whole(self) -> Segmentation:
        """The picture's segmentation before any change."""
        if self.choice.value not in self.before:
            self.before[self.choice.value] = segment(self.model, self.picture, self.classes)
        return self.before[self.choice.value]

    def move(self, values: dict[Any, Any]) -> None:
        """Sets several controls, and renews the pictures once."""
        self._moving = True
        for control, value in values.items():
            control.value = value
        self._moving = False
        self.renew()

    def renew(self, _change: object = None) -> None:
        """Shows the change at once, and the masks after a pause; at once too where no event loop runs."""
        if self._moving:
            return
        self.update()
        if self._next is not None:
            self._next.cancel()
        try:
            self._next = asyncio.get_running_loop().call_later(PAUSE, lambda: self.predict())
        except RuntimeError:
            self.predict()

    def update(self) -> None:
        """Shows what the controls change, all but the masks."""
        self.note.value = parts.message(self.sentence())

    def sentence(self) -> str:
        """What is changed, in words and figures."""
        raise NotImplementedError

    def changed(self) -> AbstractContextManager[Array]:
        """The change, made while the block lasts, and the picture to segment meanwhile."""
        raise NotImplementedError

    def predict(self) -> None:
        """Segments the picture under the change; shows the masks and what became of each class."""
        with self.changed() as seen:
            self.result = segment(self.model, seen, self.classes)
        for title, shown in self.masks().items():
            self.panels[title].show(shown)
        rows = []
        for i, before, after in self.changes():
            shares = parts.percent(before), parts.percent(after), parts.points(after - before)
            rows.append((self.result.palette[i], (self.names[i], *shares)))
        head = ("Share of the picture" if self.label is None else "IoU", "before", "after", "change")
        self.table.value = parts.table(head, rows, parts.unseen_note(self.names))
        self.show_score()

    def masks(self) -> dict[str, Array]:
        """Before and after, by title."""
        return {
            f"masks {when}": parts.named_overlay(each.image, each.labels, self.names, each.palette)
            for when, each in (("before", self.whole), ("after", self.result))
        }

    def show_score(self, _change: object = None) -> None:
        """Shows the chosen class's score after the change, 0..1, what is above the cut-off, and its share and IoU."""
        i, told = self.scored.value, []
        for result in (self.whole, self.result):  # the last is shown
            scores = result.scores(result.classes[i])
            above = scores > self.cut.value
            told.append(f"{parts.percent(above.mean())} above")
            if self.label is not None:
                true, asked = self.label == i, self.label != 255
                either = np.count_nonzero((above | true) & asked)
                share = np.count_nonzero(above & true) / either if either else np.nan
                told[-1] += f", IoU {parts.percent(share)}"
        shown = colormaps["cividis"](scores, bytes=True)[..., :3].copy()
        shown[plots.borders(above, 2)] = 255
        self.panels["score"].show(shown, f"({told[1]}; before {told[0]})")

    def changes(self) -> list[tuple[int, float, float]]:
        """Classes in truth or masks: position, IoU (area if there is no label) before and after the change, 0..1."""
        truth = self.whole.labels if self.label is None else self.label
        before, after = (self._measure(result) for result in (self.whole, self.result))
        return [(i, before[i], after[i]) for i in plots.present(truth, self.whole.labels, self.result.labels)]

    def _measure(self, result: Segmentation) -> list[float]:
        if self.label is None:
            return list(result.areas().values())
        split = Split.from_names("given", self.classes)
        return iou_per_class(confusion_matrix(self.label, result.labels, split)).tolist()

    def figure(self) -> Figure:
        """The same as a still picture."""
        self.update()
        self.predict()
        rows = [(self.names[i], self.result.palette[i], before, after) for i, before, after in self.changes()]
        figure, chart = parts.still(self.sentence(), self.shown | self.masks(), chart=True)
        for y, (_, colour, before, after) in enumerate(rows):  # the marks differ by shape
            chart.plot([100 * before, 100 * after], [y, y], color=plots.INK, lw=1, zorder=1)
            chart.plot(100 * before, y, "o", mfc="white", mec=plots.INK, ms=8)
            chart.plot(100 * after, y, "s", mfc=np.array(colour) / 255, mec=plots.INK, ms=6)
        chart.set_yticks(range(len(rows)), [name for name, *_ in rows])
        measure = "share of the picture (%)" if self.label is None else "IoU (%)"
        below = f"{measure}\n{parts.unseen_note(self.names)}"
        limits: Any = {"xlim": (-4, 104), "ylim": (len(rows) - 0.4, -0.6)}
        plots.tidy(chart, "○ before  ■ after", "x", xlabel=below, anchor="C", **limits)
        return figure


class BranchExplorer(MaskExplorer):
    """The decoder's high-frequency or low-frequency branches switched off in all layers, and the masks."""

    def controls(self) -> list[list[Any]]:
        self.branches: Any = ipywidgets.ToggleButtons(options=list(BRANCHES), description="Branches", **parts.WIDE)
        return [[self.branches]]

    @contextmanager
    def changed(self) -> Iterator[Array]:
        with spectra.switched_off(self.model, *BRANCHES[self.branches.value]):
            yield self.picture

    def sentence(self) -> str:
        return f"Branches at work in every decoder layer: {self.branches.value}. Nothing was trained anew."
