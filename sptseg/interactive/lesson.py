"""What the notebooks' cells share: figures with a sentence to them, computed prose, checks of answers, metrics."""

import hashlib
import io
import json
import math
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from IPython.display import Image as Picture
from IPython.display import Markdown, display
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image

from sptseg.analysis import error_counts, error_shares
from sptseg.datasets import plots, png_bytes
from sptseg.inference import segment, table
from sptseg.model import SptSeg
from sptseg.system import bytes_of, write

DPI = 144  # of what is shown 96 to the inch, so that it is sharp on fine screens too
WIDEST = 920  # pixels at 96 to the inch: a notebook's column


def show(figure: Figure, sentence: str) -> None:
    """Displays a figure, of 256 colours to keep a notebook small, with a sentence under it and as alternative text."""
    full = Image.open(io.BytesIO(png_bytes(figure, DPI))).convert("RGB")
    small = full.quantize(256, Image.Quantize.MAXCOVERAGE)
    if np.abs(np.asarray(small.convert("RGB"), int) - np.asarray(full, int)).max() >= 12:  # it lost rare colours
        small = full.quantize(256, Image.Quantize.FASTOCTREE)  # which has all, but of greys 16 only
    png, width = bytes_of(partial(small.save, format="png", optimize=True)), round(96 * figure.get_figwidth())
    display(Picture(png, format="png", alt=sentence, width=min(width, WIDEST)))
    say("*{}*".format(sentence.replace("*", r"\*")))  # the stars of unseen names


def say(text: str) -> None:
    """Displays Markdown; with an f-string, prose whose numbers are computed."""
    display(Markdown(text))


ANSWERS: dict[str, Callable[..., Any]] = {  # to tasks whose answer depends on what the notebook was given
    "area of the last": lambda model, image, names: segment(model, image, names).areas()[names[-1]],
    "more of two": lambda model, image, names: max(names[:2], key=segment(model, image, names).areas().__getitem__),
    "largest share": lambda labels: np.bincount(labels.ravel()).max() / labels.size,
    "single switches": lambda counts: sum(count == 1 for count in counts.values()),
    "high branch": lambda attention, tokens: attention.high(tokens).detach(),
    "focal loss": lambda loss, batches: [float(loss(*batch, "zegclip")["focal"]) for batch in batches],
    "deviations": lambda samples: [statistics.stdev(sample) for sample in samples],
    "ends": lambda gains, draws: np.quantile([gains[np.ix_(*each)].mean() for each in draws], [0.025, 0.975]),
    "border shares": lambda found, radii: [error_shares(error_counts(found, each))["border"] for each in radii],
    "pseudo labels": lambda logits, labels, seen, unseen: (logits[:, unseen].argmax(dim=1) + len(seen)).where(
        labels == -1, labels
    ),  # the seen classes come first
    "mask": lambda labels, label: labels == label,
}


def check(answer: Any, expected: str, hint: str, *given: Any) -> None:
    """Tells whether an answer is right, numbers and arrays to one percent, without a word of the right one.

    `expected` is its `seal`, or names one of the `ANSWERS`, which is computed from what is `given`. An answer that is
    still `...` is not wrong yet, and a wrong one stops nothing: the hint is shown."""
    if any(each is ... or each is None for each in (answer if isinstance(answer, list) else [answer])):
        say("Not yet: replace the `...` above and run the cell again.")
    elif _equal(answer, ANSWERS[expected](*given)) if given else expected in _seals(answer):
        say("**Right.**")
    else:
        say(f"**Not quite**: you have {answer}. {hint}")


def seal(answer: Any) -> str:
    """A digest of a task's answer, of numbers to two digits: what the task's cell gives to `check`."""
    return _seals(answer)[0]


def _seals(answer: Any) -> list[str]:
    """Of an answer and, if it is made of numbers, of what lies so near that it may be rounded otherwise."""
    try:
        numbers = np.asarray(answer, float).ravel()
        texts = [str([f"{value:.2g}" for value in share * numbers + 0]) for share in (1, 0.995, 1.005)]
    except (TypeError, ValueError):
        texts = [str(answer)]
    return [hashlib.sha256(f"sptseg: {text}".encode()).hexdigest()[:12] for text in texts]


def _equal(answer: Any, expected: Any) -> bool:
    try:
        return np.shape(answer) == np.shape(expected) and np.allclose(answer, expected, rtol=0.01, atol=1e-8)
    except TypeError:  # a name
        return answer == expected


