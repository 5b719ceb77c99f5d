"""Clumsy and hostile input on the command line: one sentence, exit code 2, no traceback, no half-written file.

Whatever is odd but sound must work: pictures of all kinds and shapes, hundreds of classes, names in any script.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import re
import struct
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load_reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save, save_file

from sptseg.checkpoints.checkpoint import config_from_dict, load_model, read_header, save_model
from sptseg.cli import options
from sptseg.cli.commands import main
from sptseg.datasets import folders as datasets
from sptseg.datasets import images
from sptseg.datasets.splits import Split
from sptseg.inference.evaluation import evaluate
from sptseg.inference.segmentation import segment
from sptseg.model.clip import Clip, WordTokenizer, new_tiny_clip
from sptseg.model.config import DENSE_CLIP, EMBEDDED_CONFIG, ModelConfig
from sptseg.model.spt_seg import SptSeg, build_model
from sptseg.training.loop import TrainConfig
from sptseg.training.stream import label_table

Made = Callable[[], bytes]
PROGRESS = re.compile(r"^(evaluating|training|checking)?(: .*)?$")  # bars


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one sentence on standard error of a command that ends with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if not PROGRESS.match(line)]
    assert stopped.value.code == 2, said
    assert len(lines) == 1 and lines[0].startswith("sptseg: "), said
    assert 15 < len(lines[0]) < 2500 and "Traceback" not in said
    return lines[0].removeprefix("sptseg: ")


@pytest.fixture(scope="module")
def embedded() -> SptSeg:
    return load_model()


@pytest.fixture
def model(embedded: SptSeg, monkeypatch: pytest.MonkeyPatch) -> SptSeg:
    """The embedded model, loaded once for all commands; data sets of few pictures by default."""
    given = {"embedded": embedded}
    monkeypatch.setattr(options, "load_model", lambda name, *rest: given.get(name) or load_model(name, *rest))
    return embedded


# Arguments

WRONG: dict[str, list[str]] = {}
for _field in fields(TrainConfig):
    _name = f"--train.{_field.name.replace('_', '-')}"
    if _field.type in ("int", "float"):
        WRONG[_name] = ["many", "", "1e999" if _field.type == "float" else "1.5", "-99999999999999999999"]
    elif _field.type not in ("bool",):
        WRONG[_name] = ["nonsense", ""]
for _field in fields(ModelConfig):
    _name = f"--{_field.name.replace('_', '-')}"
    if _field.type in ("int", "float"):
        WRONG[_name] = ["many", "nan" if _field.type == "float" else "0x10", "-5", "99999999999999999999"]
    elif _field.name in ("image_size", "spectral_layers", "prompt_depth"):
        WRONG[_name] = ["-1 -1", "x y", "1 2 3 x"]
    elif _field.type != "bool" and not _field.name.startswith("clip"):
        WRONG[_name] = ["nonsense"]
TRAIN = [f"train --output OUT {name}|{value}" for name, values in WRONG.items() for value in values]
COMMANDS = """
    nonsense|--nonsense|-x|data|data x|evaluate --no|evaluate --images|evaluate --images x|evaluate --images 0
    evaluate --images -3|evaluate --limit 0|evaluate --limit -1|evaluate --seed x|evaluate --layout foo
    evaluate --layout voc2012 --data OUT|evaluate --layout coco-stuff --data OUT|evaluate --data OUT
    evaluate --unseen unicorn|evaluate --prompts unicorn=tree|evaluate --seen-offset x|evaluate a b c
    evaluate --data /dev/null|evaluate --model /dev/null|evaluate --model OUT|evaluate --model /
    evaluate --model nobody/nothing.safetensors
    evaluate --clip ViT-B-17|evaluate --clip-weights openai|evaluate --clip RN50 --clip-weights openai
    evaluate --clip tiny --clip-weights /dev/null|evaluate --clip tiny --clip-weights /etc/hostname
    evaluate --clip ViT-B-16 --clip-weights openai|evaluate --clip hf-hub:a/b --clip-weights none
    evaluate --images 1 --json /|evaluate --images 1 --json /dev/full|evaluate --images 1 --json /dev/null/x
    segment|segment a.png|segment --classes a|segment /nowhere.png --classes grass --out OUT/a.png
    segment / --classes grass --out OUT|segment /dev/null --classes grass --out OUT/a.png
    train|train --output|train --output OUT --preset foo|train --output OUT --start-from /nowhere
    train --output OUT --images 0|train --output OUT --data /nowhere|train --output OUT --data /etc
    train --output /dev/null --images 2 --train.iterations 1|train --output OUT --clip ViT-B-32
    train --output OUT --train
    ablate --seeds a|ablate --configurations foo|ablate --output|ablate --train.setting foo
    pretrain --images 10 --output OUT|pretrain --images x|pretrain --seed x|demo --seed x
    import|import /nowhere --output OUT|import /etc/hostname --output OUT|import /dev/null --output OUT|import x
    data check|data check /nowhere|data check /etc|data check scenes --limit 0|data check scenes --images x
    data show|data show /nowhere|data show scenes --count 0|data show scenes --count -1|data show scenes --count x
