"""Training-free read-outs: ways to read the last block of a frozen CLIP so that each patch speaks for itself.

OpenAI's CLIP was trained to speak through its class token alone: read plainly, its patches attend to much that is not
there. The read-outs let them attend to those that are like them, by the queries, keys and values of CLIP's own blocks.

Symbols: B pictures, N = H * W patches, D width of the tower, h heads of width d = D / h, E embedding width; S(a) is the
scaled product of a with itself, a aᵀ / sqrt(d). "Bare": the block's residual and its MLP are left out."""

from functools import lru_cache
from typing import Any, Literal

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sptseg.model import towers
from sptseg.model.clip import TINY
from sptseg.model.ops import Grid, attend, attend_by
from sptseg.model.towers import Tower, attention_output, embed, feed_forward, grid_of, project, run_block, tower

ReadOut = Literal["plain", "maskclip", "sclip", "clearclip", "naclip", "gem"]
OPTIONS: dict[str, dict[str, Any]] = {  # and their defaults
    "plain": {}, "maskclip": {"bare": False}, "sclip": {"bare": False}, "clearclip": {"bare": True},
    "naclip": {"bare": True, "sigma": 5.0}, "gem": {"blocks": None},
}  # fmt: skip
GEM_BLOCKS = 6
CLASS_TOKEN = slice(0, 1)


def default_readout(clip: str) -> ReadOut:
    """What reads a CLIP that nothing was trained on: NACLIP; plain for the tiny CLIP, whose patches were trained, and
    under an attention pool, where a patch keeps its own value (see `towers`) and no read-out of the block is published.

    With OpenAI's ViT-B/16 NACLIP has the highest mean mIoU of the papers' own tables over seven data sets: 40.3 (SCLIP
    39.8, ClearCLIP 38.8, GEM 37.8, plain 12.6)."""
    config: Any = open_clip.get_model_config(clip) if clip in open_clip.list_models() else None
    return "plain" if clip == TINY or (config and config["vision_cfg"].get("timm_pool") == "map") else "naclip"


def read_out(
    visual: nn.Module, images: Tensor, name: str, *, bicubic: bool = False, **options: Any
) -> tuple[Tensor, Tensor]:
    """Unit patch embeddings (B, E, H, W) by a read-out, and CLIP's own unit image embeddings (B, E), whichever it is.

    Args:
        visual: open_clip's image tower, of L blocks.
        images: normalised pictures (B, 3, height, width), both sides multiples of the patch size.
        name: the last block's attention A and what else it changes:
            "plain": CLIP's own block.
            "maskclip": A = 1, each patch keeps its own value (MaskCLIP, ECCV 2022).
            "sclip": A = softmax(S(q)) + softmax(S(k)) (SCLIP, ECCV 2024).
            "clearclip": A = softmax(S(q)), bare (ClearCLIP, ECCV 2024).
            "naclip": A = softmax(S(k) + G), bare, G being high between neighbours, see `gaussian` (NACLIP, WACV 2025).
            "gem": a second path beside the last blocks, see `gem` (GEM, CVPR 2024).
        bicubic: resize position embeddings bicubically, as those papers do, instead of bilinearly.
        options: `bare` (all but plain and gem); `sigma` (naclip: in patches; None leaves G out); `blocks` (gem: how
            many of the last blocks get the second path; by default 6, or all if there are fewer)."""
    towers.check_visual("this model", visual)
    if name not in OPTIONS or not options.keys() <= OPTIONS[name].keys():
        known = ", ".join(f"{each} ({', '.join(its) or 'no options'})" for each, its in OPTIONS.items())
        raise ValueError(f"there is no read-out {name!r} with {', '.join(options) or 'no options'}; choose {known}")
    chosen = OPTIONS[name] | options
    if chosen.get("sigma") is not None and not chosen["sigma"] > 0:
        raise ValueError(f"sigma is {chosen['sigma']}; wanted more than 0 patches, or None for no spatial term")
    grid, x, parts = grid_of(visual, images), embed(visual, images, bicubic=bicubic), tower(visual)
    if name == "gem":
        return towers.embeddings(visual, gem(parts, x, grid, **chosen), grid)
    rotation = parts.rotation(grid)
    for block in parts.blocks[:-1]:
        x = run_block(block, x, rotation=rotation)
    x = read_block(parts.blocks[-1], x, rotation=rotation, grid=grid, name=name, pooled=parts.pooled, **chosen)
    return towers.embeddings(visual, x, grid)


