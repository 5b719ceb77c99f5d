"""Before the first iteration: do names, label values, text and targets fit, and does one training step work?

`preflight` looks at a model, a data set and the settings of a run together; `check_dataset` at a data set.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from sptseg.checkpoints import IMPORTED
from sptseg.datasets import (
    IGNORE,
    MOST_LISTED,
    Augmentation,
    DataReport,
    Sample,
    Split,
    evenly,
    listed,
    plots,
    save_figure,
    survey,
)
from sptseg.inference import new_accelerator
from sptseg.model import SptSeg
from sptseg.training.loop import TrainConfig, Trainee, parameter_groups, step, training_augmentation
from sptseg.training.stream import UNSEEN_PIXEL, Positions, TrainingStream, label_table

__all__ = ["DataReport", "PreflightReport", "preflight"]
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
        seconds: of one iteration: a step on one process, or reading its pictures if that takes longer.
        hours: of the whole run, validation not counted.
        memory: peak in bytes: of tensors on the GPU, or of the process so far without one.
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
        if self.seconds is not None:
            lines.append(f"time: {self.seconds:.3g} s an iteration, about {self.hours:.2g} h without validation")
        if self.memory is not None:
            what = "of the process" if self.device == "cpu" else f"on {self.device}"
            lines.append(f"memory: {self.memory / 2**30:.2g} GiB at the peak {what}")
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
    with untouched(model):
        length: int = len(dataset)  # pyright: ignore[reportArgumentType]
        report = PreflightReport(
            config.setting, survey(dataset, split, evenly(length, sample), False, config.skip_unreadable)
        )
        report.faults += report.data.faults
        report.warnings += report.data.warnings
        check_names(getattr(dataset, "split", split), split, report)
        if config.setting != "supervised" and not split.unseen:
            report.faults.append(
                f"split {split.name!r} has no unseen classes; use setting='supervised', or name some with with_unseen"
            )
        if model.clip.weights is None and model.clip.name != IMPORTED:
            report.warnings.append(f"CLIP {model.clip.name!r} has random weights: no name means anything to it")
        queries, table = label_table(split, config.setting)
        report.queries = split.names(queries)
        text = checked_text(model, split, queries, report)
        if report.data.faults:
            return report  # the stream may run into the same files
        try:
            accelerator = new_accelerator(config.precision)
            augment = augment or training_augmentation(model, config)
            start = time.perf_counter()
            batches = first_batches(
                TrainingStream(dataset, augment, table, config.seed, config.skip_unreadable), config, accelerator
            )
            reading = time.perf_counter() - start
            unchanged = TrainingStream(dataset, augment, torch.arange(256), config.seed, config.skip_unreadable)
            labels = torch.cat([y for _, y in first_batches(unchanged, config, accelerator)])
            images, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
            check_targets(targets, labels, split, queries, report)
            if folder is not None and accelerator.is_main_process:
                report.picture = draw(images, targets, augment, split, queries, Path(folder))
            if text is not None:
                measure(Trainee(model, text), batches, split, config, accelerator, reading, report)
        except (ValueError, OSError, RuntimeError) as error:
            report.faults.append(f"the first batch or its training step failed: {error}")
    return report


@contextmanager
def untouched(model: SptSeg) -> Iterator[None]:
    """Afterwards the model has the values, gradients, modes and device of before, torch's generators their state."""
    device = model.device
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    values = {name: value.detach().cpu().clone() for name, value in model.trained_state().items()}
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        nn.Module.to(model, device)  # not the text tower, which training leaves where it is
        model.load_state_dict(values, strict=False)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in modes:
            module.training = training


def check_names(own: Split, split: Split, report: PreflightReport) -> None:
    """Label values of the data set's own split must mean the same classes in the split of the run."""
    moved = [
        name for name in own.classes if name in split.classes and own.classes.index(name) != split.classes.index(name)
    ]
    if len(own.classes) != len(split.classes) or moved:
        pairs = [
            f"{i} is {a!r} and {b!r}"
            for i, (a, b) in enumerate(zip(own.classes, split.classes, strict=False))
            if a != b
        ]
        report.faults.append(
            f"the data set's split {own.name!r} ({len(own.classes)} classes) and the run's split {split.name!r} "
            f"({len(split.classes)} classes) disagree on label values: {listed(pairs) or 'their numbers differ'}; "
            "use dataset.split, with_unseen and with_prompts"
        )
    elif own.classes != split.classes:
        renamed = [f"{a!r} -> {b!r}" for a, b in zip(own.classes, split.classes, strict=True) if a != b]
        report.warnings.append(f"the run's split renames classes of the data set: {listed(renamed)}")