def model_picture(model: SptSeg, classes: int, title: str) -> Figure:
    """The whole of an SPT-SEG, from a picture and `classes` names to mask logits, with every tensor's shape. Gray is
    frozen, orange is learned, white is computed. Of many blocks the first two and the last are drawn."""
    encoder, (height, width) = model.encoder, model.config.image_size
    prompt, decoder, blocks = encoder.spectral_prompt, model.decoder, len(encoder.tower.blocks)
    if prompt is None or encoder.prompts is None or decoder is None:
        raise ValueError("this model lacks prompts, spectral prompts or a decoder; wanted an SPT-SEG, as the embedded")
    (h, w), (_, count, dim), e = prompt.grid, encoder.prompts.shape, encoder.tower.output_dim
    figure = plots.Plot(11, 5.6, title)
    ax = figure.subplots()

    def box(x: float, y: float, text: str, colour: str = "white", wide: float = 1.5, tall: float = 0.8) -> None:
        style: dict[str, Any] = {"boxstyle": "round,pad=0", "fc": colour, "ec": plots.INK}
        ax.add_patch(FancyBboxPatch((x - wide / 2, y - tall / 2), wide, tall, **style))
        ax.text(x, y, text, ha="center", va="center", size=8.5, color=plots.INK)

    def arrow(*ends: tuple[float, float]) -> None:
        ax.annotate("", ends[1], ends[0], arrowprops={"arrowstyle": "-|>", "color": plots.INK, "shrinkA": 0})

    frozen, learned = "#dddddd", "#f7dca8"
    drawn = [*range(blocks)] if blocks < 5 else [0, 1, blocks - 1]
    box(0, 4, f"picture\n3 × {height} × {width}")
    box(2, 4, f"patches and\nclass token c\n{1 + h * w} × {dim}", frozen)
    for x in range(0, 2 * len(drawn) + 4, 2):
        arrow((x + 0.75, 4), (x + 1.25, 4))
    for i, block in enumerate(drawn):
        box(4 + 2 * i, 4, f"block {block}\n{1 + h * w} × {dim}", frozen)
        box(4 + 2 * i, 5.4, f"deep prompts\n{count} × {dim}", learned)
        arrow((4 + 2 * i, 5), (4 + 2 * i, 4.4))
        if block in encoder.spectral_layers:
            box(3.9 + 2 * i, 2.85, f"X ← X + S(X, c)\nF: {h} × {w // 2 + 1} × {dim}", learned, 1.85)
            arrow((3.3 + 2 * i, 3.25), (3.1 + 2 * i, 3.95))
    end = 4 + 2 * len(drawn)
    box(end, 4, f"projection\n{dim} → {e}", frozen)
    box(3.8, 1.5, f"image embedding g: {e}", wide=2.2, tall=0.5)
    box((6 + end) / 2, 1.5, f"patch embeddings X: {h * w} × {e}  ({h} × {w} tokens)", wide=end - 4.5, tall=0.5)
    arrow((end, 3.6), (end, 1.75))
    arrow((end - 0.5, 3.6), (4.4, 1.75))
    box(0, 0, f"{classes} names,\ntext tower\nT: {classes} × {e}", frozen, tall=0.9)
    box(3.8, 0, f"queries from T and g\nq: {classes} × {e}", learned, 2.2, 0.9)
    arrow((0.75, 0), (2.7, 0))
    arrow((3.8, 1.25), (3.8, 0.45))
    layers = np.linspace(6.1, end - 2, len(decoder.layers))
    for i, x in enumerate(layers, start=1):
        box(x, 0, f"layer {i}\nY: {h * w} × {e}\nA = q·Y: {classes} × {h * w}", learned, 1.6, 0.9)
        arrow((x, 1.25), (x, 0.45))
    for left, right in pairwise([4.9, *(x + 0.8 for x in layers)]):
        arrow((left, 0), (right - 1.6, 0))
    box(end, 0, f"mask logits\n{classes} × {h} × {w}", tall=0.9)
    arrow((end - 1.2, 0), (end - 0.75, 0))
    ax.set(xlim=(-0.9, end + 0.9), ylim=(-0.7, 6))
    ax.set_axis_off()
    return figure


def write_metrics(output_dir: str | Path, metrics: Mapping[str, float]) -> None:
    """Writes the figures that a notebook stands by to `metrics.json` in a folder, and shows them as a table."""
    wrong = [name for name, value in metrics.items() if not math.isfinite(value)]
    if wrong:
        raise ValueError(f"the metric {wrong[0]} is {metrics[wrong[0]]}; wanted a finite number: leave out what is not")
    values = {name: round(float(value), 6) for name, value in metrics.items()}
    write(Path(output_dir) / "metrics.json", json.dumps(values, indent=1) + "\n")
    say(table(("figure", "value"), *((name, f"{value:.4g}") for name, value in values.items())))