"""
LINES = [line.strip() for lines in COMMANDS.splitlines() for line in lines.split("|") if line.strip()]


@pytest.mark.parametrize("line", [*LINES, *TRAIN])
def test_wrong_arguments(
    line: str, model: SptSeg, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command, _, value = line.partition("|")
    arguments = [argument.replace("OUT", str(tmp_path / "out")) for argument in command.split()]
    refused(capsys, *arguments, *(value.split(" ") if "|" in line else []))
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert set(left) <= {"first-batch.png"}, "nothing is half done"


@pytest.mark.slow
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    command=st.sampled_from(["evaluate", "segment", "train", "data check", "import"]),
    words=st.lists(st.text(max_size=12), min_size=1, max_size=4),
)
def test_any_words_as_arguments(
    command: str, words: list[str], model: SptSeg, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Nothing but exit codes 0 (help) and 2 comes of words that nobody meant as options."""
    capture = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.chdir(tmp_path_factory.mktemp("here"))
        patch.setattr("sys.stderr", capture)
        main([*command.split(), *words, "--no-such-option"])
    assert stopped.value.code == 2 and len(capture.getvalue().splitlines()) == 1, capture.getvalue()


# Classes

CLASSES = [
    "", ",", " , ,", "grass,grass", "grass, grass ,water", "unicorn", "grass,unicorn,water", "träe", "草,水", "🌳",
    "grass;grass", "'grass'", "grass water,grass water", "\0", "a" * 100_000, "grass " * 60, "{}", "%s",
]  # fmt: skip


