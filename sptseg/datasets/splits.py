"""Class names, palettes and seen/unseen splits, as frozen dataclasses. No tensors, no files."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import dist
from typing import Literal

from sptseg.scenes import CLASSES

IGNORE = 255
WIDE_IGNORE = 65535

Colour = tuple[int, int, int]


def ignored_label(classes: int) -> int:
    """The label of ignored pixels: 255, or 65535 (16-bit masks) where a class has 255."""
    return IGNORE if classes <= IGNORE else WIDE_IGNORE


@dataclass(frozen=True)
class Split:
    """The classes of a data set and which of them are unseen in training.

    `classes[i]` is the name of label value `i`; `unseen` holds label values; 255 is "ignore", see `ignored_label`.
    `prompts` holds (name, words) pairs: what CLIP is told where it is not the name.
    """

    name: str
    classes: tuple[str, ...]
    unseen: tuple[int, ...]
    palette: tuple[Colour, ...]
    source: str
    prompts: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= len(self.classes) <= WIDE_IGNORE:
            raise ValueError(f"split {self.name!r}: {len(self.classes)} classes; wanted 1 to {WIDE_IGNORE}")
        if not all(name.strip() for name in self.classes):
            blank = [i for i, name in enumerate(self.classes) if not name.strip()]
            raise ValueError(f"split {self.name!r}: label values {blank} have a blank class name; name each class")
        duplicates = sorted({name for name in self.classes if self.classes.count(name) > 1})
        if duplicates:
            raise ValueError(
                f"split {self.name!r}: class names given twice: {', '.join(duplicates)}; rename one of each"
            )
        if tuple(sorted(set(self.unseen))) != self.unseen or not set(self.unseen) <= set(range(len(self.classes))):
            raise ValueError(
                f"split {self.name!r}: unseen is {self.unseen}; "
                f"wanted ascending, distinct label values below {len(self.classes)}"
            )
        if len(self.palette) != len(self.classes):
            raise ValueError(
                f"split {self.name!r}: {len(self.palette)} colours for {len(self.classes)} classes; wanted one each"
            )
        strangers = [name for name, _ in self.prompts if name not in self.classes]
        if strangers:
            raise ValueError(
                f"split {self.name!r} has prompts for {', '.join(strangers)}, no classes of it; "
                f"it has {', '.join(self.classes)}"
            )

    @classmethod
    def from_names(cls, name: str, classes: Sequence[str], unseen: Sequence[str] = (), source: str = "") -> Split:
        """A split with unseen classes given by name, coloured by `spread_palette`."""
        palette = spread_palette(len(classes)) if 1 <= len(classes) <= WIDE_IGNORE else ()
        return cls(name, tuple(classes), (), palette, source).with_unseen(unseen)

    def with_prompts(self, prompts: Mapping[str, str]) -> Split:
        """The same classes, some told to CLIP in other words: {"tv monitor": "television"}."""
        return replace(self, prompts=tuple(prompts.items()))

    def texts(self, labels: Iterable[int] | None = None) -> tuple[str, ...]:
        """What CLIP is told of some label values (None: of all), in the order given."""
        words = dict(self.prompts)
        return tuple(words.get(name, name) for name in (self.classes if labels is None else self.names(labels)))

    @property
    def ignore(self) -> int:
        """The label of ignored pixels."""
        return ignored_label(len(self.classes))

    @property
    def seen(self) -> tuple[int, ...]:
        """Label values of the seen classes, ascending."""
        return tuple(i for i in range(len(self.classes)) if i not in set(self.unseen))

    def names(self, labels: Iterable[int]) -> tuple[str, ...]:
        """The names of some label values, in the order given."""
        return tuple(self.classes[i] for i in labels)

    def with_unseen(self, names: Sequence[str]) -> Split:
        """The same classes with other unseen ones, given by name."""
        unknown = [name for name in names if name not in self.classes]
        if unknown:
            raise ValueError(f"split {self.name!r} has no class {', '.join(unknown)}; it has {', '.join(self.classes)}")
        return replace(self, unseen=tuple(sorted({self.classes.index(name) for name in names})))


# Okabe and Ito's colours without black, which an overlay would lose: told apart by colour-blind people.
_OKABE_ITO: tuple[Colour, ...] = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
)  # fmt: skip

# Linear RGB as seen with normal vision, without M cones and without L cones (Machado et al. 2009, severity 1).
_VISIONS = (
    ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
)
_LMS_OF_RGB = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
_OKLAB_OF_LMS = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)


def _times(matrix: Sequence[Sequence[float]], vector: Sequence[float]) -> tuple[float, ...]:
    return tuple(sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix)


def _appearances(colour: Colour) -> tuple[tuple[float, ...], ...]:
    """The colour in OKLab (distances there follow perception), once for every kind of vision."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in colour)]
    lms = [_times(_LMS_OF_RGB, [max(v, 0.0) for v in _times(vision, linear)]) for vision in _VISIONS]
    return tuple(_times(_OKLAB_OF_LMS, [v ** (1 / 3) for v in cones]) for cones in lms)


