"""What the command line's options name besides data sets: models."""

from __future__ import annotations

import functools
import io
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from typing import Any

from sptseg.checkpoints import EMBEDDED, load_model
from sptseg.inference import Precision, at_precision
from sptseg.model import DENSE_CLIP, SPT_RELEASED, TINY, SptSeg, build_model, default_readout, load_clip

UNTRAINED = {"dense-clip": DENSE_CLIP, "untrained": SPT_RELEASED}


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
        readout: for "dense-clip" and "untrained", how CLIP's last block is read: plain, maskclip, sclip, clearclip,
            naclip or gem (sptseg.read_out says what they are). Default: for "dense-clip" naclip, which has the highest
            mean over seven data sets in the papers' own tables; plain for the tiny CLIP, whose patches were trained.
        precision: the type of its weights: "bf16" and "fp16" are faster where the hardware has them, "no" is float32.
    """

    model: str = ""
    clip: str = ""
    clip_weights: str = ""
    readout: str = ""
    precision: Precision = "no"

    def load(self) -> SptSeg:
        return at_precision(self.in_float32(), self.precision)

    def in_float32(self) -> SptSeg:
        name = self.model or ("dense-clip" if self.clip else "embedded")
        if self.clip_weights and not self.clip:
            raise ValueError(f"--clip-weights {self.clip_weights} needs --clip, such as ViT-B-16-quickgelu")
        if name in UNTRAINED:
            clip, weights = self.clip or TINY, clip_weights(self.clip or TINY, self.clip_weights)
            readout: Any = self.readout or (default_readout(clip) if name == "dense-clip" else "plain")
            size = (128, 128) if clip == TINY else (512, 512)
            chosen = {"clip": clip, "clip_weights": weights, "readout": readout, "image_size": size}
            return build_model(replace(UNTRAINED[name], **chosen)).eval()
        if self.readout:
            raise ValueError(
                f"--readout {self.readout} goes with --model dense-clip or untrained; {name} has the one that it was "
                f"trained with"
            )
        if not self.clip:
            return load_model(name)
        if name in EMBEDDED:
            raise ValueError(f"model {name} has its own CLIP: leave out --clip, or take dense-clip or untrained")
        return load_model(name, load_clip(self.clip, clip_weights(self.clip, self.clip_weights)))


def clip_weights(clip: str, weights: str) -> str | None:
    """The weights asked for; a real CLIP must name them, so that nobody trains on random ones unawares."""
    if clip != TINY and not weights:
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
