"""What the widgets are made of: pictures and tables that are renewed in place, and arrays made ready for them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from textwrap import fill
from typing import Any

import ipywidgets
import numpy as np
from ipywidgets import HTML, Box, GridBox, Layout, VBox
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from sptseg.datasets import Colour, enlarge, plots, png

Array = np.ndarray
Map = tuple[str, Array, float, float, str]  # title, values (h, w), their lowest and highest, colour map
LONGEST = 512  # pixels of the longer side: larger pictures are made smaller, for a quick answer
WIDTH = 256  # pixels to which small pictures are enlarged, about
NARROWEST = 220  # pixels of a picture on the page; it grows into the room that there is
WIDE: dict[str, Any] = {"style": {"description_width": "initial"}}  # as wide as it needs


class Explorer(VBox):
    """Controls, a sentence, pictures by title and a table, shown by a notebook as a cell's last expression."""

    def __init__(self, controls: Sequence[Sequence[ipywidgets.Widget]], *titles: str) -> None:
        self.note, self.table = HTML(), HTML()
        self.panels = {title: TitledPicture(title) for title in titles}
        columns = f"repeat(auto-fit, minmax({NARROWEST}px, 1fr))"  # as many pictures in a row as the page has room for
        grid = Layout(grid_template_columns=columns, align_items="flex-end", flex=f"1 1 {3 * NARROWEST}px")
        rows = [*controls, [self.note], [GridBox(list(self.panels.values()), layout=grid), self.table]]
        layout = Layout(flex_flow="row wrap", align_items="flex-start", grid_gap="0 14px")
        super().__init__([Box(row, layout=layout) for row in rows])
        self.add_class(type(self).__name__)  # a handle for style sheets and tests

    def __repr__(self) -> str:  # stands where no kernel runs
        return f"{type(self).__name__} (its controls need a running kernel; the figure beside it shows the same)"


class TitledPicture(VBox):
    """A title over a picture, whose place on the page stays the same while the picture changes."""

    def __init__(self, title: str) -> None:
        self.name, self.title = title, HTML(f"<b>{escape(title)}</b>")
        self.image = ipywidgets.Image(layout=Layout(width="98%", flex="0 0 auto"))  # no tooltip: 8.1.9 breaks
        super().__init__([self.title, self.image], layout=Layout(max_width=f"{2 * WIDTH}px"))
        self.add_class("panel-" + title.split(":")[0].replace(" ", "-"))

    def show(self, picture: Array, remark: str = "") -> None:
        """Shows (h, w, 3) uint8, enlarged if it is small; the remark goes beside the title."""
        self.image.value = png(enlarge(picture, _factor(picture)))
        self.title.value = f"<b>{escape(self.name)}</b> {escape(remark)}"

    def show_map(self, values: Array, low: float, high: float, colour_map: str, remark: str = "") -> None:
        """Shows values (h, w) as crisp squares; a remark tells their range, if there is no other."""
        colours = colormaps[colour_map]((values - low) / max(high - low, 1e-9), bytes=True)[..., :3]
        self.show(crisp(colours), f"({remark or f'{low:.3g} to {high:.3g}'})")


def slider(value: float, high: float, step: float, description: str, tooltip: str) -> Any:
    return ipywidgets.FloatSlider(
        value, min=0, max=high, step=step, description=description, tooltip=tooltip,
        layout=Layout(width="310px"), **WIDE,
    )  # fmt: skip


def dropdown(options: Mapping[str, Any], description: str, tooltip: str = "") -> Any:
    """A choice by name, whose value is what the name stands for."""
    return ipywidgets.Dropdown(options=[*options.items()], description=description, tooltip=tooltip, **WIDE)


def presets(known: Mapping[str, Any], choose: Callable[..., None]) -> list[ipywidgets.Widget]:
    """A button for each: all but the last of its values go to `choose`, the last is its tooltip."""
    buttons = [ipywidgets.Button(description=name, tooltip=values[-1]) for name, values in known.items()]
    for button in buttons:
        button.on_click(lambda clicked: choose(*known[clicked.description][:-1]))
    return [ipywidgets.Label("Presets"), *buttons]


