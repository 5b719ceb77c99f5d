"""Clumsy and hostile input on the command line: one sentence, exit code 2, no traceback, no half-written file."""

import csv
import json
import pickle
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import open_clip
import pytest
from conftest import refused
from PIL import Image
from toys import Intruder, data_folder, noise

from sptseg import DENSE_CLIP, build_model, evaluate, load_model, scenes, segment
from sptseg.cli import main, which
from sptseg.datasets import ImageMaskFolder
from sptseg.datasets.images import Note, open_mask
from sptseg.model import new_tiny_clip
from sptseg.training import label_table


@pytest.fixture(scope="module")
def model() -> Iterator[None]:
    """The embedded model is loaded once for all commands."""
    given = {"embedded": load_model()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(which, "load_model", lambda name, *rest: given.get(name) or load_model(name, *rest))
        yield


WRONG = {
    "evaluate --layout voc2012": "are for files; scenes have none: give --data their folder",
    "evaluate --max-pixels 99": "--max-pixels are for files; scenes have none",
    "evaluate --prompts tree=grass,tree=water": "wanted NAME=WORDS, each name once",
    "evaluate --seed -1": "length is 300, seed -1; wanted at least 1, and 0",
    "evaluate --seen-offset nan": "--seen-offset is nan; wanted -1 to 1",
    "ablate --clip ViT-B-16 --seeds 0": "--clip is ViT-B-16; wanted tiny or tiny-plain",
    "evaluate --unseen unicorn": "split 'scenes' has no class unicorn; it has sky, ",
    "evaluate --prompts tree": "--prompts is 'tree'; wanted NAME=WORDS",
    "evaluate --data gone": "gone does not exist",
    "evaluate --model gone.safetensors": "there is no checkpoint gone.safetensors; wanted embedded, ",
    "evaluate --model embedded --clip tiny": "model embedded has its own CLIP: leave out --clip",
    "evaluate --clip ViT-B-17 --clip-weights none": "'ViT-B-17' is no open_clip model",
    "evaluate --clip ViT-B-16-quickgelu --clip-weights openai": "'openai' of ViT-B-16-quickgelu could not be loaded",
    "evaluate --clip-weights openai": "--clip-weights openai needs --clip",
    "evaluate --clip tiny --clip-weights notes.txt": "notes.txt is no tiny CLIP",
    "evaluate --images 1 --json /dev/full": "/dev/full could not be written (No space left on device)",
    "segment --classes grass": "no picture is named; wanted files or folders",
    "segment a.png --classes grass,🌳": "the tiny CLIP does not know '🌳'",
    "segment a.png --classes ' , ,'": "the list of classes is empty; name at least one",
    "segment a.png --classes 'grass, grass ,water'": "class names given twice: grass;",
    "segment a.png --classes grass --out a.xyz": "ends in .xyz, which is no picture that can be written; use .png",
    "segment a.png --classes 'grass,,water'": "a name is blank in 'grass,,water': write it, or take",
    "segment loop.png --classes grass": "loop.png does not exist",
    "segment /dev/null --classes grass": "/dev/null is a pipe or a device; wanted an image file",
    "segment a.png --classes grass,water --out /dev/null": "written to /dev/null (it is a file, wanted a folder)",
    "segment https://x.org/a.jpg --classes grass": "is a web address; sptseg reads files only",
    "segment a.png b.png --classes grass": "2 pictures do not fit into one file segmentation.png",
    "data check . --data b": "two folders are named, . and --data b; leave out one",
    "evaluate --data . --seed 0 --subset val": "., as folder, has no subsets: leave out --subset val",
    "ablate --seeds": "seeds are none; wanted one or more, each once",
    "ablate --seeds 0 1 0": "seeds are 0, 1, 0; wanted one or more, each once",
    "notebooks run 00 --output out --timeout -1": "--timeout is -1, --jobs 1; wanted",
    "notebooks check 00 --output out --jobs 0": "--timeout is 0, --jobs 0; wanted",
    "train --output out --start-from embedded --prompt-tokens 5": "embedded has its own prompt_tokens; leave",
    "ablate --configurations spt,unicorn": "there is no configuration unicorn; there are dense-clip, ",
    "ablate --train.setting supervised": "the setting supervised goes behind a configuration's name",
    "import gone.pth --output out": "there is no checkpoint file gone.pth",
    "demo --scenes 0": "scenes is 0; wanted at least 1",
    "benchmark loss --quick --threads 0": "threads is 0",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_arguments(
    line: str, model: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder with two pictures and a text, and without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", Mock(side_effect=OSError("no route to host")))
    for name in ("a.png", "b.png"):
        noise().save(name)
    Path("loop.png").symlink_to("loop.png")
    Path("notes.txt").write_text("neither a picture nor a model")
    assert WRONG[line] in refused(capsys, *shlex.split(line))
    left = {path.name for path in tmp_path.rglob("*")}
    assert left == {"a.png", "b.png", "loop.png", "notes.txt"}, "nothing is half done"


def test_847_classes_are_segmented_saved_and_scored(tmp_path: Path) -> None:
    """As many as the full ADE20K has: labels beyond 255 go into 16-bit PNGs, 65535 is ignored, and 255 is a class."""
    classes = [f"c{i}" for i in range(847)]
    clip = new_tiny_clip((*classes, "a", "photo", "of"))
    clip = replace(clip, model=clip.model.eval().requires_grad_(False))
    model = build_model(replace(DENSE_CLIP, image_size=(64, 64)), clip).eval()
    image = np.random.default_rng(0).integers(0, 256, (2, 2, 3), np.uint8).repeat(32, 0).repeat(32, 1)
    result = segment(model, image, classes)
    assert result.labels.max() > 255 and len(result.palette) == 847 and sum(result.areas().values()) == pytest.approx(1)
    root = data_folder(tmp_path / "data", {"a": result.labels * 0}, classes, ["c255"])
    Image.fromarray(image).save(root / "images" / "a.png")
    result.save_labels(root / "masks" / "a.png")
    data = ImageMaskFolder(root)
    assert data.split.ignore == 65535
    assert evaluate(model, data, data.split, seen_offset=0.0, progress=False).pixel_accuracy == 1.0
    half = result.labels.copy()
    half[:32], half[40:, :32] = 65535, 255
    Image.fromarray(half.astype(np.uint16)).save(root / "masks" / "a.png")
    scores = evaluate(model, data, data.split, seen_offset=0.0, progress=False)
    assert scores.pixel_accuracy == pytest.approx(float((result.labels[32:] == half[32:]).mean()))
    with pytest.raises(ValueError, match="training takes at most 255 classes; split .* has 847"):
        label_table(data.split, "inductive")


def test_odd_pictures_are_segmented(model: None, tmp_path: Path) -> None:
    noise().save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes() + bytes(1000))
    noise(size=(1, 1)).save(tmp_path / "b.png")
    main(["segment", str(tmp_path), "--classes", "grass,water", "--out", str(tmp_path / "out")])
    assert [open_mask(tmp_path / f"out/{name}-labels.png").shape for name in "ab"] == [(30, 40), (1, 1)]


@pytest.mark.parametrize(("value", "kind"), [(-1, np.int32), (7, np.uint8)])
def test_wrong_masks(value: int, kind: type, model: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Evaluation stops there, and `data check` names the file in its report too."""
    folder = data_folder(tmp_path / "data", {"a": np.ones((30, 40))})
    mask, report = folder / "masks" / "a.png", folder / "report.json"
    Image.fromarray(np.full((30, 40), value, kind)).save(mask, "TIFF")
    assert str(mask) in refused(capsys, "evaluate", "--data", folder, "--json", report) and not report.exists()
    assert str(mask) in refused(capsys, "data", "check", folder, "--json", report)
    assert len(json.loads(report.read_text())["faults"]) == 1


@pytest.mark.parametrize("content", [pickle.dumps({"state_dict": {}}), b""])
def test_checkpoints_of_strangers(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "model.safetensors", tmp_path / "out"
    path.write_bytes(content)
    assert str(path) in refused(capsys, "evaluate", "--model", path, "--images", "1")
    assert str(path) in refused(capsys, "train", "--output", out, "--images", "2", "--start-from", path)
    assert not out.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_research_files_that_would_run_code(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(pickle.dumps({"state_dict": Intruder(tmp_path / "intruded")}))
    refused(capsys, "import", path, "--output", tmp_path / "out")
    assert [*tmp_path.iterdir()] == [path], "nothing ran"


# Places where nothing can be written

PLACES = {  # what their names end in and what stands in the way: commands
    (".json", "data"): "evaluate --json|data check {data} --json|pretrain --output|benchmark --json",
    ("", "file"): "train --output|ablate --output|demo --output|segment {data}/images --classes a --out|"
    "notebooks run --output|notebooks check --output",
    (".png", "folder.png"): "data show {data} --out|segment {data}/images/a.png --classes a --out",
    (".safetensors", "file"): "import {data}/classes.txt --output",
}


class Begun(BaseException):
    """Raised by what would be the first work."""


WORKS = "cli.Which.load cli.which.load_model cli.commands.import_research_checkpoint cli.demo.load_model"
WORKS += " cli.benchmark.machine datasets.Data.load training.pretraining.new_tiny_clip interactive.notebooks.run_all"


@pytest.mark.parametrize(("place", "command"), [(place, each) for place in PLACES for each in PLACES[place].split("|")])
def test_places_are_tried_before_the_work(
    place: tuple, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for work in WORKS.split():
        monkeypatch.setattr(f"sptseg.{work}", Mock(side_effect=Begun))
    data = data_folder(tmp_path / "data", dict.fromkeys("ab", np.zeros((8, 8))))
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder.png").mkdir()
    words, (suffix, wrong) = command.format(data=data).split(), place
    said = refused(capsys, *words, tmp_path / wrong)
    assert said.startswith(f"nothing can be written to {tmp_path}") and said.endswith("another place for the results")
    beyond = tmp_path / "file" / f"new{suffix}"
    assert f"nothing can be written to {beyond}" in refused(capsys, *words, beyond)
    with pytest.raises(Begun):
        main([*words, str(tmp_path / "new" / "place" / f"result{suffix}")])
    assert not (tmp_path / "new").exists() and (tmp_path / "file").read_text() == "kept"


# Pictures and masks as people have them


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


def test_each_picture_is_segmented_or_named(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "h.png").write_bytes(b"broken")
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="2"):
        main(["segment", str(photos), "--classes", "grass；water\ntree", "--out", str(out)])
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith(("note: ", "sptseg: "))] == [
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


def test_one_class_is_a_question_of_yes_or_no(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    segment = ["segment", str(photos / "a.JPG"), "--classes", "grass,water", "--out", str(tmp_path / "out")]
    assert "--max-pixels" in refused(capsys, *segment) and not (tmp_path / "out/a.png").exists()
    main([*segment, "--max-pixels", "9216"])
    assert open_mask(tmp_path / "out/a-labels.png", 9216).shape == (96, 96)


def test_masks_of_0_and_255_are_said_and_mapped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    halves = np.zeros((96, 96))
    halves[:, 48:] = 255
    data = ["--data", str(data_folder(tmp_path / "data", {"a": halves, "b": halves}, ["grass", "water"], ["water"]))]
    main(["data", "check", data[1]])
    hint = "the masks hold 2 values, 0, 255: if these are the 2 classes, say so with --values 255=1"
    assert hint in capsys.readouterr().out
    steps = "--train.iterations 1 --train.batch-size 1 --train.workers 0 --train.precision no".split()
    train = ["train", "--output", str(tmp_path / "run"), *data, *steps]
    main([*train, "--preflight-only"])
    assert f"warning: {hint}" in capsys.readouterr().out
    main([*train, "--values", "255=1"])
    assert '"values": "255=1"' in (tmp_path / "run/config.json").read_text(), "it is stored with the run"
    shares = []
    for options in (["--values", "255=1"], []):
        main(["evaluate", *data, "--json", str(tmp_path / "scores.json"), *options])
        shares.append(json.loads((tmp_path / "scores.json").read_text())["pixel_accuracy"])
    assert shares[0] < shares[1], "ignored pixels cannot be wrong"
