"""Figures of the analyses: spectra, models without a band or a part, the learned filter, failures, training."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import ArrayLike

from sptseg.analysis.spectra import Band, RadialPower
from sptseg.datasets import BLUE, GREEN, INK, MARKERS, ORANGE, VERMILION, Colour, Split, colourise, plots
from sptseg.inference import Change

Array = np.ndarray
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
HUES = (BLUE, VERMILION, GREEN, ORANGE, INK)


def look(i: int) -> dict[str, Any]:
    """How the i-th of several curves is drawn; their dashes and markers differ as well, from the sixth on empty."""
    filled = {} if i < 5 else {"mfc": "white"}
    return {"ls": DASHES[i % 5], "color": HUES[i % 5], "marker": MARKERS[i % 5], "lw": 1.6, **filled}


def band_name(band: Band) -> str:
    """A band in cycles per pixel, as fractions: "1/16 to 1/8"."""
    low, high = (f"1/{1 / f:.0f}" if f and abs(1 / f - round(1 / f)) < 1e-9 else f"{f:.2g}" for f in band)
    if band[1] > 0.5:
        return f"above {low}"
    return f"{low} to {high}" if band[0] else f"below {high}"


def power_spectra(
    panels: Mapping[str, Mapping[str, RadialPower]], unit: str, title: str | None = None, law: float | None = None
) -> Figure:
    """Radial power against frequency in cycles per `unit`, both logarithmic: panels side by side, named curves in each,
    and for the eye a grey line of power ~ frequency^law."""
    figure = plots.Plot(1.0 + 3.3 * len(panels), 3.6 + 0.3 * (title is not None), title)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for ax, (name, curves) in zip(axes, panels.items(), strict=True):
        for i, (label, each) in enumerate(curves.items()):
            kept = (each.frequency > 0) & (each.frequency <= 0.5)
            x, y = each.frequency[kept], each.mean().power[kept]
            marks = np.unique(np.geomspace(1, len(x), 8).astype(int) - 1).tolist()
            ax.loglog(x, y, ms=4.5, label=label, markevery=marks, **look(i))
        if law is not None:
            x = np.array(ax.get_xlim()).clip(max=0.5)
            middle = np.log(np.sqrt(x.prod()))  # there the line has the curves' mean height
            heights = [np.interp(middle, np.log(line.get_xdata()), np.log(line.get_ydata())) for line in ax.lines]
            y = np.exp(np.mean(heights) + law * (np.log(x) - middle))
            ax.loglog(x, y, color="#999999", lw=1, label=f"frequency$^{{{law:g}}}$")
        plots.tidy(ax, name, xlabel=f"frequency (cycles per {unit})")
        ax.set_xscale("log", base=2)
        ax.xaxis.get_major_locator().set_params(numticks=7)
        ax.xaxis.set_major_formatter(lambda frequency, _: f"1/{1 / frequency:.0f}")
        ax.minorticks_off()
        ax.legend(frameon=False, fontsize=8.5)
    axes[0].set_ylabel("power")
    return figure


def changes_by_group(rows: Sequence[str], groups: Mapping[str, Sequence[Change]], ylabel: str, title: str) -> Figure:
    """Change of mean IoU in percentage points with its interval: groups side by side for each row (a band, a part)."""
    figure = plots.Plot(1.6 + 1.15 * len(rows), 3.6, title)
    ax = figure.subplots()
    for i, (name, changes) in enumerate(groups.items()):
        x = np.arange(len(rows)) + 0.22 * (i - (len(groups) - 1) / 2)
        y = 100 * np.array([[each.change, each.low, each.high] for each in changes]).T
        ends = np.maximum([y[0] - y[1], y[2] - y[0]], 0)
        filling = "white" if i else HUES[i]
        ax.errorbar(x, y[0], ends, color=HUES[i], fmt=MARKERS[i], capsize=3, ms=6, mfc=filling, label=name)
    plots.tidy(ax, "markers: these pictures; bars: 95 % interval over pictures", "y", ylabel=ylabel)
    ax.axhline(0, color=INK, lw=1)
    ax.set_xticks(range(len(rows)), rows)
    ax.legend(frameon=False, fontsize=9)
    return figure


def class_band_table(
    changes: Mapping[str, Sequence[Change]], bands: Sequence[str], unseen: Collection[str], title: str
) -> Figure:
    """A table of IoU changes in percentage points, a row per class, the one hurt most first, a column per band. Dark is
    a loss; figures whose interval contains 0 are in brackets; a class that does not occur has empty cells."""
    import seaborn  # here, as it takes seconds to load

    ordered = sorted(changes, key=lambda name: np.nansum([each.change for each in changes[name]]))
    values = 100 * np.array([[each.change for each in changes[name]] for name in ordered])
    worst = min(-1.0, float(np.nanmin(values)))
    figure = plots.Plot(2.2 + 0.95 * len(bands), 1.2 + 0.215 * len(ordered), title)
    ax = figure.subplots()
    cells = [each for name in ordered for each in changes[name]]
    points = [f"{100 * each.change:+z.0f}" for each in cells]
    texts = [f"({text})" if each.low <= 0 <= each.high else text for each, text in zip(cells, points, strict=True)]
    seaborn.heatmap(
        values, vmin=worst, vmax=0, cmap="cividis", cbar=False, ax=ax,
        annot=np.reshape(texts, values.shape), fmt="", annot_kws={"size": 8.5},
        xticklabels=list(bands), yticklabels=[plots.marked(name, unseen) for name in ordered],
    )  # fmt: skip
    for text, value in zip(ax.texts, values[~np.isnan(values)], strict=True):
        text.set_color(INK if value > 0.55 * worst else "white")
    ax.xaxis.tick_top()
    ax.set_xlabel(f"{plots.UNSEEN_NOTE}; (in brackets): the 95 % interval contains 0", fontsize=8.5)
    ax.tick_params(length=0, labelsize=8.5, labelrotation=0)
    return figure


def filter_curves(filters: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """`filter_radial` of filters: the mean as a line, from the 10th to the 90th percentile as an area."""
    figure = plots.Plot(9.0, 3.5, title)
    left, right = figure.subplots(1, 2)
    panels = ((left, "gain", "Gain", "factor", None), (right, "phase", "Phase, without sign", "degrees", 180))
    for ax, column, what, unit, highest in panels:
        for i, (name, each) in enumerate(filters.items()):
            ax.fill_between(each.index, each[f"{column}_low"], each[f"{column}_high"], color=HUES[i], alpha=0.16, lw=0)
            ax.plot(each.index, each[column], ms=4.5, label=name, **look(i))
        told = f"{what}: mean, and 10th to 90th percentile"
        plots.tidy(ax, told, xlabel="frequency (cycles per token)", ylabel=unit, ylim=(0, highest))
    right.set_yticks([0, 45, 90, 135, 180])
    left.legend(frameon=False, fontsize=9)
    return figure


def wave_maps(maps: Mapping[str, ArrayLike], title: str, unit: str) -> Figure:
    """Small real maps (H, W) side by side, all on one scale about 0 (or from 0), values written in if there are few."""
    figure = plots.Plot(0.6 + 2.2 * len(maps), 2.7, title)
    arrays = {name: np.asarray(each) for name, each in maps.items()}
    highest = max(float(np.abs(each).max()) for each in arrays.values()) or 1.0
    signed = any((each < 0).any() for each in arrays.values())
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    for ax, (name, each) in zip(axes, arrays.items(), strict=True):
        shown = plots.show_image(ax, each, name, "PuOr_r" if signed else "cividis")
        shown.set_clim(-highest if signed else 0, highest)
        for (row, column), value in np.ndenumerate(each) if each.size <= 36 else ():
            dark = abs(value) > 0.6 * highest if signed else value < 0.5 * highest
            ax.text(column, row, f"{value:.2g}", ha="center", va="center", size=9, color="white" if dark else INK)
    figure.colorbar(shown, ax=axes, label=unit, fraction=0.05)
    return figure


def bars(ax: Axes, values: Mapping[str, float] | pd.Series, xlabel: str, title: str, form: str = "{:.1f}") -> None:
    """A bar per name, the first on top, with its value written behind it."""
    names, numbers = zip(*values.items(), strict=True)
    ax.barh(range(len(names)), numbers, height=0.66, color=BLUE)
    for y, value in enumerate(numbers):
        ax.annotate(form.format(value), (max(value, 0), y), (4, 0), textcoords="offset points", va="center", size=8.5)
    plots.tidy(ax, title, "x", xlabel=xlabel, ylim=(len(names) - 0.4, -0.6))
    ax.set_yticks(range(len(names)), names)
    ax.margins(x=0.16)


def intervals(ax: Axes, rows: Mapping[str, tuple[float, float, float]], xlabel: str, title: str) -> None:
    """A marker per name with the ends of its interval: (value, low, high), all 0..1, shown in percent."""
    for y, (value, low, high) in enumerate(100 * np.array(list(rows.values()))):
        ax.plot([low, high], [y, y], "|-", color=BLUE, lw=2, ms=9)
        ax.plot(value, y, "o", color=INK, ms=5)
        behind: Any = {"fc": "white", "ec": "none", "pad": 0.8}  # a line at 0 stops before the figure
        ax.annotate(f"{value:z.1f}", (value, y), (0, 7), textcoords="offset points", ha="center", size=8.5, bbox=behind)
    plots.tidy(ax, title, "x", xlabel=xlabel, ylim=(len(rows) - 0.5, -0.7))
    ax.set_yticks(range(len(rows)), list(rows))


def differences(pairs: Mapping[str, Mapping[str, Any]], title: str) -> Figure:
    """Rows of a study's pairs, as its record has them: differences of mIoU with their intervals, seen and unseen."""
    figure = plots.Plot(10.0, 1.5 + 0.42 * len(pairs), title)
    left, right = figure.subplots(1, 2, sharey=True)
    for ax, kind in ((left, "seen"), (right, "unseen")):
        rows = {name: pair[f"miou_{kind}"] for name, pair in pairs.items()}
        intervals(ax, rows, "difference (percentage points)", f"mIoU, {kind} classes: mean, 95 % interval")
        ax.axvline(0, color=INK, lw=1)
    return figure


