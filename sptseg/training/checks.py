"""Before the first iteration: do names, label values and targets fit, and does a training step work?"""

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
from sptseg.datasets import IGNORE, MOST_LISTED, Sample, Split, evenly, listed, plots, survey
from sptseg.model import SptSeg
from sptseg.system import is_main_process
from sptseg.training.config import TrainConfig, training_augmentation
from sptseg.training.loop import Trainer, fit
from sptseg.training.stream import UNSEEN_PIXEL, label_table

SAMPLE = 16  # pictures that are read for their label values
SAME_TEXT = 0.999  # cosine of two classes that no mask could tell apart


@dataclass
class Report:
    """What was found before a run: findings, warnings and faults, one a line each, and the first batch's loss."""

    findings: list[str]
    warnings: list[str]
    faults: list[str]
    terms: dict[str, float] = field(default_factory=dict)

    def text(self) -> str:
        """The report, one finding a line."""
        lines = [*(f"warning: {each}" for each in self.warnings), *(f"fault: {each}" for each in self.faults)]
        count = f"preflight: {len(self.faults)} faults, {len(self.warnings)} warnings"
        return "\n".join([*self.findings, *lines, count])

    def raise_on_fault(self) -> None:
        """Raises one ValueError that names all faults, if there are any."""
        if self.faults:
            all_of_them = "; ".join(f"({i}) {text}" for i, text in enumerate(self.faults, start=1))
            raise ValueError(f"preflight found {len(self.faults)} faults, nothing was trained: {all_of_them}")


def preflight(
    model: SptSeg, dataset: Dataset[Sample], split: Split, config: TrainConfig, folder: str | Path | None = None
) -> Report:
    """Looks for what would spoil a run of `fit` with the same arguments. Model and random generators stay as they are.

    Under `accelerate launch` every process calls it, as it calls `fit`. `first-batch.png` goes to `folder`."""
    length: int = len(dataset)  # pyright: ignore[reportArgumentType]
    data = survey(dataset, split, evenly(length, SAMPLE), progress=False)
    found = [f"{i} {name} {data.shares[i]:.1%}" for i, name in enumerate(split.classes) if data.images[i]]
    classes = f"split {split.name}: {len(split.seen)} seen and {len(split.unseen)} unseen classes, {config.setting}"
    values = f"label values in {data.looked_at} of {data.total} images: {', '.join(found)}"
    report = Report([classes, values], [*data.warnings], [*data.faults])
    check_names(getattr(dataset, "split", split), split, report)
    if model.clip.weights is None and model.clip.name != IMPORTED:
        report.warnings.append(f"CLIP {model.clip.name!r} has random weights: no name means anything to it")
    try:
        check_text(model, split, report)
        if not data.faults:  # the first batch may run into the same files
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                try_out(model, dataset, split, config, None if folder is None else Path(folder), report)
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        report.faults.append(f"a first step cannot be made: {error}")
    return report


def check_names(own: Split, split: Split, report: Report) -> None:
    """Label values of the data set's own split must mean the same classes in the split of the run."""
    pairs = enumerate(zip(own.classes, split.classes, strict=False))
    differing = listed([f"{i} is {a!r} and {b!r}" for i, (a, b) in pairs if a != b]) or "their numbers differ"
    elsewhere = {*enumerate(own.classes)} - {*enumerate(split.classes)}
    if len(own.classes) != len(split.classes) or any(name in split.classes for _, name in elsewhere):
        told = f"the data set's split {own.name!r} ({len(own.classes)} classes) and the run's split {split.name!r}"
        how = "use dataset.split, with_unseen and with_prompts"
        report.faults.append(f"{told} ({len(split.classes)} classes) disagree on label values: {differing}; {how}")
    elif elsewhere:
        report.warnings.append(f"the run's split renames classes of the data set: {differing}")


