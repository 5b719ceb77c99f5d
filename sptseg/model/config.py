"""`ModelConfig`: everything that defines a model, and the configurations that have a name."""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sptseg.model.clip import TEMPLATES, TINY
from sptseg.model.readouts import ReadOut

Branches = Literal["high_low", "high", "low", "full"]
LossKind = Literal["spt", "zegclip"]
PROTOCOL_STRIDE = 426 / 512  # of the window


def fits(value: object, hint: Any) -> bool:
    """Whether a value is of a field's type: a plain one, Literal, tuple, or a union of these."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Literal:
        return value in parts
    if kind is tuple:
        parts = parts[:1] * len(value) if isinstance(value, tuple) and parts[-1] is ... else parts
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(fits, value, parts))
    if parts:
        return any(fits(value, part) for part in parts)
    return isinstance(value, (int, float) if hint is float else hint) and (hint is bool or not isinstance(value, bool))


def check_values(config: object, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Refuses a dataclass with a value of another type than its field's, or a number that is not finite or in range."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not fits(value, hint):
            parts = [part for part in (hint, *get_args(hint)) if get_origin(part) is Literal]
            choices = ", ".join(choice for part in parts for choice in get_args(part))
            wanted = f"one of {choices}" if choices else inspect.formatannotation(hint)
            raise ValueError(f"{name} is {repr(value)[:100]}; wanted {wanted}")
        low, high = ranges.get(name, (-math.inf, math.inf))
        values = value if isinstance(value, tuple) else (value,)
        if not all(low <= x <= high and abs(x) < math.inf for x in values if type(x) in (int, float)):
            raise ValueError(f"{name} is {value}; wanted {f'{low} to {high}' if name in ranges else 'a finite number'}")


RANGES = {  # far beyond use, and far below what no memory holds: configurations also come from strangers' files
    "image_size": (1, 8192), "prompt_tokens": (0, 10_000), "spectral_band": (0, 1), "decoder_layers": (1, 100),
    "decoder_heads": (1, 1024), "decoder_window": (1, 8192), "seen_offset": (-1, 1),
    "short_side": (1, 8192), "window_stride": (0.05, 1), "softmax_scale": (0, 1000),
}  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """Everything that defines a model; stored in its checkpoint. The defaults: the released SPT-SEG on the tiny CLIP.

    Attributes:
        clip, clip_weights: an open_clip name and tag; see `sptseg.clip.load_clip`.
        image_size: height and width in pixels that the spectral filter is made for (the training crop).
        prompt_tokens: K deep prompts a block (paper: 10 for VOC, 100 for COCO-Stuff); 0 for none.
        prompt_depth: blocks after the first that get prompts of their own; None for all.
        spectral_layers: blocks before which the spectral prompt is added; () for none.
        spectral_band: the frequencies low <= r < high, in cycles per token, of which F passes anything; all by default.
        spectral_trained: whether F is learned; else it keeps its random start (to see what learning it is worth).
        class_embedding_twice: the released code's class token (see `PromptedEncoder`).
        readout: how CLIP's last block is read, see `sptseg.read_out`. Dense CLIP and decoders that start from it begin
            there; prompts are trained through it. "gem" goes without prompts only.
        decoder: "spectral" (SPT-SEG), "cross_attention" (ZegCLIP) or "none" (dense CLIP: cosine of patch and text).
        selection: the spectral decoder's top-down selection.
        branches: which of its branches there are: "high_low" (paper), "high", "low", or "full" attention instead.
        start, residual, norms, logit_scale: the decoder's first weights, whether its layers add to the patches, its
            norms, and whether it learns a scale and threshold of its logits; see `Decoder`. None: as belongs to
            `start`: with "dense_clip" a residual, RMS norms and a scale, so that the first logits are dense CLIP's.
        loss: "spt" (focal + SSIM) or "zegclip" (focal + dice).
        templates: prompt templates of the class names.
        normalization: the image statistics, "imagenet" (ZegCLIP's protocol) or "clip", those of CLIP's own training.
        seen_offset: what evaluation lowers the scores of seen classes by (paper: 0.1 inductive, 0 else).
        short_side: what test pictures' short side is resized to; None: that of `image_size`, the windows' size.
        window_stride: from one window to the next, as a share of it.
        bicubic: whether position embeddings are resized bicubically, as published with read-outs, or bilinearly.
        softmax_scale: dense CLIP only: the logits are this many times the cosine of patch and text, and scores their
            softmax over all names, after windows were averaged. None: CLIP's own scale, a softmax at each token."""

    clip: str = TINY
    clip_weights: str | None = None
    image_size: tuple[int, int] = (128, 128)
    prompt_tokens: int = 10
    prompt_depth: int | None = None
    spectral_layers: tuple[int, ...] = (0, 1)
    spectral_band: tuple[float, float] = (0.0, 1.0)
    spectral_trained: bool = True
    class_embedding_twice: bool = True
    readout: ReadOut = "plain"
    decoder: Literal["spectral", "cross_attention", "none"] = "spectral"
    decoder_layers: int = 3
    decoder_heads: int = 8
    decoder_window: int = 3
    selection: bool = True
    branches: Branches = "high_low"
    start: Literal["random", "dense_clip"] = "random"
    residual: bool | None = None
    norms: Literal["layer", "rms"] | None = None
    logit_scale: bool | None = None
    dropout: float = 0.1
    loss: LossKind = "spt"
    templates: tuple[str, ...] = TEMPLATES
    normalization: Literal["imagenet", "clip"] = "imagenet"
    seen_offset: float = 0.1
    short_side: int | None = None
    window_stride: float = PROTOCOL_STRIDE
    bicubic: bool = False
    softmax_scale: float | None = None

    def __post_init__(self) -> None:
        check_values(self, RANGES)
        if self.readout == "gem" and (self.prompt_tokens or self.spectral_layers):
            raise ValueError("readout gem goes without prompts: prompt_tokens 0, spectral_layers (); or choose another")
        if self.softmax_scale is not None and self.trains:
            raise ValueError("softmax_scale is dense CLIP's, with decoder none and without prompts; leave it out")
        if len(set(self.spectral_layers)) < len(self.spectral_layers):
            raise ValueError(f"spectral_layers is {self.spectral_layers}; wanted each block once")
        if self.spectral_band[0] >= self.spectral_band[1]:
            raise ValueError(f"spectral_band is {self.spectral_band}; wanted the lower frequency first")
        if self.decoder == "cross_attention" and (self.residual is not None or self.branches != "high_low"):
            raise ValueError("residual and branches are of the spectral decoder; leave them out with cross_attention")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; wanted 0 <= dropout < 1")
        if not self.templates or any(template.count("{}") != 1 for template in self.templates):
            raise ValueError(f"templates is {self.templates!r}; wanted one or more texts with one {{}} each")

    def of_decoder(self) -> dict[str, Any]:
        """Those of the decoder's switches that may be None, as `start` has them."""
        dense = self.start == "dense_clip"
        belongs: dict[str, Any] = {"norms": "rms" if dense else "layer", "logit_scale": dense}
        if self.decoder == "spectral":
            belongs["residual"] = dense
        return belongs | {name: getattr(self, name) for name in belongs if getattr(self, name) is not None}

    @property
    def trains(self) -> bool:
        """Whether there is anything to train: dense CLIP has nothing."""
        return self.decoder != "none" or self.prompt_tokens > 0 or bool(self.spectral_layers)


SPT_RELEASED = ModelConfig()
ZEGCLIP = ModelConfig(spectral_layers=(), decoder="cross_attention", loss="zegclip")
DENSE_CLIP = ModelConfig(
    prompt_tokens=0, spectral_layers=(), class_embedding_twice=False, decoder="none", seen_offset=0.0
)
# SPT-SEG for the tiny CLIP. It deviates from the released model, as data/README.md measures: it starts as dense CLIP,
# with CLIP's own class token, without top-down selection, dice for SSIM in the loss, and no offset of seen scores.
EMBEDDED_CONFIG = ModelConfig(
    class_embedding_twice=False, selection=False, start="dense_clip", loss="zegclip", seen_offset=0.0
)