def lines(ax: Axes, x: Sequence | pd.Index, series: Mapping[str, Any], xlabel: str, ylabel: str, title: str) -> None:
    """Named curves over numbers, or over names at equal steps; values 0..1 are shown in percent."""
    named = isinstance(x[0], str)
    places = range(len(x)) if named else x
    for i, (name, values) in enumerate(series.items()):
        ax.plot(places, 100 * np.asarray(values), ms=5, label=name, **look(i))
    plots.tidy(ax, title, xlabel=xlabel, ylabel=ylabel)
    if named:
        ax.set_xticks(places, x)
    if len(series) > 1:
        ax.legend(frameon=False, fontsize=8.5)


def class_scatter(ax: Axes, classes: pd.DataFrame, share: str, xlabel: str, title: str, named: int) -> None:
    """A marker per class of `by_class` that occurs: IoU over a share, both in percent, the latter logarithmic. Seen
    classes are filled circles, unseen ones empty squares; the `named` lowest have their names."""
    there = classes[classes.pictures > 0]
    x, y = 100 * there[share], 100 * there.iou
    styles: tuple[Any, ...] = ({"color": BLUE, "marker": "o"}, {"color": ORANGE, "marker": "s", "mfc": "white"})
    for kind, style in zip(("seen", "unseen"), styles, strict=True):
        some = there.unseen == (kind == "unseen")
        ax.plot(x[some], y[some], ls="none", ms=6, mew=1.6, label=kind, **style)
    for name in y.nsmallest(named).index:
        ax.annotate(name, (x[name], y[name]), (6, -7), textcoords="offset points", size=8)
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ax.set_xticks([t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= t <= high])
    ax.xaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    plots.tidy(ax, title, xlabel=xlabel, ylabel="IoU (%)")
    ax.legend(frameon=False, fontsize=8.5)