def still(
    sentence: str, pictures: Mapping[str, Array], maps: Sequence[Map] = (), chart: bool = False
) -> tuple[Figure, Axes]:
    """A figure, and its last axes: pictures by title, maps with colour bars, room for a chart; three a row at most."""
    count = len(pictures) + len(maps) + chart
    columns = 2 if count == 4 else min(count, 3)
    rows = -(-count // columns)
    lines = fill(sentence, 35 * columns)
    figure = plots.Plot(3.15 * columns, 2.8 * rows + 0.2 * (lines.count("\n") + 1))
    figure.suptitle(lines, fontsize=10, color=plots.INK)
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    for ax, (name, picture) in zip(axes, pictures.items(), strict=False):
        plots.show_image(ax, picture, name)
    for ax, (name, values, low, high, colour_map) in zip(axes[len(pictures) :], maps, strict=False):
        shown = plots.show_image(ax, values, name, colour_map)
        shown.set_clim(low, high)
        bar = figure.colorbar(shown, ax=ax, orientation="horizontal", fraction=0.06, pad=0.03)
        bar.ax.tick_params(labelsize=9)
        bar.ax.locator_params(nbins=5)
    for ax in axes:
        ax.set_anchor("N")  # level, with a bar below or without
    return figure, axes[-1]


def _factor(picture: Array, width: float = WIDTH) -> int:
    """How many times a picture is enlarged to be about as wide as that, if it is smaller."""
    return max(1, round(width / picture.shape[1]))


def crisp(picture: Array) -> Array:
    """A small picture (h, w, 3), or values (h, w), enlarged into squares."""
    return picture.repeat(_factor(picture), axis=0).repeat(_factor(picture), axis=1)


def table(head: Sequence[str], rows: Iterable[tuple[Colour, Sequence[str]]], note: str = "") -> str:
    """An HTML table; a row begins with a patch of colour, its first cell is a name, the others are figures."""
    patch = '<span style="display:inline-block;width:1em;height:1em;border:1px solid;background:#{:02x}{:02x}{:02x}">'
    lines = [[f"<b>{escape(title)}</b>" for title in head]]
    lines += [[f"{patch.format(*colour)}</span> {escape(name)}", *map(escape, rest)] for colour, (name, *rest) in rows]
    cell = '<td style="padding:1px 14px 1px 0;text-align:{}">{}</td>'
    cells = ("".join(cell.format("right" if i else "left", text) for i, text in enumerate(line)) for line in lines)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f'<div style="line-height:1.35;margin-right:24px"><table>{body}</table>{escape(note)}</div>'


def message(text: str) -> str:
    return f'<div role="status" style="line-height:1.4;max-width:70em">{escape(text)}</div>'


def unseen_note(names: Iterable[str]) -> str:
    return plots.UNSEEN_NOTE if any(name.endswith(plots.MARK) for name in names) else ""


def percent(share: float) -> str:
    return "–" if share != share else f"{100 * share:.1f} %"


def points(change: float) -> str:
    """The difference of two shares, in percentage points."""
    return "–" if change != change else f"{100 * change:+.1f} points"


def named_overlay(image: Array, labels: Array, names: Sequence[str], palette: Sequence[Colour]) -> Array:
    """`plots.overlay`, enlarged if small, with names in the regions that have room for them: (h, w, 3) uint8. The twin
    of `plots.show_image` with `plots.write_names`, without matplotlib: a tenth of the time."""
    factor, coarse = _factor(image, 1.5 * WIDTH), max(1, min(labels.shape) // 128)
    picture = Image.fromarray(plots.overlay(enlarge(image, factor), enlarge(labels, factor), palette))
    draw, size = ImageDraw.Draw(picture), max(10, round(0.05 * picture.width))
    style: Any = {"anchor": "mm", "stroke_width": max(1, size // 8), "stroke_fill": "black"}
    style["font"] = ImageFont.truetype(findfont("DejaVu Sans:bold"), size)
    for name, x, y in plots.label_spots(labels[::coarse, ::coarse], names, letter=0.034):
        draw.text((x * picture.width, y * picture.height), name, "white", **style)
    return np.asarray(picture)


def spectrum_picture(maps: Array) -> Array:
    """Log amplitude of maps (..., H, W), averaged, frequency 0 in the middle: colours (h, w, 3) uint8. At most `WIDTH`
    values a side: neighbours are averaged. The mean is left out."""
    amplitude = np.abs(np.fft.fft2(maps - maps.mean((-2, -1), keepdims=True))).reshape(-1, *maps.shape[-2:]).mean(0)
    height, width = (min(WIDTH, n) for n in amplitude.shape)
    shown = Image.fromarray(np.fft.fftshift(np.log1p(amplitude)).astype(np.float32))
    small = np.asarray(shown.resize((width, height), Image.Resampling.BOX))
    lowest, highest = np.quantile(small, 0.02), max(float(small.max()), 1e-9)
    return colormaps["cividis"]((small - lowest) / max(highest - lowest, 1e-9), bytes=True)[..., :3]


def token_pictures(before: Array, after: Array) -> tuple[Array, Array]:
    """Tokens (H, W, D) before and after as colours (H, W, 3) uint8: along the first three principal axes of the first.
    Grey is the mean token, and full colour three standard deviations of the first axis."""
    grid, mean = before.shape[:2], before.mean((0, 1))
    _, scales, axes = np.linalg.svd((before - mean).reshape(-1, len(mean)), full_matrices=False)
    deviation = max(scales[0] / (grid[0] * grid[1]) ** 0.5, 1e-9)
    shares = [(each - mean) @ axes[:3].T / (3 * deviation) for each in (before, after)]
    first, second = (np.rint(127.5 * (1 + share.clip(-1, 1))).astype(np.uint8) for share in shares)
    return first, second
