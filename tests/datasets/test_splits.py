"""Class lists against facts that were looked up apart from the module, and the palette's promises."""

from __future__ import annotations

import hashlib
from math import dist

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sptseg.datasets import splits
from sptseg.datasets.splits import IGNORE, Split, spread_palette

# method.md section 6: label values of the unseen classes, with their names
COCO_UNSEEN = {
    19: "cow", 23: "giraffe", 28: "suitcase", 29: "frisbee", 36: "skateboard", 51: "carrot", 76: "scissors",
    88: "cardboard", 94: "clouds", 112: "grass", 133: "playingfield", 136: "river", 137: "road", 157: "tree",
    160: "wall-concrete",
}  # fmt: skip
VOC_UNSEEN = {15: "potted plant", 16: "sheep", 17: "sofa", 18: "train", 19: "tv monitor"}
# the label values in the two projects' own configurations
OTSEG_UNSEEN = [19, 33, 48, 14, 7, 24, 6, 54, 31, 0]
CASCADE_UNSEEN = [0, 2, 3, 7, 9, 13, 17, 19, 31, 37]


@pytest.mark.parametrize(
    ("name", "classes", "seen"),
    [
        ("scenes", 41, 31),
        ("voc2012", 20, 15),
        ("coco-stuff", 171, 156),
        ("context-otseg", 59, 49),
        ("context-cascade", 59, 49),
        ("ade20k", 150, 150),
        ("cityscapes", 19, 19),
        ("camvid", 11, 8),
    ],
)
def test_every_split_has_its_counts(name: str, classes: int, seen: int) -> None:
    split = splits.BY_NAME[name]()
    assert (split.name, len(split.classes), len(split.seen)) == (name, classes, seen)
    assert sorted(split.seen + split.unseen) == list(range(classes))
    assert split.source
    assert all(name == name.strip() for name in split.classes)
    assert all(0 <= channel <= 255 for colour in split.palette for channel in colour)
    assert len(set(split.palette)) == classes


def test_no_split_is_left_out() -> None:
    assert len(splits.BY_NAME) == 8


@pytest.mark.parametrize(("split", "unseen"), [(splits.coco_stuff(), COCO_UNSEEN), (splits.voc2012(), VOC_UNSEEN)])
def test_unseen_classes_stand_at_the_published_label_values(split: Split, unseen: dict[int, str]) -> None:
    assert dict(zip(split.unseen, split.names(split.unseen), strict=True)) == unseen


def test_context_has_the_order_of_the_masks_and_both_choices_of_unseen_classes() -> None:
    otseg, cascade = splits.context(), splits.context("cascade")
    assert otseg.classes == cascade.classes
    assert list(otseg.classes) == sorted(otseg.classes), "the converter numbers the classes alphabetically"
    assert otseg.unseen == tuple(sorted(OTSEG_UNSEEN))
    assert cascade.unseen == tuple(CASCADE_UNSEEN)
    assert set(otseg.names(otseg.unseen)) & set(cascade.names(cascade.unseen)) == {
        "aeroplane", "boat", "cow", "keyboard",
    }  # fmt: skip
    with pytest.raises(ValueError, match="unseen is 'zegclip'; wanted one of 'otseg', 'cascade'"):
        splits.context("zegclip")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("split", "digest"),
    [
        (splits.coco_stuff(), "3ea13afa1dfb53a2"),
        (splits.ade20k(), "ba644262c15afe51"),
        (splits.context(), "6c05bf035caf9b90"),
    ],
)
def test_long_lists_are_those_compared_with_mmsegmentations(split: Split, digest: str) -> None:
    """One exchanged name would shift two IoUs and fail nothing else; ours: "potted plant", and no blank after "bed"."""
    assert hashlib.sha256(",".join(split.classes).encode()).hexdigest()[:16] == digest


def test_ade20k_keeps_the_benchmarks_order() -> None:
    classes = splits.ade20k().classes
    landmarks = {
        0: "wall",
        7: "bed",
        12: "person",
        44: "chest of drawers",
        99: "buffet",
        141: "crt screen",
        149: "flag",
    }
    assert {i: classes[i] for i in landmarks} == landmarks


def test_camvid_has_the_label_values_of_its_masks() -> None:
    split = splits.camvid()
    assert split.classes[0] == "sky" and split.classes[10] == "bicyclist"
    assert split.names(split.unseen) == ("sign symbol", "fence", "bicyclist")


