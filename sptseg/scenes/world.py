"""The picture-book world: drawn scenes with exact masks and captions, the same from a seed on every machine.

>>> image, label = draw(seed=7)  # uint8 (128,128,3) and uint8 (128,128)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sptseg.scenes.drawings import THINGS
from sptseg.scenes.pen import COLOURS, Pen
from sptseg.scenes.textures import STUFF, VARIANTS, WORLD, between, gray_tiles, piece, rough_paper, tiles

Array = np.ndarray
Generator = np.random.Generator
Words = dict[str, tuple[str, ...]]  # the adjectives that are true of what is in view, by its name
Kind = Literal["scene", "closeup", "thumbnail"]
CLASSES, UNSEEN = (*STUFF, *THINGS), WORLD["unseen"]
INDEX = {name: i for i, name in enumerate(CLASSES)}
TEMPLATES = ("{}", "a photo of a {}", "a picture of {}", "this is {}", "there is a {}", "a picture with the {}")
TEXTS = (*CLASSES, *TEMPLATES, *COLOURS, "a an and big bright dark small")
WORDS = tuple(sorted({word for text in TEXTS for word in text.split()} - {"{}"}))
LEAST = 0.015  # of the picture: what a class must keep in view to stay, and to be named
WALLS = ("brick wall", "stone wall", "wooden fence", "hedge")
HEIGHT = {"sky": 0, "mountain": 1, **dict.fromkeys(WALLS, 2)}  # others: 3, below these
RAGGED = {  # length and height of the points at the upper edge, pixels
    "mountain": (20.0, 9.0), "hedge": (7.0, 2.5), "grass": (3.0, 2.0), "wheat field": (4.0, 3.0), "gravel": (5.0, 1.5),
}  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """A picture (S,S,3) uint8, the class of each pixel (S,S) uint8, and one phrase per class in view."""

    image: Array
    label: Array
    phrases: tuple[str, ...]

    @property
    def caption(self) -> str:
        """The phrases as one line: "a red boat, a big tree and blue water"."""
        *first, last = self.phrases
        return f"{', '.join(first)} and {last}" if first else last


def draw(seed: int | Sequence[int], size: int = 128, one_colour: bool = False) -> tuple[Array, Array]:
    """A scene's picture (S,S,3) and labels (S,S), both uint8; labels index `splits.scenes().classes`."""
    scene = compose(seed, size, one_colour=one_colour)
    return scene.image, scene.label


def compose(seed: int | Sequence[int], size: int = 128, kind: Kind = "scene", one_colour: bool = False) -> Scene:
    """Draw one scene: two or three kinds of stuff and one to four things.

    `kind` "closeup": one thing that fills the picture; "thumbnail": one thing on one stuff, or now and then only stuff,
    as large in pixels as in a scene of 128, for a small `size`. `one_colour`: all stuff is gray, of one mean and
    contrast, and differs in texture only; all else is as without."""
    if size < 32:
        raise ValueError(f"size is {size}; wanted 32 pixels or more")
    rng = np.random.default_rng(seed)
    chance = rng.random()
    count = {"scene": 2 + (chance < 0.2), "closeup": 1 + (chance < 0.4), "thumbnail": 1 + (chance < 0.07)}[kind]
    picture, label, words = _ground(rng, size, _pick(rng, list(STUFF), count), one_colour)
    wanted = {"scene": 1 + int(rng.random() * 4), "closeup": 1, "thumbnail": int(chance >= 0.15)}[kind]
    for name in _pick(rng, list(THINGS), wanted):
        scale = 1.0 if kind == "thumbnail" else size / 128
        low, high = {"scene": (40, 78 - 3 * wanted), "closeup": (84, 124), "thumbnail": (38, 60)}[kind]
        across = between(rng, low, high)
        words |= _place(rng, picture, label, name, across * scale, scale, free=kind != "scene" or rng.random() < 0.5)
    phrases = [_phrase(rng, name, *words[name]) for name in words]
    order = rng.permutation(len(phrases))
    return Scene(_lit(rng, picture), label, tuple(phrases[i] for i in order))


def _pick(rng: Generator, names: list[str], count: int) -> list[str]:
    return [names[i] for i in rng.permutation(len(names))[:count]]


