"""How each stuff of the picture-book world is drawn: tiles of texture, each kind with a frequency content of its own.

A tile says how bright each pixel is and how much of a second colour it takes; scenes cut pieces out of tiles and colour
them. As in `drawings`, only operations that IEEE 754 makes exact: the same pictures on every machine."""

import math
import tomllib
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

Array = np.ndarray
TILE = 256  # side of a texture tile, pixels
VARIANTS = 4  # tiles per stuff: other grains, scales and orientations
SCALES = (0.85, 1.0, 1.15, 1.35)
WORLD = tomllib.loads(Path(__file__).with_name("world.toml").read_text("utf-8"))  # which says what it holds
_SINE = np.array([math.sin(2 * math.pi * i / 2048) for i in range(2048)]).round(6).astype(np.float32)


def between(rng: np.random.Generator, low: float, high: float) -> float:
    """A number in [low, high); `rng.uniform` may fuse its multiply and add on some machines, and then differ."""
    return low + (high - low) * rng.random()


def rgb(code: str) -> Array:
    """A colour (3,1,1), float32 in [0, 1], from six hexadecimal digits."""
    return (np.array(list(bytes.fromhex(code)), np.float32) / np.float32(255)).reshape(3, 1, 1)


def _frac(t: Array) -> Array:
    return t - np.floor(t)


def sine(t: Array) -> Array:
    """sin(2 pi t) from the table."""
    return _SINE[(np.floor(t * 2048).astype(np.int32)) & 2047]


def _unit(t: Array) -> Array:
    return np.minimum(np.maximum(t, 0), 1)


class Cloth:
    """What a texture is woven from: turned and scaled coordinates u, v (T,T) in pixels, noise and chance."""

    def __init__(self, seed: list[int], scale: float, angle: float):
        self.rng = np.random.default_rng(seed)
        along = np.arange(TILE, dtype=np.float32) / np.float32(scale)
        cos, sin = math.cos(angle), math.sin(angle)
        self.u = (along * cos)[None, :] + (along * sin)[:, None] + 400
        self.v = (along * -sin)[None, :] + (along * cos)[:, None] + 400
        self.chance = self.rng.random(4096, dtype=np.float32)

    def hash(self, i: Array, j: Array | int = 0, salt: int = 0) -> Array:
        """A random number in [0, 1) for each pair of whole numbers."""
        return self.chance[(i.astype(np.int32) * 157 + np.asarray(j).astype(np.int32) * 911 + salt * 1303) & 4095]

    def noise(self, cell_u: float, cell_v: float) -> Array:
        """Value noise in [-1, 1]: a random grid of these cells, smoothly upsampled."""
        u, v = self.u * (1 / cell_u), self.v * (1 / cell_v)
        i, j, salt = np.floor(u), np.floor(v), int(self.rng.integers(4096))
        u, v = u - i, v - j
        u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
        top = self.hash(i, j, salt) * (1 - u) + self.hash(i + 1, j, salt) * u
        low = self.hash(i, j + 1, salt) * (1 - u) + self.hash(i + 1, j + 1, salt) * u
        return (top * (1 - v) + low * v) * 2 - 1

    def grain(self) -> Array:
        """White noise in [-1, 1]."""
        return self.rng.random((TILE, TILE), dtype=np.float32) * 2 - 1

    def pebbles(self, cell_u: float, cell_v: float) -> tuple[Array, Array, Array]:
        """Voronoi cells: distance to the nearest seed, gap to the second nearest, a random number per cell."""
        u, v = self.u * (1 / cell_u), self.v * (1 / cell_v)
        i, j = np.floor(u), np.floor(v)
        near, second, name = np.full_like(u, 9.0), np.full_like(u, 9.0), np.zeros_like(u)
        for di in (-1, 0, 1):
            for dj in (-1, 0, 1):
                x = i + di + 0.1 + 0.8 * self.hash(i + di, j + dj) - u
                y = j + dj + 0.1 + 0.8 * self.hash(i + di, j + dj, 7) - v
                d = x * x + y * y
                closer = d < near
                second = np.where(closer, near, np.minimum(second, d))
                name = np.where(closer, self.hash(i + di, j + dj, 3), name)
                near = np.minimum(near, d)
        near, second = np.sqrt(near), np.sqrt(second)
        return near, second - near, name


