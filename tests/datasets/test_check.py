"""What is found in data sets: counts, faulty files, values that mean something else; and samples to look at."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toys import Bands, data_folder

from sptseg.datasets import IGNORE, ImageMaskFolder, camvid, splits
from sptseg.datasets.check import MOST_LISTED, check_dataset, evenly, show_samples, survey

CAMVID = Path(os.environ.get("SPTSEG_CAMVID", Path(__file__).resolve().parents[3] / "shared/camvid"))


class Changed(Bands):
    """More samples than a report lists, with parts replaced."""

    def __init__(self, **change: object) -> None:
        super().__init__(length=MOST_LISTED + 3)
        self.change = change

    def __getitem__(self, index: int) -> Any:
        return {**super().__getitem__(index), **self.change}


def folder(root: Path, masks: dict[str, list[int]], classes: Sequence[str] = "abc") -> ImageMaskFolder:
    """Pictures whose masks are two equal rows."""
    return ImageMaskFolder(data_folder(root, {name: [row] * 2 for name, row in masks.items()}, classes))


def test_check_counts_pixels_images_and_sizes() -> None:
    assert evenly(10, 4) == [0, 2, 5, 7] and evenly(3, 9) == evenly(3, None) == [0, 1, 2]
    report = check_dataset(Bands((0, 0, 1, IGNORE)), progress=False)
    assert (report.total, report.looked_at, report.faults) == (5, 5, [])
    assert report.pixels == [5 * 40 * 24, 5 * 40 * 12, 0, 0] and report.images == [5, 5, 0, 0]
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


def test_every_faulty_file_and_every_note_is_collected(tmp_path: Path) -> None:
    sound = [0, 1, 2, 255]
    data = folder(tmp_path, {"a": sound, "b": sound, "c": [9, 0, 0, 0], "d": sound, "e": [255] * 4})
    (tmp_path / "images/b.png").write_bytes(b"no picture")
    for name in "ae":
        Image.fromarray(np.full((2, 4), 4000, np.uint16)).save(tmp_path / f"images/{name}.png")
    Image.new("L", (2, 4)).save(tmp_path / "masks/d.png")
    report = check_dataset(data, progress=False)
    assert len(report.faults) == 3
    for text, fault in zip(("b.png is not an image", "mask value 9", "wanted equal sizes"), report.faults, strict=True):
        assert text in fault
    assert report.images == [1, 1, 1] and report.all_ignored == ["e"]
    note = "2 images: no more than 12 of its 16 bits are used: scaled as 12-bit values: a, e"
    assert report.warnings == [note, "1 images: no labelled pixel: e"]
    assert "Faults: 3" in report.table() and "| 5 of 5 | 3 |" in report.table()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image": torch.zeros(3, 40, 48)}, "the image is float32 (3, 40, 48), its labels int64 (40, 48); wanted"),
        ({"label": torch.full((40, 48), -1)}, "label value -1 is no class"),
        ({"label": torch.full((40, 48), 4)}, "label value 4 is no class of split 'park' (0 to 3"),
        ({"label": None}, "image 0: "),
    ],
)
def test_samples_that_no_training_run_could_use(change: dict, words: str) -> None:
    report = check_dataset(Changed(**change), progress=False)
    assert len(report.faults) == MOST_LISTED + 3 and words in report.faults[0]
    assert "- and 3 more" in report.table() and "none | none | none" in report.table()


@pytest.mark.parametrize(
    ("classes", "rows", "hint", "options"),
    [
        ("ab", [[0, 255, 0, 255]], "the masks hold 2 values, 0, 255: if these are the 2 classes,", {255: 1}),
        ("abc", [[0, 127, 0, 0], [254, 0, 0, 0]], "the masks hold 3 values, 0, 127, 254:", {127: 1, 254: 2}),
        ("ab", [[1, 2, 1, 255]], "one above the last class: if the masks count from 1", None),
        ("abcd", [[0, 255, 255, 0]], "255 is ignored and has 50.0% of the pixels, while b, c, d never occur", {255: 1}),
        ("abc", [[0, 1, 1, 1], [0, 1, 0, 255]], "the masks hold 3 values, 0, 1, 255", {255: 2}),
        ("a", [[0, 0, 0, 255]], "255 is ignored and has 25.0% of the pixels, while all others are a", {255: 0, 0: 255}),
    ],
)
def test_values_that_may_mean_something_else_are_said(
    tmp_path: Path, classes: str, rows: list[list[int]], hint: str, options: dict[int, int] | None
) -> None:
    data = folder(tmp_path, dict(zip("xy", rows, strict=False)), classes)
    report = survey(data, data.split, range(len(data)), progress=False)
    (warning,) = report.warnings
    assert hint in warning
    if options is None:
        assert "--reduce-zero-label" in warning and "value_map={0: 255, 1: 0, 2: 1, ...}" in warning
        options = {0: 255, **{i + 1: i for i in range(len(classes))}}
    else:
        flag = warning.partition("--values ")[2]
        assert flag in (",".join(f"{value}={label}" for value, label in options.items()), "255=LABEL")
    data.map_values(options)
    mended = survey(data, data.split, range(len(data)), progress=False)
    assert not mended.faults and not mended.warnings


def test_a_lonely_absent_class_0_is_suspicious_and_usual_masks_are_not(tmp_path: Path) -> None:
    report = check_dataset(Bands((1, 2, 3)), progress=False)
    assert "label 0 ('grass') alone never occurs" in report.warnings[-1]
    data = folder(tmp_path, {"a": [0, 1, 2, 255], "b": [0, 1, 2, 2], "c": [0, 0, 0, 9]})
    assert not any(survey(data, data.split, [i], progress=False).warnings for i in range(3))


def test_samples_are_shown_with_masks_and_names_and_what_is_broken(tmp_path: Path) -> None:
    figure, again = (show_samples(Bands(), count=3, seed=1) for _ in range(2))
    titles = [ax.get_title() for ax in figure.axes]
    assert len({*titles} & {*"01234"}) == 3 and titles == [ax.get_title() for ax in again.axes]
    assert {"grass", "tree*"} <= {text.get_text() for ax in figure.axes for text in ax.texts}
    legend = [text.get_text() for text in figure.axes[-1].get_legend().get_texts()]
    assert legend == ["grass", "water", "tree*", "boat", "* unseen in training"]
    data = folder(tmp_path, {"a": [0, 1, 2, 255]})
    (tmp_path / "masks/a.png").write_bytes(b"")
    figure = show_samples(data)
    assert any("is not" in " ".join(text.get_text().split()) for ax in figure.axes for text in ax.texts)


@pytest.mark.skipif(not CAMVID.is_dir(), reason="CamVid is not on this machine; set SPTSEG_CAMVID")
def test_real_photographs() -> None:
    report = check_dataset(camvid(CAMVID / "train"), limit=12, progress=False)
    assert not report.faults and not report.warnings
    assert report.split == splits.camvid() and report.size_range()["median"] == (480, 360)