@cache
def spread_palette(n: int) -> tuple[Colour, ...]:
    """`n` well-told-apart colours, always the same ones, and a prefix of every longer palette; after 255 they repeat.

    Seven colours of Okabe and Ito, then always the colour farthest, in lightness and hue, from all those before:
    the smallest distance counts among normal, deuteranopic and protanopic vision.
    """
    if not 1 <= n <= WIDE_IGNORE:
        raise ValueError(f"spread_palette: n is {n}; wanted 1 to {WIDE_IGNORE} colours")
    if n > IGNORE:
        return tuple(itertools.islice(itertools.cycle(spread_palette(IGNORE)), n))
    palette = list(_OKABE_ITO[:n])
    levels = range(20, 256, 23)
    candidates: dict[Colour, tuple[tuple[float, ...], ...]]
    candidates = {(r, g, b): _appearances((r, g, b)) for r in levels for g in levels for b in levels}
    candidates = {colour: seen for colour, seen in candidates.items() if 0.35 <= seen[0][0] <= 0.95}
    gaps = dict.fromkeys(candidates, float("inf"))
    newest: Iterable[Colour] = palette
    while len(palette) < n:
        for chosen in map(_appearances, newest):
            for colour, seen in candidates.items():
                gaps[colour] = min(gaps[colour], *map(dist, chosen, seen))
        palette.append(max(gaps, key=gaps.__getitem__))
        newest = palette[-1:]
    return tuple(palette)


def scenes() -> Split:
    """The picture-book world of `sptseg.scenes`: 41 classes, 14 stuff and 27 things, 10 of them unseen."""
    unseen = ("water", "brick wall", "wheat field", "moon", "castle", "tree", "flower", "apple", "car", "fish")
    return Split.from_names("scenes", CLASSES, unseen, "drawn by sptseg.scenes")


def _names(text: str) -> tuple[str, ...]:
    """Class names separated by commas, over any number of lines."""
    return tuple(" ".join(name.split()) for name in text.split(","))


def _voc_colour(label: int) -> Colour:
    """The devkit's colour: bits 0, 3, 6 of the label are red's highest bits, 1, 4, 7 green's and 2, 5, 8 blue's."""
    red, green, blue = (sum(((label >> (3 * k + channel)) & 1) << (7 - k) for k in range(3)) for channel in range(3))
    return red, green, blue


def voc2012() -> Split:
    """PASCAL VOC 2012 without background: 20 classes, 15 seen; in the official colours."""
    classes = _names(
        "aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, dining table, dog, horse, motorbike,"
        "person, potted plant, sheep, sofa, train, tv monitor"
    )
    palette = tuple(_voc_colour(i + 1) for i in range(len(classes)))  # colour 0 is the background's
    source = "PASCAL VOC 2012 devkit; seen and unseen as in ZegCLIP (Zhou et al., CVPR 2023)"
    unseen = ("potted plant", "sheep", "sofa", "train", "tv monitor")
    return Split("voc2012", classes, (), palette, source).with_unseen(unseen)


