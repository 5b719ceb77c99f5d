"""Figures of the analyses: spectra, models without a band or a part, the learned filter, failures."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import ArrayLike

from sptseg.analysis.failures import ClassRow
from sptseg.analysis.spectra import Band, Change, FilterRadial, PromptEffect, RadialPower
from sptseg.datasets import (
    BLUE,
    DOT,
    FAINT,
    GREEN,
    INK,
    LEGEND,
    MARK,
    MARKERS,
    ORANGE,
    OUTLINED,
    UNSEEN_NOTE,
    VERMILION,
    Colour,
    Plot,
    Split,
    colourise,
    marked,
    plots,
    show_image,
    tidy,
)

Array = np.ndarray
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
HUES = (BLUE, VERMILION, GREEN, ORANGE, INK)


def band_name(band: Band) -> str:
    """A band in cycles per pixel, as fractions: "1/16 to 1/8"."""
    low, high = band
    if high > 0.5:
        return f"above {_fraction(low)}"
    return f"{_fraction(low)} to {_fraction(high)}" if low else f"below {_fraction(high)}"


def _fraction(value: float) -> str:
    return f"1/{1 / value:.0f}" if abs(1 / value - round(1 / value)) < 1e-9 else f"{value:.2g}"


def power_spectra(
    panels: Mapping[str, Mapping[str, RadialPower]], unit: str, title: str | None = None, law: float | None = None
) -> Figure:
    """Radial power against frequency in cycles per `unit`, both logarithmic: panels side by side, named curves in each.

    law: draw a grey line of power ~ frequency^law for the eye.
    """
    figure = Plot(1.0 + 3.3 * len(panels), 3.6 + 0.3 * (title is not None), title)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for ax, (name, curves) in zip(axes, panels.items(), strict=True):
        for i, (label, each) in enumerate(curves.items()):
            kept = (each.frequency > 0) & (each.frequency <= 0.5)
            x, y = each.frequency[kept], each.mean().power[kept]
            marks = np.unique(np.geomspace(1, len(x), 8).astype(int) - 1).tolist()
            look: dict[str, Any] = {
                "ls": LINES[i % 5],
                "color": HUES[i % 5],
                "marker": MARKERS[i % 5],
                "markevery": marks,
            }
            ax.loglog(x, y, lw=1.6, ms=4.5, label=label, **look)
        if law is not None:
            x = np.array(ax.get_xlim()).clip(max=0.5)
            middle = np.log(np.sqrt(x.prod()))  # there the line has the curves' mean height
            heights = [np.interp(middle, np.log(line.get_xdata()), np.log(line.get_ydata())) for line in ax.lines]
            y = np.exp(np.mean(heights) + law * (np.log(x) - middle))
            ax.loglog(x, y, color="#999999", lw=1, label=f"frequency$^{{{law:g}}}$")
        tidy(ax, name)
        ax.grid(color=FAINT, linewidth=0.7)
        ax.set(xlabel=f"frequency (cycles per {unit})")
        ticks = [1 / 2**k for k in range(1, 12) if 1 / 2**k >= ax.get_xlim()[0]]
        ticks = ticks[:: 1 + len(ticks) // 7]
        ax.set_xticks(ticks, [f"1/{1 / tick:.0f}" for tick in ticks], minor=False)
        ax.minorticks_off()
        ax.legend(frameon=False, fontsize=8.5)
    axes[0].set_ylabel("power")
    return figure


def changes_by_group(rows: Sequence[str], groups: Mapping[str, Sequence[Change]], ylabel: str, title: str) -> Figure:
    """Change of mean IoU in percentage points with its interval: groups side by side for each row (a band, a part)."""
    figure = Plot(1.6 + 1.15 * len(rows), 3.6, title)
    ax = figure.subplots()
    for i, (name, changes) in enumerate(groups.items()):
        x = np.arange(len(rows)) + 0.22 * (i - (len(groups) - 1) / 2)
        y = 100 * np.array([[each.change, each.low, each.high] for each in changes]).T
        ends = np.maximum([y[0] - y[1], y[2] - y[0]], 0)
        ax.errorbar(
            x, y[0], ends, color=HUES[i], fmt=MARKERS[i], capsize=3, ms=6, mfc="white" if i else HUES[i], label=name
        )
    tidy(ax, "markers: these pictures; bars: 95 % interval over pictures")
    ax.axhline(0, color=INK, lw=1)
    ax.set_xticks(range(len(rows)), rows)
    ax.set(ylabel=ylabel)
    ax.grid(axis="y", color=FAINT, linewidth=0.7)
    ax.legend(frameon=False, fontsize=9)
    return figure


def class_band_table(
    changes: Mapping[str, Sequence[Change]], bands: Sequence[str], unseen: Collection[str], title: str
) -> Figure:
    """A table of IoU changes in percentage points, a row per class, a column per band; the class hurt most comes first.

    Dark is a loss; figures whose interval contains 0 are in brackets; a class that does not occur has empty cells.
    """
    import seaborn  # here, as it takes seconds to load

    ordered = sorted(changes, key=lambda name: np.nansum([each.change for each in changes[name]]))
    values = 100 * np.array([[each.change for each in changes[name]] for name in ordered])
    unsure = [[each.low <= 0 <= each.high for each in changes[name]] for name in ordered]
    texts = [
        [f"({v:+.0f})" if doubt else f"{v:+.0f}" for v, doubt in zip(*row, strict=True)]
        for row in zip(values, unsure, strict=True)
    ]
    figure = Plot(2.2 + 0.95 * len(bands), 1.2 + 0.215 * len(ordered), title)
    ax = figure.subplots()
    seaborn.heatmap(
        values, vmin=min(-1.0, np.nanmin(values)), vmax=0, cmap="cividis", cbar=False, ax=ax,
        annot=np.array(texts), fmt="", annot_kws={"size": 8.5},
        xticklabels=list(bands), yticklabels=[marked(name, unseen) for name in ordered],
    )  # fmt: skip
    ax.xaxis.tick_top()
    ax.set_xlabel(f"{UNSEEN_NOTE}; (in brackets): the 95 % interval contains 0", fontsize=8.5)
    ax.tick_params(length=0, labelsize=8.5, labelrotation=0)
    return figure


def filter_curves(filters: Mapping[str, FilterRadial], title: str) -> Figure:
    """Gain and phase of filters by radius: the mean as a line, from the 10th to the 90th percentile as an area."""
    figure = Plot(9.0, 3.5, title)
    axes = figure.subplots(1, 2)
    for i, (name, each) in enumerate(filters.items()):
        for ax, mean, quantiles in (
            (axes[0], each.gain, each.gain_quantiles),
            (axes[1], each.phase, each.phase_quantiles),
        ):
            ax.fill_between(each.frequency, quantiles[0], quantiles[2], color=HUES[i], alpha=0.16, lw=0)
            ax.plot(each.frequency, mean, ls=LINES[i], color=HUES[i], marker=MARKERS[i], ms=4.5, lw=1.6, label=name)
    for ax, name, unit in zip(axes, ("Gain", "Phase, without sign"), ("factor", "degrees"), strict=True):
        tidy(ax, f"{name}: mean, and 10th to 90th percentile")
        ax.set(xlabel="frequency (cycles per token)", ylabel=unit, ylim=(0, 180 if unit == "degrees" else None))
        ax.grid(color=FAINT, linewidth=0.7)
    axes[1].set_yticks([0, 45, 90, 135, 180])
    axes[0].legend(frameon=False, fontsize=9)
    return figure


def prompt_energy(effects: Sequence[PromptEffect], title: str) -> Figure:
    """What the spectral prompt adds before each block, as a share of the tokens' energy; unused blocks are hatched."""
    figure = Plot(5.6, 3.3, title)
    ax = figure.subplots()
    for each in effects:
        look: dict[str, Any] = (
            {"color": BLUE} if each.used else {"facecolor": "white", "edgecolor": BLUE, "hatch": "///"}
        )
        ax.bar(each.block, 100 * each.energy, width=0.6, **look)
        ax.text(each.block, 100 * each.energy, f"{100 * each.energy:.1f} %", ha="center", va="bottom", fontsize=9)
    tidy(ax, "filled: added there; hatched: would be added, if it were used there")
    ax.set_xticks([each.block for each in effects])
    ax.set(xlabel="block", ylabel="energy added (% of the tokens')")
    ax.margins(y=0.1)
    ax.grid(axis="y", color=FAINT, linewidth=0.7)
    return figure


