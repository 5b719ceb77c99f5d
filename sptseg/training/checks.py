"""Before the first iteration: do names, label values and targets fit, and does a training step work?"""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sptseg.checkpoints import IMPORTED
from sptseg.datasets import (
    IGNORE,
    SHOWN,
    Augmentation,
    DataReport,
    Panel,
    Sample,
    Split,
    listed,
    save_figure,
    sheet,
    shrunk,
    spread,
    survey,
)  # fmt: skip
from sptseg.inference import new_accelerator
from sptseg.model import SptSeg
from sptseg.system import is_main_process
from sptseg.training.config import TrainConfig, training_augmentation
from sptseg.training.loop import fit
from sptseg.training.stream import UNSEEN_PIXEL, Positions, Setting, TrainingStream, collate, label_table

SAME_TEXT = 0.999  # cosine of two classes that no mask could tell apart


@dataclass
class PreflightReport:
    """What was found before a run. What a fault kept from being measured is None or empty.

    Attributes:
        data: the sample's label values.
        closest: the two classes whose text embeddings are closest, and their cosine.
        queries: the classes that training asks for, in the order of the targets' values.
        ignored: share of pixels that the first batch's targets ignore.
        terms: the loss of the first batch.
        seconds: of one iteration: a step, or reading its pictures if that takes longer.
        hours: of the whole run, validation not counted.
        memory: bytes: the peak of tensors on the GPU, or without one the process's.
        picture: the first batch as PNG.
    """

    setting: str
    data: DataReport
    closest: tuple[str, str, float] | None = None
    queries: tuple[str, ...] = ()
    ignored: float | None = None
    terms: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    hours: float | None = None
    memory: int | None = None
    device: str = "cpu"
    picture: Path | None = None
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The report, one finding a line."""
        data, split = self.data, self.data.split
        found = [f"{i} {name} {data.shares[i]:.1%}" for i, name in enumerate(split.classes) if data.images[i]]
        lines = [f"split {split.name}: {len(split.seen)} seen and {len(split.unseen)} unseen classes, {self.setting}"]
        lines += [f"label values in {data.looked_at} of {data.total} images: {', '.join(found)}"]
        if data.never_seen:
            lines.append(f"classes not in these images: {', '.join(data.never_seen)}")
        if self.closest:
            lines.append("closest text embeddings: {!r} and {!r}, cosine {:.3f}".format(*self.closest))
        if self.ignored is not None:
            lines.append(f"first batch: {len(self.queries)} queries, {self.ignored:.1%} of the pixels ignored")
        if self.picture:
            lines.append(f"first batch drawn: {self.picture}")
        if self.terms:
            lines.append("first loss: " + ", ".join(f"{name} {value:.4g}" for name, value in self.terms.items()))
            lines.append(f"time: {self.seconds:.3g} s an iteration, about {self.hours:.2g} h without validation")
        if self.memory is not None:
            what = "of the process" if self.device == "cpu" else f"at the peak on {self.device}"
            lines.append(f"memory: {self.memory / 2**30:.2g} GiB {what}")
        lines += [f"warning: {text}" for text in self.warnings] + [f"fault: {text}" for text in self.faults]
        return "\n".join([*lines, f"preflight: {len(self.faults)} faults, {len(self.warnings)} warnings"])

    def raise_on_fault(self) -> None:
        """Raises one ValueError that names all faults, if there are any."""
        if self.faults:
            all_of_them = "; ".join(f"({i}) {text}" for i, text in enumerate(self.faults, start=1))
            raise ValueError(f"preflight found {len(self.faults)} faults, nothing was trained: {all_of_them}")


def preflight(
    model: SptSeg,
    dataset: Dataset[Sample],
    split: Split,
    config: TrainConfig,
    *,
    sample: int = 16,
    folder: str | Path | None = None,
    augment: Augmentation | None = None,
) -> PreflightReport:
    """Looks for what would spoil a run of `fit` with the same arguments. Model and random generators stay as they are.

    Under `accelerate launch` every process calls it, as every process calls `fit`.

    Args:
        sample: how many images are read for their label values.
        folder: where `first-batch.png` goes; None draws nothing.
    """
    length: int = len(dataset)  # pyright: ignore[reportArgumentType]
    data = survey(dataset, split, spread(length, sample), progress=False)
    report = PreflightReport(config.setting, data, faults=[*data.faults], warnings=[*data.warnings])
    check_names(getattr(dataset, "split", split), split, report)
    if model.clip.weights is None and model.clip.name != IMPORTED:
        report.warnings.append(f"CLIP {model.clip.name!r} has random weights: no name means anything to it")
    augment = augment or training_augmentation(model, config)
    try:
        check_text(model, split, report)
        if not data.faults:  # the first batch may run into the same files
            start = time.perf_counter()
            images, targets = check_first_batch(dataset, split, config, augment, report)
            reading = time.perf_counter() - start
            if folder is not None and is_main_process():
                path = Path(folder) / "first-batch.png"
                report.picture = draw(images, targets, augment, split, config.setting, path)
            report.terms, whole, device = try_out(model, dataset, split, config, augment)
            report.seconds = max(whole - reading, reading / config.workers) if config.workers else whole
            report.hours = report.seconds * config.iterations / 3600
            cuda, report.device = device.type == "cuda", device.type
            report.memory = torch.cuda.max_memory_allocated(device) if cuda else psutil.Process().memory_info().rss
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        report.faults.append(f"a first step cannot be made: {error}")
    return report


def check_names(own: Split, split: Split, report: PreflightReport) -> None:
    """Label values of the data set's own split must mean the same classes in the split of the run."""
    pairs = list(zip(own.classes, split.classes, strict=False))
    moved = [name for i, name in enumerate(own.classes) if name in split.classes and split.classes.index(name) != i]
    if len(own.classes) != len(split.classes) or moved:
        differing = [f"{i} is {a!r} and {b!r}" for i, (a, b) in enumerate(pairs) if a != b]
        report.faults.append(
            f"the data set's split {own.name!r} ({len(own.classes)} classes) and the run's split {split.name!r} "
            f"({len(split.classes)} classes) disagree on label values: {listed(differing) or 'their numbers differ'}; "
            "use dataset.split, with_unseen and with_prompts"
        )
    elif own.classes != split.classes:
        renamed = [f"{a!r} -> {b!r}" for a, b in pairs if a != b]
        report.warnings.append(f"the run's split renames classes of the data set: {listed(renamed)}")


