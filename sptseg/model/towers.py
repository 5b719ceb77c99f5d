"""Image towers of open_clip that are vision transformers, its own and timm's: their parts in one shape.

A tower makes tokens of patches, may put a class token first, runs blocks, and pools: it reads the class token (CLIP,
EVA-CLIP, MobileCLIP-B), the mean patch (CLIPA), or an attention pool's query (SigLIP, PE-Core). A patch's embedding is
what it would make of the picture if the pool saw this patch alone (under an attention pool: its own value, MaskCLIP).

Spectral prompts need a class token, which SigLIP and the largest PE-Core lack. No towers in this sense are CoCa's (its
pool has 256 queries and other norms), ViTamin's (its blocks follow convolutions), ResNets, ConvNeXt and FastViT.

Symbols: B pictures, N = H * W patches, P = 0 or 1 class token, D width, h heads of width d, E embedding width."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, apply_rot_embed_cat, build_rotary_pos_embed
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from sptseg.model.ops import Grid, attend, join_heads, linear, resize_positions, split_heads, tokens_to_grid

BLOCKS = {  # what blocks call the norms before their halves, and what scales or norms the output of these
    ResidualAttentionBlock: ("ln_", "ls_"), Block: ("norm", "ls"), EvaBlock: ("norm", "gamma_"),
    EvaBlockPostNorm: ("", "norm"),
}  # fmt: skip
USABLE = "vision transformer with a class token, an attention pool or a mean of patches"
OPEN_CLIP_POOLS = {("tok", False, True): "token", ("tok", True, True): "token", ("avg", True, True): "mean"}


@dataclass(frozen=True)
class Tower:
    """The parts of an image tower: its own modules and parameters, or views of them. `grid`: that of `positions`
    (P + H * W, D); `pool`: "token", "mean" or an attention pool; `rotary`: rotary positions of queries and keys."""

    stem: Callable[[Tensor], Tensor]
    patch_size: Grid
    grid: Grid
    class_token: Tensor | None
    positions: Tensor
    norm_before: nn.Module
    blocks: Sequence[nn.Module]
    norm_after: nn.Module
    pool: str | AttentionPoolLatent
    head: Callable[[Tensor], Tensor]
    output_dim: int
    rotary: RotaryEmbeddingCat | None

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


def tower(visual: Any) -> Tower:
    """The parts of an open_clip image tower that `check_visual` accepts."""
    if isinstance(visual, VisionTransformer):
        return Tower(
            visual.conv1, cast(Grid, visual.patch_size), visual.grid_size, visual.class_embedding,
            visual.positional_embedding, visual.ln_pre, cast(Any, visual.transformer.resblocks),
            visual.ln_post, OPEN_CLIP_POOLS[visual.pool_type, visual.final_ln_after_pool, visual.attn_pool is None],
            lambda x: linear(x, cast(Tensor, visual.proj).T), visual.output_dim, None,
        )  # fmt: skip
    trunk, embed = visual.trunk, visual.trunk.patch_embed  # whose parts are called, as it refuses other sizes
    return Tower(
        lambda images: embed.proj(embed.backbone(images) if hasattr(embed, "backbone") else images),
        embed.feat_ratio(as_scalar=False), embed.grid_size, None if trunk.cls_token is None else trunk.cls_token[0, 0],
        trunk.pos_embed[0], trunk.norm_pre, trunk.blocks, trunk.norm,
        {"token": "token", "map": trunk.attn_pool}[trunk.global_pool], trunk.head,
        trunk.num_classes or trunk.num_features, getattr(trunk, "rope", None),
    )  # fmt: skip


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
    pool = vision.get("pool_type", "tok"), vision.get("final_ln_after_pool", False), not vision.get("attentional_pool")
    odd = any(vision.get(key) for key in ("block_type", "qk_norm"))
    return isinstance(vision.get("layers"), int) and pool in OPEN_CLIP_POOLS and not odd


def check_visual(name: str, visual: object) -> None:
    """Refuses image towers that are no vision transformer with the parts of a `Tower`."""
    try:
        blocks: Sequence[Any] = tower(visual).blocks
    except (AttributeError, KeyError, TypeError):
        blocks = ()
    norms = [getattr(block.attn, part, None) for block in blocks for part in ("q_norm", "gate")]
    if not blocks or not {*map(type, blocks)} <= BLOCKS.keys() or not {*map(type, norms)} <= {nn.Identity, type(None)}:
        kind, usable = type(visual).__name__, ", ".join(usable_models())
        raise ValueError(f"the image tower of {name!r} is {kind}, not a {USABLE}; use one of {usable}")


def grid_of(visual: nn.Module, images: Tensor) -> Grid:
    """The token grid of images (B, 3, height, width), whose sides must be multiples of the patch size."""
    (height, width), (patch_height, patch_width) = images.shape[-2:], tower(visual).patch_size
    if height % patch_height or width % patch_width:
        wanted = f"both sides must be multiples of the patch size {patch_height} x {patch_width}"
        raise ValueError(f"images are {height} x {width}; {wanted}; sptseg.segment takes any size")
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


def embeddings(visual: nn.Module, tokens: Tensor, grid: Grid, norm: nn.Module | None = None) -> tuple[Tensor, Tensor]:
    """Tokens as read from the last block -> unit patch embeddings (B, E, H, W), unit image embeddings (B, E). The last
    N tokens are the patches; those before them the pool reads. `norm`: a further one before the tower's own."""
    parts, count = tower(visual), grid[0] * grid[1]
    if parts.pool == "mean":
        tokens = torch.cat([tokens[:, -2 * count : -count].mean(dim=1, keepdim=True), tokens[:, -count:]], dim=1)
    x = parts.norm_after(tokens if norm is None else norm(tokens))
    if isinstance(parts.pool, AttentionPoolLatent):
        x = torch.cat([parts.pool(x[:, :-count])[:, None], pool_alone(parts.pool, x[:, -count:])], dim=1)
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
    """A block's queries (B, h, M, d) of tokens x (B, M, D), its keys and values (B, h, M + K, d) of x and a context; a
    `rotation` (N, 2 d) turns the queries and keys of the last N tokens of x."""
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
    elif getattr(attention, "q_bias", None) is None:
        return attention.qkv.weight, attention.qkv.bias, attention.head_dim
    else:
        weight, biases = attention.qkv.weight, [attention.q_bias, None, attention.v_bias]
    none = weight.new_zeros(len(weight) // 3)  # as EVA-CLIP's keys have
    return weight, torch.cat([none if bias is None else bias for bias in biases]), attention.head_dim


def normed(block: nn.Module, half: Literal[1, 2], x: Tensor) -> Tensor:
    """The input of a block's attention (half 1) or MLP (half 2)."""
    name = BLOCKS[type(block)][0]
    return getattr(block, f"{name}{half}")(x) if name else x


def scaled(block: nn.Module, half: Literal[1, 2], x: Tensor) -> Tensor:
    """What a block adds of its attention's (half 1) or MLP's (half 2) output."""
    part = getattr(block, f"{BLOCKS[type(block)][1]}{half}")
    return part(x) if isinstance(part, nn.Module) else x if part is None else part * x


def attention_output(block: Any, mixed: Tensor) -> Tensor:
    """What the heads mixed of the values (B, h, N, d), through the output projection: (B, N, D), to be added to x."""
    ours, x = isinstance(block, ResidualAttentionBlock), join_heads(mixed)
    last = block.attn.out_proj if ours else block.attn.proj
    return scaled(block, 1, linear(x if ours else block.attn.norm(x), last.weight, last.bias))


def feed_forward(block: Any, x: Tensor) -> Tensor:
    """The second half of a block, x + MLP(LN(x))."""
    hidden = normed(block, 2, x)
    if not isinstance(block, ResidualAttentionBlock):
        return x + scaled(block, 2, block.mlp(hidden))
    expand, activation, contract = cast(Any, block.mlp)
    hidden = activation(linear(hidden, expand.weight, expand.bias))
    return x + scaled(block, 2, linear(hidden, contract.weight, contract.bias))


def run_block(block: nn.Module, x: Tensor, context: Tensor | None = None, rotation: Tensor | None = None) -> Tensor:
    """A tower's block on tokens x (B, M, D), equal to `block(x)`, with rotary positions as `project` has them. With
    `context` (B, K, D), equal to the first M tokens of `block(cat([x, context], dim=1))`, at less cost."""
    return feed_forward(block, x + attention_output(block, attend(*project(block, x, context, rotation))))