def wave_maps(maps: Mapping[str, ArrayLike], title: str, unit: str) -> Figure:
    """Small real maps (H, W) side by side, all on one scale about 0 (or from 0), values written in if there are few."""
    figure = Plot(0.6 + 2.2 * len(maps), 2.7, title)
    arrays = [np.asarray(each) for each in maps.values()]
    highest = max(float(np.abs(each).max()) for each in arrays) or 1.0
    signed = any((each < 0).any() for each in arrays)
    scale: dict[str, Any] = {"vmin": -highest if signed else 0, "vmax": highest}
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    for ax, name, each in zip(axes, maps, arrays, strict=True):
        shown = ax.imshow(each, cmap=colormaps["PuOr_r" if signed else "cividis"], **scale)
        ax.set_title(name, fontsize=10, color=INK)
        ax.set_axis_off()
        if each.size <= 36:
            for (row, column), value in np.ndenumerate(each):
                dark = abs(value) > 0.6 * highest if signed else value < 0.5 * highest
                ax.text(column, row, f"{value:.2g}", ha="center", va="center", size=9, color="white" if dark else INK)
    figure.colorbar(shown, ax=axes, label=unit, fraction=0.05)
    return figure


def bars(ax: Axes, values: Mapping[str, float], xlabel: str, title: str, form: str = "{:.1f}") -> None:
    """A bar per name, the first on top, with its value written behind it."""
    y = np.arange(len(values))
    ax.barh(y, list(values.values()), height=0.66, color=BLUE)
    for row, value in zip(y, values.values(), strict=True):
        ax.annotate(form.format(value), (max(value, 0), row), (4, 0), textcoords="offset points", va="center", size=8.5)
    tidy(ax, title)
    ax.set_yticks(y, list(values))
    ax.set(xlabel=xlabel, ylim=(len(values) - 0.4, -0.6))
    ax.margins(x=0.16)
    ax.grid(axis="x", color=FAINT, linewidth=0.7)