def mask_sheet(
    rows: Sequence[tuple[Array, Sequence[Array]]],
    titles: Sequence[str],
    split: Split,
    row_titles: Sequence[str] | None = None,
    panel: float = 2.2,
) -> Figure:
    """A row per picture (H,W,3): the picture, then label maps (H,W) over it (255: as it is), with names in the regions
    that have room; `titles` of the columns; `panel` in inches."""
    sheet = [[image, *(plots.overlay(image, mask, split.palette) for mask in masks)] for image, masks in rows]
    figure = plots.contact_sheet(sheet, titles, row_titles, panel)
    for ax, mask in zip(figure.axes, (mask for _, masks in rows for mask in (None, *masks)), strict=True):
        if mask is not None:
            plots.write_names(ax, mask, split.classes, split.names(split.unseen))
    return figure


def class_iou_bars(
    iou: Mapping[str, float],
    unseen: Collection[str],
    title: str,
    model: str = "this model",
    others: Mapping[str, Mapping[str, float]] | None = None,
) -> Figure:
    """A bar per class, the best first, seen and unseen apart; `others` (model: IoU by class) show as markers."""
    others = others or {}
    dots: list[dict[str, Any]] = [{"marker": marker, **plots.DOT} for marker in MARKERS[: len(others)]]
    best_first = sorted(iou, key=lambda name: -math.inf if math.isnan(iou[name]) else iou[name], reverse=True)
    groups = [[n for n in best_first if n not in unseen], [n for n in best_first if n in unseen]]
    seen, unseen_rows = map(len, groups)
    figure = plots.Plot(9.6, 1.1 + 0.2 * max(seen, unseen_rows, 10), title)
    grid = figure.add_gridspec(2, 2, height_ratios=[max(unseen_rows, 1), max(seen - unseen_rows, 4)])
    keys: list[Patch | Line2D] = []
    panels = ((grid[:, 0], "seen", BLUE, ""), (grid[0, 1], f"unseen{plots.MARK}", ORANGE, "///"))
    for (place, kind, colour, hatch), group in zip(panels, groups, strict=True):
        ax, y, values = figure.add_subplot(place), np.arange(len(group)), np.array([100 * iou[name] for name in group])
        style: dict[str, Any] = {"facecolor": colour, "hatch": hatch, "edgecolor": "white"}
        ax.barh(y, np.nan_to_num(values), height=0.68, **style)
        for row in y[np.isnan(values)]:
            ax.text(1, row, "not in these pictures", va="center", fontsize=8, color="#555555", style="italic")
        for other, dot in zip(others.values(), dots, strict=True):
            ax.plot([100 * other[name] for name in group], y, clip_on=False, **dot)
        mean = f"mean {np.nanmean(values):.1f} %" if np.isfinite(values).any() else "none"
        plots.tidy(ax, f"{kind} classes, {mean}", "x", xlabel="IoU (%)", xlim=(0, 100), ylim=(len(group) - 0.4, -0.6))
        ax.set_yticks(y, group)
        keys.append(Patch(label=f"{model}: {kind} classes", **style))
    keys += [Line2D([], [], label=name, **dot) for name, dot in zip(others, dots, strict=True)]
    key = figure.add_subplot(grid[1, 1], frame_on=False, xticks=[], yticks=[])
    key.legend(handles=keys, title=plots.UNSEEN_NOTE, title_fontsize=9, alignment="left", **plots.LEGEND)
    return figure


