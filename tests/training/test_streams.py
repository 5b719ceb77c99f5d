"""What a run reads, in which order: targets by setting, position p always the same, every position once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import SPLIT, Toys

from sptseg.datasets import Augmentation, read_batches
from sptseg.training.stream import Positions, Setting, TrainingStream, collate, label_table

AUGMENT = Augmentation(crop=16, resize_base=(64, 16))


def new_stream(dataset: Any = None, seed: int = 0, setting: Setting = "inductive") -> TrainingStream:
    return TrainingStream(Toys() if dataset is None else dataset, AUGMENT, label_table(SPLIT, setting)[1], seed)


@pytest.mark.parametrize(
    ("setting", "queries", "targets"),
    [
        ("inductive", (0, 1, 3), [0, 1, 255, 2, 255]),
        ("transductive", (0, 1, 2, 3, 4), [0, 1, -1, 3, -1]),
        ("supervised", (0, 1, 2, 3, 4), [0, 1, 2, 3, 4]),
    ],
)
def test_targets_of_a_setting(setting: Setting, queries: tuple[int, ...], targets: list[int]) -> None:
    """Of the classes 0 to 4, with 2 and 4 unseen; what is no class is ignored."""
    found, table = label_table(SPLIT, setting)
    assert found == queries
    assert table.tolist() == [*targets, *[255] * 251]


def test_a_position_is_the_same_whatever_was_read_before() -> None:
    """Within an epoch, over epochs, backwards, and whatever the global generator did, which stays as it is."""
    expected = [new_stream()[p] for p in range(14)]
    stream = new_stream()
    for p in (13, 2, 7, 2, 0):
        before = torch.manual_seed(p).get_state()
        image, label, name = stream[p]
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(image, expected[p].image) and torch.equal(label, expected[p].target)
        assert name == expected[p].name
    assert image.shape == (3, 16, 16) and label.shape == (16, 16)


def test_an_epoch_reads_every_picture_once_in_its_own_order() -> None:
    dataset = Toys(7)
    stream = new_stream(dataset)
    for position in range(21):
        stream[position]
    epochs = [dataset.read[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_augmentation_and_order_depend_on_the_seed_and_the_position() -> None:
    one_picture = [Toys()[0]] * 3
    images = [new_stream(one_picture, seed)[p][0] for seed in (0, 1) for p in (0, 1, 2, 3)]
    for i, image in enumerate(images):
        assert not any(torch.equal(image, other) for other in images[:i])


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
def test_workers_read_the_same() -> None:
    """Batches (B, ...) of what the stream has at their positions."""
    positions, stream = Positions(range(3), 4, 1, 0, 1), new_stream()
    for workers in (0, 2):
        for i, batch in enumerate(read_batches(new_stream(), positions, collate, workers, pin_memory=False)):
            expected = [stream[position] for position in range(4 * i, 4 * i + 4)]
            assert torch.equal(batch.image, torch.stack([each.image for each in expected]))
            assert torch.equal(batch.target, torch.stack([each.target for each in expected]))
            assert batch.name == [each.name for each in expected]
        assert i == 2


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 3)])
def test_processes_and_micro_batches_share_every_iteration(processes: int, accumulation: int) -> None:
    """Each position once, and in each iteration exactly that iteration's."""
    ranks = [Positions(range(2, 5), 24, accumulation, rank, processes) for rank in range(processes)]
    read = [list(rank) for rank in ranks]
    assert {len(batches) for batches in read} == {len(ranks[0])} == {3 * accumulation}
    assert {len(batch) for batches in read for batch in batches} == {24 // processes // accumulation}
    for i in range(3):
        there = slice(i * accumulation, (i + 1) * accumulation)
        found = sorted(p for batches in read for batch in batches[there] for p in batch)
        assert found == list(range((i + 2) * 24, (i + 3) * 24))


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size 6 cannot be shared by 2 processes x 2 .*choose a multiple of 4"):
        Positions(range(2), 6, 2, 0, 2)
