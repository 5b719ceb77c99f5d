"""What is found before the first iteration: faulty data, unfit names, text, targets; and that nothing is changed."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from sptseg.datasets import folders as datasets
from sptseg.datasets import splits
from sptseg.datasets.check import SHOWN, contact_sheet, spread
from sptseg.datasets.check import check_dataset as check
from sptseg.datasets.folders import ImageMaskFolder, Sample
from sptseg.datasets.plots import png_bytes
from sptseg.datasets.splits import IGNORE, Split, spread_palette
from sptseg.model.clip import Clip
from sptseg.model.config import ModelConfig
from sptseg.model.spt_seg import SptSeg, build_model
from sptseg.training import checks as preflight
from sptseg.training.loop import TrainConfig, fit

CAMVID = Path(os.environ.get("SPTSEG_CAMVID", Path(__file__).resolve().parents[3] / "shared/camvid"))
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


def folder(root: Path, masks: dict[str, list[list[int]]], palettes: dict[str, list[int]] | None = None) -> Path:
    """Images of 4 x 2 pixels with masks, some of them with palettes, and classes.txt."""
    for part in ("images", "masks"):
        (root / part).mkdir()
    for name, values in masks.items():
        Image.new("RGB", (4, 2), (90, 120, 30)).save(root / f"images/{name}.png")
        mask = Image.fromarray(np.array(values, np.uint8))
        if palettes and name in palettes:
            mask.putpalette(palettes[name])
        mask.save(root / f"masks/{name}.png")
    (root / "classes.txt").write_text("grass\nwater\ntree\n")
    return root


# --- check ------------------------------------------------------------------------------------------------------------


def test_check_counts_pixels_images_and_sizes() -> None:
    report = check(Drawn((0, 0, 1, IGNORE)), progress=False)
    assert (report.total, report.looked_at, report.faults) == (5, 5, [])
    assert report.pixels == [5 * 40 * 24, 5 * 40 * 12, 0, 0]
    assert report.images == [5, 5, 0, 0]
    assert report.shares == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert report.ignored == pytest.approx(0.25)
    assert report.size_range() == dict.fromkeys(("smallest", "median", "largest"), (48, 40))
    assert report.never_seen == ("tree", "boat")
    assert report.warnings == ["classes without a pixel in the images read: tree, boat"]
    table = report.table()
    assert "| 5 of 5 | 0 | 48 x 40 | 48 x 40 | 48 x 40 | 25.0% |" in table
    assert "| 0 | grass | seen | 66.67% | 5 |" in table and "| 2 | tree | unseen | 0.00% | 0 |" in table
    assert json.loads(json.dumps(report.as_dict()))["classes"][1] == {
        "label": 1, "name": "water", "unseen": False, "share": pytest.approx(1 / 3), "images": 5,
    }  # fmt: skip


def test_a_limit_spreads_the_images_evenly() -> None:
    assert spread(10, 4) == [0, 2, 5, 7]
    assert spread(3, 9) == spread(3, None) == [0, 1, 2]
    assert check(Drawn(), limit=2, progress=False).looked_at == 2


def test_every_faulty_file_is_collected(tmp_path: Path) -> None:
    sound = [[0, 1, 2, 255], [0, 1, 2, 255]]
    root = folder(tmp_path, {"a": sound, "b": sound, "c": [[9, 0, 0, 0]] * 2, "d": [[0] * 4], "e": [[255] * 4] * 2})
    (root / "images/b.png").write_bytes(b"no picture")
    report = check(ImageMaskFolder(root), progress=False)
    assert len(report.faults) == 3
    for text, fault in zip(("b.png is not an image", "mask value 9", "wanted equal sizes"), report.faults, strict=True):
        assert text in fault
    assert report.images == [1, 1, 1] and report.all_ignored == ["e"]
    assert report.warnings == ["1 images have no labelled pixel: e"]
    assert "Faults: 3" in report.table() and "| 5 of 5 | 3 |" in report.table()


def test_long_lists_of_faults_are_cut_in_the_table_only() -> None:
    report = check(Drawn((0, 7), length=SHOWN + 3), progress=False)
    assert len(report.faults) == SHOWN + 3
    assert "- and 3 more" in report.table() and f"image {SHOWN}:" not in report.table()
    assert "none | none | none" in report.table()


def test_unexpected_errors_are_named_with_their_kind() -> None:
    class Broken(Drawn):
        def __getitem__(self, index: int) -> Sample:
            raise KeyError("label")

    assert check(Broken(length=1), progress=False).faults == ["image 0: KeyError: 'label'"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image": torch.zeros(3, 40, 48)}, "give the data set no transform"),
        ({"label": torch.zeros(40, 47, dtype=torch.long)}, "equal sizes"),
        ({"label": torch.zeros(40, 48)}, "wanted integers"),
        ({"label": torch.full((40, 48), -1)}, "label value -1 is no class"),
        ({"label": torch.full((40, 48), 4)}, "label value 4 is no class of split 'park' (0 to 3"),
    ],
)
def test_samples_that_no_training_run_could_use(change: dict, words: str) -> None:
    class Changed(Drawn):
        def __getitem__(self, index: int) -> Sample:
            return {**super().__getitem__(index), **change}  # pyright: ignore[reportReturnType]

    (fault,) = check(Changed(length=1), progress=False).faults
    assert words in fault


def test_masks_that_count_from_one_are_recognised(tmp_path: Path) -> None:
    root = folder(tmp_path, {"a": [[0, 1, 2, 3]] * 2, "b": [[0, 1, 2, 2]] * 2})
    report = check(ImageMaskFolder(root), progress=False)
    assert len(report.faults) == 1
    (warning,) = report.warnings
    assert "one above the last class" in warning and "value_map={0: 255, 1: 0, 2: 1, ...}" in warning
    mended = check(ImageMaskFolder(root, value_map={0: 255, 1: 0, 2: 1, 3: 2}), progress=False)
    assert not mended.faults and not mended.warnings


def test_a_lonely_absent_class_0_is_suspicious() -> None:
    report = check(Drawn((1, 2, 3)), progress=False)
    assert "label 0 ('grass') alone never occurs" in report.warnings[-1]


def test_palettes_that_speak_against_the_split(tmp_path: Path) -> None:
    own = [channel for colour in spread_palette(3) for channel in colour]
    swapped = own[3:6] + own[:3] + own[6:]
    values = [[0, 1, 2, 2]] * 2
    root = folder(tmp_path, {"a": values, "b": values, "c": values, "d": values}, {"b": own, "c": swapped})
    changing, differing = check(ImageMaskFolder(root), progress=False).warnings
    assert "0 is (230, 159, 0) in b.png, (86, 180, 233) in c.png" in changing
    assert "0 ('grass') is (86, 180, 233) in c.png, the colour of 'water'" in differing and "2 colours" in differing


@pytest.mark.parametrize("made_up", [True, False])
def test_foreign_colours_count_only_against_a_data_sets_own_palette(tmp_path: Path, made_up: bool) -> None:
    values, foreign = [[0, 1, 1, 255]] * 2, [1, 2, 3, 4, 5, 6] + [7, 8, 9] * 254
    root = folder(tmp_path, {"a": values}, {"a": foreign})
    split = Split.from_names("park", ["grass", "water"])
    if not made_up:
        split = dataclasses.replace(split, palette=((128, 0, 0), (4, 5, 6)))
    warnings = check(ImageMaskFolder(root, split), progress=False).warnings
    assert made_up == (not warnings)
    if warnings:
        assert "for 1 colours: mask value 0 ('grass') is (1, 2, 3) in a.png, not (128, 0, 0)" in warnings[0]


def test_a_grey_palette_means_nothing(tmp_path: Path) -> None:
    root = folder(tmp_path, {"a": [[0, 1, 1, 0]] * 2}, {"a": [v for k in range(256) for v in (k, k, k)]})
    split = dataclasses.replace(Split.from_names("park", ["grass", "water"]), palette=((128, 0, 0), (4, 5, 6)))
    assert check(ImageMaskFolder(root, split), progress=False).warnings == []


def test_a_data_set_without_a_split_is_refused() -> None:
    with pytest.raises(ValueError, match="Subset has no split"):
        check(torch.utils.data.Subset(Drawn(), [0]))


# --- contact_sheet ----------------------------------------------------------------------------------------------------


def test_contact_sheet_shows_pictures_masks_and_names() -> None:
    figure = contact_sheet(Drawn(), count=3, seed=1)
    titles = [ax.get_title() for ax in figure.axes]
    assert sum(title.startswith("noise-") for title in titles) == 3
    texts = {text.get_text() for ax in figure.axes for text in ax.texts}
    assert {"grass", "tree*"} <= texts
    legend = [text.get_text() for text in figure.axes[-1].get_legend().get_texts()]
    assert legend == ["grass", "water", "tree*", "boat", "* unseen in training"]
    again = contact_sheet(Drawn(), count=3, seed=1)
    assert [ax.get_title() for ax in again.axes] == titles
    assert png_bytes(again).startswith(b"\x89PNG")


def test_contact_sheet_says_which_files_are_broken(tmp_path: Path) -> None:
    root = folder(tmp_path, {"a": [[0, 1, 2, 255]] * 2, "b": [[0, 1, 2, 255]] * 2})
    (root / "masks/b.png").write_bytes(b"")
    figure = contact_sheet(ImageMaskFolder(root))
    shown = [text.get_text().replace("\n", " ") for ax in figure.axes for text in ax.texts]
    assert any("not an image" in text for text in shown)
    assert png_bytes(figure).startswith(b"\x89PNG")


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
    assert report.faults == ["CLIP cannot tell apart 'tree' and 'Tree'; give other words with with_prompts"]
    assert report.closest[:2] == ("tree", "Tree")


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


@pytest.mark.skipif(not CAMVID.is_dir(), reason="CamVid is not on this machine; set SPTSEG_CAMVID")
def test_real_photographs() -> None:
    report = check(datasets.camvid(CAMVID / "train"), limit=12, progress=False)
    assert not report.faults and not report.warnings
    assert report.split == splits.camvid() and report.size_range()["median"] == (480, 360)
