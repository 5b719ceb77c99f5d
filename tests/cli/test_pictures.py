"""Pictures, masks and names as people have them, on the command line: right, or said."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toys import data_folder

from sptseg import scenes
from sptseg.checkpoints import load_model
from sptseg.cli import main
from sptseg.datasets.images import Note, open_mask
from sptseg.inference import segment


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, list[str]]:
    """Exit code and lines on standard error of a command, without progress bars."""
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    return code, [line for line in capsys.readouterr().err.splitlines() if line.startswith(("note: ", "sptseg: "))]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder as cameras, phones and browsers fill it."""
    folder = tmp_path / "photos"
    folder.mkdir()
    image = Image.fromarray(scenes.draw(7, 96)[0])
    for name in ("a.JPG", "b.jfif", "d.avif", "e.webp"):
        image.save(folder / name)
    image.save(folder / "c.gif", save_all=True, append_images=[image.rotate(90)])
    Image.fromarray(np.full((96, 96), 3000, np.uint16)).save(folder / "f.png")
    (folder / "g.heic").write_bytes(b"ftypheic")
    (folder / "._a.JPG").write_bytes(b"macOS")
    return folder


def test_every_picture_of_a_folder_is_segmented_or_named(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "h.png").write_bytes(b"broken")
    out = tmp_path / "out"
    code, said = run(capsys, "segment", photos, "--classes", "grass；water\ntree", "--out", out)
    assert code == 2 and said == [
        f"note: {photos}: left out 1 entries that are no pictures Pillow reads: g.heic",
        f"note: {photos / 'c.gif'}: of several frames or pages the first is taken",
        f"note: {photos / 'f.png'}: no more than 12 of its 16 bits are used: scaled as 12-bit values",
        f"sptseg: 1 of 7 pictures cannot be read, and were left out: {photos / 'h.png'} is not an image that Pillow "
        "can read (6 bytes); wanted JPEG, PNG or the like: convert it, or take it out of the folder",
    ]
    rows = list(csv.reader((out / "areas.csv").read_text().splitlines()))
    assert rows[0] == ["picture", "grass", "water", "tree"]
    assert [row[0] for row in rows[1:]] == ["a.JPG", "b.jfif", "c.gif", "d.avif", "e.webp", "f.png"]
    assert {f"{name}{end}.png" for name in "abcdef" for end in ("", "-labels")} <= {file.name for file in out.iterdir()}


def test_a_single_class_is_a_question_of_yes_or_no(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here of the embedded model, which knows what is drawn; Python says that every pixel gets the class."""
    image, label = scenes.draw(7, 128)
    Image.fromarray(image).save(photos / "a.png")
    name = scenes.CLASSES[np.bincount(label.ravel()).argmax()]
    main(["segment", str(photos / "a.png"), "--classes", name, "--out", str(tmp_path / "a.png")])
    assert "none stands for sky, " in capsys.readouterr().out
    found, true = open_mask(tmp_path / "a-labels.png"), label == scenes.INDEX[name]
    assert np.mean((found == 0) == true) > 0.9 and ((found == 0) | (found == 255)).all()
    assert json.loads((tmp_path / "a-names.json").read_text()) == {"0": name, "255": "none"}
    coco = json.loads((tmp_path / "a-coco.json").read_text())
    assert [each["area"] for each in coco["annotations"]] == [(found == 0).sum()]
    main(["segment", str(photos / "a.png"), "--classes", name, "--background", "1", "--out", str(tmp_path / "out")])
    assert (tmp_path / "out/areas.csv").read_text().splitlines() == [f"picture,{name},none", "a.png,0.0000,1.0000"]
    with pytest.warns(Note, match=f"every pixel gets '{name}', as no other is named"):
        assert not segment(load_model(), image, [name]).labels.any()


def test_large_pictures_ask_for_a_flag(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    segment = ["segment", photos / "a.JPG", "--classes", "grass,water", "--out", tmp_path / "out"]
    code, said = run(capsys, *segment)
    assert code == 2 and "--max-pixels" in said[0] and not (tmp_path / "out/a.png").exists()
    assert run(capsys, *segment, "--max-pixels", "9216") == (0, [])
    assert open_mask(tmp_path / "out/a-labels.png", 9216).shape == (96, 96)


def test_masks_of_0_and_255_are_said_and_mapped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, label = scenes.draw(7, 96)
    halves = np.uint8(label == label[0, 0]) * 255
    data_folder(tmp_path / "data", {"a": halves, "b": halves}, ["grass", "water"], ["water"])
    main(["data", "check", str(tmp_path / "data")])
    assert "the masks hold 2 values, 0, 255: if these are the 2 classes, say so with --values 255=1" in (
        capsys.readouterr().out
    )
    steps = "--train.iterations 1 --train.batch-size 1 --train.workers 0 --train.precision no".split()
    train = ["train", "--output", tmp_path / "run", "--data", tmp_path / "data", *steps]
    main([str(word) for word in [*train, "--preflight-only"]])
    assert "warning: the masks hold 2 values, 0, 255" in capsys.readouterr().out
    main([str(word) for word in [*train, "--values", "255=1"]])
    about = json.loads((tmp_path / "run/config.json").read_text())["about"]
    assert about["data_options"]["values"] == "255=1"
    shares = []
    for options in (["--values", "255=1"], []):
        main(["evaluate", "--data", str(tmp_path / "data"), "--json", str(tmp_path / "scores.json"), *options])
        shares.append(json.loads((tmp_path / "scores.json").read_text())["pixel_accuracy"])
    assert shares[0] < shares[1], "ignored pixels cannot be wrong"