def read_block(
    block: nn.Module,
    x: Tensor,
    context: Tensor | None = None,
    rotation: Tensor | None = None,
    *,
    grid: Grid,
    name: str,
    bare: bool = False,
    sigma: float | None = None,
    pooled: slice = CLASS_TOKEN,
) -> Tensor:
    """The last block by any read-out but GEM: tokens x (B, P + N, D), a class token first -> (B, M + N, D).

    The last N are patches as the read-out has them; the M before them are the tokens `pooled` of x, from which the
    image embedding is read (the class token, or all P + N), as the block itself makes them. A `context` (B, K, D), such
    as prompts, is seen by patches as further tokens without a place on the grid. `rotation` as in `project`."""
    count = grid[0] * grid[1]
    if name == "plain":
        x = run_block(block, x, context, rotation)
        return x if pooled == CLASS_TOKEN else torch.cat([x[:, pooled], x[:, -count:]], dim=1)
    query, key, value = project(block, x if context is None else torch.cat([context, x], dim=1), rotation=rotation)
    if name == "maskclip":
        mixed = value[:, :, -count:]
    else:
        alike, bias = {"sclip": (query, key), "clearclip": (query,), "naclip": (key,)}[name], None
        if sigma is not None:
            near = gaussian(grid, sigma, key.device, key.dtype)[1:, 1:]
            bias = F.pad(near, (key.shape[2] - count, 0))  # 0 for keys off the grid, which come first
        mixed = attend_by([(a[:, :, -count:], a) for a in alike], value, bias)
    looking = query[:, :, -x.shape[1] :][:, :, pooled]
    output = attention_output(block, torch.cat([attend(looking, key, value), mixed], dim=2))
    x = torch.cat([x[:, pooled], x[:, -count:]], dim=1)
    if not bare:
        return feed_forward(block, x + output)
    return torch.cat([feed_forward(block, (x + output)[:, :-count]), output[:, -count:]], dim=1)


@lru_cache(maxsize=4)
def gaussian(grid: Grid, sigma: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """NACLIP's G (1 + N, 1 + N): exp(-|p_i - p_j|² / (2 sigma²)) for patches at p, 0 to and from the class token."""
    with torch.inference_mode(False):  # what is kept may be needed under autograd
        axes = [torch.arange(length, device=device, dtype=torch.float32) for length in grid]
        rows, columns = (torch.exp(-((axis[:, None] - axis) ** 2) / (2 * sigma**2)) for axis in axes)
        return F.pad(torch.kron(rows, columns), (1, 0, 1, 0)).to(dtype)


def gem(parts: Tower, x: Tensor, grid: Grid, blocks: int | None = None) -> Tensor:
    """GEM: tokens x (B, P + N, D) of a tower before the first block -> (B, M + N, D), patches of the second path.

    Beside the last `blocks` the second path adds up, from the same input, what self-self attention makes of the first
    path's tokens, without any MLP: the mean over a = v, k, q of softmax(a aᵀ t) v, where a is made unit, replaced by
    softmax(a aᵀ t) a and made unit again, and t is the tokens' mean length after the layer norm, over sqrt(d)."""
    rotation, pooled, layers = parts.rotation(grid), parts.pooled, len(parts.blocks)
    count = min(GEM_BLOCKS, layers) if blocks is None else blocks
    if not 1 <= count <= layers:
        raise ValueError(f"blocks is {blocks}; this CLIP has {layers}, so 1 to {layers} go")
    for block in parts.blocks[:-count]:
        x = run_block(block, x, rotation=rotation)
    second = x
    for i, block in enumerate(parts.blocks[-count:], start=1):
        query, key, value = project(block, x, rotation=rotation)
        length = towers.normed(block, 1, x).norm(dim=-1).mean(dim=1)[:, None, None, None]
        units = [unit(a) for a in (value, key, query)]
        clustered = [unit(attend(a * length, a, a)) for a in units]
        second = second + attention_output(block, attend_by([(a * length, a) for a in clustered], value) / 3)
        if i == count:  # of the last block's own path, only what the image embedding is made of is read
            x, query = x[:, pooled], query[:, :, pooled]
        x = feed_forward(block, x + attention_output(block, attend(query, key, value)))
    return torch.cat([x, second[:, -grid[0] * grid[1] :]], dim=1)


def unit(a: Tensor) -> Tensor:
    return F.normalize(a.float(), dim=-1).to(a.dtype)
