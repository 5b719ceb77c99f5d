"""The job of `make demo`: segment, train and score in the picture-book world, and put it all on one page."""

import base64
import json
import shlex
import time
from collections.abc import Mapping
from dataclasses import replace
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from sptseg import scenes
from sptseg.analysis import class_iou_bars, training_curves
from sptseg.checkpoints import load_model
from sptseg.datasets import Scenes, enlarge, plots, png
from sptseg.inference import FIGURES, Scores, evaluate, percent, segment, table
from sptseg.model import EMBEDDED_CONFIG, SptSeg, build_model
from sptseg.system import output_place, write
from sptseg.training import EMBEDDED_TRAINING, fit

MODELS = {"embedded": "SPT-SEG", "embedded-zegclip": "ZegCLIP", "dense-clip": "dense CLIP"}
TRAINED = "SPT-SEG, just trained"
GALLERY, BATCH = 6, 16
FREE_SEED = 5049  # a scene with a boat beside a tree
ABSENT = "a big castle"
FREE_CLASSES = ("a brown boat", "a yellow tree", "blue water", "a wheat field", "gray mountain", "an airplane", ABSENT)
HONESTY = (
    "These are figures of {scenes} scenes (seed {seed}), with one training run per model: a few points are chance. "
    "Means and standard deviations over training seeds, on more scenes, are in README.md and data/README.md."
)


class Picture(NamedTuple):
    """A PNG file, what it shows, and what is said below it."""

    png: bytes
    alt: str
    caption: str = ""

    @classmethod
    def of(cls, figure: plots.Figure, alt: str, caption: str = "") -> Self:
        return cls(plots.png_bytes(figure, dpi=150), alt, caption)

    def html(self) -> str:
        """The picture on the page, which needs no other file."""
        data = base64.b64encode(self.png).decode()
        below = f"<figcaption>{escape(self.caption)}</figcaption>" if self.caption else ""
        return f'<figure><img src="data:image/png;base64,{data}" alt="{escape(self.alt)}"/>{below}</figure>'


def demo(output: Path | str = Path("demo"), seed: int = 1, scenes: int = 40, iterations: int = 60) -> Path:
    """Segments, trains and scores in a few minutes on two cores; returns the page's path.

    Args:
        output: a folder, made if need be, for index.html, PNGs, table.md and results.json.
        seed: of the scenes and of the training.
        scenes: how many scenes are scored; the first six are shown.
        iterations: training steps of 16 pictures."""
    for name, value in {"scenes": scenes, "iterations": iterations}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; wanted at least 1")
    folder, started, data = output_place(output, folder=True), time.perf_counter(), Scenes(scenes, seed)
    models, shown = {title: load_model(name) for name, title in MODELS.items()}, min(GALLERY, scenes)

    print(f"1/3  Segmenting {shown + 1} scenes with the embedded model")
    pictures = segmented(models[MODELS["embedded"]], data)
    print(f"2/3  Training for {iterations} steps, on masks of the {len(data.split.seen)} seen classes only")
    models[TRAINED], history = trained(seed, iterations)
    print(f"3/3  Scoring {len(models)} models on {scenes} fresh scenes")
    scores = {title: evaluate(model, data, data.split, progress=False) for title, model in models.items()}

    pictures |= charts(scores, history, data)
    for name, each in pictures.items():
        write(folder / f"{name}.png", each.png)
    run = {"seed": seed, "scenes": scenes, "iterations": iterations, "seconds": round(time.perf_counter() - started)}
    honesty, rows = HONESTY.format(**run), [[name, *of.cells()] for name, of in scores.items()]
    said = f"{table(('model (%)', *FIGURES.values()), *rows)}\n\n{honesty}\n"
    print(f"\n{said}")
    write(folder / "table.md", said)
    results = {**run, "scores": {name: of.as_dict() for name, of in scores.items()}, "history": history}
    write(folder / "results.json", json.dumps(results, indent=1) + "\n")
    cells = (f'<th scope="row">{name}</th><td>{"</td><td>".join(figures)}</td>' for name, *figures in rows)
    places = {name.replace("-", "_"): each.html() for name, each in pictures.items()}
    template = Template(files("sptseg.cli").joinpath("demo.html").read_text(encoding="utf-8"))
    page = template.substitute(
        run, **places, honesty=honesty, batch=BATCH, absent=ABSENT, next_seed=seed + 1, gallery_count=shown,
        classes=len(data.split.classes), seen=len(data.split.seen), unseen=len(data.split.unseen),
        place=escape(shlex.quote((folder / "picture.png").as_posix())),
        gallery="\n".join(places[f"scene_{i + 1}"] for i in range(shown)),
        head="".join(f'<th scope="col">{name}</th>' for name in ("model", *FIGURES.values())),
        body="".join(f"<tr>{row}</tr>\n" for row in cells),
    )  # fmt: skip
    file = write(folder / "index.html", page)
    print(f"Open {file.resolve().as_uri()} in a browser")
    return file


