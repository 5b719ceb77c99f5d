"""Checkpoints of SPT-SEG's and ZegCLIP's research code; the CLIP models that come inside them."""

import logging
import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from sptseg.model import Clip, ModelConfig, SptSeg, build_model, read_weights

NAMES = tomllib.loads(Path(__file__).with_name("research.toml").read_text("utf-8"))
IMPORTED = "imported"  # ModelConfig.clip of a model whose CLIP weights travel in its checkpoint
PROMPTS = ("backbone.prompt_embeddings", "backbone.deep_prompt_embeddings")
LAYER = r"decode_head\.decoder_1\.layers\.(\d+)\."
VISION_SIZES = {"image_size", "patch_size", "width", "layers", "head_width"}
NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}  # in place of a missing tower


def check_architecture(architecture: Mapping[str, Any], tensors: int) -> None:
    """Refuses other keys than `imported_clip`'s, as open_clip has some that load models by name, and more layers
    than a file of so many tensors can have: all other sizes are held to the tensors before anything is made."""
    vision, text = architecture["vision_cfg"], architecture["text_cfg"]
    if (len(architecture), set(vision), set(text)) != (3, VISION_SIZES, set(NO_TEXT)):
        raise ValueError(f"wanted embed_dim, vision_cfg with {sorted(VISION_SIZES)} and text_cfg with {[*NO_TEXT]}")
    if max(vision["layers"], text["layers"]) > tensors:
        raise ValueError(f"CLIP has {vision['layers']} and {text['layers']} layers, the file only {tensors} tensors")


def clip_from_architecture(architecture: Mapping[str, Any]) -> Clip:
    """A frozen CLIP with QuickGELU (as in OpenAI's and the research code) of the given sizes, weights random."""
    vision: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in architecture["vision_cfg"].items()}
    model = open_clip.CLIP(architecture["embed_dim"], vision, architecture["text_cfg"], quick_gelu=True)
    no_text = architecture["text_cfg"]["vocab_size"] == NO_TEXT["vocab_size"]
    tokenizer = refuse_text if no_text else open_clip.SimpleTokenizer(context_length=model.context_length)
    return Clip(IMPORTED, None, model.eval().requires_grad_(False), tokenizer, architecture)


def refuse_text(texts: object) -> Tensor:
    raise ValueError("this model was imported without a text encoder; call it with text embeddings (C, E)")


def import_report(model: SptSeg) -> str:
    """What an import read, and the parameters that it left out."""
    kind = "SPT-SEG" if model.config.decoder == "spectral" else "ZegCLIP"
    text = "with" if model.clip.tokenizer is not refuse_text else "without"
    head = f"{kind} checkpoint, {model.config.prompt_tokens} prompt tokens, {text} a text encoder"
    left_out = model.about["left_out"] or ["nothing"]
    return "\n  ".join([f"{head}; left out, as no forward pass reads them:", *left_out])