def intervals(ax: Axes, rows: Mapping[str, tuple[float, float, float]], xlabel: str, title: str) -> None:
    """A marker per name with the ends of its interval: (value, low, high), all 0..1, shown in percent."""
    for y, (value, low, high) in enumerate(100 * np.array(list(rows.values()))):
        ax.plot([low, high], [y, y], color=BLUE, lw=2)
        ax.plot([low, high], [y, y], "|", color=BLUE, ms=9)
        ax.plot(value, y, "o", color=INK, ms=5)
        ax.annotate(f"{value:.1f}", (value, y), (0, 6), textcoords="offset points", ha="center", size=8.5)
    tidy(ax, title)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set(xlabel=xlabel, ylim=(len(rows) - 0.5, -0.7))
    ax.grid(axis="x", color=FAINT, linewidth=0.7)


def lines(ax: Axes, x: Sequence, series: Mapping[str, Sequence[float]], xlabel: str, ylabel: str, title: str) -> None:
    """Named curves over numbers, or over names at equal steps; values 0..1 are shown in percent."""
    named = isinstance(x[0], str)
    places = range(len(x)) if named else x
    for i, (name, values) in enumerate(series.items()):
        look: dict[str, Any] = {"ls": LINES[i], "color": HUES[i], "marker": MARKERS[i], "ms": 5, "lw": 1.6}
        ax.plot(places, 100 * np.asarray(values), label=name, **look)
    tidy(ax, title)
    if named:
        ax.set_xticks(places, x)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(color=FAINT, linewidth=0.7)
    if len(series) > 1:
        ax.legend(frameon=False, fontsize=8.5)