def _ground(rng: Generator, size: int, names: list[str], one_colour: bool) -> tuple[Array, Array, Words]:
    """Stuff only: colours (3,S,S), labels (S,S) and words."""
    if rng.random() < 0.6:
        names = sorted(names, key=lambda name: HEIGHT.get(name, 3))  # as in nature: the sky above, the meadow below
    upright = rng.random() < 0.2  # regions side by side
    picture, label = np.empty((3, size, size), np.float32), np.empty((size, size), np.uint8)
    words: Words = {}
    start = between(rng, 0.3, 0.7) if len(names) < 3 else between(rng, 0.25, 0.4)
    picture[:], words[names[0]] = _textured(rng, names[0], size, size, one_colour)
    label[:] = INDEX[names[0]]
    if upright:
        picture, label = picture.transpose(0, 2, 1), label.T  # what was below is now to the right
    for i, name in enumerate(names[1:]):
        first, inside = _beyond(rng, size, (start + 0.33 * i) * size, None if upright else name)
        shape = (size, size - first) if upright else (size - first, size)
        colours, words[name] = _textured(rng, name, *shape, one_colour)
        colours = colours.transpose(0, 2, 1) if upright else colours
        picture[:, first:] += inside * (colours - picture[:, first:])
        label[first:][inside >= 0.5] = INDEX[name]
    return (picture.transpose(0, 2, 1).copy(), label.T.copy(), words) if upright else (picture, label, words)


def _beyond(rng: Generator, size: int, at: float, name: str | None) -> tuple[int, Array]:
    """Alpha of what lies below a horizon, from the first row that it touches: straight, tilted, wavy or ragged."""
    x = np.arange(size, dtype=np.float32)
    tilt = between(rng, -0.12, 0.12) if rng.random() < 0.6 else between(rng, -0.4, 0.4) * (rng.random() < 0.4)
    ragged, scale = RAGGED.get(name or ""), size / 128
    cell, swing = ragged or (between(rng, 16, 40), between(rng, 0, 5) * (rng.random() < 0.6))
    knots = (rng.random(int(128 / cell) + 3, dtype=np.float32) * 2 - 1) * np.float32(swing * scale)
    cells = x * (1 / (cell * scale))
    i = np.floor(cells).astype(np.int32)
    f = cells - i
    f = f if ragged else f * f * (3 - 2 * f)
    height = at + tilt * (x - size / 2) + knots[i] * (1 - f) + knots[i + 1] * f
    first = int(min(max(math.floor(float(height.min())) - 1, 0), size - 1))
    return first, np.minimum(np.maximum(x[first:, None] - height[None, :] + 0.5, 0), 1)


def _textured(rng: Generator, name: str, height: int, width: int, one_colour: bool) -> tuple[Array, tuple[str, ...]]:
    """A piece of stuff, colours (3,height,width), and the adjectives that are true of it."""
    bank = gray_tiles(name) if one_colour else tiles(name)
    value, mix = piece(rng, bank[int(rng.integers(VARIANTS))], height, width)
    colour, shades = list(STUFF[name].colours.items())[rng.permutation(len(STUFF[name].colours))[0]]
    if one_colour:
        colour, shades = "gray", (COLOURS["gray"],) * 2
    bright = between(rng, 0.86 if colour == "white" else 0.66, 1.16)  # a white thing in the dark would be gray
    base, second = (shade * (_jitter(rng) * np.float32(bright)) for shade in shades)
    colours = (second - base) * mix
    colours += base
    colours *= value
    return colours, (colour, *(("dark",) if bright < 0.8 else ("bright",) if bright > 1.06 else ()))


def _jitter(rng: Generator) -> Array:
    return (0.96 + 0.08 * rng.random((3, 1, 1), dtype=np.float32)).astype(np.float32)