def checked_text(model: SptSeg, split: Split, queries: Sequence[int], report: PreflightReport) -> Tensor | None:
    """The queries' text embeddings, or None if no model could work with them."""
    names, wrong = split.texts(), len(report.faults)
    fresh = dataclasses.replace(model.clip, cache={})  # what an older call may have stored does not vouch for itself
    try:
        alone = torch.cat([fresh.class_embeddings([name], model.config.templates) for name in names])  # (C, E)
        together, text = model.class_embeddings(names).cpu(), model.class_embeddings(split.texts(queries))
    except ValueError as error:
        report.faults.append(f"class names: {error}")
        return None
    rows = [
        *zip(names, together, alone, strict=True),
        *zip(split.texts(queries), text.cpu(), alone[list(queries)], strict=True),
    ]
    unfinished = {name for name, row, _ in rows if not row.isfinite().all() or abs(row.norm() - 1) > 1e-3}
    misplaced = {name for name, row, own in rows if name not in unfinished and (row - own).norm() > 0.02}
    if unfinished:
        report.faults.append(f"text embeddings that are not finite or not of length 1: {listed(sorted(unfinished))}")
    if misplaced:
        report.faults.append(f"text embeddings of other classes stand in the places of {listed(sorted(misplaced))}")
    cosine = (alone @ alone.T).fill_diagonal_(-2).triu(1).nan_to_num(-2)
    if len(names) > 1:
        first, second = divmod(int(cosine.argmax()), len(names))
        report.closest = (names[first], names[second], float(cosine[first, second]))
    same = [f"{names[i]!r} and {names[j]!r}" for i, j in (cosine > SAME_TEXT).nonzero().tolist()]
    if same:
        report.faults.append(f"CLIP cannot tell apart {listed(same)}; give other words with with_prompts")
    return text if len(report.faults) == wrong else None


def first_batches(stream: TrainingStream, config: TrainConfig, accelerator: Accelerator) -> list[tuple[Tensor, Tensor]]:
    """The micro-batches (images, targets) of this process's first iteration."""
    share = accelerator.process_index, accelerator.num_processes
    batches = []
    for positions in Positions(range(1), config.batch_size, config.accumulation, *share):
        examples = [stream[position] for position in positions]
        batches.append((torch.stack([x.image for x in examples]), torch.stack([x.target for x in examples])))
    return batches


def check_targets(
    targets: Tensor, labels: Tensor, split: Split, queries: Sequence[int], report: PreflightReport
) -> None:
    """Compares targets (B, S, S') with the label values of the same crops (B, S, S'), class by class."""
    wrong = []
    for label, name in enumerate(split.classes):
        wanted = queries.index(label) if label in queries else IGNORE
        if report.setting == "transductive" and label in split.unseen:
            wanted = UNSEEN_PIXEL
        got = targets[labels == label].unique().tolist()
        if got not in ([], [wanted]):
            wrong.append(f"{name} ({'unseen' if label in split.unseen else 'seen'}): {got} instead of {wanted}")
    if wrong:
        report.faults.append(f"{report.setting} training has wrong targets for {listed(wrong)}")
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


def draw(
    images: Tensor, targets: Tensor, augment: Augmentation, split: Split, queries: Sequence[int], folder: Path
) -> Path:
    """Writes pictures of the first batch, as the model sees them, beside their targets with the queries' names."""
    cells: list[tuple[str, np.ndarray | str, np.ndarray | None]] = []
    for i, (image, target) in enumerate(zip(images[:MOST_LISTED], targets, strict=False)):
        pixels = image.permute(1, 2, 0).numpy() * np.array(augment.std) + np.array(augment.mean)  # (S, S', 3)
        picture = np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)
        labels = torch.where(target == UNSEEN_PIXEL, IGNORE, target).numpy()
        cells += [(f"picture {i}", picture, None), ("", picture, labels)]
    palette = [split.palette[label] for label in queries]
    title = f"First training batch: {len(cells) // 2} of {len(images)} pictures; ignored pixels keep their colours"
    figure = plots.gallery(cells, split.names(queries), palette, split.names(split.unseen), title)
    save_figure(figure, folder / "first-batch.png")
    return folder / "first-batch.png"


def measure(
    trainee: Trainee,
    batches: Sequence[tuple[Tensor, Tensor]],
    split: Split,
    config: TrainConfig,
    accelerator: Accelerator,
    reading: float,
    report: PreflightReport,
) -> None:
    """One step as `fit` makes it: its loss, its gradients, its time and memory."""
    device = accelerator.device
    trainee.to(device).train()
    groups = parameter_groups(trainee, config.weight_decay)
    if not any(group["params"] for group in groups):
        report.faults.append("the model has nothing to train: no prompts and no decoder")
        return
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    if device.type == "cuda":
        step(accelerator, trainee, optimizer, batches, split, config)  # the first step also loads kernels
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    report.terms = step(accelerator, trainee, optimizer, batches, split, config)  # ends with .item(), so all is done
    stepping = time.perf_counter() - start
    report.seconds = max(stepping, reading / config.workers) if config.workers else stepping + reading
    report.hours = report.seconds * config.iterations / 3600
    report.memory, report.device = peak_memory(device), device.type
    if not math.isfinite(report.terms["total"]):
        report.faults.append(f"the first loss is {report.terms}; try precision='no', and look at the first batch")
    elif config.precision != "fp16":  # whose scaled gradients may overflow in the first steps
        parameters = [(name, p.grad) for name, p in trainee.model.named_parameters() if p.grad is not None]
        broken = [name for name, gradient in parameters if not gradient.isfinite().all()]
        if broken:
            report.faults.append(f"gradients that are not finite: {listed(broken)}; try precision='no'")


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the peak: PyTorch's on a GPU, else the whole process's; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
