"""The model and its losses the obvious way: all maps at full size, in the logits' own type, autograd's gradients."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from sptseg.model.decoder import CrossAttentionLayer, Decoder, HighLowAttention, QueryUpdate
from sptseg.model.encoder import PromptedEncoder, SpectralPrompt
from sptseg.model.ops import resample_filter, resize_positions
from sptseg.model.readouts import OPTIONS
from sptseg.model.spt_seg import SptSeg


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def encode(encoder: PromptedEncoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """Unit patch embeddings (B, E, H, W) and image embeddings (B, E); open_clip's own blocks, no dropout."""
    clip: Any = encoder.visual
    grid = images.shape[2] // encoder.patch_size[0], images.shape[3] // encoder.patch_size[1]
    patches = F.conv2d(images, clip.conv1.weight, stride=clip.patch_size).flatten(2).transpose(1, 2)
    token = clip.class_embedding.expand(len(images), 1, -1)
    x = torch.cat([token, patches], dim=1) + resize_positions(clip.positional_embedding, clip.grid_size, grid)
    if encoder.class_embedding_twice:
        x = torch.cat([token + x[:, :1], x[:, 1:]], dim=1)
    x = clip.ln_pre(x)
    token, patches = x[:, :1], x[:, 1:]
    for i, block in enumerate(clip.transformer.resblocks):
        if i in encoder.spectral_layers:
            patches = patches + filtered(patches * token, encoder.spectral_prompt, grid)
        prompts = patches[:, :0]
        if encoder.prompts is not None and i <= encoder.prompt_depth:
            prompts = linear(encoder.prompt_projection, encoder.prompts[i]).expand(len(images), -1, -1)
        x = torch.cat([token, prompts, patches], dim=1)
        if block is clip.transformer.resblocks[-1] and encoder.readout != "plain":
            x = torch.cat([token, patches, prompts], dim=1)
            x = read_block(block, x, grid, encoder.readout, **OPTIONS[encoder.readout])
        else:
            x = block(x)
        token, patches = x[:, :1], x[:, -patches.shape[1] :]
    token, patches = (F.normalize(clip.ln_post(encoder.prompt_norm(y)) @ clip.proj, dim=-1) for y in (token, patches))
    return patches.transpose(1, 2).unflatten(2, grid), token[:, 0]


def read_block(
    block: Any, x: Tensor, grid: tuple[int, int], name: str, bare: bool, sigma: float | None = None
) -> Tensor:
    """Class token and patches after the last block of tokens x (B, 1 + N + K, D): class, patches, prompts."""
    patches, seen = grid[0] * grid[1], x.shape[1]
    near = torch.zeros(seen, seen)
    if sigma is not None:
        places = torch.tensor([(row, column) for row in range(grid[0]) for column in range(grid[1])]).float()
        near[1 : 1 + patches, 1 : 1 + patches] = torch.exp(-(torch.cdist(places, places) ** 2) / (2 * sigma**2))
    width, heads = x.shape[-1] // block.attn.num_heads, []
    for q, k, v in zip(*(part.split(width, dim=-1) for part in in_projection(block, x)), strict=True):
        q_alike, k_alike = q @ q.mT / math.sqrt(width), k @ k.mT / math.sqrt(width)
        weights = {
            "maskclip": torch.eye(seen),
            "sclip": q_alike.softmax(dim=-1) + k_alike.softmax(dim=-1),
            "clearclip": q_alike.softmax(dim=-1),
            "naclip": (k_alike + near).softmax(dim=-1),
        }
        heads.append(weights[name] @ v)
    out = block.ls_1(linear(block.attn.out_proj, torch.cat(heads, dim=-1)))
    if not bare:
        out = x + out
        out = out + block.ls_2(block.mlp(block.ln_2(out)))
    return torch.cat([block(x)[:, :1], out[:, 1 : 1 + patches]], dim=1)


def in_projection(block: Any, x: Tensor) -> tuple[Tensor, ...]:
    return F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)


