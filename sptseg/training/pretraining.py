"""Pre-training of the tiny CLIP on drawn pictures and their captions. No pixel label is read here.

Unlike OpenAI's CLIP, this one is trained to be dense: next to the usual contrast of image and caption, every patch must
choose among the nouns of its own caption, every noun of the caption must win some patches, and in the end each patch
must stand by what it says in a small window."""

import json
import math
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.transformer import PatchDropout
from torch import Tensor
from tqdm import tqdm

from sptseg import scenes
from sptseg.datasets import IMAGENET_MEAN, IMAGENET_STD
from sptseg.model import Clip, from_windows, new_tiny_clip, resize_positions, run_block, save_tiny_clip, to_windows
from sptseg.system import cores, ended_helpers, output_place
from sptseg.training.state import read_tensors, write_tensors

STREAM = 2  # first number of every pre-training picture's seed; evaluation and training pictures have others
Phrases = tuple[str, ...]  # a caption's


@dataclass(frozen=True)
class Stage:
    """A part of pre-training."""

    kinds: tuple[scenes.Kind, ...]  # of its pictures
    size: int
    images: int
    batch: int
    rates: tuple[float, float]  # learning rate at the beginning and the end, a half cosine between
    patch_dropout: float = 0.5  # share of the patches left out
    coverage: float = 0.07  # share of the patches that each noun of the caption must win
    local_window: int = 0  # patches a side of the windows of `local_losses`; 0: none


MIXED: tuple[scenes.Kind, ...] = ("scene", "scene", "scene", "closeup")


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of `pretrain`. `pool` pictures a stage are drawn once and reused, mirrored at random."""

    seed: int = 0
    stages: tuple[Stage, ...] = (
        Stage(("thumbnail",), 64, 400_000, 256, (1.5e-3, 1.1e-3)),
        Stage(MIXED, 128, 160_000, 64, (1.1e-3, 1e-4)),
        Stage(MIXED, 128, 20_000, 64, (1e-4, 0.0), patch_dropout=0.0),
        Stage(MIXED, 128, 16_000, 32, (6e-4, 0.0), patch_dropout=0.0, coverage=0.02, local_window=4),
    )
    pool: int = 40_000
    weight_decay: float = 0.05
    dense_losses: bool = True
    threads: int = field(default_factory=cores)
    device: str = "cpu"

    @classmethod
    def plain(cls, seed: int = 0) -> Self:
        """CLIP's own contrast alone; without the stage of local views, which only patches need."""
        return cls(seed, cls.stages[:3], dense_losses=False)

    def scaled(self, images: int) -> Self:
        """The same stages with about so many pictures in all, at least a batch each."""
        share = images / sum(stage.images for stage in self.stages)
        stages = tuple(replace(stage, images=max(stage.batch, round(stage.images * share))) for stage in self.stages)
        return replace(self, stages=stages)


def draw_pool(stage: Stage, config: PretrainConfig, number: int) -> tuple[np.ndarray, list[Phrases]]:
    """The pictures (n, S, S, 3) uint8 of one stage with their phrases, drawn by all cores."""
    count = min(config.pool, stage.images)
    kinds = [stage.kinds[i % len(stage.kinds)] for i in range(count)]
    seeds = [(STREAM, config.seed, number, i) for i in range(count)]
    images, phrases = np.empty((count, stage.size, stage.size, 3), np.uint8), []
    remedy = "make room and give the same command: it goes on from its last state"
    with ended_helpers(remedy), ProcessPoolExecutor(config.threads, multiprocessing.get_context("spawn")) as workers:
        drawn = workers.map(scenes.compose, seeds, repeat(stage.size), kinds, chunksize=256)
        for i, scene in enumerate(tqdm(drawn, total=count, desc="drawing", mininterval=5)):
            images[i] = scene.image
            phrases.append(scene.phrases)
    return images, phrases


def normalised(images: np.ndarray) -> Tensor:
    """Pictures (B, S, S, 3) uint8 -> (B, 3, S, S)."""
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (torch.from_numpy(images).permute(0, 3, 1, 2) - mean) / std


def batches(
    pictures: np.ndarray, phrases: Sequence[Phrases], batch: int, rng: np.random.Generator
) -> Iterator[tuple[Tensor, list[Phrases]]]:
    """Normalised batches (B, 3, S, S), mirrored at random, with their phrases in random order."""
    while True:
        order = rng.permutation(len(pictures))
        for start in range(0, len(order) - batch + 1, batch):
            chosen = order[start : start + batch]
            images, mirrored = normalised(pictures[chosen]), torch.from_numpy(rng.random(batch) < 0.5)
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
            yield images, [tuple(rng.permutation(phrases[i]).tolist()) for i in chosen]


