"""The prompted image encoder: open_clip's own image tower, frozen, with deep prompts and spectral prompts."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sptseg.model.config import ModelConfig
from sptseg.model.ops import Grid, fourier_filter, radial_frequency, resample_filter
from sptseg.model.readouts import OPTIONS, ReadOut, gem, read_block
from sptseg.model.towers import Tower, embed, embeddings, grid_of, run_block, tower


class SpectralPrompt(nn.Module):
    """Adds to the patch tokens X (B, H, W, D) a filtered version of them, gated by the class token c (B, 1, 1, D):

        S = irfft2( rfft2(X * c) * F ),   X <- X + S

    F is learned, complex, one per channel, shared by all layers that use it. Source: paper, section "Spectral Prompt
    Tuning" (the gate by the class token is in the released code). `weight` holds F as real numbers (H, W//2+1, D, 2)
    for its own grid; on others F is resampled (ours). Outside `band`, low <= r < high in cycles per token, F is 0."""

    def __init__(self, grid: Grid, width: int, band: tuple[float, float] = (0.0, 1.0)) -> None:
        super().__init__()
        self.grid = grid
        self.band = band
        self.weight = nn.Parameter(0.02 * torch.randn(grid[0], grid[1] // 2 + 1, width, 2))

    def filter(self, grid: Grid) -> Tensor:
        """F for a grid: (H, W//2+1, D) complex64."""
        weight = resample_filter(torch.view_as_complex(self.weight.float()), self.grid, grid)
        radius = radial_frequency(grid, weight.device)
        return weight * ((radius >= self.band[0]) & (radius < self.band[1]))[..., None]

    def forward(self, patches: Tensor, class_token: Tensor, weight: Tensor) -> Tensor:
        return patches + fourier_filter(patches * class_token[:, None, None], weight)


class PromptedEncoder(nn.Module):
    """A frozen image tower whose blocks see learned prompts.

    Trained: `prompts` (1 + depth, K, D), their shared `prompt_projection`, `prompt_norm` and `spectral_prompt`.
    `visual`, open_clip's image tower of width D (see `towers`), is frozen and stays in evaluation mode. With
    `config.class_embedding_twice` token 0 is class embedding + (class embedding + its position), as in the released
    code; otherwise CLIP's own class token, if it has one."""

    prompts: nn.Parameter | None
    spectral_prompt: SpectralPrompt | None

    def __init__(self, visual: nn.Module, config: ModelConfig) -> None:
        super().__init__()
        self.visual = visual.requires_grad_(False).eval()
        width, layers, spectral_layers = self.tower.positions.shape[1], len(self.tower.blocks), config.spectral_layers
        prompt_depth = layers - 1 if config.prompt_depth is None else config.prompt_depth
        if not 0 <= prompt_depth < layers:
            raise ValueError(f"prompt_depth is {prompt_depth}; this CLIP has {layers} blocks, so 0 to {layers - 1} go")
        if not set(spectral_layers) <= set(range(layers)):
            raise ValueError(f"spectral_layers is {spectral_layers}; this CLIP has the blocks 0 to {layers - 1}")
        if spectral_layers and self.tower.class_token is None:
            raise ValueError(f"spectral_layers is {spectral_layers}; this CLIP has no class token: wanted ()")
        self.checkpointing = False  # gradient checkpointing: blocks run again in the backward pass, nothing is kept
        self.visit: Callable[[int, Tensor], Tensor] | None = None  # sees or changes block i's patch tokens (B, H, W, D)
        self.readout: ReadOut = config.readout
        self.bicubic = config.bicubic
        self.prompt_depth = prompt_depth
        self.spectral_layers = frozenset(spectral_layers)
        self.class_embedding_twice = config.class_embedding_twice
        self.prompts = self.spectral_prompt = None
        if config.prompt_tokens:
            bound = math.sqrt(6 / (3 * math.prod(self.patch_size) + width))
            self.prompts = nn.Parameter(torch.empty(1 + prompt_depth, config.prompt_tokens, width))
            nn.init.uniform_(self.prompts, -bound, bound)
            self.prompt_projection = nn.Linear(width, width)
            nn.init.kaiming_normal_(self.prompt_projection.weight, mode="fan_out")
            self.prompt_dropout = nn.Dropout(config.dropout)
        if self.spectral_layers:
            rows, columns = (side // patch for side, patch in zip(config.image_size, self.patch_size, strict=True))
            self.spectral_prompt = SpectralPrompt((rows, columns), width, config.spectral_band)
            self.spectral_prompt.requires_grad_(config.spectral_trained)
        self.prompt_norm = nn.LayerNorm(width, eps=1e-6)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.visual.eval()  # frozen parts never train, whatever the mode
        return self

    @property
    def tower(self) -> Tower:
        return tower(self.visual)

    @property
    def patch_size(self) -> Grid:
        return self.tower.patch_size

    def grid_of(self, images: Tensor) -> Grid:
        """The token grid of images (B, 3, height, width)."""
        return grid_of(self.visual, images)

    def embed(self, images: Tensor) -> Tensor:
        """Tokens before the first block (B, P + N, D), P = 1 class token or 0."""
        return embed(self.visual, images, class_embedding_twice=self.class_embedding_twice, bicubic=self.bicubic)

    def states(self, images: Tensor, *, of_prompts: bool = True) -> Iterator[Tensor]:
        """Tokens after every block: (B, P + K + N, D) while the block has prompts, else (B, P + N, D).

        Nothing reads what a block makes of its prompts: without `of_prompts` it makes keys and values of them only, and
        the tokens are always (B, P + N, D), after the last block as `read_block` gives them."""
        grid, parts = self.grid_of(images), self.tower
        x, rotation = self.embed(images), parts.rotation(grid)
        first = x.shape[1] - math.prod(grid)
        class_token, patches = x[:, :first], x[:, first:]
        prompt, visit = self.spectral_prompt, self.visit
        weight = None if prompt is None else prompt.filter(grid)
        projected = None if self.prompts is None else self.prompt_projection(self.prompts)  # (1 + depth, K, D)
        for i, block in enumerate(parts.blocks):
            if prompt is not None and i in self.spectral_layers:
                on_grid = patches.unflatten(1, grid)  # (B, H, W, D)
                patches = prompt(on_grid, class_token[:, 0], weight).flatten(1, 2)
            if visit is not None:
                patches = visit(i, patches.unflatten(1, grid)).flatten(1, 2)
            context, among = None, []
            if projected is not None and i <= self.prompt_depth:
                context = self.prompt_dropout(projected[i].expand(len(patches), -1, -1)).to(patches.dtype)
                context, among = (None, [context]) if of_prompts else (context, [])
            tokens, run = torch.cat([class_token, *among, patches], dim=1), run_block
            if block is parts.blocks[-1] and not of_prompts:
                chosen = OPTIONS[self.readout]
                run = partial(read_block, grid=grid, name=self.readout, pooled=parts.pooled, **chosen)
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(run, block, tokens, context, rotation, use_reentrant=False, preserve_rng_state=False)
            else:
                x = run(block, tokens, context, rotation)
            yield x
            class_token, patches = x[:, :first], x[:, -patches.shape[1] :]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images (B, 3, S, S') -> unit patch embeddings (B, E, H, W), unit image embeddings (B, E)."""
        grid = self.grid_of(images)
        if self.readout == "gem":  # which has no prompts, see `ModelConfig`
            x = gem(self.tower, self.embed(images), grid)
        else:
            x = deque(self.states(images, of_prompts=False), maxlen=1)[0]  # the last; those before are not kept
        x = x.to(self.prompt_norm.weight.dtype)  # CPUs add up its gradients in x's own
        return embeddings(self.visual, x, grid, self.prompt_norm)