def check_text(model: SptSeg, split: Split, report: Report) -> None:
    """No two classes may be the same to CLIP."""
    names, text = split.texts(), model.class_embeddings(split.texts())
    cosine = (text @ text.T).cpu().fill_diagonal_(-2)
    first, second = divmod(int(cosine.argmax()), len(names))
    pair = f"{names[first]!r} and {names[second]!r}, cosine {cosine[first, second]:.3f}"
    if first != second:
        report.findings.append(f"closest text embeddings: {pair}")
    if cosine[first, second] > SAME_TEXT:
        report.faults.append(f"CLIP cannot tell apart {pair}; give other words with with_prompts")


def try_out(
    model: SptSeg, dataset: Dataset[Sample], split: Split, config: TrainConfig, folder: Path | None, report: Report
) -> None:
    """The first batch; two iterations on a copy: loss of the first, which loads kernels too, time of the second."""
    few = replace(config, iterations=2, validate_every=0, workers=0, tensorboard=False, progress=False)
    copy = SptSeg(model.config, deepcopy(model.encoder), deepcopy(model.decoder), model.clip)
    batches, start = Trainer(copy, dataset, split, few).batches, time.perf_counter()
    first_batch = [next(batches) for _ in range(config.accumulation)]
    reading = time.perf_counter() - start
    images, targets = (torch.cat(parts) for parts in list(zip(*first_batch, strict=True))[:2])
    ignored = targets.eq(IGNORE).flatten(1).float().mean(dim=1)  # of each picture
    report.findings.append(f"first batch: {ignored.mean():.1%} of the pixels ignored")
    empty = [str(i) for i in (ignored == 1).nonzero().flatten().tolist()]
    if len(empty) == len(targets):
        report.faults.append(
            f"every pixel of the first {len(targets)} training pictures is ignored: there is nothing to learn; look at "
            "the masks' values, and at which classes are unseen"
        )
    elif empty:
        report.warnings.append(f"pictures of the first batch in which every pixel is ignored: {listed(empty)}")
    if folder is not None and is_main_process():
        path = folder / "first-batch.png"
        draw(images, targets, model, split, config, path)
        report.findings.append(f"first batch drawn: {path}")
    before = torch.cuda.memory_allocated()  # also of the model itself; 0 without a GPU
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    first, second = fit(copy, dataset, split, few).history
    report.terms = {name: first[name] for name in ("focal", "ssim", "dice", "total") if name in first}
    seconds = config.batch_size / second["images_per_second"]
    if config.workers:  # which share the reading
        seconds = max(seconds - reading, reading / config.workers)
    memory, what = psutil.Process().memory_info().rss, "of the process"
    if copy.device.type == "cuda":
        memory, what = torch.cuda.max_memory_allocated(copy.device) - before, "at the peak on the GPU"
    report.findings += [
        "first loss: " + ", ".join(f"{name} {value:.4g}" for name, value in report.terms.items()),
        f"time: {seconds:.3g} s an iteration, about {seconds * config.iterations / 3600:.2g} h without validation",
        f"memory: {memory / 2**30:.2g} GiB {what}",
    ]


def draw(images: Tensor, targets: Tensor, model: SptSeg, split: Split, config: TrainConfig, path: Path) -> None:
    """Writes pictures of the first batch, as the model sees them, beside their targets with the queries' names."""
    augment, (queries, _) = training_augmentation(model, config), label_table(split, config.setting)
    cells: list[tuple[str, np.ndarray | str, np.ndarray | None]] = []
    for i, (image, target) in enumerate(zip(images[:MOST_LISTED], targets, strict=False)):
        pixels = image.permute(1, 2, 0).numpy() * np.array(augment.std) + np.array(augment.mean)  # (S, S', 3)
        picture = np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)
        labels = torch.where(target == UNSEEN_PIXEL, IGNORE, target).numpy()
        cells += [(f"picture {i}", picture, None), ("", picture, labels)]
    palette = [split.palette[label] for label in queries]
    title = f"First training batch: {len(cells) // 2} of {len(images)} pictures; ignored pixels keep their colours"
    plots.save_figure(plots.gallery(cells, split.names(queries), palette, split.names(split.unseen), title), path)