def gem(clip: VisionTransformer, x: Tensor, blocks: int) -> Tensor:
    """GEM's second path beside the last blocks, with the class token of the first; x (B, 1 + N, D) after `ln_pre`."""
    block: Any
    for block in clip.transformer.resblocks[:-blocks]:
        x = block(x)
    second = x
    for block in clip.transformer.resblocks[-blocks:]:
        width, heads = x.shape[-1] // block.attn.num_heads, []
        t = block.ln_1(x).norm(dim=-1).mean(dim=1)[:, None, None] / math.sqrt(width)
        for q, k, v in zip(*(part.split(width, dim=-1) for part in in_projection(block, x)), strict=True):
            mixed = []
            for a in (v, k, q):
                a = a / a.norm(dim=-1, keepdim=True)
                a = (a @ a.mT * t).softmax(dim=-1) @ a
                a = a / a.norm(dim=-1, keepdim=True)
                mixed.append((a @ a.mT * t).softmax(dim=-1) @ v)
            heads.append(torch.stack(mixed).mean(dim=0))
        second = second + block.ls_1(linear(block.attn.out_proj, torch.cat(heads, dim=-1)))
        x = block(x)
    return torch.cat([x[:, :1], second[:, 1:]], dim=1)


def filtered(tokens: Tensor, prompt: SpectralPrompt, grid: tuple[int, int]) -> Tensor:
    """irfft2(rfft2(X) * F) of tokens (B, N, D), F being 0 outside the band."""
    weight, (low, high) = resample_filter(torch.view_as_complex(prompt.weight), prompt.grid, grid), prompt.band
    radius = torch.fft.fftfreq(grid[0])[:, None].square().add(torch.fft.rfftfreq(grid[1]).square()).sqrt()
    weight = torch.where(((low <= radius) & (radius < high))[..., None].to(weight.device), weight, 0)
    spectrum = torch.fft.rfft2(tokens.unflatten(1, grid), dim=(1, 2), norm="ortho")
    return torch.fft.irfft2(spectrum * weight, s=grid, dim=(1, 2), norm="ortho").flatten(1, 2)


def attention(query: Tensor, key: Tensor, value: Tensor, head_width: int) -> Tensor:
    """Heads one by one, side by side in the last axis of query (..., N, h * d), key and value (..., M, h * d)."""
    heads = zip(*(x.split(head_width, dim=-1) for x in (query, key, value)), strict=True)
    return torch.cat([(q @ k.mT / math.sqrt(head_width)).softmax(dim=-1) @ v for q, k, v in heads], dim=-1)


