"""What the command line's options name besides data sets: models."""

from __future__ import annotations

import functools
import io
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace

from sptseg.checkpoints import EMBEDDED, load_model
from sptseg.inference import Precision, at_precision
from sptseg.model import DENSE_CLIP, SPT_RELEASED, SptSeg, build_model, load_clip


@dataclass(frozen=True)
class Which:
    """Which model.

    Attributes:
        model: "embedded" (SPT-SEG on the tiny CLIP), "embedded-zegclip", "dense-clip" (no training), "untrained"
            (SPT-SEG with random prompts and decoder, to try sizes), or a checkpoint's path. Default: "embedded", or
            "dense-clip" if `clip` is given.
        clip: for "dense-clip" and "untrained": "tiny" or an open_clip model, such as ViT-B-16-quickgelu; for a
            checkpoint only if its CLIP's weights are a file.
        clip_weights: its weights: an open_clip tag such as openai (downloaded once), a file, or "none" for random ones.
        precision: the type of its weights: "bf16" and "fp16" are faster where the hardware has them, "no" is float32.
    """

    model: str = ""
    clip: str = ""
    clip_weights: str = ""
    precision: Precision = "no"

    def load(self) -> SptSeg:
        return at_precision(self.in_float32(), self.precision)

    def in_float32(self) -> SptSeg:
        if not self.clip:
            if self.clip_weights:
                raise ValueError(f"--clip-weights {self.clip_weights} needs --clip, such as ViT-B-16-quickgelu")
            if self.model == "untrained":
                return build_model(SPT_RELEASED).eval()
            return load_model(self.model or "embedded")
        presets = {"": DENSE_CLIP, "dense-clip": DENSE_CLIP, "untrained": SPT_RELEASED}
        if self.model in EMBEDDED:
            raise ValueError(f"model {self.model} has its own CLIP: leave out --clip, or take dense-clip or untrained")
        weights = clip_weights(self.clip, self.clip_weights)
        if self.model not in presets:
            return load_model(self.model, load_clip(self.clip, weights))
        size = (128, 128) if self.clip == "tiny" else (512, 512)
        return build_model(replace(presets[self.model], clip=self.clip, clip_weights=weights, image_size=size)).eval()


def clip_weights(clip: str, weights: str) -> str | None:
    """The weights asked for; a real CLIP must name them, so that nobody trains on random ones unawares."""
    if clip != "tiny" and not weights:
        raise ValueError(
            f"--clip {clip} needs --clip-weights: an open_clip tag such as openai, a file, or none for random weights"
        )
    return None if weights in ("", "none") else weights


def deferred(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """The command with its options, which returns what is then to do: parsing ends before the work begins."""

    @functools.wraps(command)
    def later(*arguments: object, **options: object) -> Callable[[], None]:
        return functools.partial(command, *arguments, **options)

    return later


@contextmanager
def one_line() -> Iterator[None]:
    """Of tyro's boxes about wrong options, one line goes to standard error: what is wrong, without advice and frame."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            yield
    except SystemExit as stopped:
        if stopped.code:
            lines = [line.strip("│ ") for line in said.getvalue().splitlines()[1:]]  # without the frame's title
            words = " ".join(itertools.takewhile(lambda line: line[:1] not in ("─", "╰"), lines)).split()
            print(f"sptseg: {' '.join(words).rstrip('.')}; see --help", file=sys.stderr)
        raise