def class_scatter(ax: Axes, rows: Sequence[ClassRow], x: Sequence[float], xlabel: str, title: str, named: int) -> None:
    """A marker per class: IoU over a share (0..1, shown in percent, logarithmic); the `named` lowest have their names.

    Seen classes are filled circles, unseen ones empty squares. Classes that do not occur are left out.
    """
    points = [(100 * share, 100 * row.iou, row) for share, row in zip(x, rows, strict=True) if row.pictures]
    looks: dict[str, dict[str, Any]] = {
        "seen": {"marker": "o", "color": BLUE},
        "unseen": {"marker": "s", "color": ORANGE, "mfc": "white"},
    }
    for kind, look in looks.items():
        some = [point for point in points if point[2].unseen == (kind == "unseen")]
        ax.plot([p[0] for p in some], [p[1] for p in some], ls="none", ms=6, mew=1.6, label=kind, **look)
    for share, iou, row in sorted(points, key=lambda point: point[1])[:named]:
        ax.annotate(row.name, (share, iou), (6, -3), textcoords="offset points", size=8)
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ax.set_xticks([t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= t <= high])
    ax.xaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    tidy(ax, title)
    ax.set(xlabel=xlabel, ylabel="IoU (%)")
    ax.grid(color=FAINT, linewidth=0.7)
    ax.legend(frameon=False, fontsize=8.5)


def mask_sheet(
    rows: Sequence[tuple[Array, Sequence[Array]]],
    titles: Sequence[str],
    split: Split,
    row_titles: Sequence[str] | None = None,
    panel: float = 2.2,
) -> Figure:
    """A row per picture (H,W,3): the picture, then label maps (H,W) over it, with names in the regions that have room.

    Where a label map is 255 the picture stays as it is. `titles` stand above the columns; `panel` is in inches.
    """
    sheet = [[image, *(plots.overlay(image, mask, split.palette) for mask in masks)] for image, masks in rows]
    figure = plots.contact_sheet(sheet, titles, row_titles, panel)
    for ax, mask in zip(figure.axes, (mask for _, masks in rows for mask in (None, *masks)), strict=True):
        if mask is not None:
            plots.write_names(ax, mask, split.classes, split.names(split.unseen))
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


def class_iou_bars(
    iou: Mapping[str, float],
    unseen: Collection[str],
    title: str,
    model: str = "this model",
    others: Mapping[str, Mapping[str, float]] | None = None,
) -> Figure:
    """A bar per class, the best first, seen and unseen apart; `others` (model: IoU by class) show as markers."""
    others = dict(others or {})
    if len(others) > len(MARKERS):
        raise ValueError(f"class_iou_bars: {len(others)} other models; wanted {len(MARKERS)} at most, one marker each")
    dots: list[dict[str, Any]] = [{"marker": marker, **DOT} for marker in MARKERS[: len(others)]]
    best_first = sorted(iou, key=lambda name: -math.inf if math.isnan(iou[name]) else iou[name], reverse=True)
    groups = [[n for n in best_first if n not in unseen], [n for n in best_first if n in unseen]]
    seen, unseen_rows = map(len, groups)
    figure = Plot(9.6, 1.1 + 0.2 * max(seen, unseen_rows, 10), title)
    grid = figure.add_gridspec(2, 2, height_ratios=[max(unseen_rows, 1), max(seen - unseen_rows, 4)])
    keys: list[Patch | Line2D] = []
    panels = ((grid[:, 0], "seen", BLUE, ""), (grid[0, 1], f"unseen{MARK}", ORANGE, "///"))
    for (place, kind, colour, hatch), group in zip(panels, groups, strict=True):
        ax, y, values = figure.add_subplot(place), np.arange(len(group)), np.array([100 * iou[name] for name in group])
        bars: dict[str, Any] = {"facecolor": colour, "hatch": hatch, "edgecolor": "white"}
        ax.barh(y, np.nan_to_num(values), height=0.68, **bars)
        for row in y[np.isnan(values)]:
            ax.text(1, row, "not in these pictures", va="center", fontsize=8, color="#555555", style="italic")
        for other, dot in zip(others.values(), dots, strict=True):
            ax.plot([100 * other[name] for name in group], y, clip_on=False, **dot)
        mean = f"mean {np.nanmean(values):.1f} %" if np.isfinite(values).any() else "none"
        tidy(ax, f"{kind} classes, {mean}")
        ax.set_yticks(y, group)
        ax.set(xlim=(0, 100), ylim=(len(group) - 0.4, -0.6), xlabel="IoU (%)")
        ax.grid(axis="x", color=FAINT, linewidth=0.7)
        keys.append(Patch(label=f"{model}: {kind} classes", **bars))
    keys += [Line2D([], [], label=name, **dot) for name, dot in zip(others, dots, strict=True)]
    key = figure.add_subplot(grid[1, 1], frame_on=False, xticks=[], yticks=[])
    key.legend(handles=keys, title=UNSEEN_NOTE, title_fontsize=9, alignment="left", **LEGEND)
    return figure


