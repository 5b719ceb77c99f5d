"""Training on Hugging Face accelerate: one process, many GPUs, many machines, the same code."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from sptseg.checkpoints import save_model
from sptseg.datasets import Augmentation, Sample, Split
from sptseg.inference import Precision, augmentation, evaluate, new_accelerator, summary
from sptseg.model import SptSeg, check_values, fingerprint, upsample
from sptseg.system import write
from sptseg.training.losses import present_pairs, segmentation_loss
from sptseg.training.state import (
    HALFWAY,
    STATE,
    History,
    Progress,
    agreed,
    identity,
    load_state,
    noted_signals,
    save_state,
)
from sptseg.training.stream import (
    UNSEEN_PIXEL,
    Example,
    Positions,
    Setting,
    TrainingStream,
    label_table,
    loading,
    mixed_seed,
)


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
        checkpointing: keep no activations of CLIP's blocks; compute them again in the backward pass: a third slower,
            for large batches on small GPUs.
        workers: data-loading processes.
        skip_unreadable: leave out pictures that cannot be read, and list them, instead of stopping at the first.
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
    checkpointing: bool = False
    workers: int = 2
    skip_unreadable: bool = False
    tensorboard: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if self.setting not in ("inductive", "transductive", "supervised"):
            raise ValueError(f"setting is {self.setting!r}; choose inductive, transductive or supervised")
        counts = dict.fromkeys(("iterations", "batch_size", "accumulation", "validation_images"), (1, 10**9))
        pauses = dict.fromkeys(("warmup", "validate_every", "save_every"), (0, 10**9))
        shares = dict.fromkeys(("weight_decay", "last_rate", "distortion"), (0, 1))
        others = {"workers": (0, 1024), "power": (0, 100), "scale": (0.01, 100), "seed": (-(2**63), 2**63 - 1)}
        check_values(self, counts | pauses | shares | others)
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate is {self.learning_rate}; wanted 0 < learning_rate < 1")
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale is {self.scale}; wanted the smaller factor first")


# For the tiny CLIP on drawn scenes: minutes on two CPU cores.
EMBEDDED_TRAINING = TrainConfig(
    iterations=500, learning_rate=2.5e-3, warmup=50, scale=(0.9, 1.15), distortion=0.0, save_every=100, workers=0
)


@dataclass
class FitResult:
    """The trained model and one row per logged iteration: loss terms, learning rate, images/s, validation figures.

    `left_out`: with `skip_unreadable`, a sentence on each picture that could not be read.
    """

    model: SptSeg
    history: History = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


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
    about: Mapping[str, Any] | None = None,
) -> FitResult:
    """Trains the model's own parts (never CLIP) in place.

    With an output folder, SIGTERM and SIGINT let the iteration end and save the state, in all processes of a run; then
    SIGTERM exits with code 143 (SystemExit), SIGINT raises KeyboardInterrupt, a second SIGINT at once.

    Args:
        dataset: items {"image" uint8 (3, H, W), "label" (H, W), "name"} without a transform.
        split: the classes of the labels, and which are unseen.
        output: a folder for `model.safetensors`, `history.json`, `config.json` and the state that `resume` reads; in
            the inductive setting also for `halfway.safetensors`, from which transductive training goes on.
        validation: looked at every `config.validate_every` iterations.
        augment: by default `training_augmentation`.
        resume: go on from the state in `output`, if there is one; with the same bits on a GPU only in PyTorch's
            deterministic mode: torch.use_deterministic_algorithms(True), CUBLAS_WORKSPACE_CONFIG=:4096:8 set.
        about: JSON values to keep in `config.json` and in the checkpoints, such as the preset's name.
    """
    config = config or TrainConfig()
    if output is None and (resume or config.tensorboard):
        raise ValueError("resume and tensorboard need an output folder; give output=")
    if config.validate_every and validation is None:
        raise ValueError("validate_every is set but there is no validation data; give validation=, or set it to 0")
    check_trainable(model, split, config)
    folder = None if output is None else Path(output)
    tracker = "tensorboard" if config.tensorboard else None
    accelerator = new_accelerator(config.precision, log_with=tracker, project_dir=folder)
    if config.tensorboard:
        accelerator.init_trackers("tensorboard", config=None)
    main = accelerator.is_main_process
    torch.manual_seed(config.seed)
    queries, table = label_table(split, config.setting)
    text = model.class_embeddings(split.texts(queries))
    groups = parameter_groups(model, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    model.encoder.checkpointing = config.checkpointing
    trainee, optimizer = accelerator.prepare(Trainee(model, text), optimizer)
    parts = {"train": config, "model": model.config, "split": split}
    settings = {name: dataclasses.asdict(part) for name, part in parts.items()}
    settings |= {"data": identity(dataset), "clip": {"fingerprint": fingerprint(model.clip)}}
    shown = split.classes if config.setting == "supervised" else split.names(split.seen)
    facts = {"split": split.name, "seen": list(shown), "unseen": list(split.names(split.unseen))}
    facts |= {"train": settings["train"], **(about or {})}
    progress = Progress()
    if folder is not None:
        if resume:
            progress = load_state(folder, model, optimizer, accelerator.scaler, settings)
        if main:
            write(folder / "config.json", json.dumps({**settings, "about": about or {}}, indent=2) + "\n")
    first, history = progress.iteration, progress.history
    augment = augment or training_augmentation(model, config)
    stream = TrainingStream(dataset, augment, table, config.seed, config.skip_unreadable)
    rank, processes = accelerator.process_index, accelerator.num_processes
    positions = Positions(range(first, config.iterations), config.batch_size, config.accumulation, rank, processes)
    loader = iter(loading(stream, positions, config.workers, pin_memory=accelerator.device.type == "cuda"))
    seconds, images = time.perf_counter(), 0
    hidden = not (main and config.progress)
    bar = tqdm(total=config.iterations, initial=first, desc="training", disable=hidden, mininterval=1)
    trainee.train()
    done, stopped = first, 0
    with noted_signals() if folder is not None else nullcontext([]) as noted:
        for iteration in range(first, config.iterations):
            torch.manual_seed(mixed_seed(config.seed, iteration, rank))  # dropout, whatever came before
            rate = learning_rate(config, iteration)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batches = [read(loader) for _ in range(config.accumulation)]
            terms = step(accelerator, trainee, optimizer, [batch[:2] for batch in batches], split, config)
            lines = [line for batch in batches for each in batch.left_out for line in each.splitlines()]
            progress.left_out += [line for line in dict.fromkeys(lines) if line not in progress.left_out]
            if not math.isfinite(terms["total"]):
                names = gather_object([name for batch in batches for name in batch.name])
                kept = folder is not None and progress.iteration and (folder / STATE).is_file()
                raise not_finite(terms["total"], iteration, names, folder / STATE if folder and kept else None)
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
                    looked_at["skip_unreadable"] = config.skip_unreadable
                    row |= summary(evaluate(model, validation, split, **looked_at))
                    trainee.train()
                    seconds = time.perf_counter()
                history.append(row)
                bar.set_postfix({name: f"{value:.3g}" for name, value in terms.items()})
                if config.tensorboard:
                    accelerator.log({name: value for name, value in row.items() if value is not None}, step=done)
            stopped = agreed(accelerator, noted)
            if folder is not None and main and config.setting == "inductive" and done == config.iterations // 2:
                save_model(model, folder / HALFWAY, {**facts, "iteration": done})
            saved = config.save_every and (done % config.save_every == 0 or last)
            if folder is not None and (saved or (stopped and not last)):
                progress.iteration, progress.left_out = done, sorted(set(gather_object(progress.left_out)))
                if main:
                    save_state(folder, model, optimizer, accelerator.scaler, progress, settings)
            if stopped and not last:
                accelerator.wait_for_everyone()  # until the state is written
                break
    bar.close()
    model.eval()
    if done < config.iterations:
        for tracker in accelerator.trackers:
            tracker.finish()
        if main:
            what = f"stopped by {signal.Signals(stopped).name} after iteration {done} of {config.iterations}"
            how = "go on with resume=True (command line: the same command and --resume)"
            print(f"{what}; the state is in {folder}: {how}", file=sys.stderr)
        raise KeyboardInterrupt if stopped == signal.SIGINT else SystemExit(128 + stopped)
    left_out = sorted(set(gather_object(progress.left_out)))
    if folder is not None and main:
        save_model(model, folder, facts)
        write(folder / "history.json", json.dumps(history, indent=1) + "\n")
    for tracker in accelerator.trackers:
        tracker.finish()  # accelerator.end_training() would also end the process group, which evaluate counts with
    accelerator.wait_for_everyone()
    return FitResult(model, history, left_out)


def check_trainable(model: SptSeg, split: Split, config: TrainConfig) -> None:
    if config.setting != "supervised" and not split.unseen:
        raise ValueError(
            f"split {split.name!r} has no unseen classes; use setting='supervised', or name some with with_unseen"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "this model has nothing to train, as dense CLIP; give it prompts, spectral layers or a decoder"
        )


def not_finite(loss: float, iteration: int, names: Sequence[str], state: Path | None) -> FloatingPointError:
    kept = "no state was saved before" if state is None else f"the last good state is {state}"
    return FloatingPointError(
        f"the loss is {loss} at iteration {iteration}, on {', '.join(names)}; lower learning_rate, or use "
        f"precision='no'; {kept}"
    )


def read(loader: Iterator[Any]) -> Example:
    """The next batch; raises what kept it from being read."""
    batch = next(loader)
    if isinstance(batch, Exception):
        raise batch
    return batch


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
