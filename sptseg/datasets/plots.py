"""Arrays to pictures: label colours, overlays, legends, bars, curves; PNG bytes of either.

Figures are matplotlib objects of their own (no pyplot, no global state); nothing is told by colour alone."""

import math
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from textwrap import fill
from typing import Any, Literal

import numpy as np
from matplotlib import font_manager, rcParams
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from sptseg.datasets.images import reduce
from sptseg.datasets.splits import IGNORE, Colour, ignored_label
from sptseg.system import bytes_of, output_place, write

Array = np.ndarray
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"  # Okabe and Ito
INK, FAINT = "#22252a", "#d9d9d9"
MARK = "*"
UNSEEN_NOTE = f"{MARK} unseen in training"
PICTURE_SIDE = 1024  # pixels of a picture in a figure
ROWS_AT_ONCE = 256  # as floats of a large picture take gigabytes
MARKERS = ("D", "o", "s", "^", "v")
STROKE = [withStroke(linewidth=2.4, foreground="black")]
OUTLINED: dict[str, Any] = {"color": "white", "size": 8.5, "weight": "bold", "path_effects": STROKE}
DOT: dict[str, Any] = {"ls": "none", "ms": 4.5, "mfc": "white", "mec": INK}
LEGEND: dict[str, Any] = {"loc": "center left", "frameon": False, "fontsize": 9, "borderaxespad": 0}
# Class names are in any language: these have what matplotlib's own font lacks, on Linux, macOS and Windows.
FURTHER_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Droid Sans Fallback", "Arial Unicode MS",
    "PingFang SC", "Hiragino Sans", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic",
)  # fmt: skip
rcParams["font.family"] += [name for name in FURTHER_FONTS if name in font_manager.get_font_names()]


class Plot(Figure):
    """A matplotlib figure that a notebook shows without pyplot."""

    def __init__(self, width: float, height: float, title: str | None = None) -> None:
        super().__init__(figsize=(width, height), dpi=100, layout="constrained", facecolor="white")
        if title:
            self.suptitle(title, fontsize=12, color=INK)

    def _repr_png_(self) -> bytes:
        return png_bytes(self)


def png_bytes(figure: Figure, dpi: float | None = None) -> bytes:
    """The figure as a PNG file, at its own resolution or `dpi`; the same bytes for the same figure."""
    return bytes_of(partial(figure.savefig, format="png", dpi=dpi or figure.dpi, metadata={"Software": None}))


def picture_place(path: str | PathLike[str]) -> Path:
    """`output_place` of a picture, in a format that figures can be saved in."""
    kind = Path(path).suffix[1:].lower() or "png"
    if kind not in FigureCanvasBase.get_supported_filetypes():
        raise ValueError(f"{path} ends in .{kind}, which is no picture that can be written; use .png, .jpg or .pdf")
    return output_place(path)


def save_figure(figure: Figure, path: str | PathLike[str], **options: Any) -> None:
    """Writes a figure whole or not at all, in the format of the path's suffix; PNG without one."""
    write(path, bytes_of(partial(figure.savefig, format=Path(path).suffix[1:] or "png", **options)))


def colourise(labels: Array, palette: Sequence[Colour], ignore: Colour = (255, 255, 255)) -> Array:
    """Labels (H,W) -> colours (H,W,3) uint8; label 255 gets the colour `ignore`."""
    table = np.full((ignored_label(len(palette)) + 1, 3), ignore, np.uint8)
    table[: len(palette)] = palette
    return table[labels]


def borders(labels: Array, width: int = 1) -> Array:
    """Where the class changes within `width` pixels to the right or below: bool (H,W)."""
    edge = np.zeros(labels.shape, bool)
    for step in range(1, width + 1):
        edge[:-step] |= labels[:-step] != labels[step:]
        edge[:, :-step] |= labels[:, :-step] != labels[:, step:]
    return edge


