"""Pre-training of the tiny CLIP on drawn pictures and their captions. No pixel label is read here.

Unlike OpenAI's CLIP, this one is trained to be dense: next to the usual contrast of image and caption, every patch must
choose among the nouns of its own caption, and every noun of the caption must win some patches.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.transformer import PatchDropout
from torch import Tensor
from tqdm import tqdm

from sptseg import scenes
from sptseg.clip import Clip, new_tiny_clip, run_block, save_tiny_clip
from sptseg.ops import resize_positions
from sptseg.transforms import IMAGENET_MEAN, IMAGENET_STD

MODIFIERS = {"a", "an", "big", "small", "bright", "dark", *scenes.COLOURS}
STREAM = 2  # first number of every pre-training picture's seed; evaluation and training pictures have others


@dataclass(frozen=True)
class Stage:
    """A part of pre-training: which pictures, how many, and which share of their patches is dropped."""

    kinds: tuple[str, ...]
    size: int
    images: int
    batch: int
    patch_dropout: float


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of `pretrain`. `pool` pictures a kind are drawn once and reused, mirrored at random."""

    seed: int = 0
    stages: tuple[Stage, ...] = (
        Stage(("thumbnail",), 64, 400_000, 256, 0.5),
        Stage(("scene", "scene", "scene", "closeup"), 128, 160_000, 64, 0.5),
        Stage(("scene", "scene", "scene", "closeup"), 128, 20_000, 64, 0.0),
    )
    pool: int = 40_000
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    coverage: float = 0.07
    dense_losses: bool = True
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)


    def scaled(self, images: int) -> PretrainConfig:
        """The same stages with about so many pictures in all."""
        if images < 1000:
            raise ValueError(f"{images} pictures are too few to pre-train on; wanted at least 1000")
        share = images / sum(stage.images for stage in self.stages)
        stages = tuple(replace(stage, images=max(stage.batch, round(stage.images * share))) for stage in self.stages)
        return replace(self, stages=stages)


def noun(phrase: str) -> str:
    """A phrase without its article and adjectives: "a big red boat" -> "boat"."""
    words = phrase.split()
    while len(words) > 1 and words[0] in MODIFIERS:
        words = words[1:]
    return " ".join(words)


@dataclass(frozen=True)
class Pool:
    """Pictures (n, size, size, 3) uint8 with their phrases."""

    images: np.ndarray
    phrases: list[tuple[str, ...]]


def draw_one(size: int, job: tuple[str, tuple[int, ...]]) -> tuple[np.ndarray, tuple[str, ...]]:
    kind, seed = job
    scene = scenes.compose(seed, size, kind)
    return scene.image, scene.phrases


def draw_pool(stage: Stage, config: PretrainConfig, number: int) -> Pool:
    """The pictures of one stage, drawn by all cores."""
    count = min(config.pool, stage.images)
    jobs = [(stage.kinds[i % len(stage.kinds)], (STREAM, config.seed, number, i)) for i in range(count)]
    images, phrases = np.empty((count, stage.size, stage.size, 3), np.uint8), []
    with multiprocessing.get_context("spawn").Pool(config.threads) as workers:
        drawn = workers.imap(partial(draw_one, stage.size), jobs, chunksize=256)
        for i, (image, words) in enumerate(tqdm(drawn, total=count, desc="drawing", mininterval=5)):
            images[i] = image
            phrases.append(words)
    return Pool(images, phrases)


def batches(pool: Pool, stage: Stage, rng: np.random.Generator) -> Iterator[tuple[Tensor, list[tuple[str, ...]]]]:
    """Normalised batches (B, 3, S, S), mirrored at random, with their phrases in random order."""
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (IMAGENET_MEAN, IMAGENET_STD))
    while True:
        order = rng.permutation(len(pool.images))
        for start in range(0, len(order) - stage.batch + 1, stage.batch):
            chosen = order[start : start + stage.batch]
            images = torch.from_numpy(pool.images[chosen]).permute(0, 3, 1, 2)
            mirrored = torch.from_numpy(rng.random(stage.batch) < 0.5)
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
            phrases = [tuple(rng.permutation(pool.phrases[i]).tolist()) for i in chosen]
            yield (images - mean) / std, phrases


