"""Checkpoints of SPT-SEG's and ZegCLIP's research code; the CLIP models that come inside them."""

from __future__ import annotations

import logging
import math
import pickle
import re
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sptseg.model import Clip, ModelConfig, SptSeg, build_model

IMPORTED = "imported"  # ModelConfig.clip of a model whose CLIP weights travel in its checkpoint
VISION_SIZES = {"image_size", "patch_size", "width", "layers", "head_width"}


def clip_architecture(clip: Clip) -> dict[str, Any]:
    """Sizes from which `clip_from_architecture` builds an imported CLIP again."""
    visual: Any = clip.visual
    model: Any = clip.model
    return {
        "embed_dim": visual.output_dim,
        "vision_cfg": {
            "image_size": list(visual.image_size),
            "patch_size": list(visual.patch_size),
            "width": visual.ln_pre.normalized_shape[0],
            "layers": len(visual.transformer.resblocks),
            "head_width": visual.transformer.resblocks[0].attn.head_dim,
        },
        "text_cfg": {
            "context_length": model.context_length,
            "vocab_size": model.vocab_size,
            "width": model.ln_final.normalized_shape[0],
            "heads": model.transformer.resblocks[0].attn.num_heads,
            "layers": len(model.transformer.resblocks),
        },
    }


def check_architecture(architecture: Mapping[str, Any], tensors: int) -> None:
    """Refuses sizes that `clip_architecture` cannot have written for a file of so many tensors.

    open_clip would take other keys too, some of which load models by name.
    """
    vision, text = architecture["vision_cfg"], architecture["text_cfg"]
    sizes = [architecture["embed_dim"], *vision.values(), *text.values()]
    numbers = [number for size in sizes for number in (size if isinstance(size, list) else [size])]
    if len(architecture) != 3 or set(vision) != VISION_SIZES or set(text) != set(NO_TEXT) or len(numbers) != 13:
        raise ValueError(f"wanted embed_dim, vision_cfg with {sorted(VISION_SIZES)} and text_cfg with {[*NO_TEXT]}")
    if not all(type(number) is int and 1 <= number < 2**20 for number in numbers):
        raise ValueError(f"the sizes of CLIP are {numbers}; wanted whole numbers from 1 to {2**20}")
    if max(vision["layers"], text["layers"]) > tensors:
        raise ValueError(f"CLIP has {vision['layers']} and {text['layers']} layers, the file only {tensors} tensors")


def clip_from_architecture(architecture: Mapping[str, Any]) -> Clip:
    """A frozen CLIP with QuickGELU (as in OpenAI's and the research code) of the given sizes, weights random."""
    vision: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in architecture["vision_cfg"].items()}
    model = open_clip.CLIP(architecture["embed_dim"], vision, architecture["text_cfg"], quick_gelu=True)
    no_text = architecture["text_cfg"]["vocab_size"] == NO_TEXT["vocab_size"]
    tokenizer = refuse_text if no_text else open_clip.SimpleTokenizer(context_length=model.context_length)
    return Clip(IMPORTED, None, model.eval().requires_grad_(False), tokenizer)


def refuse_text(texts: object) -> Tensor:
    raise ValueError("this model was imported without a text encoder; call it with text embeddings (C, E)")


# Names in the research code's checkpoints -> ours. Encoder names that are not listed belong to CLIP's image tower.
ENCODER_NAMES = {
    r"backbone\.prompt_proj\.(weight|bias)": r"encoder.prompt_projection.\1",
    r"backbone\.prompt_norm\.(weight|bias)": r"encoder.prompt_norm.\1",
    r"backbone\.complex_weight": r"encoder.spectral_prompt.weight",
}
LAYER = r"decode_head\.decoder_1\.layers\.(\d+)\."
UPDATE_NAMES = {
    LAYER + r"linear1\.(weight|bias)": r"decoder.layers.\1.update.feedforward.0.\2",
    LAYER + r"linear2\.(weight|bias)": r"decoder.layers.\1.update.feedforward.3.\2",
    LAYER + r"norm2\.(weight|bias)": r"decoder.layers.\1.update.norm_attention.\2",
    LAYER + r"norm3\.(weight|bias)": r"decoder.layers.\1.update.norm_feedforward.\2",
    r"decode_head\.q_proj\.(weight|bias)": r"decoder.query_map.\1",
}
SPT_NAMES = {
    LAYER + r"hlfs\.h_qkv\.(weight)": r"decoder.layers.\1.attention.high_qkv.\2",
    LAYER + r"hlfs\.l_q\.(weight)": r"decoder.layers.\1.attention.low_query.\2",
    LAYER + r"hlfs\.l_kv\.(weight)": r"decoder.layers.\1.attention.low_key_value.\2",
    LAYER + r"hlfs\.l_proj\.(weight|bias)": r"decoder.layers.\1.attention.low_projection.\2",
    LAYER + r"hlfs\.prompt": r"decoder.layers.\1.selection_vector",
    LAYER + r"hlfs\.top_down_transform": r"decoder.layers.\1.top_down",
    LAYER + r"hlfs\.proj\.(weight|bias)": r"decoder.layers.\1.update_projection.\2",
}
ZEGCLIP_NAMES = {
    LAYER + r"multihead_attn\.q\.(weight|bias)": r"decoder.layers.\1.query.\2",
    LAYER + r"multihead_attn\.k\.(weight|bias)": r"decoder.layers.\1.key.\2",
    LAYER + r"multihead_attn\.v\.(weight|bias)": r"decoder.layers.\1.value.\2",
    LAYER + r"multihead_attn\.proj\.(weight|bias)": r"decoder.layers.\1.update_projection.\2",
}
UNREADABLE = (  # what the readers raise on bytes that are no checkpoint
    SafetensorError, pickle.UnpicklingError, EOFError, OSError, RuntimeError, LookupError, TypeError, AttributeError,
    ValueError, AssertionError, struct.error,
)  # fmt: skip
NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}  # in place of a missing tower
TEXT_TOWER = ("token_embedding.weight", "positional_embedding", "ln_final.weight", "ln_final.bias", "text_projection")


