"""Scores of a model over a data set, on one process or many."""

from __future__ import annotations

from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from accelerate.utils.dataclasses import KwargsHandler
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from tqdm import tqdm

from sptseg.datasets import Sample
from sptseg.inference import augmentation, window_logits
from sptseg.metrics import Scores, SegmentationMetrics
from sptseg.model import SptSeg
from sptseg.splits import Split
from sptseg.transforms import test_transform

Precision = Literal["no", "bf16", "fp16"]


def new_accelerator(precision: Precision, **options: Any) -> Accelerator:
    """An accelerator with its own precision; accelerate otherwise keeps the first one's for the whole process."""
    AcceleratorState._reset_state()
    handlers: list[KwargsHandler] = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    return Accelerator(mixed_precision=precision, kwargs_handlers=handlers, **options)


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
    """Scores over a data set (or its first `limit` pictures); every picture counts once, however many processes.

    `seen_offset` is subtracted from the scores of the seen classes; None takes the model's own.
    """
    accelerator = accelerator or new_accelerator(precision)
    model.to(accelerator.device).eval()
    metrics = SegmentationMetrics(split, accelerator.device)
    text = model.class_embeddings(split.texts())
    offset = torch.zeros(len(split.classes), device=accelerator.device)
    offset[list(split.seen)] = model.config.seen_offset if seen_offset is None else seen_offset
    prepare = test_transform(augmentation(model.config))
    count = len(dataset) if limit is None else min(limit, len(dataset))  # pyright: ignore[reportArgumentType]
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
                images = torch.stack([image for image, _ in group])
                with accelerator.autocast():
                    found = window_logits(model, images, text, offset=offset, window_batch=batch_size)
                for logits, (_, label) in zip(found, group, strict=True):
                    predicted = logits.labels((label.shape[0], label.shape[1]))
                    metrics.update(predicted, label.to(accelerator.device))
            bar.update(len(samples))
    return metrics.compute()
