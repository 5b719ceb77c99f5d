"""What a run reads, in which order: targets by setting, position p always the same, every position once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from toys import SPLIT, Toys

from sptseg.datasets.images import Unreadable
from sptseg.datasets.transforms import Augmentation
from sptseg.training.stream import Positions, Setting, TrainingStream, collate, label_table, mixed_seed

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
    """Within an epoch, over epochs, backwards, and whatever the global generator did."""
    expected = [new_stream()[p] for p in range(14)]
    stream = new_stream()
    for p in (13, 2, 7, 2, 0):
        torch.manual_seed(p)
        image, label, name, _ = stream[p]
        assert torch.equal(image, expected[p].image) and torch.equal(label, expected[p].target)
        assert name == expected[p].name
    assert image.shape == (3, 16, 16) and label.shape == (16, 16)


def test_reading_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    new_stream()[3]
    assert torch.equal(torch.get_rng_state(), before)


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


class Holes(Toys):
    """Toys of which some cannot be read."""

    def __init__(self, length: int, holes: set[int]) -> None:
        super().__init__(length)
        self.holes = holes

    def __getitem__(self, index: int) -> Any:
        if index in self.holes:
            raise Unreadable(f"{index}.png is damaged")
        return super().__getitem__(index)


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 7), st.sets(st.integers(0, 6)), st.lists(st.integers(0, 30), min_size=1, max_size=6))
def test_the_next_readable_picture_stands_in(length: int, holes: set[int], positions: list[int]) -> None:
    """Next in the order of the epoch, which is that of the stream without holes; whatever was read before."""
    holes = {index for index in holes if index < length}
    if len(holes) == length:
        holes.pop()
    table = label_table(SPLIT, "inductive")[1]
    stream = TrainingStream(Holes(length, holes), AUGMENT, table, 5, skip_unreadable=True)
    whole = TrainingStream(Toys(length), AUGMENT, table, 5)
    for position in positions:
        epoch = position // length
        order = [int(whole[epoch * length + i].name) for i in range(length)]
        later = order[position % length :] + order[: position % length]
        expected = next(index for index in later if index not in holes)
        example = stream[position]
        assert example.name == str(expected)
        passed = later[: later.index(expected)]
        assert example.left_out.splitlines() == [f"{index}.png is damaged" for index in passed]
        if not passed:
            assert torch.equal(example.image, whole[position].image)


def test_unreadable_pictures_are_raised_by_default_and_handed_over_in_batches() -> None:
    stream = new_stream(Holes(3, {0, 1, 2}))
    with pytest.raises(Unreadable, match="png is damaged"):
        stream[0]
    batch = next(iter(DataLoader(stream, batch_sampler=Positions(range(1), 2, 1, 0, 1), collate_fn=collate)))
    assert isinstance(batch, Unreadable) and "png is damaged" in str(batch)


def test_targets_go_through_the_table() -> None:
    for setting, values in (("inductive", {0, 1, 2, 255}), ("transductive", {-1, 0, 1, 3, 255})):
        labels = torch.cat([new_stream(setting=setting)[p][1].flatten() for p in range(12)])
        assert set(labels.unique().tolist()) == values


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
def test_workers_read_the_same() -> None:
    positions = Positions(range(3), 4, 1, 0, 1)
    alone, shared = (
        [batch for batch in DataLoader(new_stream(), batch_sampler=positions, num_workers=n)] for n in (0, 2)
    )
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one.image, other.image) and torch.equal(one.target, other.target)
        assert one.name == other.name and len(one.name) == 4


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


def test_seeds_of_neighbours_differ() -> None:
    seeds = [mixed_seed(a, b) for a in range(20) for b in range(20)] + [mixed_seed(a) for a in range(20)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mixed_seed(1, 2) != mixed_seed(2, 1)
