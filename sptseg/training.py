"""Training on Hugging Face accelerate: one process, many GPUs, many machines, the same code."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sptseg.checkpoints import save_model
from sptseg.datasets import Sample
from sptseg.evaluation import Precision, evaluate, new_accelerator, summary
from sptseg.inference import augmentation
from sptseg.losses import present_pairs, segmentation_loss
from sptseg.model import SptSeg, upsample
from sptseg.splits import Split
from sptseg.streams import UNSEEN_PIXEL, Positions, Setting, TrainingStream, label_table, mixed_seed
from sptseg.transforms import Augmentation

History = list[dict[str, Any]]
Settings = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `fit`; the defaults are the protocol for VOC (ZegCLIP's configuration).

    Attributes:
        iterations: optimiser steps.
        batch_size: pictures per step, over all processes and accumulated micro-batches together.
        accumulation: micro-batches per step; the loss is normalised as if they were one batch (but each micro-batch on
            its own in the transductive setting, whose labels are only known after each forward pass).
        learning_rate: of everything that is trained (the protocol's 2e-5, times 10 for prompts and decoder).
        weight_decay: 0 for the layer norms' parameters.
        warmup: iterations of linear warm-up, from 1e-6 of the rate.
        power, last_rate: polynomial decay to `last_rate`.
        scale: range of the random resize of training pictures.
        distortion: probability of each photometric distortion.
        setting: "inductive" (unseen pixels ignored, seen queries), "transductive" (all queries, unseen pixels get the
            model's own labels; continue from an inductive checkpoint) or "supervised" (all labels).
        precision: autocast type; the spectral filter and the losses stay in float32.
        validate_every, validation_images: iterations between evaluations (0: none), and how many pictures they look at.
        save_every: iterations between states from which `resume` goes on (0: only the final checkpoint).
        workers: data-loading processes.
        tensorboard: write TensorBoard files beside the history.
        progress: show a progress bar.
    """

    iterations: int = 20_000
    batch_size: int = 16
    accumulation: int = 1
    learning_rate: float = 2e-4
    weight_decay: float = 0.01
    warmup: int = 1500
    power: float = 0.9
    last_rate: float = 1e-6
    seed: int = 0
    scale: tuple[float, float] = (0.5, 2.0)
    distortion: float = 0.5
    setting: Setting = "inductive"
    precision: Precision = "bf16"
    validate_every: int = 0
    validation_images: int = 100
    save_every: int = 1000
    workers: int = 2
    tensorboard: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted at least 1")
        for name in ("warmup", "validate_every", "save_every", "workers", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted 0 or more")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate is {self.learning_rate}; wanted 0 < learning_rate < 1")
        if self.setting not in ("inductive", "transductive", "supervised"):
            raise ValueError(f"setting is {self.setting!r}; choose inductive, transductive or supervised")


# For the tiny CLIP on drawn scenes: minutes on two CPU cores.
EMBEDDED_TRAINING = TrainConfig(
    iterations=500, learning_rate=2.5e-3, warmup=50, scale=(0.9, 1.15), distortion=0.0, save_every=100, workers=0
)


@dataclass
class FitResult:
    """The trained model and one row per logged iteration: loss terms, learning rate, images/s, validation figures."""

    model: SptSeg
    history: History = field(default_factory=list)


def training_augmentation(model: SptSeg, config: TrainConfig) -> Augmentation:
    """The protocol's, in proportion to the model's `image_size`, with the settings' scale and distortion."""
    return replace(augmentation(model.config), scale=config.scale, distortion=config.distortion)


