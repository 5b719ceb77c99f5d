"""What a training run reads, in which order: a setting's targets; a seeded, endless stream of augmented pictures."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sptseg.datasets import IGNORE, Augmentation, Sample, Split, train_transform

Setting = Literal["inductive", "transductive", "supervised"]
UNSEEN_PIXEL = -1


def label_table(split: Split, setting: Setting) -> tuple[tuple[int, ...], Tensor]:
    """Which classes are queries, and a table (256,) from label values to training targets. Inductive: seen classes,
    unseen pixels ignored. Transductive: all classes, unseen pixels -1. Supervised: all as is."""
    if len(split.classes) > IGNORE:
        raise ValueError(f"training takes at most {IGNORE} classes; split {split.name!r} has {len(split.classes)}")
    queries = split.seen if setting == "inductive" else tuple(range(len(split.classes)))
    table = torch.full((256,), IGNORE)
    table[list(queries)] = torch.arange(len(queries))
    if setting == "transductive":
        table[list(split.unseen)] = UNSEEN_PIXEL
    return queries, table


class Example(NamedTuple):
    """An augmented picture (3, S, S'), its target (S, S') and its name; in a batch tensors (B, ...) and a list."""

    image: Tensor
    target: Tensor
    name: Any


class TrainingStream(Dataset[Example]):
    """An endless, seeded sequence of augmented pictures and targets: position p is the same whatever came before.

    Every epoch is a new permutation; the augmentation's randomness depends on seed and position alone. So a run goes on
    exactly where it stopped, and does not depend on the number of workers or processes."""

    def __init__(self, dataset: Dataset[Sample], augment: Augmentation, table: Tensor, seed: int) -> None:
        self.dataset, self.table, self.seed = dataset, table, seed
        self.transform = train_transform(augment)
        self.epoch, self.order = -1, torch.empty(0)

    def __getitem__(self, position: int) -> Example:
        length = len(self.dataset)  # pyright: ignore[reportArgumentType]
        epoch, offset = divmod(position, length)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = torch.randperm(length, generator=torch.Generator().manual_seed(mixed_seed(self.seed, epoch)))
        sample = self.dataset[int(self.order[offset])]
        with torch.random.fork_rng(devices=[]):  # GPUs' generators are dropout's: torch.manual_seed would set them too
            torch.default_generator.manual_seed(mixed_seed(self.seed, position, 1))
            image, label = self.transform(sample["image"], sample["label"])
        return Example(torch.as_tensor(image), self.table[torch.as_tensor(label)], sample["name"])


def collate(examples: Sequence[Example]) -> Example:
    """One batch; not by PyTorch's, which takes shared memory at once, whatever room that has."""
    images, targets, names = zip(*examples, strict=True)
    return Example(torch.stack(images), torch.stack(targets), list(names))


def mixed_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers."""
    state = 0
    for number in numbers:
        state = (state * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return state


class Positions:
    """Batch sampler: the positions that one process reads, from a first iteration on, micro-batch by micro-batch."""

    def __init__(self, iterations: range, batch_size: int, accumulation: int, rank: int, processes: int) -> None:
        parts = processes * accumulation
        if batch_size % parts:
            shares = f"{processes} processes x {accumulation} micro-batches"
            raise ValueError(f"batch_size {batch_size} cannot be shared by {shares}; choose a multiple of {parts}")
        self.iterations, self.batch_size, self.accumulation = iterations, batch_size, accumulation
        self.rank, self.processes, self.micro = rank, processes, batch_size // parts

    def __iter__(self) -> Iterator[list[int]]:
        for iteration in self.iterations:
            for part in range(self.accumulation):
                start = iteration * self.batch_size + (part * self.processes + self.rank) * self.micro
                yield list(range(start, start + self.micro))