Weave = tuple[Array, Array]  # brightness, around 1, and how much of the second colour, 0 to 1; each (T,T)


@dataclass(frozen=True)
class Stuff:
    """How to draw stuff: its texture, main and second colour by their adjective, each tile's orientation (degrees)."""

    weave: Callable[[Cloth], Weave]
    colours: dict[str, tuple[Array, Array]]
    angles: Sequence[float]


def sky(c: Cloth) -> Weave:
    return 1 + 0.03 * c.noise(90, 40), _unit((c.v - 400) / TILE + 0.15 * c.noise(80, 30))


def grass(c: Cloth) -> Weave:
    value, mix = 0.6 + 0.05 * c.noise(20, 20), np.zeros_like(c.u)
    for layer in range(2):  # blades in front of blades, each bent and with a tip of its own
        u = c.u / 2.7 + 0.5 * layer + 0.9 * c.noise(11, 16)
        k = np.floor(u)
        v = c.v / 17 + 5 * c.hash(k, 3, layer + 11)
        t = v - np.floor(v)  # 0 at the tip, 1 at the root
        blade = _unit((np.minimum(1, 0.25 + 2.2 * t) - np.abs(u - k - 0.5) * 2) * 2.5) * (t < 0.8 + 0.2 * layer)
        name = c.hash(k, np.floor(v), layer + 5)
        value += blade * (1.16 - 0.48 * t + 0.16 * (name - 0.5) - value)
        mix += blade * (0.9 * name - mix)
    return value + 0.07 * c.noise(40, 40), mix


def water(c: Cloth) -> Weave:
    w = sine(c.v / 11 + 0.45 * c.noise(40, 12) + 0.12 * c.noise(12, 8))
    return 0.93 + 0.13 * w + 0.05 * c.noise(60, 30), _unit((w - 0.45) * 2) * _unit(c.noise(22, 6) * 1.6 + 0.2)


def sand(c: Cloth) -> Weave:
    ripple = sine(c.v / 24 + 0.9 * c.noise(60, 30))
    grain = c.grain()
    return 0.98 + 0.11 * grain + 0.04 * ripple + 0.04 * c.noise(3, 3), (grain > 0.93).astype(np.float32) * 0.8


def snow(c: Cloth) -> Weave:
    drift = _frac(c.v / 70 + 0.5 * c.noise(80, 50))  # soft banks, each lit at the crest and blue at the foot
    return 1.03 - 0.13 * drift * drift + 0.02 * c.noise(30, 14), (c.grain() > 0.985).astype(np.float32)


def road(c: Cloth) -> Weave:
    lane = np.abs(_frac(c.v / 42) - 0.5) * 42  # pixels from the nearest lane mark
    dash = np.abs(_frac(c.u / 34) - 0.5) * 34
    paint = _unit(2.3 - lane) * _unit(9.5 - dash)
    return 1 + 0.09 * c.grain() * (1 - paint) + 0.07 * c.noise(30, 9) + 0.06 * c.noise(2, 2), paint


def gravel(c: Cloth) -> Weave:
    near, gap, name = c.pebbles(5.6, 5.0)
    stone = _unit((0.7 - near) * 2.6) * _unit(gap * 5)
    return (0.42 + 0.58 * stone) * (0.78 + 0.42 * name) + 0.1 * _unit(0.3 - near), _frac(name * 7.3)


def mountain(c: Cloth) -> Weave:
    rough = 2.4 * c.noise(9, 9) + 1.4 * c.noise(4, 4)
    value, mix = np.full_like(c.u, 0.8), np.zeros_like(c.u)
    for row in range(-1, 13):  # from the farthest range to the nearest
        k = c.u / 80 + float(c.chance[row + 50])
        f, peak = _frac(k) - 0.5 + 0.12 * (c.hash(np.floor(k), row, 1) - 0.5), 42 + 20 * c.hash(np.floor(k), row)
        rise = 1 - 2.3 * np.abs(f)
        below = c.v - 370 - row * 32 + np.maximum(rise, -0.2) * peak + 0.5 * rough  # pixels under the ridge
        lit = _unit(0.5 - f * 22 + 0.5 * rough) * 0.36 + 0.74 + 0.012 * rough  # one flank in the light
        cap = _unit((0.42 * peak + 1.6 * rough - below - (1 - rise) * peak) * 0.8)
        here = _unit(below + 0.5)
        value += here * (lit - value)
        mix += here * (np.maximum(cap, 0.4 * _unit(below / 70 - 0.1)) - mix)
    return value, mix


