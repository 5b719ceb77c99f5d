"""A pen that paints things shape over shape, each shape a signed distance, and the colours that captions name.

Pixels only ever meet + - * / sqrt, abs, min, max, floor, comparisons and table look-ups, which IEEE 754 makes exact:
the same seed gives the same picture on every machine."""

import math
from copy import copy
from functools import reduce
from typing import Self

import numpy as np

from sptseg.scenes.textures import WORLD, rgb

Array = np.ndarray
COLOURS = {name: rgb(code) for name, code in WORLD["colours"].items()}
WHITE, BLACK, BROWN, GRAY, YELLOW = (COLOURS[name] for name in ("white", "black", "brown", "gray", "yellow"))


def tone(colour: Array, factor: float) -> Array:
    """A colour made darker (factor < 1) or lighter."""
    return np.minimum(colour * factor, 1)


class Pen:
    """Paints one thing on its own small canvas, in its own coordinates: x right, y down, the thing within [-1, 1].

    `colour` is what captions call the thing, `accent` another one. Shapes are signed distances (h,w), negative inside.
    """

    def __init__(
        self, rng: np.random.Generator, radius: float, angle: float, mirror: bool, colour: Array, accent: Array
    ):
        cos, sin, flip = math.cos(angle), math.sin(angle), -1.0 if mirror else 1.0
        self.rng, self.radius, self.colour, self.accent = rng, radius, colour, accent
        self.contrast = accent if float(colour.min()) > 0.7 else WHITE  # bands and dots, also on white things
        self.half = int(radius * (abs(cos) + abs(sin)) * 1.03) + 2
        across = np.arange(-self.half, self.half + 1, dtype=np.float32) / np.float32(radius)
        self.x = (across * (cos * flip))[None, :] + (across * (sin * flip))[:, None]
        self.y = (across * -sin)[None, :] + (across * cos)[:, None]
        self.light = (1.07 - 0.09 * across)[None, :] - (0.13 * across)[:, None]  # the sun stands top left
        self.rgb = np.empty((3, *self.x.shape), np.float32)
        self.rgb[:] = colour * 0.3
        self.alpha = np.zeros(self.x.shape, np.float32)
        self.line = max(1.2, 0.055 * radius)

    def at(self, x: Array, y: Array) -> Self:
        """The same canvas in other coordinates: folded, shifted or turned."""
        other = copy(self)
        other.x, other.y = x, y
        return other

    def fold(self) -> Self:
        """Paint the right half, get both."""
        return self.at(np.abs(self.x), self.y)

    def turned(self, cx: float, cy: float, angle: float) -> Self:
        """Coordinates around (cx, cy), turned."""
        cos, sin = math.cos(angle), math.sin(angle)
        x, y = self.x - cx, self.y - cy
        return self.at(x * cos + y * sin, y * cos - x * sin)

    def spokes(self) -> Self:
        """Eightfold symmetry around the origin: paint along +x, get eight."""
        x, y = np.abs(self.x), np.abs(self.y)
        x, y = np.maximum(x, y), np.minimum(x, y)
        over = np.maximum(y * 0.92388 - x * 0.382683, 0) * 2  # beyond the line at 22.5 degrees: mirror
        return self.at(x + over * 0.382683, y - over * 0.92388)

    def ellipse(self, cx: float, cy: float, rx: float, ry: float | None = None) -> Array:
        ry = rx if ry is None else ry
        dx, dy = (self.x - cx) * (1 / rx), (self.y - cy) * (1 / ry)
        return (np.sqrt(dx * dx + dy * dy) - 1) * min(rx, ry)

    def box(self, x0: float, y0: float, x1: float, y1: float) -> Array:
        dx, dy = np.abs(self.x - (x0 + x1) / 2), np.abs(self.y - (y0 + y1) / 2)
        return np.maximum(dx - (x1 - x0) / 2, dy - (y1 - y0) / 2)

    def rounded(self, x0: float, y0: float, x1: float, y1: float, r: float) -> Array:
        dx = np.maximum(np.abs(self.x - (x0 + x1) / 2) - ((x1 - x0) / 2 - r), 0)
        dy = np.maximum(np.abs(self.y - (y0 + y1) / 2) - ((y1 - y0) / 2 - r), 0)
        return np.sqrt(dx * dx + dy * dy) - r

    def polygon(self, *points: tuple[float, float]) -> Array:
        """A convex polygon."""
        pairs = list(zip(points, points[1:] + points[:1], strict=True))
        side = 1.0 if sum(a[0] * b[1] - b[0] * a[1] for a, b in pairs) > 0 else -1.0
        planes = []
        for (ax, ay), (bx, by) in pairs:
            scale = side / math.sqrt((bx - ax) ** 2 + (by - ay) ** 2)
            nx, ny = (by - ay) * scale, (ax - bx) * scale
            planes.append(self.x * nx + (self.y * ny - (nx * ax + ny * ay)))
        return reduce(both, planes)

    def capsule(self, ax: float, ay: float, bx: float, by: float, r: float, r_end: float | None = None) -> Array:
        dx, dy = bx - ax, by - ay
        x, y = self.x - ax, self.y - ay
        t = np.minimum(np.maximum((x * dx + y * dy) * (1 / (dx * dx + dy * dy)), 0), 1)
        x, y = x - t * dx, y - t * dy
        return np.sqrt(x * x + y * y) - (r if r_end is None else r + t * (r_end - r))

    def fill(self, d: Array, colour: Array, line: bool = True) -> None:
        """Paint a shape with soft edges and, unless `line` is off, a darker rim."""
        inside = d * -self.radius  # pixels
        a = np.minimum(np.maximum(inside + 0.5, 0), 1)
        np.maximum(self.alpha, a, out=self.alpha)
        if line:
            colour = colour * np.minimum(inside * (0.55 / self.line) + 0.45, 1)
        step = colour - self.rgb
        step *= a
        self.rgb += step

    def glow(self, d: Array, colour: Array, width: float, strength: float = 0.5) -> None:
        """Blend a colour softly over `width` inside a shape, only where something is painted already."""
        a = np.minimum(np.maximum(d * (-1 / width), 0), 1) * strength
        self.rgb += (colour - self.rgb) * a

    def eye(self, x: float, y: float, r: float) -> None:
        self.fill(self.ellipse(x, y, r), WHITE)
        self.fill(self.ellipse(x + 0.2 * r, y, 0.55 * r), BLACK, line=False)

    def wheel(self, x: float, y: float, r: float) -> None:
        self.fill(self.ellipse(x, y, r), BLACK, line=False)
        self.fill(self.ellipse(x, y, 0.5 * r), GRAY)


both = np.maximum  # what lies in both of two shapes


def union(*shapes: Array) -> Array:
    return reduce(np.minimum, shapes)


def cut(shape: Array, hole: Array) -> Array:
    return np.maximum(shape, -hole)
