"""What is found before the first iteration: faulty data, unfit names, targets, steps; and that nothing is changed."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from toys import PARK, Bands

from sptseg.datasets import IGNORE, Sample, Split
from sptseg.model import Clip, ModelConfig, SptSeg, build_model
from sptseg.training import TrainConfig, fit, preflight

CONFIG = TrainConfig(iterations=1000, batch_size=4, precision="no", workers=0, progress=False)
SMALL = ModelConfig(
    image_size=(32, 32), prompt_tokens=2, decoder_layers=1, decoder_heads=2, class_embedding_twice=False
)  # fmt: skip


@pytest.fixture
def model(clip: Clip) -> SptSeg:
    return build_model(SMALL, clip)


def test_a_sound_run(model: SptSeg, tmp_path: Path) -> None:
    report = preflight(model, Bands(), PARK, CONFIG, folder=tmp_path / "new")
    report.raise_on_fault()
    assert set(report.terms) == {"focal", "ssim", "total"}
    assert report.warnings == ["CLIP 'small' has random weights: no name means anything to it"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["first-batch.png"]
    with Image.open(tmp_path / "new/first-batch.png") as picture:
        assert picture.width > 1000
    seconds, hours = map(float, re.findall(r"time: (\S+) s an iteration, about (\S+) h", report.text())[0])
    assert hours == pytest.approx(seconds * 1000 / 3600, rel=0.1) and seconds > 0
    (ignored,) = map(float, re.findall(r"first batch: (\S+)% of the pixels ignored", report.text()))
    assert ignored == pytest.approx(40, abs=20), "the tree, and what is padded"
    for words in (
        "split park: 3 seen and 1 unseen classes, inductive", "label values in 5 of 5 images: 0 grass 25.0%, 1 water",
        "GiB of the process\nwarning: CLIP", "closest text embeddings: '", "preflight: 0 faults, 1 warnings",
    ):  # fmt: skip
        assert words in report.text()


def test_model_and_generators_stay_as_they_are(model: SptSeg) -> None:
    model.train().decoder.eval()
    model.encoder.prompts.grad = torch.ones_like(model.encoder.prompts)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    config = dataclasses.replace(CONFIG, checkpointing=True, setting="transductive")
    assert preflight(model, Bands(), PARK, config).terms
    assert torch.equal(torch.rand(4), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes and not model.encoder.checkpointing
    assert torch.all(model.encoder.prompts.grad == 1) and all(p.grad is None for p in model.decoder.parameters())


def test_the_first_loss_is_the_one_that_fit_sees(clip: Clip) -> None:
    """With dropout; in micro-batches."""
    config = dataclasses.replace(CONFIG, iterations=1, warmup=0, batch_size=4, accumulation=2)
    model = build_model(SMALL, clip)
    found = preflight(model, Bands(), PARK, config).terms
    row = fit(model, Bands(), PARK, config).history[0]
    assert found == pytest.approx({name: row[name] for name in found})


class Mixed(Bands):
    """Of four pictures, the first holds the unseen class alone."""

    def __getitem__(self, index: int) -> Sample:
        self.bands = (2,) if index % 4 == 0 else (0, 1)
        return super().__getitem__(index)


OTHER = Split.from_names("other", ["grass", "tree", "water", "boat"])
FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"dataset": Bands((0, 1), split=OTHER)}, "disagree on label values: 1 is 'tree' and 'water', 2 is 'water' and"),
    ({"dataset": Bands((0, 1), split=Split.from_names("other", ["grass", "water", "tree"]))}, "other' (3 classes)"),
    ({"split": PARK.with_prompts({"boat": "ship"})}, "a first step cannot be made: the tiny CLIP does not know 'ship'"),
    ({"split": PARK.with_prompts({"boat": "Tree"})}, "class names given twice: Tree, tree; name each class once"),
    ({"split": PARK.with_unseen([])}, "use setting='supervised'"),
    ({"dataset": Bands((2, IGNORE))}, "every pixel of the first 4 training pictures is ignored: there is nothing to"),
    ({"config": dataclasses.replace(CONFIG, batch_size=3, accumulation=2)}, "choose a multiple of 2"),
]


@pytest.mark.parametrize(("changes", "said"), FAULTS)
def test_what_would_spoil_a_run_is_a_fault(changes: dict[str, Any], said: str, model: SptSeg) -> None:
    report = preflight(model, **{"dataset": Bands(), "split": PARK, "config": CONFIG, **changes})
    (fault,) = report.faults
    assert said in fault and f"fault: {fault}" in report.text() and "1 faults" in report.text()
    with pytest.raises(ValueError, match=r"preflight found 1 faults, nothing was trained: \(1\)"):
        report.raise_on_fault()


def test_renamed_classes_and_pictures_without_a_target_are_warnings(model: SptSeg) -> None:
    renamed = Mixed(length=4, split=Split.from_names("other", ["meadow", "water", "tree", "boat"]))
    report = preflight(model, renamed, PARK, CONFIG)
    assert not report.faults and "renames classes of the data set: 0 is 'meadow' and 'grass'" in report.warnings[0]
    assert any("in which every pixel is ignored: " in text for text in report.warnings)


def test_faulty_files_stop_before_the_batch(model: SptSeg) -> None:
    report = preflight(model, Bands((0, 4)), PARK, CONFIG)
    assert len(report.faults) == 5 and not report.terms and "5 faults" in report.text()
    with pytest.raises(ValueError, match=r"5 faults.*\(1\) image 0.*\(5\) image 4"):
        report.raise_on_fault()


def test_a_loss_that_is_not_finite(model: SptSeg) -> None:
    weight = model.encoder.prompt_norm.weight
    with torch.no_grad():
        weight[0] = float("nan")
    assert "the loss is nan at iteration 0, on noise-" in preflight(model, Bands(), PARK, CONFIG).faults[0]
    assert weight.isnan().sum() == 1, "the model stays as it was"
