"""What is found before the first iteration, which changes nothing; what a run reads, in which order."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from toys import SPLIT, Toys, same, toy_config, toy_model

from sptseg.datasets import IGNORE, Augmentation, Sample, Split, read_batches
from sptseg.model import SptSeg
from sptseg.training import fit, preflight
from sptseg.training.stream import Positions, Setting, TrainingStream, collate, label_table

CONFIG = toy_config(iterations=1000)


class Bands(Toys):
    """Pictures whose masks are upright bands of label values; every fourth one's may be others."""

    def __init__(self, *bands: int, names: str = " ".join(SPLIT.classes), fourth: tuple[int, ...] = ()) -> None:
        super().__init__(5)
        self.bands, self.fourth, self.split = bands, fourth or bands, Split.from_names("other", names.split())

    def __getitem__(self, index: int) -> Sample:
        bands = self.bands if index % 4 else self.fourth
        label = torch.tensor(bands).repeat_interleave(32 // len(bands)).expand(32, 32)
        return {**super().__getitem__(index), "label": tv_tensors.Mask(label)}


@pytest.fixture
def model() -> SptSeg:
    return toy_model(dropout=0.1)


def test_a_sound_run(model: SptSeg, tmp_path: Path) -> None:
    report = preflight(model, Bands(0, 1, 2, 3), SPLIT, CONFIG, folder=tmp_path / "new")
    report.raise_on_fault()
    assert report.warnings == ["CLIP 'small' has random weights: no name means anything to it"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["first-batch.png"]
    with Image.open(tmp_path / "new/first-batch.png") as picture:
        assert picture.width > 1000
    seconds, hours = map(float, re.findall(r"time: (\S+) s an iteration, about (\S+) h", report.text())[0])
    assert hours == pytest.approx(seconds * 1000 / 3600, rel=0.1) and seconds > 0
    (ignored,) = map(float, re.findall(r"first batch: (\S+)% of the pixels ignored", report.text()))
    assert ignored == pytest.approx(40, abs=20), "the boat, and what is padded"
    for words in (
        "split toys: 3 seen and 2 unseen classes, inductive", "label values in 5 of 5 images: 0 grass 25.0%, 1 water",
        "GiB of the process\nwarning: CLIP", "closest text embeddings: '", "preflight: 0 faults, 1 warnings",
    ):  # fmt: skip
        assert words in report.text()


def test_model_and_generators_stay_as_they_are_and_the_first_loss_is_the_one_that_fit_sees(model: SptSeg) -> None:
    """With dropout; in micro-batches."""
    model.train().decoder.eval()
    model.encoder.prompts.grad = torch.ones_like(model.encoder.prompts)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes, generator = [module.training for module in model.modules()], torch.manual_seed(3).get_state()
    config = toy_config(iterations=1, accumulation=2, checkpointing=True, setting="transductive")
    found = preflight(model, Toys(), SPLIT, config).terms
    assert set(found) == {"focal", "ssim", "total"} and torch.equal(torch.get_rng_state(), generator)
    assert same(model.state_dict(), before) and [module.training for module in model.modules()] == modes
    assert torch.all(model.encoder.prompts.grad == 1) and all(p.grad is None for p in model.decoder.parameters())
    assert not model.encoder.checkpointing
    row = fit(model, Toys(), SPLIT, config).history[0]
    assert found == pytest.approx({name: row[name] for name in found})


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"dataset": Bands(0, 1, names="grass boat water tree house")}, "label values: 1 is 'boat' and 'water', 2 is 'wa"),
    ({"dataset": Bands(0, 1, names="grass water boat")}, "other' (3 classes)"),
    ({"split": SPLIT.with_prompts({"boat": "ship"})}, "a first step cannot be made: the tiny CLIP does not know 's"),
    ({"split": SPLIT.with_prompts({"boat": "Tree"})}, "class names given twice: Tree, tree; name each class once"),
    ({"split": SPLIT.with_unseen([])}, "use setting='supervised'"),
    ({"dataset": Bands(2, IGNORE)}, "every pixel of the first 4 training pictures is ignored: there is nothing to"),
    ({"config": replace(CONFIG, batch_size=3, accumulation=2)}, "choose a multiple of 2"),
]


@pytest.mark.parametrize(("changes", "said"), FAULTS)
def test_what_would_spoil_a_run_is_a_fault(changes: dict[str, Any], said: str, model: SptSeg) -> None:
    report = preflight(model, **{"dataset": Bands(0, 1, 2, 3), "split": SPLIT, "config": CONFIG, **changes})
    (fault,) = report.faults
    assert said in fault and f"fault: {fault}" in report.text() and "1 faults" in report.text()
    with pytest.raises(ValueError, match=r"preflight found 1 faults, nothing was trained: \(1\)"):
        report.raise_on_fault()


def test_renamed_classes_and_pictures_without_a_target_are_warnings(model: SptSeg) -> None:
    report = preflight(model, Bands(0, 1, fourth=(2,), names="meadow water boat tree house"), SPLIT, CONFIG)
    assert not report.faults and "renames classes of the data set: 0 is 'meadow' and 'grass'" in report.warnings[0]
    assert any("in which every pixel is ignored: " in text for text in report.warnings)


def test_faulty_files_stop_before_the_batch(model: SptSeg) -> None:
    report = preflight(model, Bands(0, 5), SPLIT, CONFIG)
    assert len(report.faults) == 5 and not report.terms and "5 faults" in report.text()
    with pytest.raises(ValueError, match=r"5 faults.*\(1\) image 0.*\(5\) image 4"):
        report.raise_on_fault()


def test_a_loss_that_is_not_finite(model: SptSeg) -> None:
    weight = model.encoder.prompt_norm.weight
    with torch.no_grad():
        weight[0] = float("nan")
    assert "the loss is nan at iteration 0, on " in preflight(model, Bands(0, 1), SPLIT, CONFIG).faults[0]
    assert weight.isnan().sum() == 1, "the model stays as it was"


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
    """By seed and position, as is the augmentation."""
    dataset = Toys(7)
    for seed in (0, 1):
        stream = new_stream(dataset, seed)
        for position in range(14):
            stream[position]
    epochs = [tuple(dataset.read[i : i + 7]) for i in (0, 7, 14, 21)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len(set(epochs)) == 4
    images = [new_stream([Toys()[0]] * 3, seed)[p].image for seed in (0, 1) for p in (0, 1, 2, 3)]
    assert len(torch.stack(images).unique(dim=0)) == 8


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
    assert {len(batches) for batches in read} == {3 * accumulation}
    assert {len(batch) for batches in read for batch in batches} == {24 // processes // accumulation}
    for i in range(3):
        there = slice(i * accumulation, (i + 1) * accumulation)
        found = sorted(p for batches in read for batch in batches[there] for p in batch)
        assert found == list(range((i + 2) * 24, (i + 3) * 24))
    if processes * accumulation > 1:
        with pytest.raises(ValueError, match=rf"batch_size 25 cannot be shared by {processes} processes x .*choose a"):
            Positions(range(2), 25, accumulation, 0, processes)