@dataclass(frozen=True)
class Imported:
    """What an import read, and the parameters that it left out: no forward pass of the research code reads them."""

    model: SptSeg
    left_out: tuple[str, ...]

    def report(self) -> str:
        config = self.model.config
        kind = "SPT-SEG" if config.decoder == "spectral" else "ZegCLIP"
        text = "with" if self.model.clip.tokenizer is not refuse_text else "without"
        head = f"{kind} checkpoint, {config.prompt_tokens} prompt tokens, {text} a text encoder"
        names = [f"  {name}" for name in self.left_out or ("nothing",)]
        return "\n".join([f"{head}; left out, as no forward pass reads them:", *names])


def read_research_state(source: Mapping[str, Tensor] | str | Path) -> dict[str, Tensor]:
    """A flat state dictionary from a mapping, a safetensors file or a `.pth` file (read with `weights_only=True`)."""
    state: Any
    if isinstance(source, Mapping):
        state = source
    elif not Path(source).is_file():
        raise FileNotFoundError(f"there is no checkpoint file {source}")
    else:
        try:
            if Path(source).suffix == ".safetensors":
                state = load_file(source)
            else:
                with warnings.catch_warnings(action="ignore"):  # of pickle protocols: it reads them or refuses
                    state = torch.load(source, map_location="cpu", weights_only=True)
        except UNREADABLE as error:
            raise ValueError(
                f"{source} cannot be read as a checkpoint of tensors only; it is damaged or holds other Python "
                f"objects, which could run code; save it again with "
                f"torch.save({{'state_dict': model.state_dict()}}, ...)"
            ) from error
    state = (state.get("state_dict", state) or {}) if isinstance(state, Mapping) else {}
    tensors = {str(name).removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}
    if "backbone.conv1.weight" not in tensors:
        raise ValueError(
            "the checkpoint has no backbone.conv1.weight; wanted one of SPT-SEG's or ZegCLIP's research code"
        )
    return tensors


def import_research_checkpoint(
    source: Mapping[str, Tensor] | str | Path, *, image_size: int | tuple[int, int], heads: int, decoder_heads: int = 8
) -> SptSeg:
    """A model from a checkpoint of SPT-SEG's or ZegCLIP's research code; what was left out goes to the log.

    Args:
        source: a state dictionary with `backbone.` and `decode_head.` names (`text_encoder.` is read if it is there),
            or the path of a file that holds one.
        image_size: pixels of the training crop, one number or (height, width); the spectral filter belongs to it.
        heads: attention heads of the image encoder (12 for ViT-B/16); no tensor tells.
        decoder_heads: attention heads of the decoder.
    """
    imported = import_research(source, image_size=image_size, heads=heads, decoder_heads=decoder_heads)
    logging.getLogger("sptseg").info(imported.report())
    return imported.model


