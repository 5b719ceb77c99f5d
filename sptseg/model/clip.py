"""CLIP models by (name, weights): open_clip's, and the tiny ones that the package embeds; their text embeddings."""

import hashlib
import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from sptseg.model.towers import USABLE, check_visual, tower, usable_models
from sptseg.model.weights import load_weights
from sptseg.system import write

TINY = "tiny"
EMBEDDED_CLIPS = {TINY: "tiny_clip.safetensors", "tiny-plain": "tiny_clip_plain.safetensors"}
TEMPLATES = ("a photo of a {}",)
OLD_FINGERPRINT = 16  # digits
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

    @cached_property
    def ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words, start=1)}

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
                told = f"the tiny CLIP does not know {', '.join(map(repr, unknown))} (in {text!r}); it knows the words"
                others = "use these, or a CLIP that knows any word, such as ViT-B-16-quickgelu"
                raise ValueError(f"{told} {', '.join(self.words)}; {others}")
            if len(words) > self.context_length - 2:
                raise ValueError(f"{text!r} has {len(words)} words; this CLIP reads at most {self.context_length - 2}")
            row[: len(words) + 2] = torch.tensor([start, *(self.ids[word] for word in words), end])
        return rows


def synonyms(text: str) -> list[str]:
    """The words for one class, between bars: "car|automobile"."""
    return [word.strip() for word in text.split("|")]


@dataclass(frozen=True)
class Clip:
    """A CLIP model (open_clip's CLIP or CustomTextCLIP) with its name, weights and tokenizer, and `architecture`, the
    sizes from which one that is not open_clip's is built again."""

    name: str
    weights: str | None
    model: Any
    tokenizer: Callable[[list[str]], Tensor]
    architecture: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)
    cache: dict[tuple[tuple[str, ...], ...], Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def visual(self) -> Any:
        """The image tower, open_clip's VisionTransformer or TimmModel; see `sptseg.model.towers`."""
        return self.model.visual

    @torch.no_grad()
    def class_embeddings(self, names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Tensor:
        """Unit text embeddings (C, E), float32, on the CPU: the templates' unit embeddings averaged, and those of a
        class's words ("car|automobile"), made unit again. Source: ZegCLIP."""
        names, templates = tuple(names), tuple(templates)
        if not names:
            raise ValueError("the list of classes is empty; name at least one class")
        words = [synonyms(name) for name in names]
        blank = [i for i, each in enumerate(words) if not all(each)]
        if blank:
            raise ValueError(f"the class name at position {blank[0]} is blank; give every class a name")
        each = [word for some in words for word in some]
        read = [" ".join(unicodedata.normalize("NFC", word).casefold().split()) for word in each]  # as tokenizers do
        duplicates = sorted({word for word, same in zip(each, read, strict=True) if read.count(same) > 1})
        if duplicates:
            raise ValueError(f"class names given twice: {', '.join(duplicates)}; name each class once")
        key = (names, templates)
        if key not in self.cache:
            device = next(self.model.parameters()).device
            prompts = [template.format(word) for word in each for template in templates]
            tokens = self.tokenizer(prompts).to(device)
            embedded = [F.normalize(self.model.encode_text(part).float(), dim=-1) for part in tokens.split(256)]
            per_class = torch.cat(embedded).split([len(some) * len(templates) for some in words])
            self.cache[key] = F.normalize(torch.stack([each.mean(dim=0) for each in per_class]), dim=-1).cpu()
        return self.cache[key].clone()


def fingerprint(clip: Clip, like: str = "") -> str:
    """A hash by which a checkpoint knows its CLIP, wherever that lies: of both towers' weights, heads and activations,
    and the tiny CLIP's words. `like`: one to be compared with; earlier versions' are short, of 4 tensors."""
    state, digest, earlier = clip.model.state_dict(), hashlib.sha256(), len(like) == OLD_FINGERPRINT
    tensors = [f"visual.{name}" for name in ("conv1.weight", "positional_embedding", "ln_post.weight", "proj")]
    if not earlier:
        tensors = sorted(state)
        if isinstance(clip.model, open_clip.CLIP) and isinstance(clip.visual, VisionTransformer):
            blocks: Any = [*clip.visual.transformer.resblocks, *clip.model.transformer.resblocks]
            built = [(block.attn.num_heads, *(type(part).__name__ for part in block.mlp)) for block in blocks]
        else:
            modules = clip.model.named_modules()
            built = [(name, type(part).__name__, getattr(part, "num_heads", 0)) for name, part in modules]
        words = clip.tokenizer.words if isinstance(clip.tokenizer, WordTokenizer) else ()
        shapes = [(name, tuple(state[name].shape)) for name in tensors]
        digest.update(repr((built, words, tower(clip.visual).grid, shapes)).encode())
    for name in tensors:
        digest.update(state[name].float().cpu().contiguous().numpy())
    return digest.hexdigest()[: OLD_FINGERPRINT if earlier else 32]


def new_tiny_clip(words: Sequence[str]) -> Clip:
    """The tiny CLIP with random weights (torch's global seed), for a vocabulary of words."""
    tokenizer = WordTokenizer(tuple(words), TINY_CONFIG["text_cfg"]["context_length"])
    text_config: Any = {**TINY_CONFIG["text_cfg"], "vocab_size": tokenizer.vocabulary_size}
    model = open_clip.CLIP(TINY_CONFIG["embed_dim"], TINY_CONFIG["vision_cfg"], text_config)
    return Clip(TINY, None, model, tokenizer)


def save_tiny_clip(clip: Clip, path: str | Path) -> None:
    """Weights in float16 and the vocabulary, in one safetensors file."""
    tensors = {name: value.detach().half().contiguous().cpu() for name, value in clip.model.state_dict().items()}
    write(path, save(tensors, metadata={"words": json.dumps(cast(WordTokenizer, clip.tokenizer).words)}))


def load_tiny_clip(path: str | Path, name: str = TINY) -> Clip:
    try:
        with safe_open(path, "pt") as file:
            clip = new_tiny_clip(json.loads(file.metadata()["words"]))
            clip.model.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})
    except Exception as error:  # of whichever part meets with another file
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is no tiny CLIP ({reason}); wanted a file that sptseg pretrain wrote") from error
    return Clip(name, str(path), clip.model.eval().requires_grad_(False), clip.tokenizer)