def brick_wall(c: Cloth) -> Weave:
    row = np.floor(c.v / 8)
    u = c.u / 18 + 0.5 * (row.astype(np.int32) & 1)
    fu, fv = _frac(u) * 18, _frac(c.v / 8) * 8
    edge = np.minimum(np.minimum(fu, 18 - fu), np.minimum(fv, 8 - fv))
    return 0.84 + 0.28 * c.hash(np.floor(u), row) + 0.06 * c.grain() + 0.1 * (fv < 2.2), 1 - _unit(edge - 0.25)


def stone_wall(c: Cloth) -> Weave:
    v = (c.v + 1.6 * c.noise(24, 9)) / 15
    row = np.floor(v)
    t = (c.u + 1.4 * c.noise(9, 9)) / 22 + 9 * c.hash(row)
    k = np.floor(t)
    k = np.where(t - k < 0.55 * c.hash(k, row, 2), k - 1, k)  # joints at uneven steps: short and long blocks
    left, right = k + 0.55 * c.hash(k, row, 2), k + 1 + 0.55 * c.hash(k + 1, row, 2)
    ex, ey = np.minimum(t - left, right - t) * 22, np.minimum(v - row, row + 1 - v) * 15
    ex, ey = np.maximum(5 - ex, 0), np.maximum(5 - ey, 0)
    inside = 5 - np.sqrt(ex * ex + ey * ey)  # pixels from the rounded rim of a block
    shade = 0.72 + 0.36 * c.hash(k, row, 4) + 0.12 * _unit((inside - 1) / 3)
    return shade + 0.09 * c.noise(3, 3) + 0.07 * c.noise(8, 8), 1 - _unit((inside - 0.7) * 0.9)


def wooden_fence(c: Cloth) -> Weave:
    k = np.floor(c.u / 15)
    f = _frac(c.u / 15) * 15
    grain = sine(f / 4 + 1.4 * c.noise(9, 50) + c.hash(k, 0, 2) * 5)
    across, along = f - 7.5, (_frac(c.v / 52) - 0.5) * 52
    nail = _unit(2.2 - np.sqrt(across * across + along * along))
    gap = _unit(1.9 - np.minimum(f, 15 - f))
    value = 0.84 + 0.26 * c.hash(k) + 0.08 * grain + 0.05 * c.noise(2, 12) + 0.1 * (np.abs(f - 3) < 1)
    return value, np.maximum(gap, 0.7 * nail)


def hedge(c: Cloth) -> Weave:
    clump = c.noise(24, 20)
    value, mix = 0.55 + 0.1 * clump, np.zeros_like(c.u)
    for layer in range(3):  # leaves over leaves, the upper ones brighter
        q = copy(c)
        q.u = c.u + 0.6 * c.v * (layer - 1) + 31 * layer + 1.5 * c.noise(6, 6)
        q.v = c.v - 0.3 * c.u * (layer - 1) + 1.5 * c.noise(6, 6)
        near, _, name = q.pebbles(7.5, 6)
        leaf = _unit((0.42 + 0.08 * name - near) * 6) * (name > 0.25)
        value += leaf * ((0.62 + 0.16 * layer + 0.3 * name) * (1.12 - 0.7 * near) * (1 + 0.32 * clump) - value)
        mix += leaf * (_unit(_frac(name * 9) * 0.9 - 0.2 + 0.3 * clump) - mix)
    return value, mix