@pytest.mark.parametrize("classes", CLASSES, ids=lambda text: repr(text[:12]))
def test_wrong_class_lists(classes: str, model: SptSeg, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (20, 30)).save(tmp_path / "a.png")
    refused(capsys, "segment", tmp_path / "a.png", "--classes", classes, "--out", tmp_path / "out.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


CLASS_FILES = {
    "none": b"", "blank lines": b"\n\n \n", "twice": b"grass\ngrass\n", "unknown": b"grass\nunicorn\n",
    "no text": b"\xff\xfe\x00\x01\x9d", "zeros": bytes(100),
}  # fmt: skip


@pytest.mark.parametrize("kind", CLASS_FILES)
@pytest.mark.parametrize("file", ["classes.txt", "unseen.txt"])
def test_wrong_class_files(kind: str, file: str, folder: Path, model: SptSeg, capsys: pytest.CaptureFixture) -> None:
    if file == "unseen.txt" and kind in ("none", "blank lines", "twice"):
        pytest.skip("no unseen classes are none; naming one twice names it")
    (folder / file).write_bytes(CLASS_FILES[kind])
    refused(capsys, "evaluate", "--data", folder)


def any_word_clip(classes: int) -> Clip:
    """The embedded CLIP's image tower with a text tower, of random weights, for the words c0, c1, ..."""
    words = (*(f"c{i}" for i in range(classes)), "a", "photo", "of")
    torch.manual_seed(0)
    clip = new_tiny_clip(words)
    return replace(clip, model=clip.model.eval().requires_grad_(False))


def test_847_classes_are_segmented_saved_and_scored(tmp_path: Path) -> None:
    """As many as the full ADE20K has: labels beyond 255 go into 16-bit PNGs, 65535 is ignored, and 255 is a class."""
    classes = [f"c{i}" for i in range(847)]
    clip = any_word_clip(847)
    assert isinstance(clip.tokenizer, WordTokenizer)
    model = build_model(replace(DENSE_CLIP, image_size=(64, 64)), clip).eval()
    image = np.random.default_rng(0).integers(0, 256, (2, 2, 3), np.uint8).repeat(32, 0).repeat(32, 1)
    result = segment(model, image, classes)
    assert result.labels.max() > 255 and len(result.palette) == 847 and sum(result.areas().values()) == pytest.approx(1)
    result.save(tmp_path / "overlay.png")
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    result.save_labels(tmp_path / "masks" / "a.png")
    Image.fromarray(image).save(tmp_path / "images" / "a.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "masks" / "a.png")), result.labels)
    (tmp_path / "classes.txt").write_text("\n".join(classes))
    (tmp_path / "unseen.txt").write_text("c255")
    data = datasets.ImageMaskFolder(tmp_path)
    assert data.split.ignore == 65535
    scores = evaluate(model, data, data.split, seen_offset=0.0, progress=False)
    assert scores.pixel_accuracy == 1.0
    half = result.labels.copy()
    half[:32] = 65535
    half[40:, :32] = 255
    Image.fromarray(half.astype(np.uint16)).save(tmp_path / "masks" / "a.png")
    scores = evaluate(model, data, data.split, seen_offset=0.0, progress=False)
    assert scores.pixel_accuracy == pytest.approx(float((result.labels[32:] == half[32:]).mean()))
    assert scores.iou["c255"] == pytest.approx((result.labels[half == 255] == 255).mean(), abs=0.01)
    with pytest.raises(ValueError, match="training takes at most 255 classes; split .* has 847"):
        label_table(data.split, "inductive")


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(min_size=1, max_size=8), max_size=5))
def test_names_in_any_script_are_classes_or_refused(names: list[str]) -> None:
    """A split takes every list of names that are not blank and differ by more than form and blanks, and no other."""
    one_form = [" ".join(unicodedata.normalize("NFC", name).split()) for name in names]
    sound = names and len(set(one_form)) == len(names) and all(one_form)
    try:
        assert Split.from_names("any", names).classes == tuple(one_form) and sound
    except ValueError as error:
        assert not sound and len(str(error).splitlines()) <= 1 + sum(map(len, names))


# Pictures


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    values = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(values).convert(mode)


