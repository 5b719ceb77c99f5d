"""Training and evaluation on Hugging Face accelerate: one process, many GPUs, many machines, the same code."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from tqdm import tqdm

from sptseg.checkpoints import save_model
from sptseg.datasets import Sample
from sptseg.inference import augmentation, window_logits
from sptseg.losses import present_pairs, segmentation_loss
from sptseg.metrics import Scores, SegmentationMetrics
from sptseg.model import SptSeg, upsample
from sptseg.splits import Split
from sptseg.streams import UNSEEN_PIXEL, Positions, Setting, TrainingStream, label_table, mixed_seed
from sptseg.transforms import Augmentation, test_transform

Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `fit`; the defaults are the protocol for VOC (ZegCLIP's configuration).

    Attributes:
        iterations: optimiser steps.
        batch_size: pictures per step, over all processes and accumulated micro-batches together.
        accumulation: micro-batches per step; the loss is normalised as if they were one batch.
        learning_rate: of everything that is trained (the protocol's 2e-5, times 10 for prompts and decoder).
        weight_decay: 0 for the layer norms' parameters.
        warmup: iterations of linear warm-up, from 1e-6 of the rate.
        power, last_rate: polynomial decay to `last_rate`.
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


@dataclass
class FitResult:
    """The trained model and one row per logged iteration: loss terms, learning rate, images/s, validation figures."""

    model: SptSeg
    history: list[dict[str, Any]] = field(default_factory=list)


def learning_rate(config: TrainConfig, iteration: int) -> float:
    """Polynomial decay with linear warm-up, for iteration 0, 1, ..."""
    decay = (1 - iteration / config.iterations) ** config.power
    rate = (config.learning_rate - config.last_rate) * decay + config.last_rate
    if iteration < config.warmup:
        rate *= 1 - (1 - iteration / config.warmup) * (1 - 1e-6)
    return rate


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters in two groups: layer norms without weight decay, all others with it; chosen by module."""
    norms = [p for m in model.modules() if isinstance(m, nn.LayerNorm | nn.RMSNorm) for p in m.parameters(recurse=False) if p.requires_grad]
    known = {id(p) for p in norms}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    return [{"params": others, "weight_decay": weight_decay}, {"params": norms, "weight_decay": 0.0}]


def pseudo_labels(logits: Tensor, labels: Tensor, seen: Sequence[int] | Tensor, unseen: Sequence[int] | Tensor) -> Tensor:
    """Labels whose unseen pixels (-1) hold the model's best unseen class; the self-training step.

    logits (B, C, h, w) of all classes, upsampled to the labels' size; labels (B, S, S'), not changed; `seen` and `unseen`
    are the positions of the classes in C.
    """
    seen, unseen = torch.as_tensor(seen, device=logits.device), torch.as_tensor(unseen, device=logits.device)
    together = torch.cat([seen, unseen]).sort().values
    if not torch.equal(together, torch.arange(logits.shape[1], device=logits.device)):
        raise ValueError(
            f"{len(seen)} seen and {len(unseen)} unseen positions do not make up the {logits.shape[1]} classes of the logits; wanted each position once"
        )
    best = unseen[upsample(logits.detach()[:, unseen], labels.shape[-2:]).argmax(dim=1)]
    return torch.where(labels == UNSEEN_PIXEL, best.to(labels.dtype), labels)


