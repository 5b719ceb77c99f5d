"""Scores of a model over a data set, on one process or many."""

import ctypes
import sys
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from accelerate.utils.dataclasses import KwargsHandler
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

from sptseg.datasets import Sample, Split, read_batches, test_transform
from sptseg.inference.metrics import Scores, SegmentationMetrics, confusion_matrix
from sptseg.inference.segmentation import told
from sptseg.inference.windows import Precision, WindowLogits, at_precision, augmentation, window_logits
from sptseg.model import SptSeg
from sptseg.system import ended_helpers


def new_accelerator(precision: Precision, **options: Any) -> Accelerator:
    """An accelerator with its own precision; accelerate otherwise keeps the first one's for the whole process."""
    AcceleratorState._reset_state()
    handlers: list[KwargsHandler] = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=handlers, **options)
    libc: Any = ctypes.CDLL(None) if accelerator.device.type == "cpu" and sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # glibc returns large blocks, and the kernel clears each page anew: a third of a step
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for any block
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is returned
    return accelerator


def prepared(samples: list[Sample], prepare: v2.Transform) -> tuple[Sample, Tensor]:
    """A single picture as it is and as a model sees it."""
    (sample,) = samples
    return sample, prepare(tv_tensors.Image(sample["image"]))


def first_indices(dataset: Dataset[Sample], limit: int | None) -> range:
    """Positions of the first `limit` pictures of a data set, or of all."""
    length = len(dataset)  # pyright: ignore[reportArgumentType]
    if length < 1 or (limit is not None and limit < 1):
        raise ValueError(f"the data set has {length} pictures, and limit is {limit}; wanted at least one picture")
    return range(length)[:limit]


def predictions(
    model: SptSeg,
    dataset: Dataset[Sample],
    split: Split,
    *,
    seen_offset: float | None = None,
    indices: Sequence[int] | None = None,
    batch_size: int = 16,
    autocast: Callable[..., AbstractContextManager[Any]] = nullcontext,
    workers: int = 0,
) -> Generator[tuple[Sample, WindowLogits]]:
    """Each picture of a data set (or those at `indices`), in order, with its logits for all classes of the split, whose
    `labels(size)` are the predicted ones. Options as for `evaluate`. A picture that cannot be read raises OSError."""
    model.eval()
    words, owners = told(split.texts())
    text = model.class_embeddings(words)
    lowered = model.config.seen_offset if seen_offset is None else seen_offset
    offset = torch.tensor([lowered if owner in split.seen else 0.0 for owner in owners])
    prepare = partial(prepared, prepare=test_transform(augmentation(model.config)))
    indices = range(len(dataset)) if indices is None else indices  # pyright: ignore[reportArgumentType]
    one_by_one, pin = [[i] for i in indices], model.device.type == "cuda"
    pictures = read_batches(dataset, one_by_one, prepare, workers, pin, ahead=2 * batch_size)
    while batch := list(islice(pictures, batch_size)):
        found: dict[int, WindowLogits] = {}
        for size in {image.shape for _, image in batch}:
            same = [i for i, (_, image) in enumerate(batch) if image.shape == size]
            stacked = torch.stack([batch[i][1] for i in same])
            with autocast():
                logits = window_logits(model, stacked, text, offset=offset, owners=owners, window_batch=batch_size)
            found |= zip(same, logits, strict=True)
        yield from ((sample, found[i]) for i, (sample, _) in enumerate(batch))


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
    workers: int = 0,
) -> Scores:
    """Scores over a data set (or its first `limit` pictures); every picture counts once, however many processes.

    `seen_offset` is subtracted from the scores of the seen classes; None takes the model's own. `precision` is that of
    the weights (see `at_precision`), unless an `accelerator` brings its own. `workers` processes read ahead; on macOS
    and Windows a script that has some needs its main guard."""
    if accelerator is None:
        model, accelerator = at_precision(model, precision), new_accelerator("no")
    model.to(accelerator.device)
    metrics = SegmentationMetrics(split, accelerator.device)
    mine = first_indices(dataset, limit)[accelerator.process_index :: accelerator.num_processes]
    hidden = not (progress and accelerator.is_main_process)
    options = {"seen_offset": seen_offset, "batch_size": batch_size, "workers": workers}
    found = predictions(model, dataset, split, indices=mine, autocast=accelerator.autocast, **options)
    with ended_helpers("use workers=0 (command line: --workers 0)"), closing(found):
        for sample, logits in tqdm(found, desc="evaluating", total=len(mine), disable=hidden, mininterval=1):
            label = torch.as_tensor(sample["label"])
            predicted = logits.labels((label.shape[0], label.shape[1]))
            metrics.update(predicted, label.to(accelerator.device))
    return metrics.compute()


def by_training(scores: Scores, trained_classes: Collection[str]) -> dict[str, Any]:
    """mIoU of the classes whose names are among `trained_classes`, of the others and of all, across data sets, as JSON
    values: classes that do not occur are left out, and a mean without any class is None."""
    known = {name: value for name, value in scores.iou.items() if value == value}

    def mean(names: Collection[str]) -> float | None:
        return sum(known[name] for name in names) / len(names) if names else None

    old, new = ([name for name in known if (name in trained_classes) is wanted] for wanted in (True, False))
    both = [name for name in scores.iou if name in trained_classes]
    return {"shown": both, "miou": mean(known), "miou_shown": mean(old), "miou_new": mean(new)}


def confusion_matrices(
    model: SptSeg, dataset: Dataset[Sample], split: Split, *, limit: int | None = None, **options: Any
) -> Tensor:
    """Pixel counts of each picture (P, C, C), rows true, columns predicted; options as for `predictions`."""
    counts = []
    for sample, logits in predictions(model, dataset, split, indices=first_indices(dataset, limit), **options):
        label = torch.as_tensor(sample["label"])
        predicted = logits.labels((label.shape[0], label.shape[1])).cpu()
        counts.append(confusion_matrix(label, predicted, split))
    return torch.stack(counts)