def overlay(image: Array, labels: Array, palette: Sequence[Colour], alpha: float = 0.55) -> Array:
    """The image (H,W,3) uint8 in grey, tinted by class, with thin dark borders; ignored pixels stay coloured."""
    result, width = image.copy(), max(1, round(min(labels.shape) / 250))
    for top in range(0, len(labels), ROWS_AT_ONCE):
        here = slice(top, top + ROWS_AT_ONCE)
        grey = image[here] @ np.array([0.299, 0.587, 0.114])  # so that the tints are the legend's
        mixed = alpha * colourise(labels[here], palette) + (1 - alpha) * grey[..., None]
        ignored = labels[here] == ignored_label(len(palette))
        mixed[ignored] = image[here][ignored]
        mixed[borders(labels[top : top + ROWS_AT_ONCE + width], width)[: len(mixed)]] *= 0.25
        result[here] = np.rint(mixed)
    return result


def present(labels: Array, *others: Array | None, ignore: int = IGNORE) -> list[int]:
    """The label values that occur, the largest region first; those only in `others` follow."""
    found: list[int] = []
    for array in [labels, *(other for other in others if other is not None)]:
        counts = np.bincount(array.ravel(), minlength=ignore + 1)
        counts[[ignore, *found]] = 0
        found += np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)].tolist()
    return found


def label_spots(labels: Array, names: Sequence[str], letter: float = 0.024) -> Iterator[tuple[str, float, float]]:
    """Where names fit inside their regions, one place per class at most: (name, x, y), shares of width and height.
    `letter` is a letter's width as a share of the picture's; a line is 2.5 times as high."""
    rows, columns = labels.shape
    for label in present(labels, ignore=ignored_label(len(names))):
        mask = labels == label
        middle_y, middle_x = (where.mean() for where in np.nonzero(mask))
        total = np.pad(mask.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))  # sums of rectangles from (0, 0)
        for room in (1.6, 1.3, 1.0):  # rather with some air around
            h, w = (math.ceil(n * letter * room * columns) for n in (2.5, len(names[label]) + 1))
            inside = total[h:, w:] - total[:-h, w:] - total[h:, :-w] + total[:-h, :-w]
            tops, lefts = np.nonzero(inside >= 0.95 * h * w)
            if len(tops):
                ys, xs = tops + h / 2, lefts + w / 2
                best = np.argmin((ys - middle_y) ** 2 + (xs - middle_x) ** 2)
                yield names[label], float(xs[best] / columns), float(ys[best] / rows)
                break


def show_image(ax: Axes, image: Array, title: str = "", cmap: str = "gray", highest: float = 255) -> AxesImage:
    """A picture without axes, its title above; values (H,W), from 0 to `highest`, through a colour map."""
    readable = marked(title.encode(errors="backslashreplace").decode(), ())  # a file's name may be no UTF-8
    ax.set_title(readable, fontsize=10, color=INK)
    ax.set_axis_off()
    return ax.imshow(image, cmap=cmap, vmin=0, vmax=highest, interpolation="nearest")


def marked(name: str, unseen: Collection[str]) -> str:
    """The name, with a mark if the class is unseen in training, for matplotlib, which reads between $ as formulas."""
    return f"{name}{MARK * (name in unseen)}".replace("$", r"\$")


def write_names(ax: Axes, labels: Array, names: Sequence[str], unseen: Collection[str] = ()) -> None:
    """Class names into the regions that have room for them, in outlined letters."""
    height, width = labels.shape
    for name, x, y in label_spots(labels, names):
        ax.text(x * width, y * height, marked(name, unseen), ha="center", va="center", **OUTLINED)


