"""Class lists against facts that were looked up apart from the module, names in any form, the palette's search."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from sptseg.datasets import WORDS, splits
from sptseg.datasets.splits import IGNORE, Split, names, spread_palette

# ZegCLIP's splits: label values of the unseen classes, with their names
COCO_UNSEEN = {
    19: "cow", 23: "giraffe", 28: "suitcase", 29: "frisbee", 36: "skateboard", 51: "carrot", 76: "scissors",
    88: "cardboard", 94: "clouds", 112: "grass", 133: "playingfield", 136: "river", 137: "road", 157: "tree",
    160: "wall-concrete",
}  # fmt: skip
VOC_UNSEEN = {15: "potted plant", 16: "sheep", 17: "sofa", 18: "train", 19: "tv monitor"}
CAMVID_UNSEEN = {6: "sign symbol", 7: "fence", 10: "bicyclist"}
# the label values in the two projects' own configurations
OTSEG_UNSEEN = [19, 33, 48, 14, 7, 24, 6, 54, 31, 0]
CASCADE_UNSEEN = [0, 2, 3, 7, 9, 13, 17, 19, 31, 37]
COUNTS = {  # classes, seen
    "scenes": (41, 31), "voc2012": (20, 15), "coco-stuff": (171, 156), "context-otseg": (59, 49),
    "context-cascade": (59, 49), "ade20k": (150, 150), "ade20k-847": (847, 847), "cityscapes": (19, 19),
    "camvid": (11, 8),
}  # fmt: skip


def test_every_split_has_its_counts() -> None:
    assert splits.BY_NAME.keys() == COUNTS.keys()
    for name, (classes, seen) in COUNTS.items():
        split = splits.BY_NAME[name]()
        assert (split.name, len(split.classes), len(split.seen)) == (name, classes, seen)
        assert sorted(split.seen + split.unseen) == list(range(classes)) and split.source
        assert len(set(split.palette)) == min(classes, IGNORE)


@pytest.mark.parametrize(
    ("split", "unseen"),
    [(splits.coco_stuff(), COCO_UNSEEN), (splits.voc2012(), VOC_UNSEEN), (splits.camvid(), CAMVID_UNSEEN)],
)
def test_unseen_classes_stand_at_the_published_label_values(split: Split, unseen: dict[int, str]) -> None:
    assert dict(zip(split.unseen, split.names(split.unseen), strict=True)) == unseen


def test_context_has_the_order_of_the_masks_and_both_choices_of_unseen_classes() -> None:
    otseg, cascade = splits.context(), splits.context("cascade")
    assert otseg.classes == cascade.classes
    assert list(otseg.classes) == sorted(otseg.classes), "the converter numbers the classes alphabetically"
    assert otseg.unseen == tuple(sorted(OTSEG_UNSEEN)) and cascade.unseen == tuple(CASCADE_UNSEEN)
    common = {"aeroplane", "boat", "cow", "keyboard"}
    assert set(otseg.names(otseg.unseen)) & set(cascade.names(cascade.unseen)) == common
    with pytest.raises(ValueError, match="unseen is 'zegclip'; wanted one of 'otseg', 'cascade'"):
        splits.context("zegclip")


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


def test_voc_colours_are_the_devkits() -> None:
    """Bits 0, 3, 6 of a label are red's highest bits, 1, 4, 7 green's and 2, 5, 8 blue's; background is label 0."""
    known = {0: (128, 0, 0), 7: (64, 0, 0), 14: (192, 128, 128), 19: (0, 64, 128)}  # aeroplane, cat, person, tv monitor
    palette = splits.voc2012().palette
    assert {i: palette[i] for i in known} == known
    for label, colour in enumerate(palette, start=1):
        bits = [[(label >> (3 * k + channel)) & 1 for k in range(3)] for channel in range(3)]
        assert colour == tuple(128 * a + 64 * b + 32 * c for a, b, c in bits)


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
    assert told.with_prompts({}) == split
    hash(told)
    with pytest.raises(ValueError, match="'three': prompts for tv, no classes of it; it has tv monitor, boat, sofa"):
        split.with_prompts({"tv": "television"})


