"""The picture-book world: the same everywhere, every class there, captions that tell the truth."""

import hashlib
from functools import cache

import numpy as np
import pytest

from sptseg import scenes
from sptseg.datasets import splits
from sptseg.scenes import world
from sptseg.scenes.drawings import THINGS
from sptseg.scenes.pen import COLOURS

CLASSES = splits.scenes().classes


@cache
def some(kind="scene", size=128):
    return [scenes.compose(seed, size, kind) for seed in range(300 if kind == "scene" else 120)]


def name_of(phrase):
    """The class that a phrase names: the longest class name at its end."""
    return max((name for name in CLASSES if f" {phrase}".endswith(f" {name}")), key=len)


def in_view(scene):
    return {CLASSES[i] for i in np.flatnonzero(np.bincount(scene.label.ravel()))}


def test_pictures_are_the_recorded_ones():
    """Changing the world changes what the embedded models were trained on: do it knowingly, and train them again."""
    digest = hashlib.sha256()
    for seed in range(12):
        for kind, size in (("scene", 128), ("closeup", 96), ("thumbnail", 64)):
            scene = scenes.compose(seed, size, kind)
            for part in (scene.image.tobytes(), scene.label.tobytes(), scene.caption.encode()):
                digest.update(part)
    with pytest.raises(ValueError, match="size is 31; wanted 32 pixels or more"):
        scenes.draw(0, 31)
    assert digest.hexdigest() == "1a44f0469ad2ac7b0d2ba0bd95cc180c7645fe3b64aa6d8176ee421e1c9ce696"


@pytest.mark.parametrize("kind,size", [("scene", 128), ("closeup", 128), ("thumbnail", 64), ("scene", 300)])
def test_phrases_name_what_is_in_view(kind, size):
    for scene in some(kind, size) if size < 300 else [scenes.compose(seed, size, kind) for seed in range(4)]:
        assert scene.image.shape == (size, size, 3) and scene.image.dtype == scene.label.dtype == np.uint8
        assert {name_of(phrase) for phrase in scene.phrases} == in_view(scene)
        assert len(scene.phrases) == len(in_view(scene))
        pixels = np.bincount(scene.label.ravel())
        assert pixels[pixels > 0].min() >= world.LEAST * size * size and len(pixels) <= len(CLASSES)


def test_captions_use_the_known_words_and_the_right_article():
    adjectives = set(COLOURS) | {"small", "big", "dark", "bright"}
    adorned = []
    for scene in some():
        words = scene.caption.replace(",", "").split()
        assert set(words) <= set(scenes.WORDS)
        assert all(phrase in scene.caption for phrase in scene.phrases)
        adorned += [bool(set(phrase.split()) & adjectives) for phrase in scene.phrases]
        for phrase in scene.phrases:
            article, word, *_ = f"{phrase} .".split()
            assert (article in ("a", "an")) == (name_of(phrase) in THINGS), phrase
            assert article not in ("a", "an") or (article == "an") == (word[0] in "aeiou"), phrase
    assert 0.4 < np.mean(adorned) < 0.65
    assert {word for t in scenes.TEMPLATES for word in t.split()} - {"{}"} <= set(scenes.WORDS)


def test_colours_are_true():
    """A thing called red is redder than one called blue, by its own pixels."""
    redness = {"red": [], "blue": []}
    for scene in some() + some("closeup"):
        for phrase in scene.phrases:
            for colour in redness.keys() & set(phrase.split()):
                if (name := name_of(phrase)) in ("car", "bus", "fish", "ball", "snail", "umbrella", "apple"):
                    pixels = scene.image[scene.label == CLASSES.index(name)].astype(float)
                    redness[colour].append((pixels[:, 0] - pixels[:, 2]).mean())
    assert min(redness["red"]) > max(redness["blue"])