def bomb(width: int, height: int) -> bytes:
    """A PNG header that promises a huge picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


PNG, JPEG = encoded(noise(), "PNG"), encoded(noise(), "JPEG")
SOUND: dict[str, tuple[str, bytes, tuple[int, int]]] = {  # file name, content, upright (width, height)
    "1 x 1": ("a.png", encoded(noise(size=(1, 1)), "PNG"), (1, 1)),
    "10000 x 3": ("a.png", encoded(noise(size=(10_000, 3)), "PNG"), (10_000, 3)),
    "3 x 700": ("a.jpg", encoded(noise(size=(3, 700)), "JPEG"), (3, 700)),
    "CMYK": ("a.jpg", encoded(noise("CMYK"), "JPEG"), (40, 30)),
    "YCbCr": ("a.tif", encoded(noise("YCbCr"), "TIFF"), (40, 30)),
    "grey": ("a.png", encoded(noise("L"), "PNG"), (40, 30)),
    "grey and alpha": ("a.png", encoded(noise("LA"), "PNG"), (40, 30)),
    "alpha": ("a.png", encoded(noise("RGBA"), "PNG"), (40, 30)),
    "palette": ("a.png", encoded(noise("P"), "PNG"), (40, 30)),
    "palette, transparent": ("a.png", encoded(noise("P"), "PNG", transparency=0), (40, 30)),
    "black and white": ("a.png", encoded(noise("1"), "PNG"), (40, 30)),
    "16 bits": ("a.png", encoded(Image.fromarray(np.full((30, 40), 40_000, np.uint16)), "PNG"), (40, 30)),
    "animated GIF": ("a.webp", encoded(noise(), "GIF", save_all=True, append_images=[noise("L")]), (40, 30)),
    "animated WebP": ("a.webp", encoded(noise(), "WEBP", save_all=True, append_images=[noise("L")]), (40, 30)),
    "turned by EXIF": ("a.jpg",
    encoded(noise(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
    (30, 40)),
    "PNG named .jpg": ("a.jpg", PNG, (40, 30)),
    "JPEG named .bmp": ("a.bmp", JPEG, (40, 30)),
    "bytes behind the end": ("a.png", PNG + bytes(1000), (40, 30)),
}  # fmt: skip


@pytest.mark.parametrize("kind", SOUND)
def test_odd_pictures_are_segmented(kind: str, model: SptSeg, tmp_path: Path) -> None:
    name, content, size = SOUND[kind]
    (tmp_path / name).write_bytes(content)
    main(["segment", str(tmp_path / name), "--classes", "grass,water", "--out", str(tmp_path / "out")])
    with Image.open(tmp_path / "out" / "a-labels.png") as labels:
        assert labels.size == size


BROKEN: dict[str, bytes] = {
    **{f"PNG cut at {n}": PNG[:n] for n in (0, 1, 8, 20, 33, 60, len(PNG) // 2, len(PNG) - 30)},
    **{f"JPEG cut at {n}": JPEG[:n] for n in (2, 3, 20, 200, len(JPEG) // 2, len(JPEG) - 20)},
    **{f"{form} cut in half": encoded(noise(), form)[: len(encoded(noise(), form)) // 2] for form in ("WEBP", "BMP",
    "TIFF", "GIF")},
    "text": b"this is no picture", "zeros": bytes(5000), "ones": b"\xff" * 5000,
    "bomb": bomb(60_000, 60_000), "large bomb": bomb(2**31 - 1, 2**31 - 1), "bomb of one row": bomb(2**28, 1),
    "no width": bomb(0, 10), "no height": bomb(10, 0), "less data than promised": bomb(100, 100),
    "wrong check sum": PNG[:29] + b"\0\0\0\0" + PNG[33:],
    "PDF": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n", "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "zip": b"PK\x03\x04" + bytes(60), "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
    "floating point": encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
    "32 bits": encoded(Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), "TIFF"),
    "negative": encoded(Image.fromarray(np.full((4, 4), -5, np.int32)), "TIFF"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_pictures_of_segment(kind: str, model: SptSeg, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(BROKEN[kind])
    said = refused(capsys, "segment", path, "--classes", "grass,water", "--out", tmp_path / "out.png")
    assert str(path) in said
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_a_folder_named_like_a_picture(model: SptSeg, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").mkdir()
    assert "holds no pictures" in refused(capsys, "segment", tmp_path / "a.png", "--classes", "grass")
    said = refused(capsys, "segment", tmp_path, "--classes", "grass", "--out", tmp_path / "out")
    assert "holds no pictures, but 1 entries that are no pictures Pillow reads: a.png" in said


@pytest.mark.slow
@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.sampled_from([PNG, JPEG, *(content for _, content, _ in SOUND.values())]), data=st.data())
def test_changed_bytes_give_a_picture_or_a_sentence(content: bytes, data: st.DataObject, tmp_path: Path) -> None:
    changed = bytearray(content)
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=6)):
        changed[place] = data.draw(st.integers(0, 255))
    (tmp_path / "a.png").write_bytes(changed[: data.draw(st.integers(1, len(changed)))])
    try:
        assert images.open_image(tmp_path / "a.png").mode == "RGB"
    except ValueError as error:
        assert str(error).startswith(f"{tmp_path / 'a.png'} ")


# Masks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One picture and its mask, three classes."""
    for part in ("images", "masks"):
        (tmp_path / "data" / part).mkdir(parents=True)
    noise().save(tmp_path / "data" / "images" / "a.png")
    Image.new("L", (40, 30), 1).save(tmp_path / "data" / "masks" / "a.png")
    (tmp_path / "data" / "classes.txt").write_text("grass\nwater\ntree\n")
    return tmp_path / "data"