def check_public(name: str, weights: str | None) -> None:
    """Refuses CLIP weights that not everybody can load: files (no path in a checkpoint is opened) and random ones."""
    embedded = weights is None and name in EMBEDDED_CLIPS
    if not embedded and weights not in open_clip.list_pretrained_tags_by_model(name):
        told = f"its CLIP, {name!r} with weights {weights!r}, is not public, and no path in a checkpoint is opened"
        yours = "load_model(..., clip=load_clip(NAME, FILE)), or --clip NAME --clip-weights FILE"
        raise ValueError(f"{told}; give one of yours: {yours}")


def load_clip(name: str = TINY, weights: str | None = None) -> Clip:
    """A frozen CLIP in evaluation mode.

    `name`: "tiny" or "tiny-plain" (embedded; trained to be dense, and by the contrast of picture and caption alone;
    `weights` is None or a file made by `sptseg pretrain`), or one of `usable_models`. `weights`: an open_clip tag such
    as "openai", a file (see `read_weights`) such as OpenAI's ViT-B-16.pt, or None for random ones (torch's seed)."""
    file = None if weights is None else Path(weights).expanduser()
    if name in EMBEDDED_CLIPS:
        return load_tiny_clip(file or data_file(EMBEDDED_CLIPS[name]), name)
    if name not in usable_models():
        usable = ", ".join((*EMBEDDED_CLIPS, *usable_models()))
        raise ValueError(f"{name!r} is no open_clip model with a {USABLE}; use {usable}")
    tag = open_clip.get_pretrained_cfg(name, weights or "")
    if tag.get("quick_gelu"):
        refuse_quick_gelu(name, weights)
    if file is not None and not tag and not file.is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(f"{weights} is no file, and no tag of {name}; open_clip's tags of it: {tags}")
    try:
        tokenizer = open_clip.get_tokenizer(name)
        if tag:
            model: Any = open_clip.create_model(name, pretrained=weights, precision="fp32")
        else:
            config = cast("dict[str, Any]", open_clip.get_model_config(name))
            custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
            model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)
    except Exception as error:  # there is no list of what open_clip, transformers and the network may raise
        raise ValueError(
            f"the weights {weights!r} of {name} could not be loaded ({type(error).__name__}); open_clip downloads them "
            f"once where there is a network, or give a file that holds them; some tokenizers need `pip install "
            f"transformers`, which downloads them once"
        ) from error
    if file is not None and not tag and load_weights(model, file, name):
        refuse_quick_gelu(name, weights)
    check_visual(name, model.visual)
    return Clip(name, weights, model.eval().requires_grad_(False), tokenizer)


def about_weights(name: str, weights: str | None) -> dict[str, Any]:
    """What open_clip says of weights, such as their pictures' `mean` and `std`; if they have no tag, of the first."""
    tags = (weights or "", *open_clip.list_pretrained_tags_by_model(name))
    return next(filter(None, (open_clip.get_pretrained_cfg(name, tag) for tag in tags)), {})


def refuse_quick_gelu(name: str, weights: str | None) -> None:
    """Refuses weights that were trained with QuickGELU for a model without: they would fit, and be wrong."""
    if not cast("dict[str, Any]", open_clip.get_model_config(name)).get("quick_gelu"):
        other = f"{name}-quickgelu"
        raise ValueError(f"the weights {weights} were trained with QuickGELU, which {name!r} lacks; use {other!r}")