def learning_rate(config: TrainConfig, iteration: int) -> float:
    """Polynomial decay with linear warm-up, for iteration 0, 1, ..."""
    decay = (1 - iteration / config.iterations) ** config.power
    rate = (config.learning_rate - config.last_rate) * decay + config.last_rate
    if iteration < config.warmup:
        rate *= 1 - (1 - iteration / config.warmup) * (1 - 1e-6)
    return rate


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters in two groups: layer norms without weight decay, all others with it; chosen by module."""
    layers = [module for module in model.modules() if isinstance(module, nn.LayerNorm | nn.RMSNorm)]
    norms = [p for layer in layers for p in layer.parameters(recurse=False) if p.requires_grad]
    known = {id(p) for p in norms}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    return [{"params": others, "weight_decay": weight_decay}, {"params": norms, "weight_decay": 0.0}]


def pseudo_labels(
    logits: Tensor, labels: Tensor, seen: Sequence[int] | Tensor, unseen: Sequence[int] | Tensor
) -> Tensor:
    """Labels whose unseen pixels (-1) hold the model's best unseen class; the self-training step.

    logits (B, C, h, w) of all classes, upsampled to the labels' size; labels (B, S, S'), not changed; `seen` and
    `unseen` are the positions of the classes in C.
    """
    seen, unseen = torch.as_tensor(seen, device=logits.device), torch.as_tensor(unseen, device=logits.device)
    together = torch.cat([seen, unseen]).sort().values
    if not torch.equal(together, torch.arange(logits.shape[1], device=logits.device)):
        raise ValueError(
            f"{len(seen)} seen and {len(unseen)} unseen positions do not make up the {logits.shape[1]} classes of the "
            f"logits; wanted each position once"
        )
    scores = upsample(logits.detach()[:, unseen], (labels.shape[-2], labels.shape[-1]))
    best = unseen[scores.argmax(dim=1)]
    return torch.where(labels == UNSEEN_PIXEL, best.to(labels.dtype), labels)


class Trainee(nn.Module):
    """The model with its text embeddings: pictures in, mask logits out, as wrapping for many processes wants it."""

    def __init__(self, model: SptSeg, text: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("text", text, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images, self.text)


def fit(
    model: SptSeg,
    dataset: Dataset[Sample],
    split: Split,
    config: TrainConfig | None = None,
    *,
    output: str | Path | None = None,
    validation: Dataset[Sample] | None = None,
    augment: Augmentation | None = None,
    resume: bool = False,
) -> FitResult:
    """Trains the model's own parts (never CLIP) in place.

    Args:
        dataset: items {"image" uint8 (3, H, W), "label" (H, W), "name"} without a transform.
        split: the classes of the labels, and which are unseen.
        output: a folder for `model.safetensors`, `history.json`, `config.json` and the state that `resume` reads.
        validation: looked at every `config.validate_every` iterations.
        augment: by default `training_augmentation`.
        resume: go on from the state in `output`, if there is one.
    """
    config = config or TrainConfig()
    if output is None and (resume or config.tensorboard):
        raise ValueError("resume and tensorboard need an output folder; give output=")
    if config.setting != "supervised" and not split.unseen:
        raise ValueError(
            f"split {split.name!r} has no unseen classes; use setting='supervised', or name some with with_unseen"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "this model has nothing to train, as dense CLIP; give it prompts, spectral layers or a decoder"
        )
    if config.validate_every and validation is None:
        raise ValueError("validate_every is set but there is no validation data; give validation=, or set it to 0")
    folder = None if output is None else Path(output)
    tracker = "tensorboard" if config.tensorboard else None
    accelerator = new_accelerator(config.precision, log_with=tracker, project_dir=folder)
    if config.tensorboard:
        accelerator.init_trackers("tensorboard", config=None)
    main = accelerator.is_main_process
    torch.manual_seed(config.seed)
    queries, table = label_table(split, config.setting)
    text = model.class_embeddings(split.texts(queries))
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=config.learning_rate)
    trainee, optimizer = accelerator.prepare(Trainee(model, text), optimizer)
    parts = {"train": config, "model": model.config, "split": split}
    settings = {name: dataclasses.asdict(part) for name, part in parts.items()}
    history: History = []
    first = 0
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if resume and (folder / "state.pt").is_file():
            first, history = load_state(folder / "state.pt", model, optimizer, settings)
        if main:
            (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    stream = TrainingStream(dataset, augment or training_augmentation(model, config), table, config.seed)
    rank, processes = accelerator.process_index, accelerator.num_processes
    positions = Positions(range(first, config.iterations), config.batch_size, config.accumulation, rank, processes)
    pin = accelerator.device.type == "cuda"
    loader = iter(DataLoader(stream, batch_sampler=positions, num_workers=config.workers, pin_memory=pin))
    seconds, images = time.perf_counter(), 0
    hidden = not (main and config.progress)
    bar = tqdm(total=config.iterations, initial=first, desc="training", disable=hidden, mininterval=1)
    trainee.train()
    for iteration in range(first, config.iterations):
        torch.manual_seed(mixed_seed(config.seed, iteration, rank))  # dropout, whatever came before
        rate = learning_rate(config, iteration)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batches = [next(loader) for _ in range(config.accumulation)]
        terms = step(accelerator, trainee, optimizer, batches, split, config)
        if not math.isfinite(terms["total"]):
            saved = folder is not None and config.save_every and iteration >= config.save_every
            kept = f"the last good state is in {folder}" if saved or first else "no state was saved before"
            raise FloatingPointError(
                f"the loss is {terms['total']} at iteration {iteration}; lower learning_rate, or use precision='no'; "
                f"{kept}"
            )
        images += config.batch_size
        bar.update()
        done = iteration + 1
        last = done == config.iterations
        validate = config.validate_every and (done % config.validate_every == 0 or last)
        if validate or done % max(1, config.iterations // 200) == 0 or last:
            elapsed, seconds = time.perf_counter() - seconds, time.perf_counter()
            row: dict[str, Any] = {"iteration": done, **terms, "learning_rate": rate}
            row["images_per_second"], images = images / elapsed, 0
            if validate and validation is not None:
                looked_at = {"limit": config.validation_images, "accelerator": accelerator, "progress": False}
                row |= summary(evaluate(model, validation, split, **looked_at))
                trainee.train()
                seconds = time.perf_counter()
            history.append(row)
            bar.set_postfix({name: f"{value:.3g}" for name, value in terms.items()})
            if config.tensorboard:
                accelerator.log({name: value for name, value in row.items() if value is not None}, step=done)
        if folder is not None and main and config.save_every and (done % config.save_every == 0 or last):
            save_state(folder / "state.pt", model, optimizer, done, history, settings)
    bar.close()
    model.eval()
    if folder is not None and main:
        about = {"split": split.name, "unseen": list(split.names(split.unseen)), "train": dataclasses.asdict(config)}
        save_model(model, folder, about)
        (folder / "history.json").write_text(json.dumps(history, indent=1) + "\n")
    for tracker in accelerator.trackers:
        tracker.finish()  # accelerator.end_training() would also end the process group, which evaluate counts with
    accelerator.wait_for_everyone()
    return FitResult(model, history)


def step(
    accelerator: Accelerator,
    trainee: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[tuple[Tensor, Tensor]],
    split: Split,
    config: TrainConfig,
) -> dict[str, float]:
    """One optimiser step over micro-batches; returns the loss terms of the whole batch, over all processes."""
    device = accelerator.device
    moved = [(x.to(device, non_blocking=True), y.to(device, non_blocking=True)) for x, y in batches]
    model: SptSeg = accelerator.unwrap_model(trainee).model
    transductive = config.setting == "transductive"
    classes = len(split.classes) if config.setting != "inductive" else len(split.seen)
    pairs = None
    if not transductive:
        pairs = mean_pairs(accelerator, [y for _, y in moved], classes)
    sums: dict[str, Tensor] = {}
    optimizer.zero_grad(set_to_none=True)
    for i, (images, labels) in enumerate(moved):
        with nullcontext() if i == len(moved) - 1 else accelerator.no_sync(trainee):
            with accelerator.autocast():
                logits = trainee(images)
            if transductive:
                labels = pseudo_labels(logits, labels, split.seen, split.unseen)
                pairs = mean_pairs(accelerator, [labels], classes)
            losses = segmentation_loss(logits, labels, model.config.loss, pairs=pairs)
            accelerator.backward(losses["total"] / len(moved))
        for name, value in losses.items():
            sums[name] = sums.get(name, 0) + value.detach() / len(moved)
    optimizer.step()
    means: Any = accelerator.reduce(sums, reduction="mean")
    return {name: value.item() for name, value in means.items()}


def mean_pairs(accelerator: Accelerator, labels: Sequence[Tensor], classes: int) -> Tensor:
    """The loss's divisor per process and micro-batch: an even share of the whole batch's pairs, at least 1 in all."""
    pairs = torch.stack([present_pairs(y, classes).sum() for y in labels]).sum().float()
    total: Any = accelerator.reduce(pairs, reduction="sum")
    return total.clamp(min=1) / (accelerator.num_processes * len(labels))


def save_state(
    path: Path, model: SptSeg, optimizer: torch.optim.Optimizer, done: int, history: History, settings: Settings
) -> None:
    """Everything that a resumed run needs, written whole or not at all."""
    state = {
        "iteration": done,
        "settings": settings,
        "model": model.trained_state(),
        "optimizer": optimizer.state_dict(),
        "history": json.dumps(history),
    }
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def load_state(path: Path, model: SptSeg, optimizer: torch.optim.Optimizer, settings: Settings) -> tuple[int, History]:
    """Puts a saved state into model and optimiser; returns the iterations done and their history."""
    state = torch.load(path, map_location=model.device, weights_only=True)
    free = {"workers", "progress", "save_every", "validate_every", "validation_images", "tensorboard"}
    before = state["settings"]
    changed = [
        f"{part}.{name}"
        for part, values in settings.items()
        for name, value in values.items()
        if not (part == "train" and name in free) and before[part].get(name) != value
    ]
    if changed:
        raise ValueError(
            f"{path} was trained with other settings of {', '.join(changed)}; "
            f"resume with the same, or choose another output"
        )
    model.load_state_dict(state["model"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    return state["iteration"], json.loads(state["history"])
