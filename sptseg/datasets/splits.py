"""Class names, palettes and seen/unseen splits, as frozen dataclasses. No tensors, no files."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from sptseg.scenes import CLASSES

IGNORE = 255
WIDE_IGNORE = 65535
BACKGROUND = (  # everything else, as SCLIP (Wang et al., ECCV 2024) names it for VOC, and those after it do
    "sky", "wall", "tree", "wood", "grass", "road", "sea", "river", "mountain", "sands", "desk", "bed", "building",
    "cloud", "lamp", "door", "window", "wardrobe", "ceiling", "shelf", "curtain", "stair", "floor", "hill", "rail",
    "fence",
)  # fmt: skip

Colour = tuple[int, int, int]


def ignored_label(classes: int) -> int:
    """The label of ignored pixels: 255, or 65535 (16-bit masks) where a class has 255."""
    return IGNORE if classes <= IGNORE else WIDE_IGNORE


composed = partial(unicodedata.normalize, "NFC")  # one form of accented characters, which file systems keep in two


def plain(name: str) -> str:
    """A class name in the form in which names are compared: `composed`, single blanks, none around it."""
    return " ".join(composed(name).split())


def names(text: str) -> list[str]:
    """The `plain` names in a text, between commas and semicolons of any script, tabs and line ends."""
    return [name for name in map(plain, re.split(r"[,;\t\r\n，；、،؛]", text)) if name]


@dataclass(frozen=True)
class Split:
    """The classes of a data set and which of them are unseen in training.

    `classes[i]` is the name of label value `i`; `unseen` holds label values; 255 is "ignore", see `ignored_label`.
    `prompts` holds (name, words) pairs: what CLIP is told where it is not the name. Names are made `plain`. A class of
    several words, "car|automobile", goes by the first.
    """

    name: str
    classes: tuple[str, ...]
    unseen: tuple[int, ...]
    palette: tuple[Colour, ...]
    source: str
    prompts: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        several = {plain(each.split("|")[0]): plain(each) for each in self.classes if "|" in each}
        prompts = several | {plain(name): words for name, words in self.prompts}
        object.__setattr__(self, "classes", tuple(plain(each.split("|")[0]) for each in self.classes))
        object.__setattr__(self, "prompts", tuple(prompts.items()))
        count = len(self.classes)
        unsorted = tuple(sorted({*self.unseen} & {*range(count)})) != self.unseen
        blank = [label for label, name in enumerate(self.classes) if not name]
        twice = sorted(name for name, times in Counter(self.classes).items() if times > 1)
        strangers = [name for name, _ in self.prompts if name not in self.classes]
        for wrong, what in (
            (not 1 <= count <= WIDE_IGNORE, f"{count} classes; wanted 1 to {WIDE_IGNORE}"),
            (blank, f"label values {blank} have a blank class name; name each class"),
            (twice, f"class names given twice: {', '.join(twice)}; rename one of each"),
            (unsorted, f"unseen is {self.unseen}; wanted ascending, distinct label values below {count}"),
            (len(self.palette) != count, f"{len(self.palette)} colours for {count} classes; wanted one each"),
            (strangers, f"prompts for {', '.join(strangers)}, no classes of it; it has {', '.join(self.classes)}"),
        ):
            if wrong:
                raise ValueError(f"split {self.name!r}: {what}")

    @classmethod
    def from_names(cls, name: str, classes: Sequence[str], unseen: Sequence[str] = (), source: str = "") -> Split:
        """A split with unseen classes given by name, coloured by `spread_palette`."""
        palette = spread_palette(len(classes)) if 1 <= len(classes) <= WIDE_IGNORE else ()
        return cls(name, tuple(classes), (), palette, source).with_unseen(unseen)

    def with_prompts(self, prompts: Mapping[str, str]) -> Split:
        """The same classes, some told to CLIP in other words: {"tv monitor": "television|screen"}."""
        return replace(self, prompts=tuple(prompts.items()))

    def texts(self, labels: Iterable[int] | None = None) -> tuple[str, ...]:
        """What CLIP is told of some label values (None: of all), in the order given; several words between bars."""
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
        wanted = {plain(name) for name in names}
        unknown = sorted(wanted.difference(self.classes))
        if unknown:
            raise ValueError(f"split {self.name!r} has no class {', '.join(unknown)}; it has {', '.join(self.classes)}")
        return replace(self, unseen=tuple(i for i, name in enumerate(self.classes) if name in wanted))


# Okabe and Ito's colours without black, which an overlay would lose; then always that of 11 x 11 x 11 which is farthest
# in OKLab from all before it, to normal, deuteranopic and protanopic vision. The search stands in the tests.
_CHANNELS = bytes.fromhex("""
    e69f00 56b4e9 009e73 f0e442 0072b2 d55e00 cc79a7 701414 87fafa 2b2b87 1414fa 705959 5987fa fab59e 2b4259 ccfab5
    b52b14 2b42b5 9ecce3 145987 1470e3 fa5970 e39e9e fab559 597087 872b2b 1487cc 429ecc b55942 b5e3cc 599efa cce387
    e38742 2b59cc e39e70 e3fa87 1414b5 701442 9eb5cc 2b9e9e 704270 87e3fa 705914 b52b59 1459fa 9e8759 591470 2b14cc
    facc59 702b9e cc149e e37014 145942 9e70e3 cc2b70 14ccfa b542b5 702b70 2b42e3 e3fa14 2b4287 b59eb5 9ecc87 9e70b5
    b5ccb5 5970fa 4270cc 42149e ccfae3 9e9e87 707070 1414e3 fa70e3 9e2b42 e3b514 fa7087 1442cc 87599e b55914 e32b42
    709ee3 cc7042 592b2b cc4287 42fa9e b5b5b5 cc7087 9ee3e3 fa9e59 594214 e3e3b5 429eb5 b5b5e3 9ecccc 2b59e3 9e2b9e
    fae370 9efacc 9ee314 b5cc70 871459 b59ecc 9e709e cc70b5 9e7059 b587fa 4287e3 9e8770 9e422b 1442fa 872b42 b59e59
    facc14 9e2b87 b5b542 fae3fa cc42cc facce3 e39e87 e3e39e 9ee370 2bfab5 2b9e87 9e592b b587cc 9e9e9e 2b8759 ccfa9e
    b59efa fa9efa 42e39e 1459b5 2bb5b5 9eb570 9eb59e 149e59 87e3b5 b58714 59599e e38714 b54287 e39ecc 875970 424270
    702b2b 879e70 9e9e42 70709e 87fa70 fab587 b5cc42 147070 fab5cc 877042 e370cc e3e3e3 14ccb5 87422b 2b2bb5 9efa59
    b5b5fa 59e387 fae3cc 14fa87 8759e3 7070e3 e32bfa e3fa70 e3142b 708770 592b70 b5ccfa 701459 872b14 59e3cc 87fa2b
    879e59 871414 2bcc42 14cce3 b5b559 ccb570 ccb59e 9e879e 9eb587 595942 9eb514 422b9e 428714 9e4259 594259 cc5914
    fa9e42 e3ccfa 9e8742 cc709e 9e4214 fae387 87cc59 fa1459 70142b e3fa59 2b702b 592b42 e3cc9e b59e70 9ee359 7059cc
    fab570 9e9e2b 704259 facc70 9e872b 9efa87 2b2bcc 8787e3 7042b5 2b2be3 cccce3 b5702b 8759b5 9e5914 702b42 b514cc
    fa4287 9e5942 b52b42 42429e 7070b5 9e702b 42709e 9e70fa 145970 702b87 cccc2b 14fae3 14fa59 87cc14 faccb5 879eb5
    8770cc facccc 427059 fae359 e3b5e3 e37059 fa70b5 b52b87 2b2bfa 87ccb5 b5cc59 144270 70b587 70b59e b59ee3""")
_COLOURS: tuple[Colour, ...] = tuple(zip(_CHANNELS[::3], _CHANNELS[1::3], _CHANNELS[2::3], strict=True))


def spread_palette(n: int) -> tuple[Colour, ...]:
    """`n` colours that are told apart well, a prefix of every longer palette; after 255 they repeat."""
    if not 1 <= n <= WIDE_IGNORE:
        raise ValueError(f"spread_palette: n is {n}; wanted 1 to {WIDE_IGNORE} colours")
    return tuple(itertools.islice(itertools.cycle(_COLOURS), n))


def scenes() -> Split:
    """The picture-book world of `sptseg.scenes`: 41 classes, 14 stuff and 27 things, 10 of them unseen."""
    unseen = ("water", "brick wall", "wheat field", "moon", "castle", "tree", "flower", "apple", "car", "fish")
    return Split.from_names("scenes", CLASSES, unseen, "drawn by sptseg.scenes")


def _voc_colour(label: int) -> Colour:
    """The devkit's colour: bits 0, 3, 6 of the label are red's highest bits, 1, 4, 7 green's and 2, 5, 8 blue's."""
    red, green, blue = (sum(((label >> (3 * k + channel)) & 1) << (7 - k) for k in range(3)) for channel in range(3))
    return red, green, blue


def voc2012() -> Split:
    """PASCAL VOC 2012 without background: 20 classes, 15 seen; in the official colours."""
    classes = names(
        "aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, dining table, dog, horse, motorbike,"
        "person, potted plant, sheep, sofa, train, tv monitor"
    )
    palette = tuple(_voc_colour(i + 1) for i in range(len(classes)))  # colour 0 is the background's
    source = "PASCAL VOC 2012 devkit; seen and unseen as in ZegCLIP (Zhou et al., CVPR 2023)"
    unseen = ("potted plant", "sheep", "sofa", "train", "tv monitor")
    return Split("voc2012", tuple(classes), (), palette, source).with_unseen(unseen)


def coco_stuff() -> Split:
    """COCO-Stuff 164k: 171 classes, 156 seen; order and spelling as in mmsegmentation and so in others' prompts."""
    classes = names("""
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
    unseen = names(
        "cow, giraffe, suitcase, frisbee, skateboard, carrot, scissors, cardboard, clouds, grass, playingfield, river,"
        "road, tree, wall-concrete"
    )
    source = "COCO-Stuff 164k, mmsegmentation's train ids; seen and unseen as in ZegCLIP (Zhou et al., CVPR 2023)"
    return Split.from_names("coco-stuff", classes, unseen, source)


# Two 49/10 splits go by the same name in the literature; figures of one say nothing about the other.
_CONTEXT_UNSEEN = {
    "otseg": names("cow, motorbike, sofa, cat, boat, fence, bird, tv monitor, keyboard, aeroplane"),
    "cascade": names("aeroplane, bed, bedclothes, boat, bottle, car, cloth, cow, keyboard, plate"),
}


def context(unseen: Literal["otseg", "cascade"] = "otseg") -> Split:
    """PASCAL Context without background: 59 classes, 49 seen, by OTSeg's or by Cascade-CLIP's choice.

    The order is alphabetical, as in the masks that mmsegmentation's converter writes (early versions of its class
    list had VOC's order and named them wrongly).
    """
    if unseen not in _CONTEXT_UNSEEN:
        raise ValueError(f"context: unseen is {unseen!r}; wanted one of {', '.join(map(repr, _CONTEXT_UNSEEN))}")
    classes = names("""
        aeroplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building, bus, cabinet, car, cat,
        ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence, floor, flower, food, grass, ground, horse,
        keyboard, light, motorbike, mountain, mouse, person, plate, platform, potted plant, road, rock, sheep, shelves,
        sidewalk, sign, sky, snow, sofa, table, track, train, tree, truck, tv monitor, wall, water, window, wood""")
    author = {"otseg": "OTSeg (Kim et al., ECCV 2024)", "cascade": "Cascade-CLIP (Li et al., ICML 2024)"}[unseen]
    source = f"PASCAL Context, the 59 frequent classes; seen and unseen as in {author}"
    return Split.from_names(f"context-{unseen}", classes, _CONTEXT_UNSEEN[unseen], source)


def ade20k() -> Split:
    """ADE20K, scene parsing benchmark: 150 classes without background, none of them unseen (for cross-dataset use)."""
    classes = names("""
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
    classes = names(
        "road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky, person,"
        "rider, car, truck, bus, train, motorcycle, bicycle"
    )
    palette: tuple[Colour, ...] = (
        (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153),
        (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0),
        (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
    )  # fmt: skip
    return Split("cityscapes", tuple(classes), (), palette, "Cityscapes, labels.py of its scripts")


def camvid() -> Split:
    """CamVid in the SegNet tutorial's form: 11 classes of street photographs, 3 unseen (our choice)."""
    classes = names("sky, building, pole, road, pavement, tree, sign symbol, fence, car, pedestrian, bicyclist")
    unseen = ("fence", "bicyclist", "sign symbol")
    return Split.from_names("camvid", classes, unseen, "CamVid, SegNet tutorial; seen and unseen chosen here")


BY_NAME: dict[str, Callable[[], Split]] = {
    "scenes": scenes, "voc2012": voc2012, "coco-stuff": coco_stuff, "context-otseg": context,
    "context-cascade": lambda: context("cascade"), "ade20k": ade20k, "cityscapes": cityscapes, "camvid": camvid,
}  # fmt: skip