def _series(history: Sequence[Mapping[str, float]], key: str) -> tuple[Array, Array]:
    """Iterations and values of a key, in block means if there are more than 400."""
    points = np.array([(row["iteration"], row[key]) for row in history if row.get(key) is not None], dtype=float)
    starts = np.arange(0, len(points), math.ceil(len(points) / 400))
    means = np.add.reduceat(points, starts) / np.diff(starts, append=len(points))[:, None]
    return means[:, 0], means[:, 1]


def training_curves(history: Sequence[Mapping[str, float]]) -> Figure:
    """Loss terms, learning rate and, where the history has them, validation figures, each over the iterations."""
    if not history:
        raise ValueError("training_curves: the history is empty; wanted one mapping per row, such as fit(...).history")
    found = {key for row in history for key, value in row.items() if value is not None}
    panels = {t: {k: v for k, v in lines.items() if k in found} for t, lines in CURVES.items() if found & lines.keys()}
    figure = Plot(0.6 + 3.4 * len(panels), 2.9)
    for ax, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for key, (name, colour, line) in lines.items():
            x, y = _series(history, key)
            scale = 100 if "%" in title else 1
            ax.plot(x, scale * y, line, color=colour, lw=1.8 if line == "-" else 1.3, ms=4, label=name)
        tidy(ax, title)
        ax.grid(color=FAINT, linewidth=0.7)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set(xlabel="iteration", ylim=(0, 100 if "%" in title else None))
        if "learning_rate" in lines:
            ax.yaxis.set_major_formatter("{x:.3g}")
        else:
            ax.legend(frameon=False, fontsize=9)
    return figure


def show_label_values(ax: Axes, labels: Array, palette: Sequence[Colour], title: str = "") -> None:
    """A small label map (H,W) in its colours, each pixel's value written into it; ignored pixels are white."""
    show_image(ax, colourise(labels, palette), title)
    for (row, column), value in np.ndenumerate(labels):
        ax.text(column, row, str(value), ha="center", va="center", **OUTLINED)


def seed_dots(
    panels: Mapping[str, Mapping[str, Sequence[float]]], xlabel: str, title: str, zero: bool = False
) -> Figure:
    """Panels side by side, a row per name with one marker per value (seed 0, 1, ...) and a bar at their mean.

    panels: {panel title: {row name: its values}}; rows keep their order. zero: draw a line at 0 and give all panels one
    scale, for differences.
    """
    most = max(len(values) for rows in panels.values() for values in rows.values())
    if most > len(MARKERS):
        raise ValueError(f"seed_dots: a row has {most} values; wanted {len(MARKERS)} at most, one marker each")
    rows_of = [list(rows) for rows in panels.values()]
    shared, tallest = all(names == rows_of[0] for names in rows_of), max(map(len, rows_of))
    figure = Plot(2.2 + 2.9 * len(panels), 1.3 + 0.26 * tallest, title)
    axes = figure.subplots(1, len(panels), squeeze=False, sharex=zero)[0]
    for ax, (panel, rows) in zip(axes, panels.items(), strict=True):
        for y, values in enumerate(rows.values()):
            ax.plot([np.mean(values)] * 2, [y - 0.36, y + 0.36], color=VERMILION, lw=2.4, zorder=1)
            for marker, value in zip(MARKERS, values, strict=False):
                ax.plot(value, y, marker=marker, alpha=0.85, clip_on=False, **DOT)
        tidy(ax, panel)
        ax.set_yticks(range(len(rows)), list(rows) if ax.get_subplotspec().is_first_col() or not shared else [])
        ax.set(ylim=(tallest - 0.4, -0.6), xlabel=xlabel)
        ax.grid(color=FAINT, linewidth=0.7)
        if zero:
            ax.axvline(0, color=INK, lw=1)
    keys = [Line2D([], [], marker=marker, label=f"seed {i}", **DOT) for i, marker in enumerate(MARKERS[:most])]
    keys.append(Line2D([], [], color=VERMILION, lw=2.4, label="mean"))
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False, fontsize=9)
    return figure
