"""The job of `make demo`: segment, train and score in the picture-book world, and put it all on one page.

`run` computes, `render_page` writes HTML from what it computed, `demo` does both and fills a folder.
"""

from __future__ import annotations

import base64
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch

from sptseg import scenes
from sptseg.analysis import class_iou_bars, training_curves
from sptseg.checkpoints import load_model
from sptseg.datasets import IGNORE, Colour, Scenes, enlarge, plots, png
from sptseg.inference import Scores, evaluate, segment
from sptseg.model import EMBEDDED_CONFIG, build_model
from sptseg.system import output_place, write
from sptseg.training import EMBEDDED_TRAINING, fit

MODELS = {"embedded": "SPT-SEG", "embedded-zegclip": "ZegCLIP", "dense-clip": "dense CLIP"}
TRAINED = "SPT-SEG, just trained"
GALLERY, BATCH = 6, 16
FREE_SEED = 5049  # a scene with a boat beside a tree
ABSENT = "a big castle"
FREE_CLASSES = ("a brown boat", "a yellow tree", "blue water", "a wheat field", "gray mountain", "an airplane", ABSENT)
COLUMNS = {"pixel_accuracy": "pAcc", "miou_seen": "mIoU(S)", "miou_unseen": "mIoU(U)", "hiou": "hIoU"}
HONESTY = (
    "These are figures of {scenes} scenes (seed {seed}), with one training run per model: a few points are chance. "
    "Means and standard deviations over training seeds, on more scenes, are in README.md and data/README.md."
)
TRAINING = (
    "{iterations} steps of {batch} pictures, with masks of the {seen} seen classes only. The model begins as dense "
    "CLIP. This is a first taste: the embedded model was trained for longer."
)
COMMANDS = (
    'sptseg segment {picture} --classes "a boat,a tree,water,mountain" --out masks.png',
    "sptseg evaluate --model embedded --data scenes --seed {next_seed} --json scores.json",
    "jupyter lab notebooks/00_start_here.ipynb",
)


@dataclass(frozen=True)
class Plate:
    """A segmented picture: image (H,W,3) uint8, labels and truth (H,W), which index `names` and `palette`."""

    title: str
    image: np.ndarray
    labels: np.ndarray
    truth: np.ndarray | None
    names: tuple[str, ...]
    palette: tuple[Colour, ...]
    unseen: tuple[str, ...]

    @property
    def accuracy(self) -> float | None:
        """Share of labelled pixels with the right class."""
        if self.truth is None:
            return None
        known = self.truth != IGNORE
        return float((self.labels == self.truth)[known].mean())


@dataclass(frozen=True)
class Results:
    """Everything that the page shows; `scores` begins with the embedded SPT-SEG."""

    seed: int
    scenes: int
    iterations: int
    classes: tuple[str, ...]
    unseen: tuple[str, ...]
    gallery: tuple[Plate, ...]
    free: Plate
    score_maps: Mapping[str, np.ndarray]
    history: Sequence[Mapping[str, Any]]
    scores: Mapping[str, Scores]
    seconds: float


def demo(output: Path | str = Path("demo"), seed: int = 1, scenes: int = 40, iterations: int = 60) -> Path:
    """Segments, trains and scores in a few minutes on two cores; returns the page's path.

    Args:
        output: a folder, made if need be, for index.html, PNGs, table.md and results.json.
        seed: of the scenes and of the training.
        scenes: how many scenes are scored; the first six are shown.
        iterations: training steps of 16 pictures.
    """
    for name, value in {"scenes": scenes, "iterations": iterations}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; wanted at least 1")
    folder = output_place(output, folder=True)
    page = save(run(seed, scenes, iterations), folder)
    print(f"\nOpen {page.resolve().as_uri()} in a browser")
    return page