def segmented(model: SptSeg, data: Scenes) -> dict[str, Picture]:
    """The first scenes with their truth; a scene cut up by free phrases, and that scene alone."""
    classes, palette, unseen = data.split.classes, data.split.palette, data.split.names(data.split.unseen)
    made = {}
    for i in range(min(GALLERY, len(data))):
        image, truth = data[i]["image"].permute(1, 2, 0).numpy(), data[i]["label"].numpy()
        labels, title = segment(model, image, classes).labels, f"Scene {i + 1}"
        figure = plots.show_segmentation(image, labels, classes, palette, unseen, truth, title)
        found = f"truth: {shares(truth, classes, unseen)}; prediction: {shares(labels, classes, unseen)}"
        right = f"{(labels == truth).mean():.1%} of the pixels right"
        made[f"scene-{i + 1}"] = Picture.of(figure, f"{title}, {found}", right)

    image, _ = scenes.draw(FREE_SEED)
    free, marked = segment(model, image, FREE_CLASSES), [name for name in FREE_CLASSES if name.endswith(unseen)]
    found = shares(free.labels, FREE_CLASSES, marked)
    figure = plots.show_segmentation(image, free.labels, FREE_CLASSES, free.palette, marked)
    made["free-phrases"] = Picture.of(figure, f"A scene and its mask by free phrases: {found}")
    return {**made, "picture": Picture(png(enlarge(image, 2)), "A drawn scene with a boat beside a tree")}


def trained(seed: int, iterations: int) -> tuple[SptSeg, list[dict[str, Any]]]:
    """A model after a few steps of training, and their history."""
    torch.manual_seed(seed)
    model, data = build_model(EMBEDDED_CONFIG), Scenes(10_000, seed, "training")
    config = replace(
        EMBEDDED_TRAINING, iterations=iterations, warmup=iterations // 10, batch_size=BATCH, seed=seed,
        validate_every=max(1, iterations // 4), validation_images=12,
    )  # fmt: skip
    return model, fit(model, data, data.split, config, validation=Scenes(12, seed + 1)).history


def charts(scores: Mapping[str, Scores], history: list[dict[str, Any]], data: Scenes) -> dict[str, Picture]:
    """The training's curves and the classes' IoU."""
    losses, unseen = [row["total"] for row in history], data.split.names(data.split.unseen)
    falls = f"Training curves over {len(losses)} steps: the loss goes from {losses[0]:.2f} to {losses[-1]:.2f}"
    below = "Loss and learning rate at every step; validation on a few other scenes, hence rough."
    curves = Picture.of(training_curves(history), falls, below)
    first, *others = scores
    title = f"IoU per class: {len(data)} scenes, seed {data.seed[1]}"
    bars = class_iou_bars(scores[first].iou, unseen, title, first, {name: scores[name].iou for name in others})
    found = ", ".join(f"{plots.marked(name, unseen)} {percent(iou)}" for name, iou in scores[first].iou.items())
    below = f"Bars: {first}. Markers: {', '.join(others)}. With so few scenes, a class may hang on a single picture."
    return {"training": curves, "class-iou": Picture.of(bars, f"IoU of {first} per class: {found}", below)}


def shares(labels: np.ndarray, names: tuple[str, ...], unseen: list[str] | tuple[str, ...]) -> str:
    """Such as "water* 40 %, tree* 12 %": in words what a mask shows."""
    part = {i: 100 * float((labels == i).mean()) for i in plots.present(labels)}
    return ", ".join(f"{plots.marked(names[i], unseen)} {value:.0f} %" for i, value in part.items())
