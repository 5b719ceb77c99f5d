"""Image towers of open_clip that are vision transformers, its own and timm's: their parts in one shape.

A tower makes tokens of patches, may put a class token first, runs blocks, and pools: it reads the class token (CLIP,
EVA-CLIP, MobileCLIP-B), the mean patch (CLIPA), or an attention pool's query (SigLIP, PE-Core). What it makes of a
picture is the image embedding. A patch's embedding is what it would make of that picture if the pool saw this patch
alone. Under an attention pool that is a MaskCLIP: a patch keeps its own value there.

Symbols: B pictures, N = H * W patches, P = 0 or 1 class token, D width, h heads of width d, E embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import open_clip
import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, apply_rot_embed_cat, build_rotary_pos_embed
from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from sptseg.model.ops import Grid, attend, join_heads, linear, resize_positions, split_heads, tokens_to_grid

POOLS: dict[str, Literal["token", "mean", "attention"]] = {
    "tok": "token", "token": "token", "avg": "mean", "map": "attention"
}  # fmt: skip


@dataclass(frozen=True)
class Tower:
    """The parts of an image tower: views of its own modules and parameters.

    grid: that `positions` (H * W, D), or (1 + H * W, D), are for. `rotary`: rotary positions of queries and keys.
    """

    stem: Callable[[Tensor], Tensor]
    patch_size: Grid
    grid: Grid
    class_token: Tensor | None
    positions: Tensor
    norm_before: Callable[[Tensor], Tensor]
    blocks: Sequence[nn.Module]
    norm_after: Callable[[Tensor], Tensor]
    pool: Literal["token", "mean", "attention"]
    attention_pool: AttentionPoolLatent | None
    head: Callable[[Tensor], Tensor]
    output_dim: int
    rotary: RotaryEmbeddingCat | None = None

    @property
    def width(self) -> int:
        return self.positions.shape[-1]

    @property
    def pooled(self) -> slice:
        """The tokens that the image embedding is read from."""
        return slice(0, 1) if self.pool == "token" else slice(None)

    def rotation(self, grid: Grid) -> Tensor | None:
        """Sines and cosines (N, 2 d) of the rotary positions on a grid, scaled to the one that they were learned on."""
        if self.rotary is None:
            return None
        names = ("dim", "temperature", "in_pixels", "ref_feat_shape", "grid_offset", "grid_indexing")
        options: dict[str, Any] = {name: getattr(self.rotary, name) for name in names}
        return torch.cat(build_rotary_pos_embed(list(grid), device=self.positions.device, **options), dim=-1)


def tower(visual: nn.Module) -> Tower:
    """The parts of an open_clip image tower that `check_visual` accepts."""
    if isinstance(visual, VisionTransformer):
        v: Any = visual
        return Tower(
            v.conv1, v.patch_size, v.grid_size, v.class_embedding, v.positional_embedding, v.ln_pre,
            v.transformer.resblocks, v.ln_post, POOLS[v.pool_type], None, lambda x: linear(x, v.proj.T), v.output_dim,
        )  # fmt: skip
    trunk = cast(Any, visual).trunk
    embed = trunk.patch_embed  # called in parts, as the whole refuses other sizes than its own
    class_token = None if trunk.cls_token is None else trunk.cls_token[0, 0]
    return Tower(
        lambda images: embed.proj(embed.backbone(images) if hasattr(embed, "backbone") else images),
        embed.feat_ratio(as_scalar=False), embed.grid_size, class_token, trunk.pos_embed[0], trunk.norm_pre,
        trunk.blocks, trunk.norm, POOLS[trunk.global_pool], trunk.attn_pool, trunk.head,
        trunk.num_classes or trunk.num_features, getattr(trunk, "rope", None),
    )  # fmt: skip


@cache
def usable_models() -> list[str]:
    """Names of the open_clip models whose image tower has the parts of a `Tower`."""
    return [name for name in open_clip.list_models() if usable_config(open_clip.get_model_config(name))]


def usable_config(config: dict | None) -> bool:
    """Whether an open_clip model configuration builds an image tower that `check_visual` accepts."""
    if not config or "multimodal_cfg" in config:
        return False
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:  # only timm's transformers have these pools
        return vision.get("timm_pool") in ("token", "map") and vision.get("timm_proj") in (None, "none")
    odd = ("attentional_pool", "block_type", "qk_norm")
    pools = {"tok": (True, False), "avg": (True,)}
    return (
        isinstance(vision.get("layers"), int)
        and not any(vision.get(key) for key in odd)
        and vision.get("final_ln_after_pool", False) in pools.get(vision.get("pool_type", "tok"), ())
    )


def check_visual(name: str, visual: object) -> None:
    """Refuses image towers that are no vision transformer with the parts of a `Tower`."""
    if isinstance(visual, TimmModel):
        trunk: Any = visual.trunk
        usable = (
            isinstance(trunk, (TimmVisionTransformer, Eva))
            and len(visual.head) == 0
            and trunk.global_pool in ("token", "map")
            and trunk.pos_embed is not None
            and isinstance(getattr(trunk, "rope", None), (RotaryEmbeddingCat, type(None)))
            and all(type(block) in (TimmBlock, EvaBlock, EvaBlockPostNorm) for block in trunk.blocks)
        )
    else:
        usable = (
            isinstance(visual, VisionTransformer)
            and visual.attn_pool is None
            and (visual.pool_type == "tok" or (visual.pool_type == "avg" and visual.final_ln_after_pool))
            and all(isinstance(block, ResidualAttentionBlock) for block in visual.transformer.resblocks)
        )
    if not usable:
        raise ValueError(
            f"the image tower of {name!r} is {type(visual).__name__}, not a vision transformer with a class token or "
            f"an attention pool; use one of {', '.join(usable_models())}"
        )


def grid_of(visual: nn.Module, images: Tensor) -> Grid:
    """The token grid of images (B, 3, height, width), whose sides must be multiples of the patch size."""
    (height, width), (patch_height, patch_width) = images.shape[-2:], tower(visual).patch_size
    if height % patch_height or width % patch_width:
        raise ValueError(
            f"images are {height} x {width}; both sides must be multiples of the patch size {patch_height} x "
            f"{patch_width}; resize or pad them, or use sptseg.segment, which does"
        )
    return height // patch_height, width // patch_width


def embed(visual: nn.Module, images: Tensor, *, class_embedding_twice: bool = False, bicubic: bool = False) -> Tensor:
    """Tokens before the first block (B, P + N, D), the class token first; positions resized to the images' grid."""
    parts = tower(visual)
    x = parts.stem(images.to(parts.positions.dtype)).flatten(2).transpose(1, 2)
    token = None if parts.class_token is None else parts.class_token.to(x.dtype).expand(len(x), 1, -1)
    if token is not None:
        x = torch.cat([token, x], dim=1)
    mode = "bicubic" if bicubic else "bilinear"
    positions = resize_positions(parts.positions, parts.grid, grid_of(visual, images), mode).to(x.dtype)
    x = x + F.pad(positions, (0, 0, x.shape[1] - len(positions), 0))  # MobileCLIP's class token has no position
    if class_embedding_twice and token is not None:
        x = torch.cat([x[:, :1] + token, x[:, 1:]], dim=1)
    return parts.norm_before(x)