def coco_stuff() -> Split:
    """COCO-Stuff 164k: 171 classes, 156 seen; order and spelling as in mmsegmentation and so in others' prompts."""
    classes = _names("""
        person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
        parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
        handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
        surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
        broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv,
        laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase,
        scissors, teddy bear, hair drier, toothbrush, banner, blanket, branch, bridge, building-other, bush, cabinet,
        cage, cardboard, carpet, ceiling-other, ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain,
        desk-stuff, dirt, door-stuff, fence, floor-marble, floor-other, floor-stone, floor-tile, floor-wood, flower,
        fog, food-other, fruit, furniture-other, grass, gravel, ground-other, hill, house, leaves, light, mat, metal,
        mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow, plant-other, plastic, platform,
        playingfield, railing, railroad, river, road, rock, roof, rug, salad, sand, sea, shelf, sky-other, skyscraper,
        snow, solid-other, stairs, stone, straw, structural-other, table, tent, textile-other, towel, tree, vegetable,
        wall-brick, wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops,
        window-blind, window-other, wood""")
    unseen = _names(
        "cow, giraffe, suitcase, frisbee, skateboard, carrot, scissors, cardboard, clouds, grass, playingfield, river,"
        "road, tree, wall-concrete"
    )
    source = "COCO-Stuff 164k, mmsegmentation's train ids; seen and unseen as in ZegCLIP (Zhou et al., CVPR 2023)"
    return Split.from_names("coco-stuff", classes, unseen, source)


# Two 49/10 splits go by the same name in the literature; figures of one say nothing about the other.
_CONTEXT_UNSEEN = {
    "otseg": _names("cow, motorbike, sofa, cat, boat, fence, bird, tv monitor, keyboard, aeroplane"),
    "cascade": _names("aeroplane, bed, bedclothes, boat, bottle, car, cloth, cow, keyboard, plate"),
}


def context(unseen: Literal["otseg", "cascade"] = "otseg") -> Split:
    """PASCAL Context without background: 59 classes, 49 seen, by OTSeg's or by Cascade-CLIP's choice.

    The order is alphabetical, as in the masks that mmsegmentation's converter writes (early versions of its class
    list had VOC's order and named them wrongly).
    """
    if unseen not in _CONTEXT_UNSEEN:
        raise ValueError(f"context: unseen is {unseen!r}; wanted one of {', '.join(map(repr, _CONTEXT_UNSEEN))}")
    classes = _names("""
        aeroplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building, bus, cabinet, car, cat,
        ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence, floor, flower, food, grass, ground, horse,
        keyboard, light, motorbike, mountain, mouse, person, plate, platform, potted plant, road, rock, sheep, shelves,
        sidewalk, sign, sky, snow, sofa, table, track, train, tree, truck, tv monitor, wall, water, window, wood""")
    author = {"otseg": "OTSeg (Kim et al., ECCV 2024)", "cascade": "Cascade-CLIP (Li et al., ICML 2024)"}[unseen]
    source = f"PASCAL Context, the 59 frequent classes; seen and unseen as in {author}"
    return Split.from_names(f"context-{unseen}", classes, _CONTEXT_UNSEEN[unseen], source)


def ade20k() -> Split:
    """ADE20K, scene parsing benchmark: 150 classes without background, none of them unseen (for cross-dataset use)."""
    classes = _names("""
        wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door,
        table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field,
        armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard,
        chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway,
        case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower,
        book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine,
        hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane,
        dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship,
        fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag,
        minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher,
        screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate,
        monitor, bulletin board, shower, radiator, glass, clock, flag""")
    return Split.from_names("ade20k", classes, source="ADE20K scene parsing benchmark (ADEChallengeData2016)")


def cityscapes() -> Split:
    """Cityscapes: the 19 classes of its benchmark, none of them unseen (for cross-dataset use); in its colours."""
    classes = _names(
        "road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky, person,"
        "rider, car, truck, bus, train, motorcycle, bicycle"
    )
    palette: tuple[Colour, ...] = (
        (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153),
        (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0),
        (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
    )  # fmt: skip
    return Split("cityscapes", classes, (), palette, "Cityscapes, labels.py of its scripts")


def camvid() -> Split:
    """CamVid in the SegNet tutorial's form: 11 classes of street photographs, 3 unseen (our choice)."""
    classes = _names("sky, building, pole, road, pavement, tree, sign symbol, fence, car, pedestrian, bicyclist")
    unseen = ("fence", "bicyclist", "sign symbol")
    return Split.from_names("camvid", classes, unseen, "CamVid, SegNet tutorial; seen and unseen chosen here")


BY_NAME: dict[str, Callable[[], Split]] = {
    "scenes": scenes,
    "voc2012": voc2012,
    "coco-stuff": coco_stuff,
    "context-otseg": context,
    "context-cascade": lambda: context("cascade"),
    "ade20k": ade20k,
    "cityscapes": cityscapes,
    "camvid": camvid,
}


def names(text: str) -> list[str]:
    """Comma-separated names."""
    return [name.strip() for name in text.split(",") if name.strip()]