def import_research_checkpoint(
    source: Mapping[str, Tensor] | str | Path, *, image_size: int | tuple[int, int], heads: int, decoder_heads: int = 8
) -> SptSeg:
    """A model from a checkpoint of SPT-SEG's or ZegCLIP's research code. `about["left_out"]` and the log name the
    parameters that no forward pass of that code reads.

    Args:
        source: a state dictionary with `backbone.` and `decode_head.` names (`text_encoder.` is read if it is there),
            or the path of a file that holds one.
        image_size: pixels of the training crop, one number or (height, width); the spectral filter belongs to it.
        heads, decoder_heads: attention heads of image encoder (12 for ViT-B/16) and decoder; no tensor tells."""
    state = read_weights(source)
    size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
    spectral = any(".hlfs." in name for name in state)
    theirs = {our_name(name, spectral): name for name in state}
    prompts = [state[name] for name in PROMPTS if name in state]
    try:
        clip = imported_clip(state, size, heads)
        config = ModelConfig(
            clip=IMPORTED,
            image_size=size,
            prompt_tokens=prompts[0].shape[1] if prompts else 0,
            prompt_depth=sum(map(len, prompts[1:])),
            spectral_layers=(0, 1) if "backbone.complex_weight" in state else (),
            decoder="spectral" if spectral else "cross_attention",
            decoder_layers=1 + max((int(m[1]) for m in (re.match(LAYER, name) for name in state) if m), default=0),
            decoder_heads=decoder_heads,
            loss="spt" if spectral else "zegclip",
        )
        model = build_model(config, clip)
        own = model.trained_state()
        read = {name: torch.cat(prompts) if name == "encoder.prompts" else state[theirs[name]] for name in own}
        model.load_state_dict(read, strict=False)
    except Exception as error:  # of whatever part meets with other tensors than it has
        what = "the checkpoint" if isinstance(source, Mapping) else source
        told = f"{what} is no whole one of SPT-SEG's or ZegCLIP's research code, or does not go with image_size"
        given = f"{size}, heads {heads} and decoder_heads {decoder_heads}"
        raise ValueError(f"{told} {given}: {' '.join(str(error).split())}") from error
    known = {*PROMPTS, *(theirs.get(name) for name in own), *(f"backbone.{name}" for name in clip.visual.state_dict())}
    if clip.tokenizer is not refuse_text:
        known |= {f"text_encoder.{name}" for name in clip.model.state_dict()}
    model.about = {"left_out": sorted(set(state) - known)}
    logging.getLogger("sptseg").info(import_report(model))
    return model.eval()


def our_name(name: str, spectral: bool) -> str | None:
    """Our name of a research-code parameter, or None."""
    layer = re.match(LAYER, name)
    inner = name[layer.end() :] if layer else name
    for theirs, ours in (NAMES["both"] | NAMES["spectral" if spectral else "cross_attention"]).items():
        if inner in (theirs, f"{theirs}.weight", f"{theirs}.bias"):
            return (f"decoder.layers.{layer[1]}." if layer else "") + ours + inner.removeprefix(theirs)
    return None


def imported_clip(state: Mapping[str, Tensor], image_size: tuple[int, int], heads: int) -> Clip:
    """The frozen CLIP of a research checkpoint, sized by its tensors; with a text tower only if one is there."""
    visual, text = (
        {name.removeprefix(part): value for name, value in state.items() if name.startswith(part)}
        for part in ("backbone.", "text_encoder.")
    )
    width, _, *patch = visual["conv1.weight"].shape
    positions = len(visual["positional_embedding"]) - 1
    grid = (image_size[0] // patch[0], image_size[1] // patch[1])
    if math.prod(grid) != positions:  # learned on another, square grid, as CLIP's own is
        grid = (math.isqrt(positions),) * 2
    vision_config = {
        "image_size": [grid[0] * patch[0], grid[1] * patch[1]], "patch_size": patch, "width": width,
        "head_width": width // heads, "layers": count_blocks(visual),
    }  # fmt: skip
    text_config = NO_TEXT
    if text:
        vocabulary, text_width = text["token_embedding.weight"].shape
        text_config = {
            "context_length": len(text["positional_embedding"]), "vocab_size": vocabulary, "width": text_width,
            "heads": max(1, text_width // 64), "layers": count_blocks(text),  # OpenAI's CLIP models: head width 64
        }  # fmt: skip
    sizes = {"embed_dim": visual["proj"].shape[1], "vision_cfg": vision_config, "text_cfg": text_config}
    clip = clip_from_architecture(sizes)
    clip.visual.load_state_dict({name: visual[name] for name in clip.visual.state_dict()})
    if text:
        own = [name for name in clip.model.state_dict() if not name.startswith("visual.") and name != "logit_scale"]
        clip.model.load_state_dict({name: text[name] for name in own}, strict=False)
    return clip


def count_blocks(tower: Mapping[str, Tensor]) -> int:
    return len({name.split(".")[2] for name in tower if name.startswith("transformer.resblocks.")})