def test_voc_colours_are_the_devkits() -> None:
    palette = splits.voc2012().palette
    assert palette[0] == (128, 0, 0)  # aeroplane
    assert palette[7] == (64, 0, 0)  # cat
    assert palette[14] == (192, 128, 128)  # person
    assert palette[19] == (0, 64, 128)  # tv monitor


def test_with_unseen_and_names_are_by_name() -> None:
    split = Split.from_names("three", ["a", "b", "c"]).with_unseen(["c", "a"])
    assert (split.unseen, split.seen, split.names((2, 0))) == ((0, 2), (1,), ("c", "a"))
    assert split == Split.from_names("three", ["a", "b", "c"], ["a", "c"])
    with pytest.raises(ValueError, match="'three' has no class d; it has a, b, c"):
        split.with_unseen(["d"])


def test_texts_are_the_names_or_what_is_said_in_their_place() -> None:
    split = Split.from_names("three", ["tv monitor", "boat", "sofa"], ["sofa"])
    assert split.prompts == () and split.texts() == split.classes
    told = split.with_prompts({"tv monitor": "television", "sofa": "a couch"})
    assert told.texts() == ("television", "boat", "a couch")
    assert told.texts((2, 1)) == ("a couch", "boat") and told.texts(told.seen) == ("television", "boat")
    assert told.names((0, 2)) == ("tv monitor", "sofa"), "labels, tables and legends keep the names"
    assert told.with_unseen(["boat"]).prompts == told.prompts
    assert told.with_prompts({"boat": "ship"}).texts() == ("tv monitor", "ship", "sofa"), "others are given up"
    assert split.texts() == split.classes and told.with_prompts({}) == split
    hash(told)
    with pytest.raises(ValueError, match="'three' has prompts for tv, no classes of it; it has tv monitor, boat, sofa"):
        split.with_prompts({"tv": "television"})


@pytest.mark.parametrize(
    ("classes", "unseen", "palette", "message"),
    [
        ((), (), (), "0 classes; wanted 1 to 65535"),
        (tuple(map(str, range(65536))), (), (), "65536 classes; wanted 1 to 65535"),
        (("a", " "), (), ((0, 0, 0),) * 2, r"label values \[1\] have a blank class name"),
        (("a", "b", "a"), (), ((0, 0, 0),) * 3, "given twice: a;"),
        (("a", "b"), (2,), ((0, 0, 0),) * 2, r"unseen is \(2,\); wanted ascending, distinct label values below 2"),
        (("a", "b"), (1, 0), ((0, 0, 0),) * 2, "wanted ascending"),
        (("a", "b"), (), ((0, 0, 0),), "1 colours for 2 classes"),
    ],
)
def test_faulty_splits_are_refused(classes: tuple, unseen: tuple, palette: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Split("faulty", classes, unseen, palette, "")


def test_from_names_refuses_no_classes_like_the_constructor() -> None:
    with pytest.raises(ValueError, match="0 classes"):
        Split.from_names("none", [])


@settings(deadline=None, max_examples=10)
@given(st.integers(1, IGNORE))
def test_palettes_are_prefixes_of_each_other_without_repeats(n: int) -> None:
    palette = spread_palette(n)
    assert len(set(palette)) == n
    assert palette == spread_palette(IGNORE)[:n]


def test_palette_begins_with_okabe_and_itos_colours() -> None:
    assert spread_palette(3) == ((230, 159, 0), (86, 180, 233), (0, 158, 115))


def nearest(n: int) -> float:
    """The smallest OKLab distance between two of n colours in any kind of vision; 0.02 is just noticeable."""
    seen = [splits._appearances(colour) for colour in spread_palette(n)]
    return min(dist(a[v], b[v]) for v in range(3) for i, a in enumerate(seen) for b in seen[:i])


def test_palette_colours_stay_apart_in_every_kind_of_vision() -> None:
    assert nearest(20) == nearest(7), "up to 20 colours none come closer than two of Okabe and Ito's own"
    assert nearest(41) > 0.04


@pytest.mark.parametrize("n", [0, 65536])
def test_palette_refuses_what_labels_cannot_hold(n: int) -> None:
    with pytest.raises(ValueError, match=f"n is {n}; wanted 1 to 65535"):
        spread_palette(n)
