"""Class lists against facts that were looked up apart from the module, names in any form, the palette's search."""

import hashlib
from unittest.mock import ANY

import pytest

from sptseg.datasets import IGNORE, WORDS, Split, names, splits, spread_palette

# ZegCLIP's splits: label values of the unseen classes, with their names
UNSEEN = {
    "coco-stuff": {
        19: "cow", 23: "giraffe", 28: "suitcase", 29: "frisbee", 36: "skateboard", 51: "carrot", 76: "scissors",
        88: "cardboard", 94: "clouds", 112: "grass", 133: "playingfield", 136: "river", 137: "road", 157: "tree",
        160: "wall-concrete",
    },
    "voc2012": {15: "potted plant", 16: "sheep", 17: "sofa", 18: "train", 19: "tv monitor"},
    "camvid": {6: "sign symbol", 7: "fence", 10: "bicyclist"},
}  # fmt: skip
COUNTS = {  # classes, seen
    "scenes": (41, 31), "voc2012": (20, 15), "coco-stuff": (171, 156), "context-otseg": (59, 49),
    "context-cascade": (59, 49), "ade20k": (150, 150), "ade20k-847": (847, 847), "cityscapes": (19, 19),
    "camvid": (11, 8),
}  # fmt: skip


def test_every_split_has_its_counts_and_its_unseen_classes_at_the_published_label_values() -> None:
    assert splits.BY_NAME.keys() == COUNTS.keys()
    for name, (classes, seen) in COUNTS.items():
        split = splits.BY_NAME[name]()
        assert (split.name, len(split.classes), len(split.seen)) == (name, classes, seen)
        assert sorted(split.seen + split.unseen) == list(range(classes)) and split.source
        assert len(set(split.palette)) == min(classes, IGNORE)
        assert dict(zip(split.unseen, split.names(split.unseen), strict=True)) == UNSEEN.get(name, ANY)


def test_context_has_the_order_of_the_masks_and_both_choices_of_unseen_classes() -> None:
    otseg, cascade = splits.context(), splits.context("cascade")
    assert otseg.classes == cascade.classes
    assert list(otseg.classes) == sorted(otseg.classes), "the converter numbers the classes alphabetically"
    assert otseg.unseen == (0, 6, 7, 14, 19, 24, 31, 33, 48, 54), "as in that project's own configuration"
    assert cascade.unseen == (0, 2, 3, 7, 9, 13, 17, 19, 31, 37), "as in that project's own configuration"
    with pytest.raises(ValueError, match="unseen is 'zegclip'; wanted one of 'otseg', 'cascade'"):
        splits.context("zegclip")


def test_long_lists_are_those_compared_with_mmsegmentations() -> None:
    """One exchanged name would shift two IoUs and fail nothing else; ours: "potted plant", and no blank after "bed"."""
    lists = [splits.BY_NAME[name]().classes for name in ("coco-stuff", "ade20k", "context-otseg")]
    digests = [hashlib.sha256(",".join(classes).encode()).hexdigest()[:16] for classes in lists]
    assert digests == ["3ea13afa1dfb53a2", "ba644262c15afe51", "6c05bf035caf9b90"]


def test_voc_colours_are_the_devkits() -> None:
    """Bits 0, 3, 6 of a label are red's highest bits, 1, 4, 7 green's and 2, 5, 8 blue's; background is label 0."""
    for label, colour in enumerate(splits.voc2012().palette, start=1):
        bits = [[(label >> (3 * k + channel)) & 1 for k in range(3)] for channel in range(3)]
        assert colour == tuple(128 * a + 64 * b + 32 * c for a, b, c in bits)


def test_classes_are_told_by_name_or_by_what_is_said_in_its_place() -> None:
    split = Split.from_names("three", ["tv monitor", "boat", "sofa"]).with_unseen(["sofa", "boat"])
    assert (split.unseen, split.seen, split.names((2, 0))) == ((1, 2), (0,), ("sofa", "tv monitor"))
    told = split.with_prompts({"tv monitor": "television", "sofa": "a couch"})
    assert told.texts() == ("television", "boat", "a couch") and told.texts((2, 1)) == ("a couch", "boat")
    assert told.names((0, 2)) == ("tv monitor", "sofa"), "labels, tables and legends keep the names"
    assert told.with_unseen(["boat"]).prompts == told.prompts and told.with_prompts({}) == split
    with pytest.raises(ValueError, match="'three' has no class d; it has tv monitor, boat, sofa"):
        split.with_unseen(["d"])
    with pytest.raises(ValueError, match="'three': prompts for tv, no classes of it; it has tv monitor, boat, sofa"):
        split.with_prompts({"tv": "television"})


def test_recipes_tell_clip_the_words_that_were_published() -> None:
    words = [word for text in splits.ade20k_847().texts() for word in text.split("|")]
    assert len(words) == len(set(words)) > 1100, "no word is two classes'"
    assert WORDS["context-otseg"] == "potted plant=pottedplant, tv monitor=tvmonitor"
    assert WORDS["cityscapes"] == "traffic light=trafficlight, traffic sign=trafficsign"
    for layout, words in WORDS.items():
        told = dict(each.split("=") for each in names(words))
        texts = splits.BY_NAME[layout]().with_prompts(told).texts()  # which refuses what is no class
        if layout == "voc2012":
            assert texts[3:5] == ("ship", "bottle") and len(texts[14].split("|")) == 7
        else:
            assert not any(" " in text for text in texts)


def test_names_stand_between_any_separators_and_are_the_same_in_every_unicode_form() -> None:
    for text in ("sand; moon\n", "sand，moon", "sand、 moon；", "sand\tmoon", ",sand\r\nmoon"):
        assert names(text) == ["sand", "moon"]
    assert names("tv  monitor , car|automobile, a/b") == ["tv monitor", "car|automobile", "a/b"]
    assert names("") == names(" ,；") == []
    with pytest.raises(ValueError, match="a name is blank in 'sand, ；moon'"):
        names("sand, ；moon")
    split = Split.from_names("two", ["caf\u00e9", "old\u00a0 house "], ["cafe\u0301"])
    assert split.classes == ("café", "old house") and split.unseen == (0,)
    assert split.with_unseen([" old  house"]).unseen == (1,)
    assert split.with_prompts({"cafe\u0301": "bar"}).texts() == ("bar", "old house")


def test_faulty_splits_are_refused() -> None:
    for classes, message in (
        ((), "0 classes; wanted 1 to 65535"), (tuple(map(str, range(65536))), "65536 classes; wanted 1 to 65535"),
        (("a", " "), r"label values \[1\] have a blank class name"), (("caf\u00e9", "cafe\u0301"), "twice: café;"),
        (("a b", "a  b "), "given twice: a b;"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Split.from_names("faulty", classes)


def test_colours_are_distinct_and_a_prefix_of_more() -> None:
    assert spread_palette(3) == ((0xE6, 0x9F, 0x00), (0x56, 0xB4, 0xE9), (0x00, 0x9E, 0x73)), "Okabe and Ito's"
    assert len(set(spread_palette(IGNORE))) == IGNORE
    assert spread_palette(9) == spread_palette(20)[:9] and spread_palette(257)[255:] == spread_palette(2)
