"""Settings of a training run, and what follows from them: its augmentation and its learning rate."""

from dataclasses import dataclass, replace

from sptseg.datasets import Augmentation
from sptseg.inference import Precision, augmentation
from sptseg.model import SptSeg, check_values
from sptseg.training.stream import Setting


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
        workers: data-loading processes; on macOS and Windows a script that has some needs its main guard (README).
        tensorboard: write TensorBoard files beside the history.
        progress: show a progress bar."""

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
    tensorboard: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
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