MASKS: dict[str, bytes] = {
    "RGB": encoded(noise("RGB"), "PNG"), "RGBA": encoded(noise("RGBA"), "PNG"), "LA": encoded(noise("LA"), "PNG"),
    "CMYK": encoded(noise("CMYK"), "TIFF"), "floating point": encoded(Image.new("F", (40, 30)), "TIFF"),
    "too small": encoded(Image.new("L", (39, 30)), "PNG"), "too large": encoded(Image.new("L", (40, 31)), "PNG"),
    "turned": encoded(Image.new("L", (30, 40)), "PNG"), "one pixel": encoded(Image.new("L", (1, 1)), "PNG"),
    "value 3": encoded(Image.new("L", (40, 30), 3), "PNG"), "value 254": encoded(Image.new("L", (40, 30), 254), "PNG"),
    "value 65535": encoded(Image.fromarray(np.full((30, 40), 65535, np.uint16)), "PNG"),
    "value -1": encoded(Image.fromarray(np.full((30, 40), -1, np.int32)), "TIFF"),
    "a JPEG's smears": encoded(noise("L"), "JPEG"),
    "palette, value 7": encoded(Image.new("L", (40, 30), 7).convert("P"), "PNG"),
    "cut off": PNG[:100], "empty": b"", "text": b"no mask", "bomb": bomb(60_000, 60_000),
}  # fmt: skip


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("command", ["evaluate --data", "data check"])
def test_wrong_masks(kind: str, command: str, folder: Path, model: SptSeg, capsys: pytest.CaptureFixture) -> None:
    (folder / "masks" / "a.png").write_bytes(MASKS[kind])
    report = folder / "report.json"
    said = refused(capsys, *command.split(), folder, "--json", report)
    assert str(folder / "masks" / "a.png") in said
    if report.exists():  # data check says what is wrong there too
        assert command == "data check" and len(json.loads(report.read_text())["faults"]) == 1


@pytest.mark.parametrize("mask", [Image.new("1", (40, 30)), Image.new("P", (40, 30), 2), Image.new("I;16", (40, 30))])
def test_masks_of_one_value_per_pixel_are_read(mask: Image.Image, folder: Path, model: SptSeg) -> None:
    mask.save(folder / "masks" / "a.png")
    main(["evaluate", "--data", str(folder)])


def test_files_that_lack_their_counterpart(folder: Path, model: SptSeg, capsys: pytest.CaptureFixture[str]) -> None:
    for damage in (
        lambda: noise().save(folder / "images" / "b.png"),
        lambda: noise().save(folder / "images" / "a.jpg"),
        lambda: (folder / "images" / "a.png").unlink(),
        lambda: (folder / "images" / "a.jpg").unlink(),
        lambda: (folder / "classes.txt").unlink(),
    ):
        damage()
        refused(capsys, "evaluate", "--data", folder)