def pool_mean(visual: nn.Module, tokens: Tensor, grid: Grid) -> Tensor:
    """Of a tower that pools by the mean, tokens as read from the last block, (B, M + N, D) -> (B, 1 + N, D).

    M = P + N tokens are what the block itself made. Other towers' tokens are returned as they are.
    """
    if tower(visual).pool != "mean":
        return tokens
    count = grid[0] * grid[1]
    return torch.cat([tokens[:, -2 * count : -count].mean(dim=1, keepdim=True), tokens[:, -count:]], dim=1)


def embeddings(visual: nn.Module, tokens: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Tokens as read from the last block -> unit patch embeddings (B, E, H, W), unit image embeddings (B, E).

    The last N tokens are the patches; those before them are what the pool reads: one, or, of an attention pool, P + N.
    """
    parts, count = tower(visual), grid[0] * grid[1]
    x = parts.norm_after(tokens)
    if parts.attention_pool is not None:
        image = parts.attention_pool(x[:, :-count])[:, None]
        x = torch.cat([image, pool_alone(parts.attention_pool, x[:, -count:])], dim=1)
    embedded = parts.head(x)
    embedded = F.normalize(embedded.float(), dim=-1).to(embedded.dtype)
    return tokens_to_grid(embedded[:, 1:], grid), embedded[:, 0]


def pool_alone(pool: Any, x: Tensor) -> Tensor:
    """What an attention pool makes of each token (B, N, D) if it sees that one alone: attention to one key is 1."""
    width = x.shape[-1]
    value = linear(x, pool.kv.weight[width:], pool.kv.bias[width:])
    x = linear(value, pool.proj.weight, pool.proj.bias)
    return x + pool.mlp(pool.norm(x))


def project(
    block: nn.Module, x: Tensor, context: Tensor | None = None, rotation: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """A block's queries (B, h, M, d) of tokens x (B, M, D), its keys and values (B, h, M + K, d) of x and a context.

    A `rotation` (N, 2 d) turns the queries and keys of the last N tokens of x.
    """
    weight, bias, head_width = projection(block)
    query, key, value = split_heads(linear(normed(block, 1, x), weight, bias), 3, head_width)
    if rotation is not None:
        first = x.shape[1] - len(rotation)
        query, key = (
            torch.cat([a[:, :, :first], apply_rot_embed_cat(a[:, :, first:], rotation)], dim=2) for a in (query, key)
        )
    if context is not None:
        weight, bias = weight[len(weight) // 3 :], None if bias is None else bias[len(bias) // 3 :]
        further = split_heads(linear(normed(block, 1, context), weight, bias), 2, head_width)
        key, value = (torch.cat(pair, dim=2) for pair in zip((key, value), further, strict=True))
    return query, key, value


def projection(block: Any) -> tuple[Tensor, Tensor | None, int]:
    """Weight (3 h d, D) and bias (3 h d,) of a block's queries, keys and values, and d."""
    attention = block.attn
    if isinstance(block, ResidualAttentionBlock):
        return attention.in_proj_weight, attention.in_proj_bias, attention.head_dim
    if attention.qkv is None:
        three = (attention.q_proj, attention.k_proj, attention.v_proj)
        weight, biases = torch.cat([part.weight for part in three]), [part.bias for part in three]
    else:
        weight, biases = attention.qkv.weight, [getattr(attention, f"{letter}_bias", None) for letter in "qkv"]
        if biases[0] is None:
            return weight, attention.qkv.bias, attention.head_dim
    zeros = weight.new_zeros(len(weight) // 3)  # EVA-CLIP's keys have no bias
    return weight, torch.cat([zeros if bias is None else bias for bias in biases]), attention.head_dim


def normed(block: Any, half: Literal[1, 2], x: Tensor) -> Tensor:
    """The input of a block's attention (half 1) or MLP (half 2)."""
    if isinstance(block, EvaBlockPostNorm):
        return x
    return getattr(block, f"ln_{half}" if isinstance(block, ResidualAttentionBlock) else f"norm{half}")(x)


def scaled(block: Any, half: Literal[1, 2], x: Tensor) -> Tensor:
    """What a block adds of its attention's (half 1) or MLP's (half 2) output: all of it, or scaled per channel."""
    if isinstance(block, EvaBlockPostNorm):
        return getattr(block, f"norm{half}")(x)
    if isinstance(block, EvaBlock):
        scale = getattr(block, f"gamma_{half}")
        return x if scale is None else scale * x
    return getattr(block, f"ls_{half}" if isinstance(block, ResidualAttentionBlock) else f"ls{half}")(x)


def attention_output(block: Any, mixed: Tensor) -> Tensor:
    """What the heads mixed of the values (B, h, N, d), through the output projection: (B, N, D), to be added to x."""
    attention, x = block.attn, join_heads(mixed)
    if isinstance(block, ResidualAttentionBlock):
        return scaled(block, 1, linear(x, attention.out_proj.weight, attention.out_proj.bias))
    return scaled(block, 1, linear(attention.norm(x), attention.proj.weight, attention.proj.bias))


def feed_forward(block: Any, x: Tensor) -> Tensor:
    """The second half of a block, x + MLP(LN(x))."""
    hidden = normed(block, 2, x)
    if isinstance(block, ResidualAttentionBlock):
        expand, activation, contract = cast(Any, block.mlp)
        hidden = linear(activation(linear(hidden, expand.weight, expand.bias)), contract.weight, contract.bias)
    else:
        hidden = block.mlp(hidden)
    return x + scaled(block, 2, hidden)


def run_block(block: nn.Module, x: Tensor, context: Tensor | None = None, rotation: Tensor | None = None) -> Tensor:
    """A tower's block on tokens x (B, M, D), equal to `block(x)`, with rotary positions as `project` has them.

    With `context` (B, K, D), equal to the first M tokens of `block(cat([x, context], dim=1))`: all that is computed of
    the context are its keys and values.
    """
    return feed_forward(block, x + attention_output(block, attend(*project(block, x, context, rotation))))
