"""CLIP models by (name, weights): open_clip's, and the tiny one that the package embeds; their text embeddings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sptseg.model.ops import Grid, attend, linear, resize_positions, tokens_to_grid
from sptseg.system import write

TINY = "tiny"
TEMPLATES = ("a photo of a {}",)
TINY_CONFIG: dict[str, Any] = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 128, "patch_size": 8, "width": 192, "layers": 4, "head_width": 64},
    "text_cfg": {"context_length": 40, "width": 128, "heads": 2, "layers": 2},
}


def data_file(name: str) -> Path:
    """Path of an embedded file: `sptseg/data/` in an installed wheel, `data/` in a clone."""
    here = Path(__file__).parents[1]
    for folder in (here / "data", here.parent / "data"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"the embedded file {name} is missing from {here.parent / 'data'}; reinstall sptseg")


@dataclass(frozen=True)
class WordTokenizer:
    """A closed-vocabulary tokenizer: one id a word, 0 pads, and the end token has the highest id: CLIP pools there."""

    words: tuple[str, ...]
    context_length: int
    ids: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", {word: i for i, word in enumerate(self.words, start=1)})

    @property
    def vocabulary_size(self) -> int:
        return len(self.words) + 3

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token ids (n, context_length). Refuses words outside the vocabulary and texts that do not fit."""
        rows = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        start, end = len(self.words) + 1, len(self.words) + 2
        for row, text in zip(rows, texts, strict=True):
            words = text.lower().replace(",", " ").split()
            unknown = [word for word in words if word not in self.ids]
            if unknown:
                raise ValueError(
                    f"the tiny CLIP does not know {', '.join(map(repr, unknown))} (in {text!r}); it knows the words "
                    f"{', '.join(self.words)}; use these, or a CLIP that knows any word, such as ViT-B-16-quickgelu"
                )
            if len(words) > self.context_length - 2:
                raise ValueError(f"{text!r} has {len(words)} words; this CLIP reads at most {self.context_length - 2}")
            row[: len(words) + 2] = torch.tensor([start, *(self.ids[word] for word in words), end])
        return rows