# Checkpoints from strangers


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SPT-SEG of a small size on the embedded CLIP."""
    config = replace(EMBEDDED_CONFIG, image_size=(32, 32), prompt_tokens=1, decoder_layers=1)
    return save_model(build_model(config), tmp_path_factory.mktemp("models") / "model.safetensors")


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


CONFIGS: list[dict[str, Any]] = [
    {name: value}
    for name, values in {
        "clip": ["/etc/passwd", "../../secret", "hf-hub:someone/model", "local-dir:/etc", "", None, 1, ["tiny"],
        "ViT-B-17"],
        "clip_weights": ["/etc/passwd", "~/.ssh/id_rsa", "http://127.0.0.1/x", "file:///etc/passwd", 1, ["a"], {}, ""],
        "image_size": [[10**9, 10**9], [2**63, 8], [-8, 8], [0, 0], [31, 32], [32], [32, 32, 32], "32", [3.5, 2],
        None, deep(50)],
        "prompt_tokens": [10**12, -1, 1.5, "1", None, [1], 2**70, 9999],
        "prompt_depth": [10**9, -1, "x", 1.5, 900],
        "spectral_layers": [[10**9], [-1], "x", [0, 0], [[0]], [0.5], list(range(2000)), 1],
        "class_embedding_twice": ["yes", 2, None], "selection": [[], "x"], "decoder": ["unet", 5, None, ["spectral"]],
        "decoder_layers": [10**12, 0, "3", 50], "decoder_heads": [7, 0, 10**12, "x"],
        "decoder_window": [0, -3, 10**12, "x"],
        "dropout": [1.0, -0.1, "x", math.nan, math.inf],
        "templates": [[], "{}", ["a"], [1], ["{} {}"], None, ["{0.__class__}"]],
        "seen_offset": [math.nan, math.inf, 1e300, "x", None], "loss": ["x", 1], "normalization": [0], "start": ["x"],
    }.items()
    for value in values
]  # fmt: skip
HEADERS: list[Any] = [
    None, [], "x", 5, {}, {"format": "sptseg-1"}, {"format": 1}, {"format": "sptseg-1", "config": deep(300)},
    {"format": "sptseg-1", "config": {}}, {"format": "sptseg-1", "config": {"a": 1}}, {"format": "../../x"},
]  # fmt: skip


@pytest.mark.parametrize("change", CONFIGS, ids=lambda change: repr(change)[:40])
def test_hostile_configurations(
    change: dict[str, Any], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused in a moment and in little memory, whatever sizes they name, and no path in them is opened."""
    header = read_header(checkpoint)
    header["config"] |= change
    path = tmp_path / "model.safetensors"
    save_file(load_file(checkpoint), path, metadata={"sptseg": json.dumps(header)})
    assert str(path) in refused(capsys, "evaluate", "--model", path, "--images", "1")


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: repr(header)[:40])
def test_hostile_headers(header: Any, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.safetensors"
    save_file(load_file(checkpoint), path, metadata={"sptseg": json.dumps(header)})
    assert str(path) in refused(capsys, "evaluate", "--model", path, "--images", "1")


ARCHITECTURES: list[Any] = [
    None, [], {}, {"vision_cfg": {"timm_model_name": "vit_base_patch16_224", "timm_model_pretrained": True}},
    {"vision_cfg": {"width": 2**19}}, {"vision_cfg": {"layers": 10**9}}, {"vision_cfg": {"width": 10**30}},
    {"vision_cfg": {"image_size": [10**6, 10**6]}}, {"vision_cfg": {"patch_size": [0, 4]}},
    {"vision_cfg": {"width": "x"}},
    {"vision_cfg": {"layers": True}}, {"vision_cfg": {"head_width": 3}},
    {"text_cfg": {"hf_model_name": "someone/model"}},
    {"text_cfg": {"vocab_size": 2**19}}, {"text_cfg": {"layers": 99}}, {"text_cfg": {"heads": 7}}, {"embed_dim": -1},
    {"embed_dim": 1.5}, {"embed_dim": 64}, {"more": 1},
]  # fmt: skip


@pytest.mark.parametrize("change", ARCHITECTURES, ids=lambda change: repr(change)[:40])
def test_hostile_architectures(change: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of an imported checkpoint, which brings its own CLIP: sizes fit the tensors, other keys are refused."""
    path = save_model(load_reference("spt").imported.model, tmp_path)
    header, tensors = read_header(path), load_file(path)
    own = header["architecture"]
    header["architecture"] = change
    if isinstance(change, dict) and change:
        header["architecture"] = own | change
        for part in ("vision_cfg", "text_cfg"):
            header["architecture"][part] = own[part] | change.get(part, {})
    save_file(tensors, path, metadata={"sptseg": json.dumps(header)})
    assert str(path) in refused(capsys, "evaluate", "--model", path, "--images", "1")


def garbage(checkpoint: Path) -> Iterator[tuple[str, bytes]]:
    whole = checkpoint.read_bytes()
    for share in (0.0, 0.00001, 0.0005, 0.01, 0.5, 0.999):
        yield f"cut at {share:.3%}", whole[: int(share * len(whole))]
    yield "one bit", whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]
    yield "longer", whole + b"x"
    yield "header of 2^63 bytes", struct.pack("<Q", 2**63) + whole[8:]
    yield "no JSON", struct.pack("<Q", 40) + b"{" * 40 + whole
    yield (
        "offsets beyond the end",
        struct.pack("<Q", 62) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36000000]}}  ',
    )
    yield "other tensors", save({"a": torch.ones(3)}, metadata={"sptseg": json.dumps(read_header(checkpoint))})
    yield "no tensors", save({}, metadata={"sptseg": json.dumps(read_header(checkpoint))})
    yield "without a header", save(load_file(checkpoint))
    yield "pickle", pickle.dumps({"state_dict": {}})
    buffer = io.BytesIO()
    torch.save(load_file(checkpoint), buffer)
    yield "torch.save", buffer.getvalue()


@pytest.mark.parametrize("number", range(16))
@pytest.mark.parametrize("command", ["evaluate --model", "train --output OUT --images 2 --start-from"])
def test_broken_checkpoints(
    number: int, command: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes([*garbage(checkpoint)][number][1])
    arguments = command.replace("OUT", str(tmp_path / "out")).split()
    assert str(path) in refused(capsys, *arguments, path)
    assert not (tmp_path / "out").exists()


class Intruder:
    """Would make a folder if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.path),))


