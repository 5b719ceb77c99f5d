"""Class names, palettes and seen/unseen splits, as frozen dataclasses; public data sets' stand in data_sets.toml."""

import itertools
import re
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, Self, get_args

from sptseg.scenes import CLASSES, UNSEEN

IGNORE = 255
WIDE_IGNORE = 65535
SEPARATORS = ",;，；、،؛"  # of names, in any script
FACTS = tomllib.loads(Path(__file__).with_name("data_sets.toml").read_text("utf-8"))  # which says what it holds
FACTS |= {f"context-{choice}": FACTS["context"] | FACTS["context"][choice] for choice in ("otseg", "cascade")}

Colour = tuple[int, int, int]


def ignored_label(classes: int) -> int:
    """The label of ignored pixels: 255, or 65535 (16-bit masks) where a class has 255."""
    return IGNORE if classes <= IGNORE else WIDE_IGNORE


composed = partial(unicodedata.normalize, "NFC")  # one form of accented characters, which file systems keep in two


def plain(name: str) -> str:
    """A class name in the form in which names are compared: `composed`, single blanks, none around it."""
    return " ".join(composed(name).split())


def names(text: str) -> list[str]:
    """The `plain` names in a text, between commas and semicolons of any script, tabs and line ends; none may be blank
    but the first and the last."""
    if re.search(rf"[^\s{SEPARATORS}]\s*[{SEPARATORS}]\s*[{SEPARATORS}]", text):
        raise ValueError(f"a name is blank in {text[:200]!r}: write it, or take a separator away")
    return [name for name in map(plain, re.split(rf"[{SEPARATORS}\t\r\n]", text)) if name]


BACKGROUND = tuple(names(FACTS["background"]))


def colours(text: str) -> tuple[Colour, ...]:
    """Colours from six hexadecimal digits each."""
    channels = bytes.fromhex(text)
    return tuple(zip(channels[::3], channels[1::3], channels[2::3], strict=True))


@dataclass(frozen=True)
class Split:
    """The classes of a data set and which of them are unseen in training.

    `classes[i]` is the name of label value `i`; `unseen` holds label values, ascending; `ignore` is 255, or 65535.
    `prompts` holds (name, words) pairs: what CLIP is told where it is not the name. Names are made `plain`. A class of
    several words, "car|automobile", goes by the first. Raises ValueError for no or blank names, and two of one."""

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
        blank = [label for label, name in enumerate(self.classes) if not name]
        twice = sorted(name for name, times in Counter(self.classes).items() if times > 1)
        strangers = [name for name, _ in self.prompts if name not in self.classes]
        for wrong, what in (
            (not 1 <= count <= WIDE_IGNORE, f"{count} classes; wanted 1 to {WIDE_IGNORE}"),
            (blank, f"label values {blank} have a blank class name; name each class"),
            (twice, f"class names given twice: {', '.join(twice)}; rename one of each"),
            (strangers, f"prompts for {', '.join(strangers)}, no classes of it; it has {', '.join(self.classes)}"),
        ):
            if wrong:
                raise ValueError(f"split {self.name!r}: {what}")

    @classmethod
    def from_names(cls, name: str, classes: Sequence[str], unseen: Sequence[str] = (), source: str = "") -> Self:
        """A split with unseen classes given by name, coloured by `spread_palette`."""
        return cls(name, tuple(classes), (), spread_palette(len(classes)), source).with_unseen(unseen)

    def with_prompts(self, prompts: Mapping[str, str]) -> Self:
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
        return tuple(i for i in range(len(self.classes)) if i not in self.unseen)

    def names(self, labels: Iterable[int]) -> tuple[str, ...]:
        """The names of some label values, in the order given."""
        return tuple(self.classes[i] for i in labels)

    def with_unseen(self, names: Sequence[str]) -> Self:
        """The same classes with other unseen ones, given by name."""
        wanted = {plain(name) for name in names}
        unknown = sorted(wanted.difference(self.classes))
        if unknown:
            raise ValueError(f"split {self.name!r} has no class {', '.join(unknown)}; it has {', '.join(self.classes)}")
        return replace(self, unseen=tuple(i for i, name in enumerate(self.classes) if name in wanted))


def spread_palette(n: int) -> tuple[Colour, ...]:
    """`n` colours that are told apart well, a prefix of every longer palette; after 255 they repeat."""
    return tuple(itertools.islice(itertools.cycle(colours(FACTS["palette"])), n))


def scenes() -> Split:
    """The picture-book world of `sptseg.scenes`: 41 classes, 14 stuff and 27 things, 10 of them unseen."""
    return Split.from_names("scenes", CLASSES, UNSEEN, "drawn by sptseg.scenes")


def published(name: str) -> Split:
    """The split of a data set in data_sets.toml, in its own colours if it has any."""
    told = FACTS[name]
    split = Split.from_names(name, names(told["classes"]), names(told.get("unseen", "")), told["source"])
    return replace(split, palette=colours(told["palette"])) if "palette" in told else split


def context(unseen: Literal["otseg", "cascade"] = "otseg") -> Split:
    """PASCAL Context without background: 59 classes, 49 seen, by OTSeg's or by Cascade-CLIP's choice."""
    if unseen not in ("otseg", "cascade"):
        raise ValueError(f"context: unseen is {unseen!r}; wanted one of 'otseg', 'cascade'")
    return published(f"context-{unseen}")


voc2012 = partial(published, "voc2012")  # PASCAL VOC 2012 without background: 20 classes, 15 seen; the devkit's colours
coco_stuff = partial(published, "coco-stuff")  # COCO-Stuff 164k: 171 classes, 156 seen
ade20k = partial(published, "ade20k")  # its scene parsing benchmark: 150 classes, all seen, as in the next two
ade20k_847 = partial(published, "ade20k-847")
cityscapes = partial(published, "cityscapes")  # the 19 classes of its benchmark, in its colours
camvid = partial(published, "camvid")  # in the SegNet tutorial's form: 11 classes, 3 unseen (our choice)

Published = Literal[
    "voc2012", "coco-stuff", "context-otseg", "context-cascade", "ade20k", "ade20k-847", "cityscapes", "camvid",
]  # fmt: skip
BY_NAME: dict[str, Callable[[], Split]] = {name: partial(published, name) for name in get_args(Published)}
BY_NAME["scenes"] = scenes