def embed_images(clip: Clip, images: Tensor, *, dropout: float = 0.0, window: int = 0) -> tuple[Tensor, Tensor]:
    """Unit patch embeddings (B, N', E) and image embeddings (B, E) of square images.

    A share `dropout` of the patches is left out. With `window`, patches attend only inside windows of that many patches
    a side, each with a class token of its own (so B * windows image embeddings)."""
    visual = clip.visual
    patch, size = visual.conv1.kernel_size[0], images.shape[-1]
    grid = (size // patch, size // patch)
    x = images.view(len(images), 3, grid[0], patch, grid[1], patch).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    x = F.linear(x, visual.conv1.weight.flatten(1))  # the patch convolution as one matrix product: faster to train
    positions = resize_positions(visual.positional_embedding, visual.grid_size, grid)
    x = x + positions[1:]
    if window:
        x = to_windows(x.unflatten(1, grid), window).flatten(0, 1)  # (B * windows, window², D)
    token = (visual.class_embedding + positions[0]).expand(len(x), 1, -1).to(x.dtype)
    x = torch.cat([token, x], dim=1)
    x = visual.ln_pre(PatchDropout(dropout)(x) if dropout else x)
    for block in visual.transformer.resblocks:
        x = run_block(block, x)
    x = F.normalize((visual.ln_post(x) @ visual.proj).float(), dim=-1)
    patches = x[:, 1:]
    if window:
        patches = from_windows(patches.unflatten(0, (len(images), -1)), window, grid).flatten(1, 2)
    return patches, x[:, 0]


def embed_texts(clip: Clip, texts: list[str]) -> Tensor:
    """Unit text embeddings (n, E); open_clip's `encode_text` on sequences cut to the longest text."""
    model: Any = clip.model
    tokens = clip.tokenizer(texts).to(model.text_projection.device)
    length = int((tokens != 0).sum(dim=1).max())
    tokens = tokens[:, :length]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    x = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=1)] @ model.text_projection
    return F.normalize(x.float(), dim=-1)