RESEARCH: dict[str, Callable[[Path], bytes]] = {
    "pickle": lambda path: pickle.dumps({"state_dict": Intruder(path)}),
    "old pickle": lambda path: pickle.dumps(Intruder(path), protocol=0),
    "list": lambda _: pickle.dumps([1, 2]), "number": lambda _: pickle.dumps(5), "none": lambda _: pickle.dumps(None),
    "text": lambda _: b"no checkpoint", "empty": lambda _: b"", "zip": lambda _: b"PK\x03\x04" + bytes(99),
    "tar": lambda _: b"a.txt" + bytes(507), "cut": lambda _: pickle.dumps({"a": list(range(999))})[:500],
    "wrong operations": lambda _: b"\x80\x02" + bytes(range(40, 120)), "stack": lambda _: b"\x80\x02.",
    "memo": lambda _: b"h\x09.",
}  # fmt: skip


@pytest.mark.parametrize("kind", RESEARCH)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_research_files_that_are_none(kind: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(RESEARCH[kind](tmp_path / "intruded"))
    refused(capsys, "import", path, "--output", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "nothing ran, nothing was written"


@settings(deadline=None, max_examples=100)
@given(
    st.dictionaries(
        st.sampled_from([field.name for field in fields(ModelConfig)]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
            max_leaves=5,
        ),
        min_size=1,
    )
)
def test_any_json_as_a_configuration(values: dict[str, Any]) -> None:
    """A configuration or one sentence that names a field of it."""
    try:
        config_from_dict({**asdict(ModelConfig()), **values})
    except ValueError as error:
        assert any(name in str(error) for name in values)


def test_there_are_two_hundred_malformed_inputs() -> None:
    """Each of them ends in one sentence and exit code 2 in the tests above, without those of hypothesis."""
    twice = [*MASKS, *range(16), *RESEARCH]
    parts = (LINES, TRAIN, CLASSES, CLASS_FILES, BROKEN, CONFIGS, HEADERS, ARCHITECTURES, twice, twice)
    assert sum(map(len, parts)) >= 400