def legend(ax: Axes, names: Sequence[str], palette: Sequence[Colour], unseen: Collection[str] = ()) -> None:
    """Fills the axes with colour patches and names; unseen classes carry a mark, explained below them."""
    patches = [
        Patch(facecolor="#{:02x}{:02x}{:02x}".format(*colour), edgecolor=INK, lw=0.6, label=marked(name, unseen))
        for name, colour in zip(names, palette, strict=True)
    ]
    if set(names) & set(unseen):
        patches.append(Patch(alpha=0, label=UNSEEN_NOTE))
    ax.set_axis_off()
    ax.legend(handles=patches, ncols=1 + len(patches) // 15, **LEGEND)


def gallery(
    cells: Sequence[tuple[str, Array | str, Array | None]],
    names: Sequence[str],
    palette: Sequence[Colour],
    unseen: Collection[str] = (),
    title: str | None = None,
) -> Figure:
    """Pictures in rows of at most four, reduced to PICTURE_SIDE pixels, and a legend of the classes in them. A cell is
    a title, a picture (H,W,3) or a text in its place, and labels (H,W) to show over it, with names, or None."""
    across, ignore = min(4, len(cells)), ignored_label(len(names))
    rows = math.ceil(len(cells) / across)
    found = present(np.array([ignore]), *(labels for *_, labels in reversed(cells)), ignore=ignore)
    shapes = [picture.shape for _, picture, _ in cells if not isinstance(picture, str)]
    tall = 3.1 * float(np.clip(np.median([h / w for h, w, _ in shapes]), 0.4, 1.6)) if shapes else 3.1
    tall = max(rows * (tall + 0.3), 0.19 * min(len(found), 15) + 0.3) + 0.3 * (title is not None)
    wide = 1.8 * (1 + len(found) // 15)
    figure = Plot(3.1 * across + wide, tall, title)
    grid = figure.add_gridspec(rows, across + 1, width_ratios=[3.1] * across + [wide - 0.2])
    for i, (name, picture, labels) in enumerate(cells):
        ax = figure.add_subplot(grid[divmod(i, across)])
        if isinstance(picture, str):
            show_image(ax, np.full((3, 4, 3), 238, np.uint8), name)
            ax.text(1.5, 1, fill(picture, 40), ha="center", va="center", fontsize=6.5)
            continue
        picture = reduce(picture, PICTURE_SIDE)
        if labels is not None:
            labels = reduce(labels, PICTURE_SIDE)
            picture = overlay(picture, labels, palette)
            write_names(ax, labels, names, unseen)
        show_image(ax, picture, name)
    legend(figure.add_subplot(grid[:, -1]), [names[i] for i in found], [palette[i] for i in found], unseen)
    return figure


def show_segmentation(
    image: Array,
    labels: Array,
    names: Sequence[str],
    palette: Sequence[Colour],
    unseen: Collection[str] = (),
    truth: Array | None = None,
    title: str | None = None,
) -> Figure:
    """Picture, truth (if given) and prediction side by side, class names in large regions, and a legend."""
    shown = [("picture", image, None), ("truth", image, truth), ("prediction", image, labels)]
    return gallery(shown if truth is not None else shown[::2], names, palette, unseen, title)


def contact_sheet(
    rows: Sequence[Sequence[Array]], titles: Sequence[str], row_titles: Sequence[str] | None = None, panel: float = 1.9
) -> Figure:
    """A grid of pictures; `titles` stand above the columns, `row_titles` beside the rows; `panel` is in inches."""
    figure = Plot(panel * len(titles) + 0.3 * (row_titles is not None), panel * len(rows) + 0.3)
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            show_image(axes[i, j], picture, titles[j] if i == 0 else "")
        if row_titles is not None:
            axes[i, 0].set_axis_on()
            axes[i, 0].set(xticks=[], yticks=[], frame_on=False, ylabel=row_titles[i])
    return figure


def score_map(ax: Axes, scores: Array, title: str, highest: float = 1.0) -> None:
    """Scores (H,W), from 0 to `highest`, with a colour bar."""
    shown = show_image(ax, scores, title, "cividis", highest)
    bar = ax.figure.colorbar(shown, ax=ax, fraction=0.046, pad=0.03, label="score", format="{x:.2g}")
    bar.ax.tick_params(labelsize=8)
    bar.set_ticks([0, highest / 2, highest])


def tidy(ax: Axes, title: str, grid: Literal["both", "x", "y"] = "both", **settings: Any) -> None:
    """Title on the left, no frame above and on the right, small ticks, a grid below; and what `ax.set` takes."""
    ax.set_title(title, fontsize=10, color=INK, loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8.5)
    ax.grid(axis=grid, color=FAINT, linewidth=0.7)
    ax.set(axisbelow=True, **settings)