def contrast(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of unit embeddings a, b (B, E)."""
    logits, target = scale * a @ b.T, torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def dense_loss(log_p: Tensor, present: Tensor, coverage: float) -> Tensor:
    """Patches choose among their caption's nouns, and each noun of the caption wins its best `coverage` of patches.
    log_p (B, N, V): log-probabilities of V nouns; present (B, V) bool."""
    own = log_p.masked_fill(~present[:, None], -torch.inf).logsumexp(dim=-1)
    best = log_p.topk(math.ceil(coverage * log_p.shape[1]), dim=1).values.mean(dim=1)  # (B, V)
    return -own.mean() - best[present].mean()


def local_losses(log_p: Tensor, local_log_p: Tensor, present: Tensor, coverage: float) -> dict[str, Tensor]:
    """What patches say in a small window teaches what they say in the whole picture, where they may know of a boat that
    is elsewhere, and say "boat" anywhere: their caption forgives it. log_p, local_log_p (B, N, V), present (B, V)."""
    own = local_log_p.detach().masked_fill(~present[:, None], -torch.inf).softmax(dim=-1)
    return {"local": dense_loss(local_log_p, present, coverage), "taught": -(own * log_p).sum(dim=-1).mean()}


def phrase_loss(patches: Tensor, phrases: Tensor, owner: Tensor, scale: Tensor) -> Tensor:
    """Each phrase picks the pictures whose captions hold it, by its soft-best patch. patches (B, N, E), phrases (P, E),
    owner (P, B) bool."""
    similarity = scale * torch.einsum("bne,pe->pbn", patches, phrases)
    scores = (similarity.softmax(dim=-1) * similarity).sum(dim=-1)  # (P, B)
    return -(scores.masked_fill(~owner, -torch.inf).logsumexp(dim=1) - scores.logsumexp(dim=1)).mean()


def noun(phrase: str) -> str:
    """The class that a phrase names: "a big red boat" -> "boat"."""
    return max((name for name in scenes.CLASSES if phrase.endswith(name)), key=len)


def caption_losses(
    clip: Clip, stage: Stage, images: Tensor, phrases: Sequence[Phrases], rng: np.random.Generator, dense: bool
) -> dict[str, Tensor]:
    """All loss terms of a batch of pictures and their captions' phrases; `dense`: those of patches too."""
    with torch.autocast(images.device.type, torch.bfloat16):
        patches, image = embed_images(clip, images, dropout=stage.patch_dropout)
    scale = clip.model.logit_scale.exp().clamp(max=100)
    captions = embed_texts(clip, [", ".join(words) for words in phrases])
    losses = {"image": contrast(image, captions, scale)}
    if not dense:
        return losses
    losses["mean_patch"] = contrast(F.normalize(patches.mean(dim=1), dim=-1), captions, scale)
    own = [{noun(phrase) for phrase in words} for words in phrases]
    nouns = sorted(set().union(*own))
    present = torch.tensor([[name in names for name in nouns] for names in own], device=images.device)
    template = scenes.TEMPLATES[rng.integers(len(scenes.TEMPLATES))]
    noun_texts = embed_texts(clip, [template.format(name) for name in nouns])
    log_p = (scale * patches @ noun_texts.T).log_softmax(dim=-1)
    losses["dense"] = dense_loss(log_p, present, stage.coverage)
    if stage.local_window:
        with torch.autocast(images.device.type, torch.bfloat16):
            local, _ = embed_images(clip, images, window=stage.local_window)
        local_log_p = (scale * local @ noun_texts.T).log_softmax(dim=-1)
        losses |= local_losses(log_p, local_log_p, present, stage.coverage)
    unique = sorted({phrase for words in phrases for phrase in words})
    unique = [unique[i] for i in rng.permutation(len(unique))[:96]]
    owner = torch.tensor([[phrase in words for words in phrases] for phrase in unique], device=images.device)
    losses["phrase"] = phrase_loss(patches, embed_texts(clip, unique), owner, scale)
    return losses


@torch.inference_mode()
def retrieval(clip: Clip, *, seed: int = 0, groups: int = 10, pictures: int = 100) -> float:
    """How often a fresh scene's own caption is the closest among those of `pictures` scenes, over `groups` of them."""
    device, hits = clip.visual.conv1.weight.device, 0
    for group in range(groups):
        drawn = [scenes.compose((STREAM + 1, seed, group, i)) for i in range(pictures)]
        _, found = embed_images(clip, normalised(np.stack([each.image for each in drawn])).to(device))
        captions = embed_texts(clip, [each.caption for each in drawn])
        hits += int(((found @ captions.T).argmax(dim=1).cpu() == torch.arange(pictures)).sum())
    return hits / (groups * pictures)


def pretrain(config: PretrainConfig, output: str | Path) -> Clip:
    """Pre-trains a tiny CLIP and writes it to `output` (safetensors, float16), its losses beside it (.jsonl).

    Every 500 steps the state goes there too (.state): a run of the same settings goes on from it, in another order."""
    output = output_place(output)
    state_file = output.with_suffix(".state")
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    clip = new_tiny_clip(scenes.WORDS)
    try:
        clip.model.to(config.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {config.device!r}, which cannot be used here ({error}); use cpu") from error
    matrices, rest = ([p for p in clip.model.parameters() if (p.ndim >= 2) is wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    machine = ("threads", "device")  # a run may go on upon another
    settings = json.dumps({name: value for name, value in asdict(config).items() if name not in machine})
    done = 0
    if state_file.is_file():
        state = read_tensors(state_file, config.device)
        if state["config"] != settings:
            raise ValueError(f"{state_file} is of a run with other settings; delete it, or choose another output")
        clip.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    output.parent.mkdir(parents=True, exist_ok=True)
    steps, step, began = [stage.images // stage.batch for stage in config.stages], done, time.perf_counter()
    for number, stage in enumerate(config.stages):
        left = range(max(0, done - sum(steps[:number])), steps[number])
        if not left:
            continue
        rng = np.random.default_rng((config.seed, number, done))
        source = batches(*draw_pool(stage, config, number), stage.batch, rng)
        for i in (bar := tqdm(left, desc=f"stage {number + 1} of {len(steps)}", mininterval=5)):
            step += 1
            first, last = stage.rates
            rate = last + (first - last) * (0.5 + 0.5 * math.cos(math.pi * i / steps[number]))
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, step / 500)
            images, phrases = next(source)
            losses = caption_losses(clip, stage, images.to(config.device), phrases, rng, config.dense_losses)
            optimizer.zero_grad(set_to_none=True)
            torch.stack(list(losses.values())).sum().backward()
            torch.nn.utils.clip_grad_norm_(clip.model.parameters(), 1.0)
            optimizer.step()
            if step % 50 == 0:
                values = {name: round(value.item(), 4) for name, value in losses.items()}
                bar.set_postfix(values)
                about = {"step": step, "stage": number, "seconds": round(time.perf_counter() - began, 1)}
                with output.with_suffix(".jsonl").open("a") as file:
                    print(json.dumps({**about, "lr": optimizer.param_groups[0]["lr"], **values}), file=file)
            if step % 500 == 0 or step == sum(steps):
                parts = {"model": clip.model.state_dict(), "optimizer": optimizer.state_dict()}
                write_tensors(state_file, {**parts, "step": step, "config": settings})
    clip.model.eval().requires_grad_(False)
    save_tiny_clip(clip, output)
    return clip
