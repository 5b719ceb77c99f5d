"""`ModelConfig`, `SptSeg`, `build_model`: parts in, model out. What is trained is chosen by module, never by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from sptseg.clip import TEMPLATES, TINY, Clip, load_clip
from sptseg.decoder import Decoder, DecoderKind, DecoderStart
from sptseg.encoder import PromptedEncoder
from sptseg.losses import LossKind
from sptseg.readouts import OPTIONS, ReadOut


def check_values(config: object, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Refuses a dataclass with a value of another type than its field's, or a number that is not finite or in range."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        try:
            check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
        except TypeCheckError:
            raise ValueError(f"{name} is {repr(value)[:100]}; wanted {inspect.formatannotation(hint)}") from None
        low, high = ranges.get(name, (-math.inf, math.inf))
        values = value if isinstance(value, tuple) else (value,)
        if not all(low <= x <= high and math.isfinite(x) for x in values if type(x) in (int, float)):
            wanted = f"{low} to {high}" if name in ranges else "a finite number"
            raise ValueError(f"{name} is {value}; wanted {wanted}")


# Far beyond use, and far below what no memory holds: configurations also come from strangers' files.
RANGES = {
    "image_size": (1, 8192), "prompt_tokens": (0, 10_000), "prompt_depth": (0, 1000), "spectral_layers": (0, 1000),
    "decoder_layers": (1, 100), "decoder_heads": (1, 1024), "decoder_window": (1, 8192), "seen_offset": (-1, 1),
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
        class_embedding_twice: the released code's class token (see `PromptedEncoder`).
        readout: how CLIP's last block is read, see `sptseg.read_out`: "plain", "maskclip", "sclip", "clearclip",
            "naclip" or "gem". Dense CLIP and decoders that start from it begin there; prompts are trained through it.
            GEM goes without prompts only.
        decoder: "spectral" (SPT-SEG), "cross_attention" (ZegCLIP) or "none" (dense CLIP: cosine of patch and text).
        selection: the spectral decoder's top-down selection.
        start: the decoder's first weights, see `Decoder`.
        loss: "spt" (focal + SSIM) or "zegclip" (focal + dice).
        templates: prompt templates of the class names.
        normalization: the image statistics, "imagenet" (ZegCLIP's protocol) or "clip".
        seen_offset: what evaluation lowers the scores of seen classes by (paper: 0.1 inductive, 0 else).
    """

    clip: str = TINY
    clip_weights: str | None = None
    image_size: tuple[int, int] = (128, 128)
    prompt_tokens: int = 10
    prompt_depth: int | None = None
    spectral_layers: tuple[int, ...] = (0, 1)
    class_embedding_twice: bool = True
    readout: ReadOut = "plain"
    decoder: DecoderKind | Literal["none"] = "spectral"
    decoder_layers: int = 3
    decoder_heads: int = 8
    decoder_window: int = 3
    selection: bool = True
    start: DecoderStart = "random"
    dropout: float = 0.1
    loss: LossKind = "spt"
    templates: tuple[str, ...] = TEMPLATES
    normalization: Literal["imagenet", "clip"] = "imagenet"
    seen_offset: float = 0.1

    def __post_init__(self) -> None:
        choices = {
            "readout": tuple(OPTIONS),
            "decoder": ("spectral", "cross_attention", "none"),
            "start": ("random", "dense_clip"),
            "loss": ("spt", "zegclip"),
            "normalization": ("imagenet", "clip"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        check_values(self, RANGES)
        if self.readout == "gem" and (self.prompt_tokens or self.spectral_layers):
            raise ValueError(
                "readout gem reads the last blocks on a second path, which prompts would not reach; set prompt_tokens "
                "to 0 and spectral_layers to (), or choose another read-out"
            )
        if len(set(self.spectral_layers)) < len(self.spectral_layers):
            raise ValueError(f"spectral_layers is {self.spectral_layers}; wanted each block once")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; wanted 0 <= dropout < 1")
        if not self.templates or any(template.count("{}") != 1 for template in self.templates):
            raise ValueError(f"templates is {self.templates!r}; wanted one or more texts with one {{}} each")

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


class SptSeg(nn.Module):
    """A prompted encoder and a decoder: `model(images, text) -> mask logits (B, C, H, W)`.

    `clip` gives text embeddings (`model.class_embeddings`); it is no part of the trained model. Without a decoder the
    logits are dense CLIP's: those whose sigmoid is CLIP's probability among the given classes, the softmax of cosine
    times CLIP's logit scale.
    """

    def __init__(self, config: ModelConfig, encoder: PromptedEncoder, decoder: Decoder | None, clip: Clip) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.decoder = decoder
        self.clip = clip
        self.about: dict[str, Any] = {}  # what its checkpoint says of split, settings and data

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S'), unit text embeddings (C, E) -> mask logits (B, C, H, W) per token."""
        patches, image = self.encoder(images)
        if self.decoder is not None:
            return self.decoder(patches, image, text)
        similarity = torch.einsum("behw,ce->bchw", patches.float(), text.float())
        return (self.clip.model.logit_scale.exp() * similarity).softmax(dim=1).logit(eps=1e-6)

    def class_embeddings(self, names: list[str] | tuple[str, ...]) -> Tensor:
        """Unit text embeddings (C, E) of class names, on the model's device."""
        return self.clip.class_embeddings(names, self.config.templates).to(self.device)

    @property
    def device(self) -> torch.device:
        return self.encoder.prompt_norm.weight.device

    def trained_state(self) -> dict[str, Tensor]:
        """The trained parts only: everything but CLIP."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("encoder.visual.")}

    def to(self, *args, **kwargs) -> SptSeg:
        self.clip.model.to(*args, **kwargs)  # the text tower comes along
        return super().to(*args, **kwargs)


def build_model(config: ModelConfig, clip: Clip | None = None) -> SptSeg:
    """A new model with weights from torch's global seed; `clip` saves loading it again."""
    clip = load_clip(config.clip, config.clip_weights) if clip is None else clip
    visual = clip.visual
    patch_height, patch_width = visual.patch_size
    if config.image_size[0] % patch_height or config.image_size[1] % patch_width or min(config.image_size) <= 0:
        raise ValueError(
            f"image_size is {config.image_size}; {config.clip} needs positive multiples of its patch size "
            f"{visual.patch_size}"
        )
    layers = len(visual.transformer.resblocks)
    encoder = PromptedEncoder(
        visual,
        grid=(config.image_size[0] // patch_height, config.image_size[1] // patch_width),
        prompt_tokens=config.prompt_tokens,
        prompt_depth=layers - 1 if config.prompt_depth is None else config.prompt_depth,
        spectral_layers=config.spectral_layers,
        class_embedding_twice=config.class_embedding_twice,
        readout=config.readout,
        dropout=config.dropout,
    )
    decoder = None
    if config.decoder != "none":
        decoder = Decoder(
            visual.output_dim,
            kind=config.decoder,
            layers=config.decoder_layers,
            heads=config.decoder_heads,
            window=config.decoder_window,
            selection=config.selection,
            start=config.start,
            clip_scale=float(clip.model.logit_scale.exp()),
            dropout=config.dropout,
        )
    model = SptSeg(config, encoder, decoder, clip)
    if not config.trains:
        model.encoder.prompt_norm.requires_grad_(False)  # dense CLIP has nothing to train
    return model


def upsample(mask_logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Mask logits (B, C, h, w) to a size in pixels, bilinear, `align_corners=False`."""
    return F.interpolate(mask_logits.float(), size=size, mode="bilinear", align_corners=False)
