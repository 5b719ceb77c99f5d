"""How each thing of the picture-book world is drawn: one small painter per class, in painter's order."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sptseg.scenes.pen import BLACK, BROWN, COLOURS, WHITE, YELLOW, Pen, both, cut, tone, union
from sptseg.scenes.textures import WORLD, between, rgb, sine

GREEN, ORANGE, GLASS = COLOURS["green"], COLOURS["orange"], rgb("bfe3f2")


@dataclass(frozen=True)
class Thing:
    """How to draw a thing: its painter, how far it turns (radians), where it belongs, the colours it may have."""

    paint: Callable[[Pen], None]
    turn: float
    home: Literal["air", "ground", "water"]
    colours: str = " ".join(COLOURS)


def sun(p: Pen) -> None:
    p.fill(p.spokes().polygon((0.5, -0.26), (0.5, 0.26), (1.0, 0.0)), tone(p.colour, 0.92))
    p.fill(p.ellipse(0, 0, 0.62), p.colour)
    p.glow(p.ellipse(-0.1, -0.1, 0.5), WHITE, 0.5, 0.4)
    p.fill(p.fold().ellipse(0.2, -0.1, 0.065, 0.09), BROWN, line=False)
    p.fill(both(np.abs(p.ellipse(0, 0.02, 0.28)) - 0.035, 0.12 - p.y), BROWN, line=False)


def moon(p: Pen) -> None:
    bite = between(p.rng, 0.38, 0.5)
    d = cut(p.ellipse(0, 0, 0.95), p.ellipse(bite, -0.12, 0.72))
    p.fill(d, p.colour)
    p.glow(d, WHITE, 0.4, 0.35)
    for x, y, r in ((-0.62, -0.1, 0.11), (-0.42, 0.5, 0.13), (-0.4, -0.62, 0.08), (0.12, 0.78, 0.07)):
        p.fill(p.ellipse(x, y, r), tone(p.colour, 0.78))


def cloud(p: Pen) -> None:
    top = between(p.rng, -0.25, 0.2)
    puffs = union(p.ellipse(-0.55, 0.12, 0.42, 0.36), p.ellipse(top, -0.18, 0.48, 0.44))
    puffs = union(puffs, p.ellipse(0.55, 0.1, 0.43, 0.38), p.rounded(-0.9, 0.0, 0.9, 0.5, 0.24))
    d = both(puffs, p.y - 0.5)
    p.fill(d, p.colour)
    p.glow(both(d, 0.12 - p.y), rgb("8f9fc0"), 0.34, 0.5)
    p.glow(p.ellipse(top - 0.1, -0.25, 0.36), WHITE, 0.4, 0.6)


def house(p: Pen) -> None:
    p.fill(p.box(0.38, -0.85, 0.62, -0.2), tone(BROWN, 0.9))
    p.fill(p.box(-0.78, -0.2, 0.78, 0.92), p.colour)
    p.fill(p.polygon((-1.0, -0.1), (1.0, -0.1), (0.0, -0.95)), tone(p.accent, 0.85))
    p.fill(p.box(-0.2, 0.3, 0.2, 0.92), BROWN)
    p.fill(p.ellipse(0.11, 0.62, 0.05), YELLOW, line=False)
    f = p.fold()
    x, y, w, h = 0.49, 0.22, 0.2, 0.22  # a window on either side
    f.fill(f.box(x - w, y - h, x + w, y + h), WHITE)
    f.fill(f.box(x - w * 0.68, y - h * 0.68, x + w * 0.68, y + h * 0.68), GLASS, line=False)
    f.fill(union(f.box(x - 0.03, y - h, x + 0.03, y + h), f.box(x - w, y - 0.03, x + w, y + 0.03)), WHITE, line=False)
    p.fill(p.ellipse(0, -0.42, 0.15), GLASS)


def castle(p: Pen) -> None:
    f = p.fold()
    teeth = np.maximum(0.1 - np.abs(np.abs(f.x - 0.2) - 0.1) * 1.0, 0)
    p.fill(union(p.box(-0.5, -0.05, 0.5, 0.92), both(f.box(0.0, -0.22, 0.5, 0.0), 0.05 - teeth)), tone(p.colour, 0.86))
    p.fill(f.box(0.46, -0.4, 0.94, 0.92), p.colour)
    p.fill(f.polygon((0.38, -0.38), (1.0, -0.38), (0.7, -0.95)), tone(p.accent, 0.85))
    p.fill(p.rounded(-0.24, 0.32, 0.24, 1.2, 0.24) + np.maximum(p.y - 0.92, 0) * 9, tone(BROWN, 0.6))
    p.fill(f.rounded(0.61, -0.2, 0.79, 0.12, 0.09), BLACK, line=False)
    p.fill(f.box(0.6, 0.45, 0.8, 0.52), tone(p.colour, 0.7), line=False)
    p.fill(f.box(0.25, 0.1, 0.42, 0.17), tone(p.colour, 0.65), line=False)
    p.fill(p.box(-0.03, -0.75, 0.03, -0.1), BROWN, line=False)
    p.fill(p.polygon((0.03, -0.75), (0.03, -0.45), (0.36, -0.6)), p.accent)


def tent(p: Pen) -> None:
    f = p.fold()
    p.fill(f.capsule(0, -0.72, 0.14, -0.92, 0.045), BROWN, line=False)
    d = p.polygon((-1.0, 0.78), (1.0, 0.78), (0.0, -0.78))
    p.fill(d, p.colour)
    slant = f.x * (1.0 / (np.maximum(p.y + 0.8, 0.05)))  # 0 in the middle, 0.63 along the edge: stripes that fan out
    p.fill(both(d + 0.05, np.abs(slant - 0.4) * 0.9 - 0.07), tone(p.colour, 1.35) + 0.06, line=False)
    p.fill(p.polygon((-0.34, 0.78), (0.34, 0.78), (0.0, -0.3)), tone(p.colour, 0.3))
    p.fill(p.polygon((0.02, -0.3), (0.52, 0.78), (0.28, 0.78)), tone(p.colour, 1.15))


def lighthouse(p: Pen) -> None:
    d = p.polygon((-0.44, 0.95), (0.44, 0.95), (0.26, -0.42), (-0.26, -0.42))
    p.fill(d, p.colour)
    p.fill(both(d + 0.03, np.abs(np.abs(p.y - 0.26) - 0.25) - 0.115), p.contrast, line=False)
    p.fill(p.box(-0.19, -0.72, 0.19, -0.46), rgb("ffe98a"))
    p.fill(p.box(-0.38, -0.5, 0.38, -0.4), tone(BLACK, 1.3))
    p.fill(p.polygon((-0.3, -0.7), (0.3, -0.7), (0.0, -0.98)), p.colour)
    p.fill(p.rounded(-0.11, 0.66, 0.11, 1.1, 0.11) + np.maximum(p.y - 0.94, 0) * 9, tone(BROWN, 0.8))


def windmill(p: Pen) -> None:
    p.fill(p.polygon((-0.52, 0.95), (0.52, 0.95), (0.28, -0.25), (-0.28, -0.25)), p.colour)
    p.fill(p.ellipse(0, -0.26, 0.32, 0.26), tone(p.accent, 0.8))
    p.fill(p.rounded(-0.13, 0.6, 0.13, 1.2, 0.13) + np.maximum(p.y - 0.94, 0) * 9, tone(BROWN, 0.8))
    p.fill(p.ellipse(0, 0.26, 0.1), GLASS)
    q = p.turned(0, -0.22, between(p.rng, 0.3, 1.2))
    up, side = np.abs(q.x) > np.abs(q.y), (q.x * q.y) > 0
    long, wide = np.where(up, np.abs(q.x), np.abs(q.y)), np.where(up, np.abs(q.y), np.abs(q.x))
    sail = p.at(long, np.where(side == up, wide, -wide))  # four sails at once, each on one side of its arm
    p.fill(sail.box(0.2, 0.0, 0.78, 0.24), rgb("f7ecd2"))
    p.fill(sail.box(0.0, -0.05, 0.78, 0.05), tone(BROWN, 0.8), line=False)
    p.fill(q.ellipse(0, 0, 0.09), BROWN)


def tree(p: Pen) -> None:
    trunk = p.polygon((-0.22, 0.98), (0.22, 0.98), (0.11, 0.1), (-0.11, 0.1))
    p.fill(union(trunk, p.capsule(0, 0.4, 0.4, 0.05, 0.06)), BROWN)
    w = between(p.rng, 0.3, 0.42)
    left, right = p.ellipse(-0.5, -0.02, 0.42), p.ellipse(0.5, 0.0, 0.43)
    p.fill(union(left, right, p.ellipse(0, -0.45, 0.55), p.ellipse(0, 0.05, 0.5, 0.36)), tone(p.colour, 0.86))
    p.fill(p.ellipse(-w, -0.25, 0.36), p.colour)
    p.fill(p.ellipse(w, -0.2, 0.33), p.colour)
    p.fill(p.ellipse(0.0, -0.55, 0.35), tone(p.colour, 1.1))
    p.glow(p.ellipse(-0.3, -0.5, 0.6), rgb("fff3b0"), 0.6, 0.25)


def pine(p: Pen) -> None:
    p.fill(p.box(-0.12, 0.6, 0.12, 0.98), BROWN)
    for y, w, h, f in ((0.75, 0.72, 0.75, 0.82), (0.3, 0.58, 0.7, 0.94), (-0.15, 0.44, 0.82, 1.08)):
        q = p.at(p.x, p.y + 0.1 * np.abs(p.x))  # drooping branches
        p.fill(q.polygon((-w, y), (w, y), (0.0, y - h)), tone(p.colour, f))
    p.glow(p.polygon((-0.7, 0.7), (0.0, 0.8), (0.0, -0.9)), rgb("ffffe0"), 0.4, 0.16)


def cactus(p: Pen) -> None:
    left = union(p.capsule(-0.68, -0.3, -0.68, 0.12, 0.16), p.capsule(-0.66, 0.16, 0, 0.3, 0.15))
    right = union(p.capsule(0.68, -0.5, 0.68, -0.06, 0.16), p.capsule(0.66, -0.04, 0, 0.12, 0.15))
    d = both(union(p.capsule(0, -0.68, 0, 0.95, 0.27), left, right), p.y - 0.96)
    p.fill(d, p.colour)
    p.fill(both(d + 0.06, np.abs(np.abs(p.x) - 0.1) - 0.025), tone(p.colour, 0.66), line=False)
    p.fill(both(d + 0.06, np.abs(np.abs(p.x) - 0.68) - 0.025), tone(p.colour, 0.66), line=False)
    p.fill(union(p.ellipse(-0.1, -0.9, 0.11), p.ellipse(0.1, -0.9, 0.11), p.ellipse(0, -0.95, 0.08)), COLOURS["pink"])


def flower(p: Pen) -> None:
    p.fill(p.capsule(0, -0.2, 0.06, 0.98, 0.06), tone(GREEN, 0.85))
    p.fill(p.turned(-0.26, 0.62, 0.55).ellipse(0, 0, 0.32, 0.12), GREEN)
    p.fill(p.turned(0.34, 0.66, -0.6).ellipse(0, 0, 0.3, 0.12), GREEN)
    q = p.turned(0, -0.34, between(p.rng, 0, 0.78))
    s = q.spokes()
    p.fill(s.ellipse(0.38, 0, 0.25, 0.2), p.colour)
    p.glow(s.ellipse(0.2, 0, 0.3), tone(p.colour, 0.6), 0.25, 0.5)
    p.fill(q.ellipse(0, 0, 0.22), BROWN if 2 * p.colour[2, 0, 0] < p.colour[1, 0, 0] else YELLOW)


def mushroom(p: Pen) -> None:
    p.fill(p.rounded(-0.3, -0.05, 0.3, 0.95, 0.22), rgb("f6ead0"))
    p.fill(both(p.ellipse(0, 0.1, 0.6, 0.2), 0.06 - p.y), tone(rgb("f6ead0"), 0.75))
    cap = both(p.ellipse(0, 0.12, 0.98, 1.0), p.y - 0.12)
    p.fill(cap, p.colour)
    p.glow(p.ellipse(-0.3, -0.4, 0.5), WHITE, 0.6, 0.3)
    dots = ((-0.1, -0.5, 0.17, 0.14), (0.45, -0.28, 0.15), (-0.55, -0.12, 0.14), (0.06, -0.08, 0.11))
    p.fill(both(union(*(p.ellipse(*dot) for dot in dots)), cap + 0.04), p.contrast, line=False)


def pumpkin(p: Pen) -> None:
    p.fill(p.capsule(0, -0.5, 0.14, -0.86, 0.1, 0.07), tone(GREEN, 0.75))
    f = p.fold()
    for x, w, s in ((0.58, 0.4, 0.84), (0.3, 0.4, 0.94), (0.0, 0.3, 1.05)):
        p.fill(f.ellipse(x, 0.16, w, 0.7 - 0.1 * x), tone(p.colour, s))
    p.glow(p.ellipse(-0.35, -0.15, 0.4), WHITE, 0.5, 0.3)


def apple(p: Pen) -> None:
    p.fill(p.capsule(0, -0.45, 0.1, -0.9, 0.055), tone(BROWN, 0.8))
    f = p.fold()
    d = cut(union(f.ellipse(0.32, 0.12, 0.56, 0.66), f.ellipse(0.18, 0.42, 0.4, 0.5)), p.ellipse(0, -0.68, 0.2))
    p.fill(d, p.colour)
    p.glow(p.ellipse(0.2, 0.3, 0.7), tone(p.colour, 0.55), 1.2, 0.4)
    p.glow(p.ellipse(-0.36, -0.14, 0.26, 0.32), WHITE, 0.22, 0.6)
    p.fill(p.turned(0.38, -0.72, -0.5).ellipse(0, 0, 0.3, 0.14), tone(GREEN, 1.1))


def boat(p: Pen) -> None:
    p.fill(p.box(-0.04, -0.95, 0.04, 0.4), BROWN)
    p.fill(p.polygon((0.08, -0.9), (0.08, 0.26), (0.8, 0.26)), rgb("fbf5e6"))
    p.fill(p.polygon((-0.1, -0.7), (-0.1, 0.26), (-0.68, 0.26)), p.accent)
    d = p.polygon((-1.0, 0.36), (1.0, 0.36), (0.66, 0.92), (-0.62, 0.92))
    p.fill(d, p.colour)
    p.fill(both(d + 0.04, np.abs(p.y - 0.5) - 0.05), p.contrast, line=False)


def car(p: Pen) -> None:
    p.fill(p.polygon((-0.62, 0.05), (0.55, 0.05), (0.3, -0.52), (-0.42, -0.52)), p.colour)
    p.fill(p.polygon((-0.46, 0.0), (-0.06, 0.0), (-0.06, -0.38), (-0.34, -0.38)), GLASS, line=False)
    p.fill(p.polygon((0.04, 0.0), (0.38, 0.0), (0.22, -0.38), (0.04, -0.38)), GLASS, line=False)
    p.fill(p.rounded(-0.98, -0.04, 0.98, 0.42, 0.17), p.colour)
    p.fill(p.box(-0.02, 0.06, 0.0, 0.36), tone(p.colour, 0.6), line=False)
    p.fill(p.ellipse(0.88, 0.12, 0.09), YELLOW, line=False)
    p.fold().wheel(0.53, 0.4, 0.25)


def bus(p: Pen) -> None:
    p.fill(p.rounded(-0.98, -0.66, 0.98, 0.56, 0.14), p.colour)
    panes = p.at(np.abs(np.abs(np.abs(p.x + 0.17) - 0.42) - 0.21), p.y)
    p.fill(both(panes.box(-0.14, -0.46, 0.14, -0.04), np.abs(p.x + 0.17) - 0.8), GLASS)
    p.fill(p.box(0.7, -0.46, 0.92, 0.44), GLASS)
    p.fill(p.box(-0.94, 0.12, 0.62, 0.22), p.contrast, line=False)
    p.fold().wheel(0.55, 0.56, 0.23)


def airplane(p: Pen) -> None:
    p.fill(p.polygon((-0.92, -0.55), (-0.66, -0.55), (-0.42, 0.0), (-0.8, 0.0)), p.accent)
    p.fill(p.polygon((-0.05, -0.1), (0.2, -0.1), (-0.1, -0.62), (-0.28, -0.62)), tone(p.accent, 0.75))
    d = p.capsule(-0.78, -0.02, 0.72, 0.02, 0.13, 0.26)
    p.fill(d, p.colour)
    p.fill(both(d + 0.04, np.abs(p.x - 0.72) - 0.12 + np.maximum(p.y + 0.02, 0) * 9), GLASS, line=False)
    dots = p.at(np.abs(np.abs(np.abs(p.x) - 0.25) - 0.13), p.y)
    p.fill(both(dots.ellipse(0.0, -0.06, 0.07), np.abs(p.x) - 0.5), tone(GLASS, 0.75), line=False)
    p.fill(p.polygon((-0.1, 0.08), (0.28, 0.08), (-0.22, 0.68), (-0.45, 0.68)), p.accent)


def balloon(p: Pen) -> None:
    p.fill(p.fold().capsule(0.42, 0.15, 0.16, 0.72, 0.025), tone(BROWN, 0.7), line=False)
    p.fill(p.rounded(-0.2, 0.66, 0.2, 0.98, 0.06), tone(BROWN, 1.1))
    d = union(p.ellipse(0, -0.32, 0.66), p.polygon((-0.58, 0.0), (0.58, 0.0), (0.24, 0.46), (-0.24, 0.46)))
    p.fill(d, p.colour)
    width = np.sqrt(np.maximum(0.64 - (p.y + 0.32) * (p.y + 0.32), 0.05))
    stripe = np.abs(np.abs(p.x) - 0.5 * width) - 0.14 * width
    p.fill(both(d + 0.04, stripe), p.accent, line=False)
    p.glow(p.ellipse(-0.25, -0.55, 0.4), WHITE, 0.4, 0.4)


def kite(p: Pen) -> None:
    tail = np.abs(p.x - 0.09 * sine(p.y * 1.4)) - 0.025
    p.fill(both(tail, np.abs(p.y - 0.6) - 0.38), BROWN, line=False)
    for y in (0.58, 0.84):
        x = 0.09 * math.sin(2 * math.pi * 1.4 * y)
        q = p.at(np.abs(p.x - x), p.y)
        p.fill(q.polygon((0.0, y), (0.17, y - 0.1), (0.17, y + 0.1)), p.accent)
    d = p.fold().polygon((-0.01, -0.98), (0.62, -0.4), (-0.01, 0.4))
    p.fill(d, p.colour)
    p.fill(both(d + 0.04, p.x * np.where(p.y > -0.4, np.float32(1), np.float32(-1))), p.accent, line=False)
    p.fill(both(d, union(np.abs(p.x), np.abs(p.y + 0.4)) - 0.025), tone(BROWN, 0.7), line=False)


def fish(p: Pen) -> None:
    tail = [p.polygon((-0.5, 0.0), (-1.0, y), (-0.86, 0.0)) for y in (-0.5, 0.5)]
    p.fill(union(*tail), p.accent)
    p.fill(p.polygon((-0.35, -0.3), (0.3, -0.35), (-0.3, -0.72)), p.accent)
    d = p.ellipse(0.14, 0.0, 0.8, 0.48)
    p.fill(d, p.colour)
    p.glow(both(d, 0.05 - p.y), WHITE, 0.4, 0.35)
    p.fill(both(d + 0.04, np.abs(np.abs(p.x + 0.16) - 0.2) - 0.06), tone(p.accent, 0.95), line=False)
    p.fill(p.polygon((0.25, 0.1), (-0.12, 0.02), (-0.15, 0.34)), tone(p.colour, 0.75))
    p.eye(0.62, -0.1, 0.13)


def bird(p: Pen) -> None:
    p.fill(union(p.capsule(-0.05, 0.5, -0.08, 0.95, 0.035), p.capsule(0.2, 0.5, 0.18, 0.95, 0.035)), ORANGE, line=False)
    p.fill(p.polygon((-0.4, -0.02), (-1.0, -0.3), (-0.9, 0.12), (-0.35, 0.4)), tone(p.colour, 0.8))
    p.fill(p.polygon((0.78, -0.6), (0.78, -0.28), (1.0, -0.42)), ORANGE)
    d = union(p.ellipse(0.05, 0.16, 0.58, 0.48), p.ellipse(0.5, -0.42, 0.36))
    p.fill(d, p.colour)
    p.glow(both(p.ellipse(0.3, 0.3, 0.42), d), rgb("fff2d8"), 0.2, 0.55)
    p.fill(p.turned(-0.15, 0.08, 0.35).ellipse(0, 0, 0.42, 0.24), tone(p.colour, 0.7))
    p.eye(0.58, -0.48, 0.1)


def snail(p: Pen) -> None:
    body = rgb("e3c48f")
    p.fill(union(p.capsule(0.72, -0.3, 0.66, -0.78, 0.04), p.capsule(0.82, -0.25, 0.94, -0.7, 0.04)), body, line=False)
    p.fill(union(p.ellipse(0.66, -0.8, 0.08), p.ellipse(0.92, -0.72, 0.08)), BLACK, line=False)
    p.fill(union(p.capsule(-0.85, 0.72, 0.6, 0.68, 0.08, 0.2), p.capsule(0.62, 0.62, 0.74, -0.12, 0.22, 0.2)), body)
    x, y = p.x + 0.16, p.y - 0.02
    for r, s in ((0.68, 1.0), (0.48, 1.18), (0.3, 0.85), (0.14, 1.18)):
        p.fill(p.at(x + 0.12 * (0.68 - r), y - 0.1 * (0.68 - r)).ellipse(0, 0, r), tone(p.colour, s))


def butterfly(p: Pen) -> None:
    f = p.fold()
    p.fill(f.capsule(0.04, -0.4, 0.24, -0.85, 0.03), BLACK, line=False)
    low, high = f.turned(0.4, 0.42, 0.75).ellipse(0, 0, 0.44, 0.32), f.turned(0.5, -0.3, -0.6).ellipse(0, 0, 0.56, 0.36)
    p.fill(low, tone(p.colour, 0.85))
    p.fill(high, p.colour)
    p.fill(f.ellipse(0.58, -0.36, 0.17), p.accent)
    p.fill(f.ellipse(0.46, 0.46, 0.12), p.accent)
    p.fill(p.capsule(0, -0.4, 0, 0.6, 0.11, 0.06), tone(BLACK, 0.9), line=False)


def ball(p: Pen) -> None:
    d = p.ellipse(0, 0, 0.92)
    p.fill(d, p.colour)
    x = p.x * (1.0 / np.sqrt(np.maximum(1.0 - p.y * p.y, 0.12)))  # meridians, as on a beach ball
    p.fill(both(d + 0.04, np.abs(np.abs(x + 0.1) - 0.5) - 0.15), p.contrast, line=False)
    p.fill(both(d + 0.03, p.ellipse(-0.07, -0.82, 0.24, 0.16)), p.accent)
    p.glow(p.ellipse(-0.32, -0.38, 0.42), WHITE, 0.45, 0.55)
    p.glow(cut(d, p.ellipse(-0.2, -0.22, 0.95)), BLACK, 0.3, 0.35)


def umbrella(p: Pen) -> None:
    hook = both(np.abs(p.ellipse(0.16, 0.76, 0.16)) - 0.05, 0.76 - p.y)
    p.fill(union(p.box(-0.045, -0.95, 0.045, 0.78), hook), tone(BROWN, 0.7), line=False)
    f = p.fold()
    scallop = union(f.ellipse(0.0, 0.12, 0.33, 0.2), f.ellipse(0.64, 0.12, 0.32, 0.2))
    d = cut(both(p.ellipse(0, 0.08, 0.98, 0.92), p.y - 0.1), scallop)
    p.fill(d, p.colour)
    bow = np.sqrt(np.maximum(0.85 - (p.y - 0.1) * (p.y - 0.1), 0.0)) * 0.36
    p.fill(both(d + 0.03, f.x - bow), tone(p.colour, 1.25) + 0.05, line=False)
    p.fill(both(d, np.abs(f.x - bow) - 0.025), tone(p.colour, 0.6), line=False)


# Each by the painter of its name.
THINGS = {name: Thing(globals()[name], **about) for name, about in WORLD["things"].items()}
