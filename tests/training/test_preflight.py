"""What is found before the first iteration: faulty data, unfit names, targets, steps; and that nothing is changed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from toys import SPLIT, Toys, same, toy_config, toy_model

from sptseg.datasets import IGNORE, Sample, Split
from sptseg.model import SptSeg
from sptseg.training import fit, preflight

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
    (
        {"split": SPLIT.with_prompts({"boat": "ship"})},
        "a first step cannot be made: the tiny CLIP does not know 's",
    ),
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