class Trainee(nn.Module):
    """The model with its text embeddings: pictures in, mask logits out, so that wrapping for many processes is simple."""

    def __init__(self, model: SptSeg, text: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("text", text, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images, self.text)


def new_accelerator(precision: Precision, **options: Any) -> Accelerator:
    """An accelerator with its own precision; accelerate otherwise keeps the first one's for the whole process."""
    AcceleratorState._reset_state()
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    return Accelerator(mixed_precision=precision, kwargs_handlers=handlers, **options)


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
        augment: by default the protocol's, in proportion to the model's `image_size`.
        resume: go on from the state in `output`, if there is one.
    """
    config = config or TrainConfig()
    if output is None and (resume or config.tensorboard):
        raise ValueError("resume and tensorboard need an output folder; give output=")
    if config.setting != "supervised" and not split.unseen:
        raise ValueError(f"split {split.name!r} has no unseen classes; use setting='supervised', or name some with with_unseen")
    if config.validate_every and validation is None:
        raise ValueError("validate_every is set but there is no validation data; give validation=, or set it to 0")
    folder = None if output is None else Path(output)
    accelerator = new_accelerator(
        config.precision, log_with="tensorboard" if config.tensorboard else None, project_dir=folder
    )
    if config.tensorboard:
        accelerator.init_trackers("tensorboard", config=None)
    main = accelerator.is_main_process
    torch.manual_seed(config.seed)
    queries, table = label_table(split, config.setting)
    text = model.class_embeddings(split.texts(queries))
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=config.learning_rate)
    trainee, optimizer = accelerator.prepare(Trainee(model, text), optimizer)
    history: list[dict[str, Any]] = []
    first = 0
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if resume and (folder / "state.pt").is_file():
            first, history = load_state(folder / "state.pt", model, optimizer, config)
        if main:
            stored = {"model": dataclasses.asdict(model.config), "train": dataclasses.asdict(config), "split": dataclasses.asdict(split)}
            (folder / "config.json").write_text(json.dumps(stored, indent=2) + "\n")
    stream = TrainingStream(dataset, augment or augmentation(model.config), table, config.seed)
    positions = Positions(
        range(first, config.iterations),
        config.batch_size,
        config.accumulation,
        accelerator.process_index,
        accelerator.num_processes,
    )
    loader = iter(
        DataLoader(
            stream,
            batch_sampler=positions,
            num_workers=config.workers,
            pin_memory=accelerator.device.type == "cuda",
        )
    )
    seconds, images = time.perf_counter(), 0
    bar = tqdm(total=config.iterations, initial=first, desc="training", disable=not (main and config.progress), mininterval=1)
    trainee.train()
    for iteration in range(first, config.iterations):
        torch.manual_seed(mixed_seed(config.seed, iteration, accelerator.process_index))  # dropout, whatever came before
        rate = learning_rate(config, iteration)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batches = [next(loader) for _ in range(config.accumulation)]
        terms = step(accelerator, trainee, optimizer, batches, split, config)
        if not math.isfinite(terms["total"]):
            raise FloatingPointError(
                f"the loss is {terms['total']} at iteration {iteration}; lower learning_rate, or use precision='no'; "
                + (f"the last good state is in {folder}" if folder else "nothing was saved, since no output folder was given")
            )
        images += config.batch_size
        bar.update()
        done = iteration + 1
        last = done == config.iterations
        if done % max(1, config.iterations // 200) == 0 or last:
            elapsed, seconds = time.perf_counter() - seconds, time.perf_counter()
            row: dict[str, Any] = {"iteration": done, **terms, "learning_rate": rate, "images_per_second": images / elapsed}
            images = 0
            if config.validate_every and validation is not None and (done % config.validate_every == 0 or last):
                row |= summary(evaluate(model, validation, split, limit=config.validation_images, accelerator=accelerator, progress=False))
                trainee.train()
                seconds = time.perf_counter()
            history.append(row)
            bar.set_postfix({name: f"{value:.3g}" for name, value in terms.items()})
            if config.tensorboard:
                accelerator.log({name: value for name, value in row.items() if value is not None}, step=done)
        if folder is not None and main and config.save_every and (done % config.save_every == 0 or last):
            save_state(folder / "state.pt", model, optimizer, done, history, config)
    bar.close()
    model.eval()
    if folder is not None and main:
        about = {"split": split.name, "unseen": list(split.names(split.unseen)), "train": dataclasses.asdict(config)}
        save_model(model, folder, about)
        (folder / "history.json").write_text(json.dumps(history, indent=1) + "\n")
    accelerator.end_training()
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
    moved = [(x.to(accelerator.device, non_blocking=True), y.to(accelerator.device, non_blocking=True)) for x, y in batches]
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
    """The loss's divisor per process and micro-batch: (image, class) pairs of the whole batch, at least 1, shared evenly."""
    pairs = torch.stack([present_pairs(y, classes).sum() for y in labels]).sum().float()
    total: Any = accelerator.reduce(pairs, reduction="sum")
    return total.clamp(min=1) / (accelerator.num_processes * len(labels))


def save_state(
    path: Path, model: SptSeg, optimizer: torch.optim.Optimizer, done: int, history: list[dict[str, Any]], config: TrainConfig
) -> None:
    """Everything that a resumed run needs, written whole or not at all."""
    state = {
        "iteration": done,
        "config": dataclasses.asdict(config),
        "model": model.trained_state(),
        "optimizer": optimizer.state_dict(),
        "history": json.dumps(history),
    }
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def load_state(
    path: Path, model: SptSeg, optimizer: torch.optim.Optimizer, config: TrainConfig
) -> tuple[int, list[dict[str, Any]]]:
    """Puts a saved state into model and optimiser; returns the iterations done and their history."""
    state = torch.load(path, map_location=model.device, weights_only=True)
    free = {"workers", "progress", "save_every", "validate_every", "validation_images", "tensorboard"}
    changed = [name for name, value in dataclasses.asdict(config).items() if name not in free and state["config"].get(name) != value]
    if changed:
        raise ValueError(f"{path} was trained with other settings of {', '.join(changed)}; resume with the same, or choose another output")
    model.load_state_dict(state["model"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    return state["iteration"], json.loads(state["history"])


def summary(scores: Scores) -> dict[str, float | None]:
    """The four summary figures, without the classes'."""
    return {name: value for name, value in scores.as_dict().items() if name != "iou"}


def evaluate(
    model: SptSeg,
    dataset: Dataset[Sample],
    split: Split,
    *,
    seen_offset: float | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    precision: Precision = "no",
    progress: bool = True,
    accelerator: Accelerator | None = None,
) -> Scores:
    """Scores over a data set (or its first `limit` pictures); every picture counts once, whatever the number of processes.

    `seen_offset` is subtracted from the scores of the seen classes; None takes the model's own.
    """
    accelerator = accelerator or new_accelerator(precision)
    model.to(accelerator.device).eval()
    metrics = SegmentationMetrics(split, accelerator.device)
    text = model.class_embeddings(split.texts())
    offset = torch.zeros(len(split.classes), device=accelerator.device)
    offset[list(split.seen)] = model.config.seen_offset if seen_offset is None else seen_offset
    prepare = test_transform(augmentation(model.config))
    count = len(dataset) if limit is None else min(limit, len(dataset))  # type: ignore[arg-type]
    mine = range(accelerator.process_index, count, accelerator.num_processes)
    hidden = not (progress and accelerator.is_main_process)
    with tqdm(total=len(mine), desc="evaluating", disable=hidden, mininterval=1) as bar:
        for start in range(0, len(mine), batch_size):
            samples = [dataset[i] for i in mine[start : start + batch_size]]
            same_size: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
            for sample in samples:
                image = prepare(tv_tensors.Image(sample["image"]))
                same_size.setdefault(tuple(image.shape), []).append((image, torch.as_tensor(sample["label"])))
            for group in same_size.values():
                with accelerator.autocast():
                    found = window_logits(model, torch.stack([image for image, _ in group]), text, offset=offset, window_batch=batch_size)
                for logits, (_, label) in zip(found, group, strict=True):
                    predicted = logits.labels((label.shape[0], label.shape[1]))
                    metrics.update(predicted, label.to(accelerator.device))
            bar.update(len(samples))
    return metrics.compute()