def run(seed: int, count: int, iterations: int) -> Results:
    """Segments the gallery, trains a model and scores all four on `count` scenes."""
    started = time.perf_counter()
    data = Scenes(count, seed)
    split = data.split
    unseen = split.names(split.unseen)
    models = {title: load_model(name) for name, title in MODELS.items()}
    embedded = models[MODELS["embedded"]]

    print(f"1/3  Segmenting {min(GALLERY, count) + 1} scenes with the embedded model")
    gallery = []
    for i in range(min(GALLERY, count)):
        image, truth = data[i]["image"].permute(1, 2, 0).numpy(), data[i]["label"].numpy()
        found = segment(embedded, image, split.classes, palette=split.palette)
        gallery.append(Plate(f"Scene {i + 1}", image, found.labels, truth, split.classes, split.palette, unseen))
    picture, _ = scenes.draw(FREE_SEED)
    found = segment(embedded, picture, FREE_CLASSES)
    marked = tuple(phrase for phrase in FREE_CLASSES if phrase.endswith(unseen))
    free = Plate("Free phrases", picture, found.labels, None, FREE_CLASSES, found.palette, marked)

    print(f"2/3  Training for {iterations} steps, on masks of the {len(split.seen)} seen classes only")
    every = max(1, iterations // 4)
    short = {"iterations": iterations, "warmup": iterations // 10, "validate_every": every, "validation_images": 12}
    config = replace(EMBEDDED_TRAINING, **short, batch_size=BATCH, seed=seed)
    torch.manual_seed(seed)
    trained = build_model(EMBEDDED_CONFIG)
    history = fit(trained, Scenes(10_000, seed, "training"), split, config, validation=Scenes(12, seed + 1)).history

    print(f"3/3  Scoring {len(models) + 1} models on {count} fresh scenes")
    scores = {
        title: evaluate(model, data, split, progress=False) for title, model in {**models, TRAINED: trained}.items()
    }
    maps = {name: found.scores(name) for name in FREE_CLASSES}
    seconds = time.perf_counter() - started
    return Results(seed, count, iterations, split.classes, unseen, tuple(gallery), free, maps, history, scores, seconds)


def save(results: Results, folder: Path) -> Path:
    """Writes the page, its pictures, the table and the numbers; returns the page's path."""
    charts = figures(results)
    pictures = charts | {"picture": png(enlarge(results.free.image, 2))}
    for plate in (*results.gallery, results.free):
        shown = plots.show_segmentation(
            plate.image, plate.labels, plate.names, plate.palette, plate.unseen, plate.truth, plate.title
        )
        pictures[plate.title.lower().replace(" ", "-")] = plots.png_bytes(shown)
    for name, data in pictures.items():
        write(folder / f"{name}.png", data)
    text = f"{markdown_table(results.scores)}\n\n{HONESTY.format(scenes=results.scenes, seed=results.seed)}\n"
    write(folder / "table.md", text)
    print(f"\n{text}")
    numbers = {name: getattr(results, name) for name in ("seed", "scenes", "iterations", "seconds")}
    numbers["scores"] = {name: scores.as_dict() for name, scores in results.scores.items()}
    numbers["history"] = list(results.history)
    write(folder / "results.json", json.dumps(numbers, indent=1) + "\n")
    return write(folder / "index.html", render_page(results, charts, folder))


def figures(results: Results) -> dict[str, bytes]:
    """The page's diagrams as PNG files, by name."""
    first, *others = results.scores
    title = f"IoU per class: {results.scenes} scenes, seed {results.seed}"
    bars = class_iou_bars(
        results.scores[first].iou, results.unseen, title, first, {name: results.scores[name].iou for name in others}
    )
    maps = plots.Plot(10, 4.6)
    axes, highest = iter(maps.subplots(2, 4).flat), max(float(scores.max()) for scores in results.score_maps.values())
    plots.show_image(next(axes), results.free.image, "picture")
    for ax, (name, scores) in zip(axes, results.score_maps.items(), strict=True):
        plots.score_map(ax, scores, plots.marked(name, results.free.unseen), highest)
    made = {"class-iou": bars, "scores": maps, "training": training_curves(results.history)}
    return {name: plots.png_bytes(figure, dpi=150) for name, figure in made.items()}


def percent(value: float) -> str:
    return "–" if value != value else f"{100 * value:.1f}"


def markdown_table(scores: Mapping[str, Scores]) -> str:
    """The summary figures of all models in percent."""
    rows = [["model (%)", *COLUMNS.values()], ["---", *["---:"] * len(COLUMNS)]]
    rows += [[name, *(percent(getattr(of, key)) for key in COLUMNS)] for name, of in scores.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def html_table(scores: Mapping[str, Scores], caption: str) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in ("model", *COLUMNS.values()))
    body = ""
    for name, of in scores.items():
        cells = "".join(f"<td>{percent(getattr(of, key))}</td>" for key in COLUMNS)
        body += f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>\n'
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>"


def html_image(png: bytes, alt: str) -> str:
    return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{escape(alt)}">'


def shares(plate: Plate, labels: np.ndarray) -> str:
    """Such as "water* 40 %, tree* 12 %": in words what a mask shows."""
    part = {i: 100 * float((labels == i).mean()) for i in plots.present(labels)}
    return ", ".join(f"{plots.marked(plate.names[i], plate.unseen)} {value:.0f} %" for i, value in part.items())


def html_plate(plate: Plate) -> str:
    """Picture, truth and prediction side by side, names in the regions, and the colours' key."""
    large = enlarge(plate.image, 2)
    picture = html_image(png(large), f"{plate.title}: the picture")
    panels = f"<figure>{picture}<figcaption>picture</figcaption></figure>\n"
    for kind, labels in (("truth", plate.truth), ("prediction", plate.labels)):
        if labels is None:
            continue
        tinted = png(plots.overlay(large, enlarge(labels, 2), plate.palette))
        mask = html_image(tinted, f"{plate.title}, {kind}: {shares(plate, labels)}")
        spots = "".join(
            f'<span aria-hidden="true" style="left:{100 * x:.1f}%;top:{100 * y:.1f}%">'
            f"{escape(plots.marked(name, plate.unseen))}</span>"
            for name, x, y in plots.label_spots(labels, plate.names, letter=0.027)
        )
        panels += f'<figure><div class="picture">{mask}{spots}</div><figcaption>{kind}</figcaption></figure>\n'
    key = "".join(
        f'<li><i style="background:rgb{plate.palette[i]}"></i>{escape(plots.marked(plate.names[i], plate.unseen))} '
        f"<small>{100 * float((plate.labels == i).mean()):.1f} %</small></li>"
        for i in plots.present(plate.labels, plate.truth)
    )
    right = "" if plate.accuracy is None else f"<p>{percent(plate.accuracy)} % of the pixels right</p>"
    return (
        f'<article class="plate"><div class="title"><h3>{escape(plate.title)}</h3>{right}</div>\n'
        f'<div class="panels">{panels}</div>\n<ul class="key" aria-label="colours and shares">{key}</ul></article>'
    )


def html_chart(png: bytes, alt: str, caption: str) -> str:
    return f'<figure class="chart">{html_image(png, alt)}<figcaption>{escape(caption)}</figcaption></figure>'


def hero(plate: Plate) -> str:
    """The picture above the diagonal, its mask below."""
    large = enlarge(plate.image, 4)
    mask = plots.overlay(large, enlarge(plate.labels, 4), plate.palette, alpha=0.8)
    y, x = np.indices(large.shape[:2])
    split = np.where((x + y < large.shape[0])[..., None], large, mask)
    split[abs(x + y - large.shape[0]) < 4] = 255
    return html_image(png(split), f"A drawn scene, half as it is, half cut up into {shares(plate, plate.labels)}")


def render_page(results: Results, charts: Mapping[str, bytes], folder: Path) -> str:
    """The page as HTML that needs no other file and asks for nothing over the network; `charts` are its `figures`."""
    picture = shlex.quote((folder / "picture.png").as_posix())
    best = {name: float(scores.max()) for name, scores in results.score_maps.items()}
    losses = [row["total"] for row in results.history if row.get("total") is not None]
    first, *others = results.scores
    seen = len(results.classes) - len(results.unseen)
    template = Template(files("sptseg.cli").joinpath("demo.html").read_text(encoding="utf-8"))
    return template.substitute(
        unseen_count=len(results.unseen),
        class_count=len(results.classes),
        hero=hero(results.free),
        gallery_count=len(results.gallery),
        gallery="\n".join(html_plate(plate) for plate in results.gallery),
        absent=escape(ABSENT),
        free=html_plate(results.free),
        score_maps=html_chart(
            charts["scores"],
            "Score of each phrase at each pixel; highest: " + ", ".join(f"{n} {v:.2f}" for n, v in best.items()),
            "How much each pixel looks like each phrase. Every pixel goes to the phrase that scores highest there.",
        ),
        training_text=TRAINING.format(iterations=results.iterations, batch=BATCH, seen=seen),
        curves=html_chart(
            charts["training"],
            f"Training curves over {results.iterations} steps: the loss goes from {losses[0]:.2f} to {losses[-1]:.2f}",
            "Loss and learning rate at every step; validation on a few other scenes, hence rough.",
        ),
        table=html_table(results.scores, f"Percent, over the same {results.scenes} scenes"),
        honesty=HONESTY.format(scenes=results.scenes, seed=results.seed),
        bars=html_chart(
            charts["class-iou"],
            f"IoU of {first} per class: "
            + ", ".join(
                f"{plots.marked(n, results.unseen)} {percent(v)}" for n, v in results.scores[first].iou.items()
            ),
            f"Bars: {first}. Markers: {', '.join(others)}. With so few scenes, a class may hang on a single picture.",
        ),
        commands=escape("\n".join(COMMANDS).format(picture=picture, next_seed=results.seed + 1)),
        seconds=f"{results.seconds:.0f}",
        seed=results.seed,
    )
