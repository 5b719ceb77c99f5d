"""What is found before the first iteration: faulty data, unfit names, text, targets; and that nothing is changed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from sptseg.datasets import folders as datasets
from sptseg.datasets.folders import Sample
from sptseg.datasets.splits import IGNORE, Split
from sptseg.model.clip import Clip
from sptseg.model.config import ModelConfig
from sptseg.model.spt_seg import SptSeg, build_model
from sptseg.training import checks as preflight
from sptseg.training.loop import TrainConfig, fit

SPLIT = Split.from_names("park", ["grass", "water", "tree", "boat"], unseen=["tree"])
CONFIG = TrainConfig(iterations=1000, batch_size=4, precision="no", workers=0, progress=False)
SMALL = ModelConfig(
    image_size=(32, 32), prompt_tokens=2, decoder_layers=1, decoder_heads=2, class_embedding_twice=False
)  # fmt: skip


class Drawn(Dataset[Sample]):
    """Noise pictures whose masks are four bands of classes."""

    def __init__(self, bands: tuple[int, ...] = (0, 1, 2, 3), length: int = 5, split: Split = SPLIT) -> None:
        self.bands, self.length, self.split = bands, length, split

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        image = torch.from_numpy(np.random.default_rng(index).integers(0, 256, (3, 40, 48), dtype=np.uint8))
        label = torch.tensor(self.bands).repeat_interleave(48 // len(self.bands)).expand(40, 48)
        return {
            "image": datasets.tv_tensors.Image(image),
            "label": datasets.tv_tensors.Mask(label),
            "name": f"noise-{index}",
        }


@pytest.fixture
def model(clip: Clip) -> SptSeg:
    return build_model(SMALL, clip)


# --- preflight --------------------------------------------------------------------------------------------------------


def test_a_sound_run(model: SptSeg, tmp_path: Path) -> None:
    report = preflight.preflight(model, Drawn(), SPLIT, CONFIG, sample=3, folder=tmp_path / "new")
    report.raise_on_fault()
    assert report.data.looked_at == 3
    assert report.queries == ("grass", "water", "boat")
    assert report.ignored == pytest.approx(0.4, abs=0.2)  # the tree, and what is padded
    assert set(report.terms) == {"focal", "ssim", "total"}
    assert report.seconds and report.hours == pytest.approx(report.seconds * 1000 / 3600)
    assert report.memory and report.memory > 2**20
    assert report.picture == tmp_path / "new/first-batch.png"
    with Image.open(report.picture) as picture:
        assert picture.width > 1000
    assert report.warnings == ["CLIP 'small' has random weights: no name means anything to it"]
    text = report.text()
    for words in (
        "3 seen and 1 unseen classes, inductive",
        "0 grass 25.0%",
        "3 queries",
        "about",
        "0 faults, 1 warnings",
    ):
        assert words in text


def test_model_and_generators_stay_as_they_are(model: SptSeg) -> None:
    model.train().decoder.eval()
    model.encoder.prompts.grad = torch.ones_like(model.encoder.prompts)
    gradient = model.encoder.prompts.grad
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    report = preflight.preflight(model, Drawn(), SPLIT, CONFIG)
    assert report.terms
    assert torch.equal(torch.rand(4), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert model.encoder.prompts.grad is gradient and torch.all(gradient == 1)
    assert all(p.grad is None for p in model.decoder.parameters())


def test_the_first_loss_is_the_one_that_fit_sees(clip: Clip) -> None:
    config = dataclasses.replace(CONFIG, iterations=1, warmup=0, batch_size=4, accumulation=2)
    model = build_model(dataclasses.replace(SMALL, dropout=0.0), clip)
    found = preflight.preflight(model, Drawn(), SPLIT, config).terms
    row = fit(model, Drawn(), SPLIT, config).history[0]
    assert found == pytest.approx({name: row[name] for name in found})


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (["grass", "tree", "water", "boat"], "1 is 'tree' and 'water'"),
        (["grass", "water", "tree"], "(3 classes)"),
    ],
)
def test_another_split_than_the_data_sets_own(model: SptSeg, own: list[str], words: str) -> None:
    dataset = Drawn((0, 1), split=Split.from_names("other", own))
    report = preflight.preflight(model, dataset, SPLIT, CONFIG)
    with pytest.raises(ValueError, match="disagree on label values") as error:
        report.raise_on_fault()
    assert words in str(error.value)


def test_renamed_classes_are_a_warning(model: SptSeg) -> None:
    dataset = Drawn(split=Split.from_names("other", ["meadow", "water", "tree", "boat"]))
    report = preflight.preflight(model, dataset, SPLIT, CONFIG)
    assert not report.faults and "'meadow' -> 'grass'" in report.warnings[0]


def test_words_that_clip_does_not_know(model: SptSeg) -> None:
    report = preflight.preflight(model, Drawn(), SPLIT.with_prompts({"boat": "ship"}), CONFIG)
    assert "does not know 'ship'" in report.faults[0]
    assert report.ignored is not None and not report.terms


def test_names_that_are_the_same_to_clip(model: SptSeg) -> None:
    report = preflight.preflight(model, Drawn(), SPLIT.with_prompts({"boat": "Tree"}), CONFIG)
    assert report.faults == ["class names: class names given twice: Tree, tree; name each class once"]


def test_embeddings_in_another_order_are_found(model: SptSeg) -> None:
    model.class_embeddings(SPLIT.texts())
    (key,) = model.clip.cache
    model.clip.cache[key] = model.clip.cache[key][[1, 0, 2, 3]]
    report = preflight.preflight(model, Drawn(), SPLIT, CONFIG)
    assert report.faults == ["text embeddings of other classes stand in the places of grass, water"]


@pytest.mark.parametrize("value", [float("nan"), 2.0])
def test_embeddings_that_are_not_finite_or_unit(model: SptSeg, value: float) -> None:
    model.class_embeddings(SPLIT.texts(SPLIT.seen))
    (stored,) = model.clip.cache.values()
    stored[1] *= value
    report = preflight.preflight(model, Drawn(), SPLIT, CONFIG)
    assert report.faults == ["text embeddings that are not finite or not of length 1: water"]


def test_unseen_classes_in_the_targets_are_found(model: SptSeg, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(split: Split, setting: object) -> tuple[tuple[int, ...], torch.Tensor]:
        table = torch.full((256,), IGNORE)
        table[:4] = torch.tensor([0, 1, 1, 2])
        return split.seen, table

    monkeypatch.setattr(preflight, "label_table", leaking)
    report = preflight.preflight(model, Drawn(), SPLIT, CONFIG)
    assert report.faults == ["inductive training has wrong targets for tree (unseen): [1] instead of 255"]


@pytest.mark.parametrize("setting", ["transductive", "supervised"])
def test_other_settings_ask_for_all_classes(model: SptSeg, setting: str, tmp_path: Path) -> None:
    target = tmp_path if setting == "transductive" else None
    report = preflight.preflight(model, Drawn(), SPLIT, dataclasses.replace(CONFIG, setting=setting), folder=target)
    report.raise_on_fault()
    assert report.queries == SPLIT.classes and report.terms


def test_a_split_without_unseen_classes(model: SptSeg) -> None:
    report = preflight.preflight(model, Drawn(), SPLIT.with_unseen([]), CONFIG)
    assert "use setting='supervised'" in report.faults[0]


def test_a_batch_without_a_target_is_a_fault_and_one_picture_a_warning(model: SptSeg) -> None:
    class Mixed(Drawn):
        def __getitem__(self, index: int) -> Sample:
            self.bands = (2,) if index == 0 else (0, 1)
            return super().__getitem__(index)

    report = preflight.preflight(model, Drawn((2, IGNORE)), SPLIT, CONFIG)
    assert "every pixel of the first 4 training pictures is ignored" in report.faults[0]
    mixed = preflight.preflight(model, Mixed(length=4), SPLIT, CONFIG)
    assert not mixed.faults and any("every pixel is ignored: " in text for text in mixed.warnings)


def test_faulty_files_stop_before_the_batch(model: SptSeg) -> None:
    report = preflight.preflight(model, Drawn((0, 4)), SPLIT, CONFIG)
    assert len(report.faults) == 5 and report.ignored is None
    assert "5 faults" in report.text()
    with pytest.raises(ValueError, match=r"5 faults.*\(1\) image 0.*\(5\) image 4"):
        report.raise_on_fault()


def test_a_loss_that_is_not_finite(model: SptSeg) -> None:
    with torch.no_grad():
        model.encoder.prompt_norm.weight[0] = float("nan")
    report = preflight.preflight(model, Drawn(), SPLIT, CONFIG)
    assert "the first loss is" in report.faults[0]
    assert model.encoder.prompt_norm.weight.isnan().sum() == 1


def test_steps_that_cannot_be_made(model: SptSeg, clip: Clip) -> None:
    uneven = dataclasses.replace(CONFIG, batch_size=3, accumulation=2)
    assert "choose a multiple of 2" in preflight.preflight(model, Drawn(), SPLIT, uneven).faults[0]
    dense = build_model(dataclasses.replace(SMALL, prompt_tokens=0, spectral_layers=(), decoder="none"), clip)
    assert preflight.preflight(dense, Drawn(), SPLIT, CONFIG).faults == [
        "the model has nothing to train: no prompts and no decoder"
    ]