CURVES = {  # panel title: {history key: (name, colour, line)}
    "Loss (weighted terms)": {
        "total": ("total", INK, "-"), "focal": ("focal", BLUE, "--"),
        "ssim": ("SSIM", VERMILION, "-."), "dice": ("dice", VERMILION, "-."),
    },
    "Learning rate": {"learning_rate": ("learning rate", GREEN, "-")},
    "Validation (%)": {
        "miou_seen": ("mIoU, seen", BLUE, "o-"), "miou_unseen": ("mIoU, unseen*", ORANGE, "s--"),
        "hiou": ("hIoU", INK, "D-"), "pixel_accuracy": ("pixel accuracy", GREEN, "^:"),
    },
}  # fmt: skip


def training_curves(history: Sequence[Mapping[str, float]]) -> Figure:
    """Loss terms, learning rate and, where the history has them, validation figures over the iterations; more than 400
    points of a curve as their block means."""
    table = pd.DataFrame(history, columns=["iteration", *(key for curves in CURVES.values() for key in curves)])
    table = table.astype(float).dropna(axis=1, how="all")
    panels = {title: keys for title, curves in CURVES.items() if (keys := [key for key in curves if key in table])}
    figure = plots.Plot(0.6 + 3.4 * len(panels), 2.9)
    for ax, (title, keys) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        percent = "%" in title
        for key in keys:
            name, colour, line = CURVES[title][key]
            points: Any = table[["iteration", key]].dropna()
            points = points.groupby(np.arange(len(points)) // math.ceil(len(points) / 400)).mean()
            style = {"color": colour, "lw": 1.8 if line == "-" else 1.3, "ms": 4, "label": name}
            ax.plot(points.iteration, points[key] * (100 if percent else 1), line, **style)
        plots.tidy(ax, title, xlabel="iteration", ylim=(0, 100 if percent else None))
        ax.xaxis.get_major_locator().set_params(integer=True)
        if title == "Learning rate":
            ax.ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=True)
        else:
            ax.legend(frameon=False, fontsize=9)
    return figure