def embed_images(clip: Clip, images: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
    """Unit patch embeddings (B, N', E) and image embeddings (B, E); a share `dropout` of the patches is left out."""
    visual = clip.visual
    patch, size = visual.patch_size[0], images.shape[-1]
    grid = (size // patch, size // patch)
    x = images.view(len(images), 3, grid[0], patch, grid[1], patch).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    x = F.linear(x, visual.conv1.weight.flatten(1))  # the patch convolution as one matrix product: faster to train
    token = visual.class_embedding.expand(len(x), 1, -1).to(x.dtype)
    x = torch.cat([token, x], dim=1) + resize_positions(visual.positional_embedding, visual.grid_size, grid)
    x = visual.ln_pre(PatchDropout(dropout)(x) if dropout else x)
    for block in visual.transformer.resblocks:
        x = run_block(block, x)
    x = F.normalize((visual.ln_post(x) @ visual.proj).float(), dim=-1)
    return x[:, 1:], x[:, 0]


def embed_texts(clip: Clip, texts: Sequence[str]) -> Tensor:
    """Unit text embeddings (n, E); open_clip's `encode_text` on sequences cut to the longest text."""
    tokens = clip.tokenizer(texts)
    length = int((tokens != 0).sum(dim=1).max())
    tokens, model = tokens[:, :length], clip.model
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    x = x[torch.arange(len(x)), tokens.argmax(dim=1)] @ model.text_projection
    return F.normalize(x.float(), dim=-1)


def contrast(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of unit embeddings a, b (B, E)."""
    logits, target = scale * a @ b.T, torch.arange(len(a))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def dense_loss(patches: Tensor, nouns: Tensor, present: Tensor, scale: Tensor, coverage: float) -> Tensor:
    """Patches choose among their caption's nouns, and each noun of the caption wins its best `coverage` of patches.

    patches (B, N, E), nouns (V, E), present (B, V) bool.
    """
    log_p = (scale * patches @ nouns.T).log_softmax(dim=-1)  # (B, N, V)
    own = log_p.masked_fill(~present[:, None], -torch.inf).logsumexp(dim=-1)
    best = log_p.topk(math.ceil(coverage * patches.shape[1]), dim=1).values.mean(dim=1)  # (B, V)
    return -own.mean() - best[present].mean()


def phrase_loss(patches: Tensor, phrases: Tensor, owner: Tensor, scale: Tensor) -> Tensor:
    """Each phrase picks the pictures whose captions hold it, by its soft-best patch. phrases (P, E), owner (P, B) bool."""
    similarity = scale * torch.einsum("bne,pe->pbn", patches, phrases)
    scores = (similarity.softmax(dim=-1) * similarity).sum(dim=-1)  # (P, B)
    return -(scores.masked_fill(~owner, -torch.inf).logsumexp(dim=1) - scores.logsumexp(dim=1)).mean()


def caption_losses(
    clip: Clip, patches: Tensor, image: Tensor, phrases: Sequence[tuple[str, ...]], rng: np.random.Generator, config: PretrainConfig
) -> dict[str, Tensor]:
    """All loss terms of a batch of embedded pictures and their captions' phrases."""
    scale = clip.model.logit_scale.exp().clamp(max=100)
    captions = embed_texts(clip, [", ".join(words) for words in phrases])
    losses = {"image": contrast(image, captions, scale)}
    if not config.dense_losses:
        return losses
    losses["mean_patch"] = contrast(F.normalize(patches.mean(dim=1), dim=-1), captions, scale)
    nouns = sorted({noun(phrase) for words in phrases for phrase in words})
    position = {name: i for i, name in enumerate(nouns)}
    present = torch.zeros(len(phrases), len(nouns), dtype=torch.bool)
    for row, words in zip(present, phrases, strict=True):
        row[[position[noun(phrase)] for phrase in words]] = True
    template = scenes.TEMPLATES[rng.integers(len(scenes.TEMPLATES))]
    losses["dense"] = dense_loss(patches, embed_texts(clip, [template.format(n) for n in nouns]), present, scale, config.coverage)
    unique = sorted({phrase for words in phrases for phrase in words})
    unique = [unique[i] for i in rng.permutation(len(unique))[:96]]
    owner = torch.tensor([[phrase in words for words in phrases] for phrase in unique])
    losses["phrase"] = phrase_loss(patches, embed_texts(clip, unique), owner, scale)
    return losses


def pretrain(config: PretrainConfig, output: str | Path) -> Clip:
    """Pre-trains a tiny CLIP and writes it to `output` (safetensors, float16).

    Every 500 steps the state goes to `output` + ".state"; a run that finds one there goes on from it.
    """
    output = Path(output)
    state_file, history_file = output.with_suffix(".state"), output.with_suffix(".jsonl")
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    clip = new_tiny_clip(scenes.WORDS)
    decay = [p for p in clip.model.parameters() if p.ndim >= 2]
    rest = [p for p in clip.model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))
    work = [stage.images * stage.size**2 for stage in config.stages]  # the learning rate falls with pixels seen
    done_step, done_work = 0, 0.0
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        clip.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done_step = state["step"]
    step, began = 0, time.perf_counter()
    for number, stage in enumerate(config.stages):
        steps = stage.images // stage.batch
        if step + steps <= done_step:
            step, done_work = step + steps, done_work + work[number]
            continue
        pool = draw_pool(stage, config, number)
        rng = np.random.default_rng((config.seed, number, done_step))
        source = batches(pool, stage, rng)
        for i in (bar := tqdm(range(steps), desc=f"stage {number + 1} of {len(config.stages)}", mininterval=5)):
            step += 1
            if step <= done_step:
                continue
            progress = (done_work + work[number] * i / steps) / sum(work)
            rate = config.learning_rate * min(1.0, step / 500) * (0.5 + 0.5 * math.cos(math.pi * progress))
            for group in optimizer.param_groups:
                group["lr"] = rate
            images, phrases = next(source)
            with torch.autocast("cpu", torch.bfloat16):
                patches, image = embed_images(clip, images, stage.patch_dropout)
            losses = caption_losses(clip, patches, image, phrases, rng, config)
            optimizer.zero_grad(set_to_none=True)
            torch.stack(list(losses.values())).sum().backward()
            torch.nn.utils.clip_grad_norm_(clip.model.parameters(), 1.0)
            optimizer.step()
            if step % 50 == 0:
                values = {name: round(value.item(), 4) for name, value in losses.items()}
                bar.set_postfix(values)
                row = {"step": step, "stage": number, "seconds": round(time.perf_counter() - began, 1), "lr": rate, **values}
                with history_file.open("a") as file:
                    print(json.dumps(row), file=file)
            if step % 500 == 0 or (number == len(config.stages) - 1 and i == steps - 1):
                state = {"model": clip.model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save(state, state_file.with_suffix(".part"))
                state_file.with_suffix(".part").replace(state_file)
        done_work += work[number]
    clip.model.eval().requires_grad_(False)
    save_tiny_clip(clip, output)
    return clip
