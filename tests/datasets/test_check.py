"""What a data set holds, which of its files are faulty, and what speaks against the meaning of its label values."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toys import Bands

from sptseg.datasets import folders as datasets
from sptseg.datasets import splits
from sptseg.datasets.check import SHOWN, contact_sheet, spread
from sptseg.datasets.check import check_dataset as check
from sptseg.datasets.folders import ImageMaskFolder, Sample
from sptseg.datasets.plots import png_bytes
from sptseg.datasets.splits import IGNORE, Split, spread_palette

CAMVID = Path(os.environ.get("SPTSEG_CAMVID", Path(__file__).resolve().parents[3] / "shared/camvid"))


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
    report = check(Bands((0, 0, 1, IGNORE)), progress=False)
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
    assert check(Bands(), limit=2, progress=False).looked_at == 2


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
    report = check(Bands((0, 7), length=SHOWN + 3), progress=False)
    assert len(report.faults) == SHOWN + 3
    assert "- and 3 more" in report.table() and f"image {SHOWN}:" not in report.table()
    assert "none | none | none" in report.table()


def test_unexpected_errors_are_named_with_their_kind() -> None:
    class Broken(Bands):
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
    class Changed(Bands):
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
    report = check(Bands((1, 2, 3)), progress=False)
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
        check(torch.utils.data.Subset(Bands(), [0]))


# --- contact_sheet ----------------------------------------------------------------------------------------------------


def test_contact_sheet_shows_pictures_masks_and_names() -> None:
    figure = contact_sheet(Bands(), count=3, seed=1)
    titles = [ax.get_title() for ax in figure.axes]
    assert sum(title.startswith("noise-") for title in titles) == 3
    texts = {text.get_text() for ax in figure.axes for text in ax.texts}
    assert {"grass", "tree*"} <= texts
    legend = [text.get_text() for text in figure.axes[-1].get_legend().get_texts()]
    assert legend == ["grass", "water", "tree*", "boat", "* unseen in training"]
    again = contact_sheet(Bands(), count=3, seed=1)
    assert [ax.get_title() for ax in again.axes] == titles
    assert png_bytes(again).startswith(b"\x89PNG")


def test_contact_sheet_says_which_files_are_broken(tmp_path: Path) -> None:
    root = folder(tmp_path, {"a": [[0, 1, 2, 255]] * 2, "b": [[0, 1, 2, 255]] * 2})
    (root / "masks/b.png").write_bytes(b"")
    figure = contact_sheet(ImageMaskFolder(root))
    shown = [text.get_text().replace("\n", "") for ax in figure.axes for text in ax.texts]
    assert any("not an image" in text for text in shown)
    assert png_bytes(figure).startswith(b"\x89PNG")


@pytest.mark.skipif(not CAMVID.is_dir(), reason="CamVid is not on this machine; set SPTSEG_CAMVID")
def test_real_photographs() -> None:
    report = check(datasets.camvid(CAMVID / "train"), limit=12, progress=False)
    assert not report.faults and not report.warnings
    assert report.split == splits.camvid() and report.size_range()["median"] == (480, 360)