def test_recipes_tell_clip_the_words_that_were_published() -> None:
    assert WORDS["context-otseg"] == "potted plant=pottedplant, tv monitor=tvmonitor"
    assert WORDS["cityscapes"] == "traffic light=trafficlight, traffic sign=trafficsign"
    for layout, words in WORDS.items():
        told = dict(each.split("=") for each in names(words))
        texts = splits.BY_NAME[layout]().with_prompts(told).texts()  # which refuses what is no class
        if layout == "voc2012":
            assert texts[3:5] == ("ship", "bottle") and len(texts[14].split("|")) == 7
        else:
            assert not any(" " in text for text in texts)


@pytest.mark.parametrize(
    "text", ["sand,moon", "sand; moon\n", "sand，moon", "sand、 moon；", "sand\tmoon", ",sand\r\nmoon"]
)
def test_names_stand_between_separators_of_any_script(text: str) -> None:
    assert names(text) == ["sand", "moon"]


def test_names_keep_what_separates_nothing() -> None:
    assert names("tv  monitor , car|automobile, a/b") == ["tv monitor", "car|automobile", "a/b"]
    assert names("") == names(" ,；") == []


def test_a_name_is_the_same_in_every_unicode_form_and_with_other_blanks() -> None:
    split = Split.from_names("two", ["caf\u00e9", "old\u00a0 house "], ["cafe\u0301"])
    assert split.classes == ("café", "old house") and split.unseen == (0,)
    assert split.with_unseen([" old  house"]).unseen == (1,)
    assert split.with_prompts({"cafe\u0301": "bar"}).texts() == ("bar", "old house")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ((), "0 classes; wanted 1 to 65535"), (tuple(map(str, range(65536))), "65536 classes; wanted 1 to 65535"),
        (("a", " "), r"label values \[1\] have a blank class name"), (("a", "b", "a"), "given twice: a;"),
        (("caf\u00e9", "cafe\u0301"), "given twice: café;"), (("a b", "a  b "), "given twice: a b;"),
    ],
)  # fmt: skip
def test_faulty_splits_are_refused(classes: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Split.from_names("faulty", classes)


# Linear RGB as seen with normal vision, without M cones and without L cones (Machado et al. 2009, severity 1).
VISIONS = np.array([
    [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
])  # fmt: skip
LMS_OF_RGB = np.array([
    [0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
])  # fmt: skip
OKLAB_OF_LMS = np.array([
    [0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.8086757660],
])  # fmt: skip


def appearances(colours: np.ndarray) -> np.ndarray:
    """Colours (N, 3) in OKLab (distances there follow perception), for every kind of vision: (3, N, 3)."""
    share = np.asarray(colours) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    seen = np.einsum("vij,nj->vni", VISIONS, linear).clip(min=0)
    return np.cbrt(seen @ LMS_OF_RGB.T) @ OKLAB_OF_LMS.T


def nearest(seen: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Distance (N,) of colours as seen (3, N, 3) to another (3, 3), in the vision in which they are closest."""
    return np.linalg.norm(seen - colour[:, None], axis=2).min(axis=0)


def test_the_palette_is_what_the_search_finds() -> None:
    """Seven colours of Okabe and Ito, then always the one of the grid that is farthest from all before it."""
    palette = np.array(spread_palette(IGNORE))
    levels = range(20, 256, 23)
    grid = np.array([(r, g, b) for r in levels for g in levels for b in levels])
    seen, found = appearances(grid), appearances(palette)
    gaps = np.where((seen[0, :, 0] >= 0.35) & (seen[0, :, 0] <= 0.95), np.inf, 0)
    for i in range(IGNORE):
        if i >= 7:
            assert palette[i].tolist() == grid[gaps.argmax()].tolist()
        gaps = np.minimum(gaps, nearest(seen, found[:, i]))
    assert [f"{r:02x}{g:02x}{b:02x}" for r, g, b in palette[:3].tolist()] == ["e69f00", "56b4e9", "009e73"]
    assert spread_palette(9) == spread_palette(20)[:9] and spread_palette(257)[255:] == spread_palette(2)