def show_label_values(ax: Axes, labels: Array, palette: Sequence[Colour], title: str = "") -> None:
    """A small label map (H,W) in its colours, each pixel's value written into it; ignored pixels are white."""
    plots.show_image(ax, colourise(labels, palette), title)
    for (row, column), value in np.ndenumerate(labels):
        ax.text(column, row, str(value), ha="center", va="center", **plots.OUTLINED)


def seed_dots(
    panels: Mapping[str, Mapping[str, Sequence[float]]], xlabel: str, title: str, zero: bool = False
) -> Figure:
    """Panels side by side, in each a row per name with one marker per value (seed 0 to 4) and a bar at their mean;
    `zero`: with a line at 0 and one scale for all, for differences."""
    most = max(len(values) for rows in panels.values() for values in rows.values())
    names = [list(rows) for rows in panels.values()]
    shared, tallest = all(each == names[0] for each in names), max(map(len, names))
    figure = plots.Plot(2.2 + 2.9 * len(panels), 1.3 + 0.26 * tallest, title)
    axes = figure.subplots(1, len(panels), squeeze=False, sharex=zero)[0]
    for ax, (panel, rows) in zip(axes, panels.items(), strict=True):
        for y, values in enumerate(rows.values()):
            ax.plot([np.mean(values)] * 2, [y - 0.36, y + 0.36], color=VERMILION, lw=2.4, zorder=1)
            for marker, value in zip(MARKERS[: len(values)], values, strict=True):
                ax.plot(value, y, marker=marker, alpha=0.85, clip_on=False, **plots.DOT)
        plots.tidy(ax, panel, xlabel=xlabel, ylim=(tallest - 0.4, -0.6))
        ax.set_yticks(range(len(rows)), list(rows) if ax is axes[0] or not shared else [])
        if zero:
            ax.axvline(0, color=INK, lw=1)
    keys = [Line2D([], [], marker=marker, label=f"seed {i}", **plots.DOT) for i, marker in enumerate(MARKERS[:most])]
    keys.append(Line2D([], [], color=VERMILION, lw=2.4, label="mean"))
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False, fontsize=9)
    return figure
