"""What CLIP is told of each class, in one word or several, and of everything else."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sptseg.datasets import BACKGROUND, names, plain, scenes
from sptseg.model import Clip, WordTokenizer, synonyms

NONE = "none"  # the name of what is none of the classes
USUAL = "usual"
Background = Sequence[str] | str | float | None


def told(texts: Sequence[str], background: Sequence[str] = ()) -> tuple[list[str], list[int]]:
    """The words for CLIP, class by class, and the class of each; the background's are of the class after the last.

    A class's score is the highest of its words' (SCLIP, Wang et al., ECCV 2024).
    """
    classes = [*map(synonyms, texts), list(background)]
    return [word for words in classes for word in words], [i for i, words in enumerate(classes) for _ in words]


def usual_background(clip: Clip) -> tuple[str, ...]:
    """`BACKGROUND`, or for a CLIP of few words the classes of the drawn world that it knows."""
    if not isinstance(clip.tokenizer, WordTokenizer):
        return BACKGROUND
    return tuple(name for name in scenes().classes if clip.tokenizer.ids.keys() >= {*name.split()})


def resolved(background: Background, clip: Clip, texts: Sequence[str]) -> tuple[str, ...] | float | None:
    """The background's words, without those that are a class's, or the least score that a class must reach.

    `background`: words, in a list or a text with commas; "usual" for those of `usual_background`; or the score, 0..1.
    """
    if isinstance(background, str):
        if re.fullmatch(r"[-+]?\d*\.?\d+", background):
            background = float(background)
        else:
            background = usual_background(clip) if plain(background) == USUAL else names(background)
    if background is None or isinstance(background, float | int):
        if background is not None and not 0 <= background <= 1:
            raise ValueError(f"background is the score {background}; wanted one in 0..1, as scores are, or words")
        return background
    taken = {plain(word).casefold() for word in told(texts)[0]}
    left = tuple(word for each in background for word in synonyms(plain(each)) if word.casefold() not in taken)
    if not left:
        raise ValueError("background has no word that is not a class's; name what else is in pictures: sky, wall, ...")
    return left