@dataclass(frozen=True)
class Clip:
    """A CLIP model with its name, weights and tokenizer."""

    name: str
    weights: str | None
    model: open_clip.CLIP
    tokenizer: Callable[[list[str]], Tensor]
    cache: dict[tuple[tuple[str, ...], ...], Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def visual(self) -> VisionTransformer:
        return cast(VisionTransformer, self.model.visual)  # see check_visual

    @torch.no_grad()
    def class_embeddings(self, names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Tensor:
        """Unit text embeddings (C, E), float32, on the CPU: the templates' unit embeddings averaged, made unit again.

        Source: ZegCLIP (one template for VOC, the average of several for COCO-Stuff).
        """
        names, templates = tuple(names), tuple(templates)
        if not names:
            raise ValueError("the list of classes is empty; name at least one class")
        blank = [i for i, name in enumerate(names) if not name.strip()]
        if blank:
            raise ValueError(f"the class name at position {blank[0]} is blank; give every class a name")
        duplicates = sorted({name for name in names if names.count(name) > 1})
        if duplicates:
            raise ValueError(f"class names given twice: {', '.join(duplicates)}; name each class once")
        key = (names, templates)
        if key not in self.cache:
            device = next(self.model.parameters()).device
            prompts = [template.format(name) for name in names for template in templates]
            tokens = self.tokenizer(prompts).to(device)
            embedded = [F.normalize(self.model.encode_text(part).float(), dim=-1) for part in tokens.split(256)]
            per_class = torch.cat(embedded).unflatten(0, (len(names), len(templates)))  # (C, templates, E)
            self.cache[key] = F.normalize(per_class.mean(dim=1), dim=-1).cpu()
        return self.cache[key].clone()


def fingerprint(clip: Clip) -> str:
    """A short hash of a CLIP's image tower, by which a checkpoint knows the CLIP that it was trained on."""
    state, digest = clip.visual.state_dict(), hashlib.sha256()
    for name in ("conv1.weight", "positional_embedding", "ln_post.weight", "proj"):
        digest.update(state[name].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def new_tiny_clip(words: Sequence[str]) -> Clip:
    """The tiny CLIP with random weights (torch's global seed), for a vocabulary of words."""
    tokenizer = WordTokenizer(tuple(words), TINY_CONFIG["text_cfg"]["context_length"])
    text_config: Any = {**TINY_CONFIG["text_cfg"], "vocab_size": tokenizer.vocabulary_size}
    model = open_clip.CLIP(TINY_CONFIG["embed_dim"], TINY_CONFIG["vision_cfg"], text_config)
    return Clip(TINY, None, model, tokenizer)


def save_tiny_clip(clip: Clip, path: str | Path) -> None:
    """Weights in float16 and the vocabulary, in one safetensors file."""
    assert isinstance(clip.tokenizer, WordTokenizer)
    tensors = {name: value.detach().half().contiguous().cpu() for name, value in clip.model.state_dict().items()}
    write(path, save(tensors, metadata={"words": json.dumps(clip.tokenizer.words)}))


def load_tiny_clip(path: str | Path) -> Clip:
    try:
        with safe_open(path, "pt") as file:
            clip = new_tiny_clip(json.loads(file.metadata()["words"]))
            clip.model.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})
    except (OSError, SafetensorError, TypeError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is no tiny CLIP ({reason}); wanted a file that sptseg pretrain wrote") from error
    return Clip(TINY, str(path), clip.model.eval().requires_grad_(False), clip.tokenizer)


def check_public(name: str, weights: str | None, source: str | Path) -> None:
    """Refuses CLIP weights that not everybody can load: files (no path in a checkpoint is opened) and random ones."""
    if weights not in open_clip.list_pretrained_tags_by_model(name) and (name, weights) != (TINY, None):
        raise ValueError(
            f"{source} names CLIP {name!r} with weights {weights!r}, which is not public, and no path in a checkpoint "
            f"is opened; load it with a CLIP of yours: load_model(..., clip=load_clip(NAME, FILE)), or --clip NAME "
            f"--clip-weights FILE"
        )


def load_clip(name: str = TINY, weights: str | None = None) -> Clip:
    """A frozen CLIP in evaluation mode.

    `name`: "tiny" (embedded; `weights` is None or a file made by `sptseg pretrain`) or an open_clip model name with a
    standard VisionTransformer. `weights`: an open_clip tag such as "openai", a file, or None for random weights (from
    torch's global seed).
    """
    if name == TINY:
        return load_tiny_clip(weights or data_file("tiny_clip.safetensors"))
    if name not in usable_models():
        usable = ", ".join((TINY, *usable_models()))
        raise ValueError(f"{name!r} is no open_clip model with a standard VisionTransformer; use {usable}")
    if weights == "openai" and "quickgelu" not in name and f"{name}-quickgelu" in open_clip.list_models():
        raise ValueError(
            f"OpenAI's weights were trained with QuickGELU, which {name!r} lacks; use {name + '-quickgelu'!r}"
        )
    try:
        model: Any = open_clip.create_model(name, pretrained=weights, precision="fp32")
    except Exception as error:  # there is no list of what open_clip may raise at a file
        if weights is None:
            raise
        if Path(weights).is_file():
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(
                f"{weights} holds no weights of {name} ({reason}); wanted a file of such a model"
            ) from error
        raise ValueError(
            f"the weights {weights!r} of {name} could not be loaded ({type(error).__name__}); open_clip downloads them "
            f"once where there is a network, or give the path of a file that holds them"
        ) from error
    check_visual(name, model.visual)
    return Clip(name, weights, model.eval().requires_grad_(False), open_clip.get_tokenizer(name))


def usable_models() -> list[str]:
    """Names of the open_clip models whose image tower is a standard VisionTransformer."""
    return [name for name in open_clip.list_models() if standard_vision_config(open_clip.get_model_config(name))]


def standard_vision_config(config: dict | None) -> bool:
    """Whether an open_clip model configuration builds the VisionTransformer that the prompted encoder drives."""
    if not config or "multimodal_cfg" in config:
        return False
    vision, text = config["vision_cfg"], config["text_cfg"]
    odd = ("timm_model_name", "attentional_pool", "no_ln_pre", "final_ln_after_pool", "block_type", "qk_norm")
    return (
        isinstance(vision.get("layers"), int)
        and not any(vision.get(key) for key in odd)
        and vision.get("pool_type", "tok") == "tok"
        and not any(text.get(key) for key in ("hf_model_name", "hf_tokenizer_name"))
    )


def check_visual(name: str, visual: object) -> None:
    """Refuses image towers that are not open_clip's standard VisionTransformer with a class token."""
    standard = (
        isinstance(visual, VisionTransformer)
        and visual.attn_pool is None
        and visual.pool_type == "tok"
        and not visual.final_ln_after_pool
        and isinstance(visual.ln_pre, torch.nn.LayerNorm)
        and all(isinstance(block, ResidualAttentionBlock) for block in visual.transformer.resblocks)
    )
    if not standard:
        raise ValueError(
            f"the image tower of {name!r} is {type(visual).__name__}, not a standard VisionTransformer with a class "
            f"token; use one of {', '.join(usable_models())}"
        )


def grid_of(visual: VisionTransformer, images: Tensor) -> Grid:
    """The token grid of images (B, 3, height, width), whose sides must be multiples of the patch size."""
    (height, width), (patch_height, patch_width) = images.shape[-2:], cast(Grid, visual.patch_size)
    if height % patch_height or width % patch_width:
        raise ValueError(
            f"images are {height} x {width}; both sides must be multiples of the patch size {patch_height} x "
            f"{patch_width}; resize or pad them, or use sptseg.segment, which does"
        )
    return height // patch_height, width // patch_width


def embed(
    visual: VisionTransformer, images: Tensor, *, class_embedding_twice: bool = False, bicubic: bool = False
) -> Tensor:
    """Tokens before the first block (B, 1 + N, D), the class token first; positions resized to the images' grid."""
    patches = visual.conv1(images.to(visual.conv1.weight.dtype)).flatten(2).transpose(1, 2)
    token = visual.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
    mode = "bicubic" if bicubic else "bilinear"
    positions = resize_positions(visual.positional_embedding, visual.grid_size, grid_of(visual, images), mode)
    x = torch.cat([token, patches], dim=1) + positions.to(patches.dtype)
    if class_embedding_twice:
        x = torch.cat([x[:, :1] + token, x[:, 1:]], dim=1)
    return visual.ln_pre(x)


def embeddings(visual: VisionTransformer, tokens: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Tokens after the last block (B, 1 + N, D) -> unit patch embeddings (B, E, H, W), unit image embeddings (B, E)."""
    embedded = linear(visual.ln_post(tokens), cast(Tensor, visual.proj).T)
    embedded = F.normalize(embedded.float(), dim=-1).to(embedded.dtype)
    return tokens_to_grid(embedded[:, 1:], grid), embedded[:, 0]


def project(block: Any, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """A block's queries (B, h, N, d) of tokens x (B, N, D), its keys and values (B, h, N + K, d) of x and a context."""
    weight, bias, heads = block.attn.in_proj_weight, block.attn.in_proj_bias, block.attn.num_heads
    width, qkv = x.shape[-1], linear(block.ln_1(x), weight, bias)
    query, key, value = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, h, N, d)
    if context is not None:
        further = linear(block.ln_1(context), weight[width:], bias[width:])
        further = further.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
        key, value = (torch.cat(pair, dim=2) for pair in zip((key, value), further, strict=True))
    return query, key, value


def attention_output(block: Any, mixed: Tensor) -> Tensor:
    """What the heads mixed of the values (B, h, N, d), through the output projection: (B, N, D), to be added to x."""
    return block.ls_1(linear(mixed.transpose(1, 2).flatten(2), block.attn.out_proj.weight, block.attn.out_proj.bias))


def feed_forward(block: Any, x: Tensor) -> Tensor:
    """The second half of a block, x + MLP(LN(x))."""
    expand, activation, contract = block.mlp
    hidden = activation(linear(block.ln_2(x), expand.weight, expand.bias))
    return x + block.ls_2(linear(hidden, contract.weight, contract.bias))


def run_block(block: nn.Module, x: Tensor, context: Tensor | None = None) -> Tensor:
    """open_clip's residual attention block on tokens x (B, N, D), equal to `block(x)`.

    With `context` (B, K, D), equal to the first N tokens of `block(cat([x, context], dim=1))`: all that is computed of
    the context are its keys and values.
    """
    assert isinstance(block, ResidualAttentionBlock)
    return feed_forward(block, x + attention_output(block, attend(*project(block, x, context))))