def check_text(model: SptSeg, split: Split, report: PreflightReport) -> None:
    """No two classes may be the same to CLIP."""
    names, text = split.texts(), model.class_embeddings(split.texts())
    cosine = (text @ text.T).cpu().fill_diagonal_(-2).triu(1)
    if len(names) > 1:
        first, second = divmod(int(cosine.argmax()), len(names))
        report.closest = (names[first], names[second], float(cosine[first, second]))
    same = [f"{names[i]!r} and {names[j]!r}" for i, j in (cosine > SAME_TEXT).nonzero().tolist()]
    if same:
        report.faults.append(f"CLIP cannot tell apart {listed(same)}; give other words with with_prompts")


def check_first_batch(
    dataset: Dataset[Sample], split: Split, config: TrainConfig, augment: Augmentation, report: PreflightReport
) -> tuple[Tensor, Tensor]:
    """This process's pictures (B, 3, S, S') of the first iteration, and their targets (B, S, S')."""
    queries, table = label_table(split, config.setting)
    report.queries, accelerator = split.names(queries), new_accelerator("no")
    share = accelerator.process_index, accelerator.num_processes
    stream = TrainingStream(dataset, augment, table, config.seed)
    positions = Positions(range(1), config.batch_size, config.accumulation, *share)
    images, targets, _ = collate([stream[position] for part in positions for position in part])
    ignored = targets.eq(IGNORE).flatten(1).float().mean(dim=1)
    report.ignored = ignored.mean().item()
    empty = [str(i) for i in (ignored == 1).nonzero().flatten().tolist()]
    if len(empty) == len(targets):
        report.faults.append(
            f"every pixel of the first {len(targets)} training pictures is ignored: there is nothing to learn; look at "
            "the masks' values, and at which classes are unseen"
        )
    elif empty:
        report.warnings.append(f"pictures of the first batch in which every pixel is ignored: {listed(empty)}")
    return images, targets


def draw(images: Tensor, targets: Tensor, augment: Augmentation, split: Split, setting: Setting, path: Path) -> Path:
    """Writes pictures of the first batch, as the model sees them, beside their targets with the queries' names."""
    queries, _ = label_table(split, setting)
    panels: list[Panel] = []
    for i, (image, target) in enumerate(zip(images[:SHOWN], targets, strict=False)):
        pixels = image.permute(1, 2, 0).numpy() * np.array(augment.std) + np.array(augment.mean)  # (S, S', 3)
        picture = np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)
        labels = torch.where(target == UNSEEN_PIXEL, IGNORE, target).numpy()
        panels.append((f"picture {i}", *shrunk(picture, labels)))
    palette = [split.palette[label] for label in queries]
    title = f"First training batch: {len(panels)} of {len(images)} pictures; ignored pixels keep their colours"
    figure = sheet(panels, split.names(queries), palette, split.names(split.unseen), title)
    save_figure(figure, path)
    return path


def try_out(
    model: SptSeg, dataset: Dataset[Sample], split: Split, config: TrainConfig, augment: Augmentation
) -> tuple[dict[str, float], float, torch.device]:
    """Two iterations of `fit` on a copy: loss terms of the first, seconds of the second (the first loads kernels too),
    and the device."""
    few = replace(config, iterations=2, validate_every=0, workers=0, tensorboard=False, progress=False)
    copy = SptSeg(model.config, deepcopy(model.encoder), deepcopy(model.decoder), model.clip)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        first, second = fit(copy, dataset, split, few, augment=augment).history
    terms = {name: first[name] for name in ("focal", "ssim", "dice", "total") if name in first}
    return terms, config.batch_size / second["images_per_second"], copy.device
