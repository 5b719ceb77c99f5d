"""What the widgets are made of: pictures and tables that are renewed in place, and arrays made ready for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from textwrap import fill
from typing import Any

import ipywidgets
import numpy as np
from ipywidgets import HTML, Box, HBox, Layout, VBox
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from sptseg.datasets import IGNORE, Colour, enlarge, luminance, plots, png

Array = np.ndarray
Map = tuple[str, Array, float, float, str]  # title, values (h, w), their lowest and highest, colour map
LONGEST = 512  # pixels of the longer side: larger pictures are shrunk, for a quick answer
PANEL = 256  # pixels on the page: the width of a picture
WIDE: dict[str, Any] = {"style": {"description_width": "initial"}}  # as wide as it needs
PAUSE = 0.1  # seconds without a new value before what takes longer follows


class Explorer(VBox):
    """A box of controls and pictures, shown by a notebook as a cell's last expression."""

    def __init__(self, parts: Sequence[ipywidgets.Widget]) -> None:
        super().__init__(parts)
        self.add_class(type(self).__name__)  # a handle for style sheets and tests

    def __repr__(self) -> str:  # stands where no kernel runs
        return f"{type(self).__name__} (its controls need a running kernel; the figure beside it shows the same)"


class AfterPause:
    """Calls a function when it has not been asked for again for a while; at once where no event loop runs."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function
        self.handle: asyncio.TimerHandle | None = None

    def __call__(self) -> None:
        if self.handle is not None:
            self.handle.cancel()
        try:
            self.handle = asyncio.get_running_loop().call_later(PAUSE, self.function)
        except RuntimeError:
            self.function()


class Panel(VBox):
    """A title over a picture, whose place on the page stays the same while the picture changes."""

    def __init__(self, title: str) -> None:
        self.name, self.title = title, HTML(f"<b>{escape(title)}</b>")
        self.image = ipywidgets.Image(layout=Layout(width=f"{PANEL}px", flex="0 0 auto"))  # no tooltip: 8.1.9 breaks
        super().__init__([self.title, self.image], layout=Layout(width=f"{PANEL + 14}px"))
        self.add_class("panel-" + title.split(":")[0].replace(" ", "-"))

    def show(self, picture: Array, remark: str = "") -> None:
        """Shows (h, w, 3) uint8, enlarged if it is small; the remark goes beside the title."""
        height = f"{round(PANEL * picture.shape[0] / picture.shape[1])}px"
        if self.image.layout.height != height:
            self.image.layout.height = height
        self.image.value = png(enlarge(picture, _factor(picture)))
        self.title.value = f"<b>{escape(self.name)}</b> {escape(remark)}"

    def show_map(self, values: Array, low: float, high: float, colour_map: str) -> None:
        """Shows values (h, w) as crisp squares; the remark tells their range."""
        colours = colormaps[colour_map]((values - low) / max(high - low, 1e-9), bytes=True)[..., :3]
        factor = _factor(values)
        self.show(colours.repeat(factor, axis=0).repeat(factor, axis=1), f"({low:.3g} to {high:.3g})")


class Maps(plots.Plot):
    """Pictures by title, then maps with colour bars."""

    def __init__(self, pictures: Mapping[str, Array], maps: Sequence[Map], title: str) -> None:
        count = len(pictures) + len(maps)
        super().__init__(2.1 * count, 3.1)
        self.suptitle(fill(title, 24 * count), fontsize=10, color=plots.INK)  # as wide as the figure
        axes = self.subplots(1, count)
        for ax, (name, picture) in zip(axes[: len(pictures)], pictures.items(), strict=True):
            plots.show_image(ax, picture, name)
        for ax, (name, values, low, high, colour_map) in zip(axes[len(pictures) :], maps, strict=True):
            shown = plots.show_image(ax, values, name, colour_map)
            shown.set_clim(low, high)
            bar = self.colorbar(shown, ax=ax, orientation="horizontal", fraction=0.06, pad=0.03)
            bar.ax.tick_params(labelsize=8)
            bar.ax.locator_params(nbins=4)


def before_and_after(
    ax: Axes, rows: Sequence[tuple[str, Colour, float, float]], xlabel: str, before: str, after: str
) -> None:
    """Shares 0..1 before and after, a row per class, in percent; the marks differ by shape."""
    for y, (_, colour, first, second) in enumerate(rows):
        ax.plot([100 * first, 100 * second], [y, y], color=plots.INK, lw=1, zorder=1)
        ax.plot(100 * first, y, "o", mfc="white", mec=plots.INK, ms=8)
        ax.plot(100 * second, y, "s", mfc=np.array(colour) / 255, mec=plots.INK, ms=6)
    ax.set_yticks(range(len(rows)), [name for name, *_ in rows])
    ax.set(xlim=(-4, 104), ylim=(len(rows) - 0.4, -0.6), xlabel=xlabel)
    ax.grid(axis="x", color=plots.FAINT, linewidth=0.7)
    plots.tidy(ax, f"○ {before}  ■ {after}")


def _factor(picture: Array, width: float = PANEL) -> int:
    """How many times a picture is enlarged to be about as wide as that, if it is smaller."""
    return max(1, round(width / picture.shape[1]))


def row(parts: Iterable[ipywidgets.Widget]) -> Box:
    """Side by side while there is room, else below each other."""
    return Box(list(parts), layout=Layout(flex_flow="row wrap", align_items="flex-start"))


def pairs(panels: Iterable[Panel]) -> Box:
    """Four pictures side by side, or two above two where the page is narrow."""
    first, second, third, fourth = panels
    return row([HBox([first, second]), HBox([third, fourth])])


def table(head: Sequence[str], rows: Iterable[tuple[Colour, Sequence[str]]], note: str = "") -> str:
    """An HTML table; a row begins with a patch of colour, its first cell is a name, the others are figures."""
    patch = '<span style="display:inline-block;width:1em;height:1em;border:1px solid;vertical-align:-.15em;{}"></span>'

    def line(cells: Sequence[str]) -> str:
        style = ' style="padding:1px 14px 1px 0;text-align:{}"'
        return "".join(f"<td{style.format('right' if i else 'left')}>{cell}</td>" for i, cell in enumerate(cells))

    lines = [line([f"<b>{escape(title)}</b>" for title in head])]
    for colour, (name, *figures) in rows:
        swatch = patch.format("background:#{:02x}{:02x}{:02x}".format(*colour))
        lines.append(line([f"{swatch} {escape(name)}", *map(escape, figures)]))
    table = "".join(f"<tr>{cells}</tr>" for cells in lines)
    return f'<div style="line-height:1.35;margin-right:24px"><table>{table}</table>{escape(note)}</div>'


def message(text: str, warning: bool = False) -> str:
    mark = "<b>⚠ Not done:</b> " if warning else ""
    return f'<div role="status" style="line-height:1.4;max-width:70em">{mark}{escape(text)}</div>'


def unseen_note(names: Iterable[str]) -> str:
    return plots.UNSEEN_NOTE if any(name.endswith(plots.MARK) for name in names) else ""


def percent(share: float) -> str:
    return "–" if share != share else f"{100 * share:.1f} %"


def points(change: float) -> str:
    """The difference of two shares, in percentage points."""
    return "–" if change != change else f"{100 * change:+.1f} points"


def _bold(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(findfont("DejaVu Sans:bold"), size)


def named_overlay(image: Array, labels: Array, names: Sequence[str], palette: Sequence[Colour]) -> Array:
    """`plots.overlay`, enlarged if small, with names in the regions that have room for them: (h, w, 3) uint8.

    The twin of `plots.show_image` with `plots.write_names`, without matplotlib: a tenth of the time.
    """
    factor, coarse = _factor(image, 1.5 * PANEL), max(1, min(labels.shape) // 128)
    shown = plots.overlay(enlarge(image, factor), enlarge(labels, factor), palette)
    picture = Image.fromarray(shown)
    draw, size = ImageDraw.Draw(picture), max(10, round(0.05 * picture.width))
    for name, x, y in plots.label_spots(labels[::coarse, ::coarse], names, letter=0.034):
        where = (x * picture.width, y * picture.height)
        draw.text(where, name, "white", _bold(size), anchor="mm", stroke_width=max(1, size // 8), stroke_fill="black")
    return np.asarray(picture)


def shrunk(image: Array, label: Array | None, classes: int) -> tuple[Array, Array | None]:
    """A picture and its labels (H, W), of at most `LONGEST` pixels a side."""
    if label is not None:
        if label.shape != image.shape[:2]:
            raise ValueError(f"the label is {label.shape} and the image {image.shape[:2]}; wanted equal sizes")
        highest = label[label != IGNORE].max(initial=0)
        if highest >= classes:
            raise ValueError(f"the label holds {highest}; {classes} classes have the labels 0 to {classes - 1}")
        label = label.astype(np.uint8)
    share = LONGEST / max(image.shape[:2])
    if share >= 1:
        return image, label
    size = (round(share * image.shape[1]), round(share * image.shape[0]))
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    return small, None if label is None else np.asarray(Image.fromarray(label).resize(size, Image.Resampling.NEAREST))


def spectrum_picture(image: Array) -> tuple[Array, Array]:
    """Log amplitude of a picture's brightness, frequency 0 in the middle: colours (h, w, 3) uint8, and radii (h, w).

    Radii are in cycles per pixel. At most `PANEL` values a side: neighbours are averaged.
    """
    grey = luminance(image)
    amplitude = np.log1p(np.abs(np.fft.fftshift(np.fft.fft2(grey - grey.mean()))))
    height, width = (min(PANEL, n) for n in grey.shape)
    small = np.asarray(Image.fromarray(amplitude.astype(np.float32)).resize((width, height), Image.Resampling.BOX))
    lowest, highest = np.quantile(small, 0.02), max(float(small.max()), 1e-9)
    colours = colormaps["cividis"]((small - lowest) / (highest - lowest), bytes=True)[..., :3]
    vertical, horizontal = (np.fft.fftshift(np.fft.fftfreq(n)) for n in (height, width))
    return colours, np.hypot(vertical[:, None], horizontal)
