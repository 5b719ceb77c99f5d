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
import torch
from conftest import refused
from PIL import Image
from safetensors.torch import load_file, save
from toys import Intruder, data_folder, noise

from sptseg.checkpoints.checkpoint import load_model, read_header, save_model
from sptseg.cli import which
from sptseg.cli.commands import main
from sptseg.datasets import folders
from sptseg.inference.evaluation import evaluate
from sptseg.inference.segmentation import segment
from sptseg.model.clip import new_tiny_clip
from sptseg.model.config import DENSE_CLIP, EMBEDDED_CONFIG
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
    "segment notes.txt --classes grass": "notes.txt is not an image that Pillow can read",
    "segment a.png --classes grass,unicorn": "the tiny CLIP does not know 'unicorn'",
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
    Path("loop.png").symlink_to("loop.png")
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


def bomb(width: int, height: int) -> bytes:
    """A PNG header that promises a huge picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


PNG, WEBP = encoded(noise(), "PNG"), encoded(noise(), "WEBP")
FRAMES: dict[str, Any] = {"save_all": True, "append_images": [noise("L")]}
SOUND = {  # file name, content, (width, height)
    "1 x 1": ("a.png", encoded(noise(size=(1, 1)), "PNG"), (1, 1)),
    "CMYK": ("a.jpg", encoded(noise("CMYK"), "JPEG"), (40, 30)),
    "palette, transparent": ("a.png", encoded(noise("P"), "PNG", transparency=0), (40, 30)),
    "animated WebP": ("a.webp", encoded(noise(), "WEBP", **FRAMES), (40, 30)),
    "bytes behind the end": ("a.png", PNG + bytes(1000), (40, 30)),
}


@pytest.mark.parametrize("kind", SOUND)
def test_odd_pictures_are_segmented(kind: str, model: SptSeg, tmp_path: Path) -> None:
    name, content, size = SOUND[kind]
    (tmp_path / name).write_bytes(content)
    main(["segment", str(tmp_path / name), "--classes", "grass,water", "--out", str(tmp_path / "out")])
    with Image.open(tmp_path / "out" / "a-labels.png") as labels:
        assert labels.size == size


BROKEN = {
    "empty": b"", "half a PNG": PNG[: len(PNG) // 2], "half a WebP": WEBP[: len(WEBP) // 2], "zeros": bytes(5000),
    "wrong check sum": PNG[:29] + bytes(4) + PNG[33:], "less data than promised": bomb(100, 100),
    "bomb of one row": bomb(2**28, 1), "no width": bomb(0, 10), "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_pictures(kind: str, here: Path, model: SptSeg, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "a.png").write_bytes(BROKEN[kind])
    assert "a.png" in refused(capsys, "segment", here / "a.png", "--classes", "grass,water")
    assert not Path("segmentation.png").exists()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One picture and its mask, three classes."""
    return data_folder(tmp_path / "data", {"a": np.full((30, 40), 1)})


MASKS = {
    "RGB": PNG, "turned": encoded(Image.new("L", (30, 40)), "PNG"), "bomb": bomb(60_000, 60_000),
    "value -1": encoded(Image.fromarray(np.full((30, 40), -1, np.int32)), "TIFF"),
    "palette, value 7": encoded(Image.new("L", (40, 30), 7).convert("P"), "PNG"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MASKS)
def test_wrong_masks(kind: str, folder: Path, model: SptSeg, capsys: pytest.CaptureFixture[str]) -> None:
    """Evaluation stops there, and `data check` names the file in its report too."""
    mask, report = folder / "masks" / "a.png", folder / "report.json"
    mask.write_bytes(MASKS[kind])
    assert str(mask) in refused(capsys, "evaluate", "--data", folder, "--json", report) and not report.exists()
    assert str(mask) in refused(capsys, "data", "check", folder, "--json", report)
    assert len(json.loads(report.read_text())["faults"]) == 1


@pytest.mark.parametrize(
    "kind", ["a pickle", "half", "one bit", "other tensors", "huge header", "a path", "huge pictures", "code"]
)
def test_checkpoints_of_strangers(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused in a moment and in little memory, whatever sizes they name, and no path in them is opened."""
    config = replace(EMBEDDED_CONFIG, image_size=(32, 32), prompt_tokens=1, decoder_layers=1)
    path = save_model(build_model(config), tmp_path / "model.safetensors")
    whole, header, tensors = path.read_bytes(), read_header(path), load_file(path)

    def changed(**options: object) -> bytes:
        return save(tensors, metadata={"sptseg": json.dumps(header | {"config": header["config"] | options})})

    contents = {
        "a pickle": pickle.dumps({"state_dict": {}}), "half": whole[: len(whole) // 2],
        "one bit": whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:], "huge header": bytes(7) + b"\x80{",
        "other tensors": save({"a": torch.ones(3)}, metadata={"sptseg": json.dumps(header)}),
        "a path": changed(clip="/etc/passwd"), "huge pictures": changed(image_size=[10**9, 10**9]),
        "code": changed(templates=["{0.__class__}"]),
    }  # fmt: skip
    path.write_bytes(contents[kind])
    assert str(path) in refused(capsys, "evaluate", "--model", path, "--images", "1")
    start = ["--images", "2", "--start-from", path]
    assert str(path) in refused(capsys, "train", "--output", tmp_path / "out", *start)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_research_files_that_would_run_code(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(pickle.dumps({"state_dict": Intruder(tmp_path / "intruded")}))
    refused(capsys, "import", path, "--output", tmp_path / "out")
    assert [*tmp_path.iterdir()] == [path], "nothing ran"