def wheat_field(c: Cloth) -> Weave:
    u = c.u + 0.22 * c.v
    k = np.floor(u / 8)
    f, t = np.abs(_frac(u / 8) - 0.5) * 8, _frac(c.v / 36 + c.hash(k)) * 36
    ear = _unit((3.1 - np.abs(t - 9) * 0.18 - f) * 1.5) * (t < 19)
    grains = _frac((t + 1.3 * f) / 4.2)
    stalk = _unit(1.4 - f)
    there = np.maximum(ear, stalk)
    return 0.75 + there * 0.2 + ear * (0.42 * grains - 0.1) + 0.05 * c.noise(5, 20), 0.85 * (1 - there)


def tiled_floor(c: Cloth) -> Weave:
    i, j = np.floor(c.u / 19), np.floor(c.v / 19)
    fu, fv = _frac(c.u / 19) * 19, _frac(c.v / 19) * 19
    edge = np.minimum(np.minimum(fu, 19 - fu), np.minimum(fv, 19 - fv))
    gloss = 0.1 * _unit(1 - (fu + fv) / 19)
    odd = ((i + j).astype(np.int32) & 1).astype(np.float32)
    return (0.55 + 0.45 * _unit(edge - 0.2)) * (0.95 + 0.08 * c.hash(i, j) + gloss), odd


def dyed(colours: str) -> dict[str, tuple[Array, Array]]:
    """Main and second colours by their adjective, from a text such as "blue 6fb0e8 cfe8f8 orange ..."."""
    words = iter(colours.split())
    return {word: (rgb(main), rgb(second)) for word, main, second in zip(words, words, words, strict=True)}


STUFF = {  # each woven by the function of its name
    name: Stuff(globals()[name.replace(" ", "_")], dyed(about["colours"]), about.get("angles", (0, 3, -3, 6)))
    for name, about in WORLD["stuff"].items()
}


@cache
def tiles(name: str) -> Array:
    """A stuff's texture tiles (VARIANTS,2,T,T), float32: brightness and share of the second colour."""
    stuff = STUFF[name]
    bank = np.empty((VARIANTS, 2, TILE, TILE), np.float32)
    for i in range(VARIANTS):
        cloth = Cloth([list(STUFF).index(name), i], SCALES[(i + len(name)) % VARIANTS], math.radians(stuff.angles[i]))
        bank[i, 0], bank[i, 1] = stuff.weave(cloth)
    return bank


@cache
def gray_tiles(name: str) -> Array:
    """The tiles with a mean of 1, a standard deviation of 0.2 and no second colour, to differ in texture only: where it
    would be, the brightness is half as much again."""
    bank = np.zeros((VARIANTS, 2, TILE, TILE), np.float32)
    for tile, (value, mix) in zip(bank, tiles(name), strict=True):
        rough = value * (1 + np.float32(0.5) * mix)
        mean = round(float(rough.mean(dtype=np.float64)), 6)  # rounded, as sums depend on the machine's order
        spread = round(float(rough.std(dtype=np.float64)), 6)
        tile[0] = 1 + (rough - np.float32(mean)) * np.float32(0.2 / spread)
    return bank


@cache
def rough_paper() -> Array:
    """A tile (T,T) of 1/f-like noise, about [-1, 1]: octaves of value noise, the finer the weaker."""
    cloth, paper = Cloth([99], 1.0, 0.0), np.zeros((TILE, TILE), np.float32)
    for cell, weight in ((64, 0.5), (32, 0.4), (16, 0.3), (8, 0.25), (4, 0.2), (2, 0.2)):
        paper += weight * cloth.noise(cell, cell)
    return paper


def piece(rng: np.random.Generator, tile: Array, height: int, width: int) -> Array:
    """A piece (...,height,width) from anywhere in a tile (...,T,T), mirrored or not; a view where it fits."""
    if max(height, width) > TILE:
        to_and_fro = np.r_[0:TILE, TILE - 1 : -1 : -1]  # so that no seam shows
        y, x = (to_and_fro[(np.arange(n) + int(rng.integers(TILE))) % (2 * TILE)] for n in (height, width))
        cut = tile[..., y[:, None], x]
    else:
        y, x = int(rng.integers(TILE - height + 1)), int(rng.integers(TILE - width + 1))
        cut = tile[..., y : y + height, x : x + width]
    return cut[..., ::-1] if rng.random() < 0.5 else cut
