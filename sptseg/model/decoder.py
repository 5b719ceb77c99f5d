"""From class queries and patch embeddings to mask logits: the spectral guided decoder and ZegCLIP's decoder.

Symbols: B batch, N = H * W tokens, E embedding width, C classes, h heads of width d = E / h."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sptseg.model import ops
from sptseg.model.config import Branches, ModelConfig
from sptseg.model.ops import Grid, attend, grid_to_tokens, join_heads, linear, split_heads, tokens_to_grid

LOW_FREQUENCY_SHARE = 0.9
START_THRESHOLD = 0.3  # cosine of patch and text at which a dense start says "maybe"; learned from there


class Linear(nn.Linear):  # torch's, by `ops.linear`
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def products(queries: Tensor, features: Tensor) -> Tensor:
    """Dot products of queries (..., C, d) and features (..., N, d): (..., C, N), float32 also of narrower types and
    under autocast, which would round logits to 8 bits: that moves a first loss by a percent."""
    with torch.autocast(queries.device.type, enabled=False):
        return queries.float() @ features.float().transpose(-2, -1)


class HighLowAttention(nn.Module):
    """Splits attention into a high-frequency and a low-frequency branch over a grid of tokens.

    High: h_hi heads attend inside s x s windows, where neighbours differ in fine detail. Low: h_lo heads attend from
    every token to the average-pooled grid, where only slow changes are left. Source: paper, "Spectral Guided Decode
    Layer", after LITv2's HiLo attention; released code: h_lo = floor(0.9 h), s = 3, zero padding is pooled as well.

    Ours: `branches` "high" or "low" gives one of them all heads; "full" is ordinary attention of all tokens to all."""

    def __init__(self, width: int, heads: int, window: int, branches: Branches = "high_low") -> None:
        super().__init__()
        low_heads = {"high_low": math.floor(LOW_FREQUENCY_SHARE * heads), "low": heads}.get(branches, 0)
        self.full = branches == "full"
        self.head_width = width // heads
        self.window = window
        self.low_width = low_heads * self.head_width
        self.high_width = width - self.low_width
        if self.high_width:
            self.high_qkv = Linear(width, 3 * self.high_width, bias=False)
        if self.low_width:
            self.low_query = Linear(width, self.low_width, bias=False)
            self.low_key_value = Linear(width, 2 * self.low_width, bias=False)
            self.low_projection = Linear(self.low_width, self.low_width)

    def high(self, x: Tensor) -> Tensor:
        """Padded grid (B, H, W, E) -> (B, H, W, h_hi * d)."""
        windows = ops.to_windows(self.high_qkv(x), self.window)
        query, key, value = split_heads(windows, 3, self.head_width)
        attended = join_heads(attend(query, key, value))
        return ops.from_windows(attended, self.window, (x.shape[1], x.shape[2]))

    def low(self, x: Tensor) -> Tensor:
        """Padded grid (B, H, W, E) -> (B, H, W, h_lo * d)."""
        pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), self.window)
        (query,) = split_heads(self.low_query(x.flatten(1, 2)), 1, self.head_width)
        key, value = split_heads(self.low_key_value(grid_to_tokens(pooled)), 2, self.head_width)
        attended = join_heads(attend(query, key, value))
        return self.low_projection(attended).unflatten(1, x.shape[1:3])

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """(B, N, E) -> (B, N, E): high-frequency channels first, then low-frequency ones."""
        if self.full:
            return join_heads(attend(*split_heads(self.high_qkv(tokens), 3, self.head_width)))
        height, width = grid
        padded = ops.pad_to_multiple(tokens.unflatten(1, grid), self.window)
        widths = {self.high: self.high_width, self.low: self.low_width}
        both = torch.cat([branch(padded) for branch, wide in widths.items() if wide], dim=-1)
        return both[:, :height, :width].flatten(1, 2)


class QueryUpdate(nn.Module):
    """q <- LN(q + dropout(U)); q <- LN(q + dropout(FFN(q))), the FFN E -> 4E -> E with ReLU; with `norms` "rms" (ours)
    RMS norms stand for the layer norms, which would take the mean out of a query."""

    def __init__(self, width: int, config: ModelConfig) -> None:
        super().__init__()
        norm = nn.RMSNorm if config.norms == "rms" else nn.LayerNorm
        self.dropout = nn.Dropout(config.dropout)
        self.feedforward = nn.Sequential(Linear(width, 4 * width), nn.ReLU(), self.dropout, Linear(4 * width, width))
        self.norm_attention = norm(width)
        self.norm_feedforward = norm(width)

    def forward(self, queries: Tensor, update: Tensor) -> Tensor:
        kept = self.norm_attention.weight.dtype  # autocast would hand the norms another
        queries = self.norm_attention((queries + self.dropout(update)).to(kept))
        return self.norm_feedforward((queries + self.dropout(self.feedforward(queries))).to(kept))


class SpectralGuidedLayer(nn.Module):
    """One layer of the spectral guided decoder (SGD).

    Y = HiLo(X); with `selection`, Y <- (clamp(cos(Y, xi), 0, 1) Y) T, the paper's top-down selection; mask logits
    A = Y q, not scaled; then q is updated from softmax_N(A) Y, but in the last layer. With `residual` (ours)
    Y <- X + Y T instead, T starting at zero."""

    def __init__(self, width: int, config: ModelConfig, last: bool) -> None:
        super().__init__()
        self.attention = HighLowAttention(width, config.decoder_heads, config.decoder_window, config.branches)
        self.selection_vector = nn.Parameter(torch.randn(width)) if config.selection else None
        self.top_down = nn.Parameter(torch.zeros(width, width) if config.residual else torch.eye(width))
        self.residual = config.residual
        self.attention_dropout = nn.Dropout(config.dropout)
        self.update_projection = None if last else Linear(width, width)
        self.update = None if last else QueryUpdate(width, config)

    def selected(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Y after the selection, before T: (B, N, E)."""
        y = self.attention(tokens, grid)
        if self.selection_vector is not None:
            mask = F.cosine_similarity(y.float(), self.selection_vector.float(), dim=-1).clamp(0, 1)
            y = mask.to(y.dtype)[..., None] * y
        return y

    def forward(self, queries: Tensor, tokens: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Queries (B, C, E), tokens (B, N, E) -> queries for the next layer (B, C, E), mask logits (B, C, N)."""
        y = self.selected(tokens, grid)
        mask_logits = products(queries @ self.top_down.T, y)  # (Y T) q = Y (T q): there are fewer queries than tokens
        if self.residual:
            mask_logits = mask_logits + products(queries, tokens)
        if self.update is not None and self.update_projection is not None:
            weights = self.attention_dropout(mask_logits.softmax(dim=-1)).to(y.dtype)
            update = (weights @ y) @ self.top_down
            if self.residual:
                update = update + weights @ tokens
            queries = self.update(queries, self.update_projection(update))
        return queries, mask_logits


class CrossAttentionLayer(nn.Module):
    """One layer of ZegCLIP's decoder: cross-attention from queries to patches; mask logits are its scaled dot products,
    averaged over the heads. The last layer gives logits only."""

    def __init__(self, width: int, config: ModelConfig, last: bool) -> None:
        super().__init__()
        self.head_width = width // config.decoder_heads
        self.query = Linear(width, width)
        self.key = Linear(width, width)
        self.value = None if last else Linear(width, width)
        self.update_projection = None if last else Linear(width, width)
        self.update = None if last else QueryUpdate(width, config)

    def forward(self, queries: Tensor, tokens: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Queries (B, C, E), tokens (B, N, E) -> queries for the next layer (B, C, E), mask logits (B, C, N)."""
        (query,) = split_heads(self.query(queries), 1, self.head_width)
        (key,) = split_heads(self.key(tokens), 1, self.head_width)
        per_head = products(query, key) * self.head_width**-0.5  # (B, h, C, N)
        if self.update is not None and self.value is not None and self.update_projection is not None:
            (value,) = split_heads(self.value(tokens), 1, self.head_width)
            update = join_heads(per_head.softmax(dim=-1).to(value.dtype) @ value)
            queries = self.update(queries, self.update_projection(update))
        return queries, per_head.mean(dim=1)


class Decoder(nn.Module):
    """Class queries from text, then layers that turn queries and patch embeddings into mask logits.

    Query of class c ("relationship descriptor", ZegCLIP): q_c = Linear_{2E->E}([g * T_c, T_c]) with the image embedding
    g and the text embedding T_c. Fields of its configuration that are explained here:

    start: the first weights: "random" as in the released code (truncated normal 0.02), or "dense_clip" (ours): queries
        start as T_c, query updates at zero, ZegCLIP's projections as the identity.
    residual: a spectral layer's output is X + Y T, T starting at zero, instead of Y T (ours).
    norms: of the query updates, "layer" (paper) or "rms" (ours), which leave a query its direction.
    logit_scale: a learned scale and threshold turn logits A into scale * (A * unit - threshold), A * unit being a
        cosine and the scale starting as CLIP's, `clip_scale` (ours). With all four, first logits are dense CLIP's."""

    def __init__(self, width: int, config: ModelConfig, clip_scale: float) -> None:
        super().__init__()
        config = replace(config, **config.of_decoder())
        heads, layers = config.decoder_heads, config.decoder_layers
        if width % heads:
            raise ValueError(f"the embedding width {width} is no multiple of decoder_heads {heads}; choose a divisor")
        if config.decoder == "spectral" and heads < 2:
            raise ValueError(f"the spectral decoder needs at least 2 heads, one for each branch, got {heads}")
        self.query_map = Linear(2 * width, width)
        kind = SpectralGuidedLayer if config.decoder == "spectral" else CrossAttentionLayer
        self.layers = nn.ModuleList(kind(width, config, last=i == layers - 1) for i in range(layers))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if config.start == "dense_clip":
            self.start_as_dense_clip(width)
        self.log_scale = self.threshold = None
        if config.logit_scale:
            self.log_scale = nn.Parameter(torch.tensor(math.log(clip_scale)))
            self.threshold = nn.Parameter(torch.tensor(START_THRESHOLD))
            self.unit = 1 / math.sqrt(width) if layers > 1 else 1.0  # the norms give queries the length sqrt(E)
            if config.decoder == "cross_attention":
                self.unit *= heads * math.sqrt(width / heads)  # its logits are mean dot products over heads, scaled

    @torch.no_grad()
    def start_as_dense_clip(self, width: int) -> None:
        self.query_map.weight.copy_(torch.cat([torch.zeros(width, width), torch.eye(width)], dim=1))
        layer: Any
        for layer in self.layers[:-1]:  # the last has no query update
            nn.init.zeros_(layer.update_projection.weight)
            nn.init.zeros_(layer.update.feedforward[-1].weight)
        for layer in self.layers:
            if isinstance(layer, CrossAttentionLayer):
                layer.query.weight.copy_(torch.eye(width))
                layer.key.weight.copy_(torch.eye(width))

    def queries(self, image: Tensor, text: Tensor) -> Tensor:
        """Image embeddings (B, E), text (C, E) -> class queries (B, C, E)."""
        text = text.to(image.dtype).expand(len(image), -1, -1)
        return self.query_map(torch.cat([image[:, None] * text, text], dim=-1))

    def states(self, patches: Tensor, image: Tensor, text: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(queries (B, C, E) after the layer, its mask logits (B, C, N)) of every layer, without the final scale."""
        tokens, grid = grid_to_tokens(patches), (patches.shape[2], patches.shape[3])
        queries = self.queries(image, text)
        for layer in self.layers:
            queries, mask_logits = layer(queries, tokens, grid)
            yield queries, mask_logits

    def forward(self, patches: Tensor, image: Tensor, text: Tensor) -> Tensor:
        """Patches (B, E, H, W), image (B, E), text (C, E) -> mask logits of the last layer (B, C, H, W)."""
        mask_logits = [mask_logits for _, mask_logits in self.states(patches, image, text)][-1]
        if self.log_scale is not None and self.threshold is not None:
            mask_logits = self.log_scale.exp() * (mask_logits * self.unit - self.threshold)
        return tokens_to_grid(mask_logits.transpose(1, 2), (patches.shape[2], patches.shape[3]))