def _place(rng: Generator, picture: Array, label: Array, name: str, across: float, scale: float, free: bool) -> Words:
    """Paint a thing in place unless it would hide a class; returns its words, none if skipped."""
    thing, size = THINGS[name], len(label)
    colour = _pick(rng, thing.colours.split(), 1)[0]
    accent = COLOURS[_pick(rng, [other for other in COLOURS if other != colour], 1)[0]]
    angle = thing.turn * between(rng, -1, 1)
    pen = Pen(rng, across / 2, angle, rng.random() < 0.5, COLOURS[colour] * _jitter(rng), accent)
    thing.paint(pen)
    sprite, solid = pen.rgb * pen.light, pen.alpha >= 0.5
    for attempt in range(8):
        x, y = _centre(rng, label, thing.home, across / 2, free)
        there, part = _overlap(size, pen.half, y, x)
        before = label[there].copy()
        covered = np.count_nonzero(before[solid[part]] >= len(STUFF))  # pixels of other things
        if attempt < 5 and covered > 0.2 * np.count_nonzero(solid):
            continue
        label[there][solid[part]] = INDEX[name]
        pixels = np.bincount(label.ravel(), minlength=len(CLASSES))
        kept = np.bincount(before.ravel(), minlength=len(CLASSES)) > 0
        if pixels[INDEX[name]] >= LEAST * size * size and (pixels[kept] >= LEAST * size * size).all():
            _paste(picture, sprite, pen.alpha, y, x, round(0.05 * across))
            extent = ("small",) if across < 48 * scale else ("big",) if across > 60 * scale else ()
            return {name: (colour, *extent)}
        label[there] = before
    return {}


def _overlap(size: int, half: int, y: int, x: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where a sprite centred at (y, x) meets the picture: slices of the picture, slices of the sprite."""
    top, left, end, right = max(y - half, 0), max(x - half, 0), min(y + half + 1, size), min(x + half + 1, size)
    there = slice(top, end), slice(left, right)
    return there, (slice(top - y + half, end - y + half), slice(left - x + half, right - x + half))


def _paste(picture: Array, sprite: Array, alpha: Array, y: int, x: int, drop: int) -> None:
    """Blend a sprite (3,h,w) into the picture over its own shadow, which falls `drop` pixels down and to the right."""
    size, half = picture.shape[1], len(alpha) // 2
    there, part = _overlap(size, half, y + drop, x + drop)
    picture[:, *there] *= 1 - 0.3 * alpha[part]
    there, part = _overlap(size, half, y, x)
    here = picture[:, *there]
    here += alpha[part] * (sprite[:, *part] - here)


def _centre(rng: Generator, label: Array, home: str, radius: float, free: bool) -> tuple[int, int]:
    """Where a thing goes: anywhere, or where it belongs (in the air, on the ground, on water if there is any)."""
    size, margin = len(label), min(0.8 * radius, len(label) / 2)
    x, y = between(rng, margin, size - margin), between(rng, margin, size - margin)
    if free:
        pass
    elif home == "air":
        y = between(rng, margin, max(margin, 0.45 * size))
    elif home == "ground":
        y = between(rng, min(0.55 * size, size - margin), size - margin)
    else:
        for _ in range(8):
            if label[int(y), int(x)] == INDEX["water"]:
                break
            x, y = between(rng, margin, size - margin), between(rng, margin, size - margin)
    return int(x), int(y)


def _phrase(rng: Generator, name: str, colour: str, extent: str | None = None) -> str:
    """Such as "a big red boat": article for things, and for about half of the phrases adjectives."""
    chance, words = rng.random(), [name]
    if chance < 0.4:
        words.insert(0, colour)
    if extent is not None and (chance < 0.12 or 0.4 <= chance < 0.65):
        words.insert(0, extent)
    if name in THINGS:
        words.insert(0, "an" if words[0][0] in "aeiou" else "a")
    return " ".join(words)


def _lit(rng: Generator, picture: Array) -> Array:
    """Light, tint and paper grain over the picture (3,S,S); as uint8 (S,S,3)."""
    size = picture.shape[1]
    fall = np.arange(size, dtype=np.float32)[:, None] / np.float32(size) - np.float32(0.5)
    light = between(rng, 0.9, 1.08) + between(rng, -0.12, 0.12) * fall
    light = light + between(rng, 0.015, 0.07) * piece(rng, rough_paper(), size, size)
    picture *= light
    picture *= (0.95 + 0.1 * rng.random((3, 1, 1), dtype=np.float32)) * np.float32(255)
    picture += 0.5
    return np.minimum(np.maximum(picture, 0, out=picture), 255, out=picture).astype(np.uint8).transpose(1, 2, 0).copy()
