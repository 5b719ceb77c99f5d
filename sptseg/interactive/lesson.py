"""What the notebooks' cells share: figures with a sentence to them, computed prose, checks of answers, metrics."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from IPython.display import Image as Picture
from IPython.display import Markdown, display
from matplotlib.figure import Figure
from PIL import Image

from sptseg.datasets import png_bytes
from sptseg.system import write


def show(figure: Figure, sentence: str) -> None:
    """Displays a figure with a sentence that says what to see, under it and as its alternative text.

    The PNG has 256 colours, so that a notebook of many figures stays small.
    """
    full = Image.open(io.BytesIO(png_bytes(figure))).convert("RGB")
    small = full.quantize(256, Image.Quantize.FASTOCTREE)  # the default method loses rare colours: those of legends
    buffer = io.BytesIO()
    small.save(buffer, format="png", optimize=True)
    display(Picture(buffer.getvalue(), format="png", alt=sentence))
    say(f"*{sentence}*")


def say(text: str) -> None:
    """Displays Markdown; with an f-string, prose whose numbers are computed."""
    display(Markdown(text))


def check(answer: Any, expected: Any, hint: str) -> None:
    """Tells whether an answer is right: numbers and arrays to one percent, everything else exactly.

    An answer that is still `...` is not wrong yet, and a wrong one stops nothing: the hint is shown.
    """
    if answer is ...:
        say("Not yet: replace the `...` above and run the cell again.")
    elif _equal(answer, expected):
        say("**Right.**")
    else:
        say(f"**Not quite**: you have {answer}. {hint}")


def _equal(answer: Any, expected: Any) -> bool:
    if isinstance(expected, bool | str):
        return type(answer) is type(expected) and answer == expected
    try:
        return np.shape(answer) == np.shape(expected) and np.allclose(answer, expected, rtol=0.01, atol=1e-8)
    except TypeError:
        return answer == expected


def write_metrics(output_dir: str | Path, metrics: Mapping[str, float]) -> None:
    """Writes the figures that a notebook stands by to `metrics.json` in a folder, and shows them as a table."""
    wrong = [name for name, value in metrics.items() if not math.isfinite(value)]
    if wrong:
        raise ValueError(f"the metric {wrong[0]} is {metrics[wrong[0]]}; wanted a finite number: leave out what is not")
    values = {name: round(float(value), 6) for name, value in metrics.items()}
    write(Path(output_dir) / "metrics.json", json.dumps(values, indent=1) + "\n")
    rows = [f"| {name} | {value:.4g} |" for name, value in values.items()]
    say("\n".join(["| figure | value |", "|---|---|", *rows]))