def high_low(module: HighLowAttention, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Y (B, N, E): attention inside windows, and from every token to the pooled grid; or of all tokens to all."""
    if module.full:
        query, key, value = linear(module.high_qkv, tokens).chunk(3, dim=-1)
        return attention(query, key, value, module.head_width)
    (height, width), s = grid, module.window
    x = F.pad(tokens.unflatten(1, grid), (0, 0, 0, -width % s, 0, -height % s))
    windows = x.unfold(1, s, s).unfold(2, s, s).flatten(4).mT  # (B, H/s, W/s, s², E)
    parts = []
    if module.high_width:
        query, key, value = linear(module.high_qkv, windows).chunk(3, dim=-1)
        high = attention(query, key, value, module.head_width).unflatten(3, (s, s))
        parts += [high.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :height, :width].flatten(1, 2)]
    if module.low_width:
        key, value = linear(module.low_key_value, windows.mean(dim=3).flatten(1, 2)).chunk(2, dim=-1)
        low = attention(linear(module.low_query, tokens), key, value, module.head_width)
        parts += [linear(module.low_projection, low)]
    return torch.cat(parts, dim=-1)


def updated(module: QueryUpdate, queries: Tensor, update: Tensor) -> Tensor:
    queries = module.norm_attention(queries + update)
    expand, _, _, contract = module.feedforward
    return module.norm_feedforward(queries + linear(contract, linear(expand, queries).relu()))


def decode(decoder: Decoder, patches: Tensor, image: Tensor, text: Tensor) -> Tensor:
    """Mask logits (B, C, H, W)."""
    grid, tokens = patches.shape[2:], patches.flatten(2).transpose(1, 2)
    text = text.expand(len(image), -1, -1)
    queries = linear(decoder.query_map, torch.cat([image[:, None] * text, text], dim=-1))
    layer: Any
    for layer in decoder.layers:
        if isinstance(layer, CrossAttentionLayer):
            query, key = linear(layer.query, queries), linear(layer.key, tokens)
            logits = query @ key.mT / math.sqrt(layer.head_width) / (query.shape[-1] // layer.head_width)
            if layer.update is not None:
                mixed = attention(query, key, linear(layer.value, tokens), layer.head_width)
                queries = updated(layer.update, queries, linear(layer.update_projection, mixed))
            continue
        y = high_low(layer.attention, tokens, grid)
        if layer.selection_vector is not None:
            y = F.cosine_similarity(y, layer.selection_vector, dim=-1).clamp(0, 1)[..., None] * y
        y = y @ layer.top_down + (tokens if layer.residual else 0)
        logits = queries @ y.mT
        if layer.update is not None:
            queries = updated(layer.update, queries, linear(layer.update_projection, logits.softmax(dim=-1) @ y))
    if decoder.log_scale is not None and decoder.threshold is not None:
        logits = decoder.log_scale.exp() * (logits * decoder.unit - decoder.threshold)
    return logits.unflatten(2, grid)


def mask_logits(model: SptSeg, images: Tensor, text: Tensor) -> Tensor:
    """The twin of `SptSeg.forward` of a model with a decoder, without dropout."""
    return decode(model.decoder, *encode(model.encoder, images), text)


def labels(model: SptSeg, images: Tensor, text: Tensor) -> Tensor:
    """(B, S, S')."""
    large = F.interpolate(mask_logits(model, images, text), size=images.shape[2:], mode="bilinear", align_corners=False)
    return large.sigmoid().argmax(dim=1)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Labels (B, S, S') -> targets (B, C, S, S') of 0 and 1, zeros where the label is 255."""
    return torch.stack([labels == c for c in range(classes)], dim=1).float()


def focal_loss(logits: Tensor, target: Tensor, pairs: Tensor) -> Tensor:
    """Mean over pixels, summed over (image, class), divided by `pairs`."""
    return sigmoid_focal_loss(logits, target, alpha=0.25, gamma=2.0).mean(dim=(2, 3)).sum() / pairs


def blur(maps: Tensor) -> Tensor:
    """An 11 x 11 Gaussian window, sigma 1.5, with 5 zeros of padding, on every map of (B, C, S, S')."""
    d = torch.arange(-5, 6, dtype=maps.dtype, device=maps.device)
    window = torch.exp(-(d[:, None] ** 2 + d[None] ** 2) / (2 * 1.5**2))
    window = (window / window.sum()).expand(maps.shape[1], 1, 11, 11)
    return F.conv2d(maps, window, padding=5, groups=maps.shape[1])


def ssim_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 - mean structural similarity of logits and target, over all classes and pixels."""
    x, y = blur(logits), blur(target)
    variance_x = blur(logits * logits) - x * x
    variance_y = blur(target * target) - y * y
    covariance = blur(logits * target) - x * y
    luminance = (2 * x * y + 0.01**2) / (x * x + y * y + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (variance_x + variance_y + 0.03**2)
    return 1 - (luminance * structure).mean()


def dice_loss(logits: Tensor, target: Tensor, pairs: Tensor) -> Tensor:
    """1 - (2 sum(p t) + 1) / (sum p + sum t + 1) of present (image, class) pairs, summed, divided by `pairs`."""
    p, t = logits.sigmoid().flatten(2), target.flatten(2)
    dice = (2 * (p * t).sum(dim=2) + 1) / (p.sum(dim=2) + t.sum(dim=2) + 1)
    return ((1 - dice) * t.any(dim=2)).sum() / pairs


def segmentation_loss(logits: Tensor, labels: Tensor, kind: str, *, pairs: Tensor | None = None) -> dict[str, Tensor]:
    """The twin of `sptseg.losses.segmentation_loss`, without its checks."""
    large = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    target = one_hot(labels, logits.shape[1]).to(logits.dtype)
    pairs = target.flatten(2).any(dim=2).sum().clamp(min=1) if pairs is None else pairs
    second = {"ssim": ssim_loss(large, target)} if kind == "spt" else {"dice": dice_loss(large, target, pairs)}
    terms = {"focal": 100 * focal_loss(large, target, pairs), **second}
    return {**terms, "total": torch.stack(list(terms.values())).sum()}