def import_research(
    source: Mapping[str, Tensor] | str | Path, *, image_size: int | tuple[int, int], heads: int, decoder_heads: int = 8
) -> Imported:
    """As `import_research_checkpoint`, with the names of what it left out."""
    state = read_research_state(source)
    size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
    spectral_decoder = any(".hlfs." in name for name in state)
    try:
        clip = imported_clip(state, size, heads)
    except KeyError as error:
        raise ValueError(f"the checkpoint lacks {error}, a parameter of CLIP; is it complete?") from error
    prompts = state.get("backbone.prompt_embeddings")
    deep = state.get("backbone.deep_prompt_embeddings")
    config = ModelConfig(
        clip=IMPORTED,
        image_size=size,
        prompt_tokens=0 if prompts is None else prompts.shape[1],
        prompt_depth=0 if deep is None else len(deep),
        spectral_layers=(0, 1) if "backbone.complex_weight" in state else (),
        decoder="spectral" if spectral_decoder else "cross_attention",
        decoder_layers=1 + max((int(m[1]) for m in (re.match(LAYER, name) for name in state) if m), default=0),
        decoder_heads=decoder_heads,
        loss="spt" if spectral_decoder else "zegclip",
    )
    names = {**ENCODER_NAMES, **UPDATE_NAMES, **(SPT_NAMES if spectral_decoder else ZEGCLIP_NAMES)}
    ours = {our_name(name, names): name for name in state if our_name(name, names)}
    model = build_model(config, clip)
    wanted = model.trained_state()
    new = {name: state[ours[name]] for name in wanted if name in ours}
    if prompts is not None:
        new["encoder.prompts"] = prompts if deep is None else torch.cat([prompts, deep])
    missing = sorted(set(wanted) - set(new))
    if missing:
        raise ValueError(f"the checkpoint lacks what {', '.join(missing[:5])} would be read from; is it complete?")
    misfits = [name for name in wanted if new[name].shape != wanted[name].shape]
    if misfits:
        shapes = [f"{name} {tuple(new[name].shape)}, wanted {tuple(wanted[name].shape)}" for name in misfits[:3]]
        raise ValueError(
            f"the checkpoint does not fit image_size {size}, heads {heads}, decoder_heads {decoder_heads}: "
            f"{'; '.join(shapes)}"
        )
    model.load_state_dict({name: value.float() for name, value in new.items()}, strict=False)
    read = {ours[name] for name in new if name in ours}
    left_out = sorted(name for name in state if name not in read and not read_elsewhere(name, clip))
    return Imported(model.eval(), tuple(left_out))


def our_name(name: str, names: Mapping[str, str]) -> str | None:
    """Our name of a research-code parameter, or None."""
    return next((match.expand(ours) for theirs, ours in names.items() if (match := re.fullmatch(theirs, name))), None)


def read_elsewhere(name: str, clip: Clip) -> bool:
    """Whether a parameter went into the prompts or into CLIP."""
    if name in ("backbone.prompt_embeddings", "backbone.deep_prompt_embeddings"):
        return True
    if name.startswith("backbone."):
        return name.removeprefix("backbone.") in clip.visual.state_dict()
    return clip.tokenizer is not refuse_text and name.removeprefix("text_encoder.") in clip.model.state_dict()


def imported_clip(state: Mapping[str, Tensor], image_size: tuple[int, int], heads: int) -> Clip:
    """The frozen CLIP of a research checkpoint, sized by its tensors; with a text tower only if one is there."""
    visual = {k.removeprefix("backbone."): v.float() for k, v in state.items() if k.startswith("backbone.")}
    text = {k.removeprefix("text_encoder."): v.float() for k, v in state.items() if k.startswith("text_encoder.")}
    width, _, *patch = visual["conv1.weight"].shape
    if width % heads:
        raise ValueError(f"heads is {heads}; the encoder's width {width} is no multiple of it")
    positions = len(visual["positional_embedding"]) - 1
    grid = (image_size[0] // patch[0], image_size[1] // patch[1])
    if math.prod(grid) != positions:  # learned on another, square grid, as CLIP's own is
        grid = (math.isqrt(positions),) * 2
    if math.prod(grid) != positions:
        raise ValueError(
            f"the position embedding has {positions} patches, which fit neither image_size {image_size} "
            f"nor a square grid"
        )
    whole_text = all(name in text for name in TEXT_TOWER)
    text_config = NO_TEXT
    if whole_text:
        vocabulary, text_width = text["token_embedding.weight"].shape
        text_config = {
            "context_length": len(text["positional_embedding"]),
            "vocab_size": vocabulary,
            "width": text_width,
            "heads": max(1, text_width // 64),  # OpenAI's CLIP models: head width 64
            "layers": count_blocks(text),
        }
    clip = clip_from_architecture(
        {
            "embed_dim": visual["proj"].shape[1],
            "vision_cfg": {
                "image_size": [grid[0] * patch[0], grid[1] * patch[1]],
                "patch_size": patch,
                "width": width,
                "layers": count_blocks(visual),
                "head_width": width // heads,
            },
            "text_cfg": text_config,
        }
    )
    tower = clip.visual.state_dict()
    clip.visual.load_state_dict({name: visual[name] for name in tower})
    if whole_text:
        own = [name for name in clip.model.state_dict() if not name.startswith("visual.") and name != "logit_scale"]
        clip.model.load_state_dict({name: text[name] for name in own}, strict=False)
    return clip


def count_blocks(tower: Mapping[str, Tensor]) -> int:
    return 1 + max(int(name.split(".")[2]) for name in tower if name.startswith("transformer.resblocks."))
