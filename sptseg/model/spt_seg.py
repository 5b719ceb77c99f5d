"""`ModelConfig`, `SptSeg`, `build_model`: parts in, model out. What is trained is chosen by module, never by name."""

from typing import Any, Self

import torch
import torch.nn.functional as F
from open_clip.constants import IMAGENET_MEAN, OPENAI_DATASET_MEAN
from torch import Tensor, nn

from sptseg.model.clip import Clip, about_weights, load_clip
from sptseg.model.config import ModelConfig
from sptseg.model.decoder import Decoder
from sptseg.model.encoder import PromptedEncoder
from sptseg.model.towers import tower


class SptSeg(nn.Module):
    """A prompted encoder and a decoder: `model(images, text) -> mask logits (B, C, H, W)`.

    `clip` gives text embeddings; it is no part of the trained model. Without a decoder the logits are dense CLIP's:
    those whose sigmoid is CLIP's probability among the given classes, the softmax of cosine times CLIP's logit scale;
    with `config.softmax_scale` that many times the cosine."""

    def __init__(self, config: ModelConfig, encoder: PromptedEncoder, decoder: Decoder | None, clip: Clip) -> None:
        super().__init__()
        self.config, self.clip = config, clip
        self.encoder, self.decoder = encoder, decoder
        self.about: dict[str, Any] = {}  # what its checkpoint says of split, settings and data

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S'), unit text embeddings (C, E) -> mask logits (B, C, H, W) per token."""
        patches, image = self.encoder(images)
        if self.decoder is not None:
            return self.decoder(patches, image, text)
        with torch.autocast(patches.device.type, enabled=False):  # in half precision 1 - 1e-6 is 1: no finite logit
            similarity = torch.einsum("behw,ce->bchw", patches.float(), text.float())
            if self.config.softmax_scale is not None:
                return self.config.softmax_scale * similarity
            return (self.clip.model.logit_scale.float().exp() * similarity).softmax(dim=1).logit(eps=1e-6)

    def class_embeddings(self, names: list[str] | tuple[str, ...]) -> Tensor:
        """Unit text embeddings (C, E) of class names, on the model's device."""
        return self.clip.class_embeddings(names, self.config.templates).to(self.device)

    @property
    def device(self) -> torch.device:
        return self.encoder.prompt_norm.weight.device

    def trained_state(self) -> dict[str, Tensor]:
        """The trained parts only: everything but CLIP."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("encoder.visual.")}

    def to(self, *args, **kwargs) -> Self:
        self.clip.model.to(*args, **kwargs)  # the text tower comes along
        return super().to(*args, **kwargs)


def build_model(config: ModelConfig, clip: Clip | None = None) -> SptSeg:
    """A new model with weights from torch's global seed; `clip` saves loading it again."""
    clip = load_clip(config.clip, config.clip_weights) if clip is None else clip
    parts = tower(clip.visual)
    if any(side % patch for side, patch in zip(config.image_size, parts.patch_size, strict=True)):
        told = f"{config.clip} needs multiples of its patch size {parts.patch_size}"
        raise ValueError(f"image_size is {config.image_size}; {told}")
    mean = about_weights(config.clip, config.clip_weights).get("mean", OPENAI_DATASET_MEAN)
    if config.normalization == "imagenet" and mean not in (OPENAI_DATASET_MEAN, IMAGENET_MEAN):
        raise ValueError(f"normalization is imagenet, but {config.clip} was trained with mean {mean}; set it to clip")
    encoder, decoder = PromptedEncoder(clip.visual, config), None
    if config.decoder != "none":
        decoder = Decoder(parts.output_dim, config, float(clip.model.logit_scale.exp()))
    model = SptSeg(config, encoder, decoder, clip)
    if not config.trains:
        model.encoder.prompt_norm.requires_grad_(False)  # dense CLIP has nothing to train
    return model


def upsample(mask_logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Mask logits (B, C, h, w) to a size in pixels, bilinear, `align_corners=False`."""
    return F.interpolate(mask_logits.float(), size=size, mode="bilinear", align_corners=False)
