"""Clumsy and hostile input on the command line: one sentence, exit code 2, no traceback, no half-written file.

Whatever is odd but sound must work: pictures of all kinds and shapes, hundreds of classes, names in any script.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
from conftest import refused
from PIL import Image
from toys import Intruder, data_folder, noise

from sptseg.checkpoints.checkpoint import load_model
from sptseg.cli import which
from sptseg.cli.commands import main
from sptseg.datasets import folders
from sptseg.datasets.images import open_mask
from sptseg.inference.evaluation import evaluate
from sptseg.inference.segmentation import segment
from sptseg.model.clip import new_tiny_clip
from sptseg.model.config import DENSE_CLIP
from sptseg.model.spt_seg import SptSeg, build_model
from sptseg.training.stream import label_table


@pytest.fixture(scope="module")
def embedded() -> SptSeg:
    return load_model()


@pytest.fixture
def model(embedded: SptSeg, monkeypatch: pytest.MonkeyPatch) -> SptSeg:
    """The embedded model, loaded once for all commands."""
    given = {"embedded": embedded}
    monkeypatch.setattr(which, "load_model", lambda name, *rest: given.get(name) or load_model(name, *rest))
    return embedded


MISREAD = """
    nonsense|-x|data|evaluate --no|evaluate --images x|evaluate --layout foo|train|train --output|import x
    train --output out --preset foo|train --output out --train.iterations -9
    train --output out --train.learning-rate nan
"""
TRAIN = "train --output out --images 2 --train.batch-size 1"
WRONG = {
    "evaluate --layout voc2012": "are for masks in files; scenes have none: give --data their folder",
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
    "segment notes.txt --classes grass": "notes.txt is not an image that Pillow can read",
    "segment a.png --classes grass,unicorn": "the tiny CLIP does not know 'unicorn'",
    "segment https://x.org/a.jpg --classes grass": "is a web address; sptseg reads files only",
    "segment a.png b.png --classes grass": "2 pictures do not fit into one file segmentation.png",
    "train --output out --start-from gone": "there is no checkpoint gone",
    f"{TRAIN} --unseen none": "has no unseen classes; use setting='supervised'",
    f"{TRAIN} --decoder none --prompt-tokens 0 --spectral-layers": "nothing to train",
    "train --output out --train.setting transductive --start random": "give --start-from an inductive checkpoint",
    "ablate --configurations spt,unicorn": "there is no configuration unicorn; there are dense-clip, ",
    "ablate --train.setting supervised": "the setting supervised goes behind a configuration's name",
    "import gone.pth --output out": "there is no checkpoint file gone.pth",
    "demo --scenes 0": "scenes is 0; wanted at least 1",
    "benchmark loss --quick --threads 0": "threads is 0",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: two pictures, a text; nothing can be downloaded."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        noise().save(name)
    Path("notes.txt").write_text("neither a picture nor a model")

    def offline(*_: object, **__: object) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", offline)
    return tmp_path


@pytest.mark.parametrize("line", WRONG)
def test_wrong_arguments(line: str, here: Path, model: SptSeg, capsys: pytest.CaptureFixture[str]) -> None:
    assert WRONG[line] in refused(capsys, *line.split())
    left = {path.name for path in here.rglob("*") if path.is_file()}
    assert left - {"first-batch.png"} == {"a.png", "b.png", "notes.txt"}, "nothing is half done"


@pytest.mark.parametrize("line", [line.strip() for line in MISREAD.strip().replace("\n", "|").split("|")])
def test_unknown_and_missing_options(line: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(line.split())
    said = capsys.readouterr().err
    assert "--help" in said or ("Expected one of" in said and "Traceback" not in said)


@pytest.mark.parametrize(
    "classes", [" , ,", "grass, grass ,water", "🌳", "\0", "a" * 100_000], ids=lambda text: repr(text[:12])
)
def test_wrong_class_lists(classes: str, here: Path, model: SptSeg, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, "segment", "a.png", "--classes", classes)
    assert not Path("segmentation.png").exists()


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
    data = folders.ImageMaskFolder(root)
    assert data.split.ignore == 65535
    assert evaluate(model, data, data.split, seen_offset=0.0, progress=False).pixel_accuracy == 1.0
    half = result.labels.copy()
    half[:32], half[40:, :32] = 65535, 255
    Image.fromarray(half.astype(np.uint16)).save(root / "masks" / "a.png")
    scores = evaluate(model, data, data.split, seen_offset=0.0, progress=False)
    assert scores.pixel_accuracy == pytest.approx(float((result.labels[32:] == half[32:]).mean()))
    with pytest.raises(ValueError, match="training takes at most 255 classes; split .* has 847"):
        label_table(data.split, "inductive")


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    image.save(buffer := io.BytesIO(), form, **options)
    return buffer.getvalue()


PNG = encoded(noise(), "PNG")


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises another size."""
    header = PNG[12:16] + struct.pack(">II", width, height) + PNG[24:29]
    return PNG[:12] + header + struct.pack(">I", zlib.crc32(header)) + PNG[33:]


def test_odd_pictures_are_segmented(model: SptSeg, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG + bytes(1000))
    noise(size=(1, 1)).save(tmp_path / "b.png")
    main(["segment", str(tmp_path), "--classes", "grass,water", "--out", str(tmp_path / "out")])
    assert [open_mask(tmp_path / f"out/{name}-labels.png").shape for name in "ab"] == [(30, 40), (1, 1)]


BROKEN = {
    "zeros": bytes(5000), "wrong check sum": PNG[:29] + bytes(4) + PNG[33:], "less data than promised": bomb(100, 100),
    "bomb of one row": bomb(2**28, 1), "no width": bomb(0, 10), "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_pictures(kind: str, here: Path, model: SptSeg, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "a.png").write_bytes(BROKEN[kind])
    assert "a.png" in refused(capsys, "segment", here / "a.png", "--classes", "grass,water")
    assert not Path("segmentation.png").exists()


MASKS = {
    "bomb": bomb(60_000, 60_000), "value -1": encoded(Image.fromarray(np.full((30, 40), -1, np.int32)), "TIFF"),
    "palette, value 7": encoded(Image.new("L", (40, 30), 7).convert("P"), "PNG"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MASKS)
def test_wrong_masks(kind: str, model: SptSeg, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Evaluation stops there, and `data check` names the file in its report too."""
    folder = data_folder(tmp_path / "data", {"a": np.full((30, 40), 1)})
    mask, report = folder / "masks" / "a.png", folder / "report.json"
    mask.write_bytes(MASKS[kind])
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
