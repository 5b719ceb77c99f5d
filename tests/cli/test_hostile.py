"""Clumsy and hostile input on the command line: one sentence, exit code 2, no traceback, no half-written file.

Whatever is odd but sound must work: pictures of all kinds and shapes, hundreds of classes, names in any script.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import struct
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from conftest import load_reference, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save, save_file
from toys import data_folder, noise

from sptseg.checkpoints.checkpoint import config_from_dict, load_model, read_header, save_model
from sptseg.cli import which
from sptseg.cli.commands import main
from sptseg.datasets import folders, images
from sptseg.datasets.splits import Split
from sptseg.inference.evaluation import evaluate
from sptseg.inference.segmentation import segment
from sptseg.model.clip import new_tiny_clip
from sptseg.model.config import DENSE_CLIP, EMBEDDED_CONFIG, ModelConfig
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


# Arguments

MISREAD = """
    nonsense|-x|data|data x|evaluate --no|evaluate --images x|evaluate --layout foo|segment|train|train --output
    train --output out --preset foo|train --output out --train.iterations -9|train --output out --train.scale x
    train --output out --train.learning-rate nan|ablate --train.setting foo|import x|demo --seed x
"""
TRAIN = "train --output out --images 2 --train.batch-size 1"
WRONG = {
    "evaluate --images -3": "length is -3; wanted at least 1",
    "evaluate --limit 0": "limit is 0; wanted at least one picture",
    "evaluate --unseen unicorn": "split 'scenes' has no class unicorn; it has sky, ",
    "evaluate --prompts unicorn=tree": "prompts for unicorn, no classes of it",
    "evaluate --data gone": "gone does not exist",
    "evaluate --model gone.safetensors": "there is no checkpoint gone.safetensors; wanted embedded, ",
    "evaluate --model embedded --clip tiny": "model embedded has its own CLIP: leave out --clip",
    "evaluate --clip ViT-B-17 --clip-weights none": "'ViT-B-17' is no open_clip model",
    "evaluate --clip hf-hub:a/b --clip-weights none": "'hf-hub:a/b' is no open_clip model",
    "evaluate --clip ViT-B-16 --clip-weights openai": "QuickGELU, which 'ViT-B-16' lacks; use 'ViT-B-16-quickgelu'",
    "evaluate --clip ViT-B-16-quickgelu": "--clip ViT-B-16-quickgelu needs --clip-weights",
    "evaluate --clip ViT-B-16-quickgelu --clip-weights openai": "'openai' of ViT-B-16-quickgelu could not be loaded",
    "evaluate --clip-weights openai": "--clip-weights openai needs --clip",
    "evaluate --clip tiny --clip-weights notes.txt": "notes.txt is no tiny CLIP",
    "evaluate --images 1 --json /dev/full": "/dev/full could not be written (No space left on device)",
    "segment --classes grass": "no picture is named; wanted files or folders",
    "segment gone.png --classes grass": "gone.png does not exist",
    "segment notes.txt --classes grass": "notes.txt is not an image that Pillow can read",
    "segment a.png --classes grass,unicorn": "the tiny CLIP does not know 'unicorn'",
    "segment empty --classes grass": "empty holds no pictures",
    "segment https://x.org/a.jpg --classes grass": "is a web address; sptseg reads files only",
    "segment a.png b.png --classes grass": "2 pictures do not fit into one file segmentation.png",
    "segment a.png --classes grass --model gone": "there is no checkpoint gone",
    "train --output out --start-from gone": "there is no checkpoint gone",
    "train --output out --clip ViT-B-32": "--clip ViT-B-32 needs --clip-weights",
    "train --output out --dropout nan": "dropout is nan; wanted a finite number",
    "train --output out --image-size -1 -1": "image_size is (-1, -1); wanted 1 to 8192",
    f"{TRAIN} --unseen none": "has no unseen classes; use setting='supervised'",
    f"{TRAIN} --train.accumulation 3": "batch_size 1 cannot be shared",
    f"{TRAIN} --decoder none --prompt-tokens 0 --spectral-layers": "nothing to train",
    "train --output out --train.setting transductive --start random": "give --start-from an inductive checkpoint",
    "ablate --configurations spt,unicorn": "there is no configuration unicorn; there are dense-clip, ",
    "ablate --configurations spt@zero-shot": "asks for the setting 'zero-shot'; wanted spt@supervised or",
    "ablate --train.setting supervised": "the setting supervised goes behind a configuration's name",
    "pretrain --output out --images 10": "pictures are too few to pre-train on",
    "import gone.pth --output out": "there is no checkpoint file gone.pth",
    "import notes.txt --output out": "notes.txt cannot be read as a checkpoint",
    "data check scenes --limit 0": "limit is 0; wanted at least 1",
    "data show scenes --count 0": "count is 0; wanted at least 1",
    "demo --scenes 0": "scenes is 0; wanted at least 1",
    "benchmark loss --quick --threads 0": "threads is 0",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: two pictures, a text, an empty folder; nothing can be downloaded."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        noise().save(name)
    Path("notes.txt").write_text("neither a picture nor a model")
    Path("empty").mkdir()

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


@pytest.mark.slow
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    command=st.sampled_from(["evaluate", "segment", "train", "data check", "import"]),
    words=st.lists(st.text(max_size=12), min_size=1, max_size=4),
)
def test_any_words_as_arguments(command: str, words: list[str], here: Path, model: SptSeg) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*command.split(), *words, "--no-such-option"])


# Classes

CLASSES = ["", " , ,", "grass, grass ,water", "träe", "🌳", "'grass'", "\0", "a" * 100_000, "{}"]
CLASS_FILES = {"none": b"", "twice": b"grass\ngrass\n", "unknown": b"grass\nunicorn\n", "zeros": bytes(100)}


@pytest.mark.parametrize("classes", CLASSES, ids=lambda text: repr(text[:12]))
def test_wrong_class_lists(classes: str, here: Path, model: SptSeg, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, "segment", "a.png", "--classes", classes)
    assert not Path("segmentation.png").exists()


@pytest.mark.parametrize("kind", CLASS_FILES)
def test_wrong_class_files(kind: str, folder: Path, model: SptSeg, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "classes.txt").write_bytes(CLASS_FILES[kind])
    refused(capsys, "evaluate", "--data", folder)


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
    assert np.array_equal(np.asarray(Image.open(root / "masks" / "a.png")), result.labels)
    data = folders.ImageMaskFolder(root)
    assert data.split.ignore == 65535
    assert evaluate(model, data, data.split, seen_offset=0.0, progress=False).pixel_accuracy == 1.0
    half = result.labels.copy()
    half[:32] = 65535
    half[40:, :32] = 255
    Image.fromarray(half.astype(np.uint16)).save(root / "masks" / "a.png")
    scores = evaluate(model, data, data.split, seen_offset=0.0, progress=False)
    assert scores.pixel_accuracy == pytest.approx(float((result.labels[32:] == half[32:]).mean()))
    with pytest.raises(ValueError, match="training takes at most 255 classes; split .* has 847"):
        label_table(data.split, "inductive")


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(min_size=1, max_size=8), max_size=5))
def test_names_in_any_script_are_classes_or_refused(names: list[str]) -> None:
    """A split takes every list of names that are not blank and differ by more than form and blanks, and no other.

    Of several words between bars, the first is the name.
    """
    one_form = [" ".join(unicodedata.normalize("NFC", name.split("|")[0]).split()) for name in names]
    sound = names and len(set(one_form)) == len(names) and all(one_form)
    try:
        assert Split.from_names("any", names).classes == tuple(one_form) and sound
    except ValueError as error:
        assert not sound and len(str(error).splitlines()) <= 1 + sum(map(len, names))


# Pictures


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    image.save(buffer := io.BytesIO(), form, **options)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG header that promises a huge picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


PNG, JPEG, WEBP = (encoded(noise(), form) for form in ("PNG", "JPEG", "WEBP"))
TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
FRAMES: dict[str, Any] = {"save_all": True, "append_images": [noise("L")]}
SOUND: dict[str, tuple[str, bytes, tuple[int, int]]] = {  # file name, content, upright (width, height)
    "1 x 1": ("a.png", encoded(noise(size=(1, 1)), "PNG"), (1, 1)),
    "10000 x 3": ("a.png", encoded(noise(size=(10_000, 3)), "PNG"), (10_000, 3)),
    "CMYK": ("a.jpg", encoded(noise("CMYK"), "JPEG"), (40, 30)),
    "grey and alpha": ("a.png", encoded(noise("LA"), "PNG"), (40, 30)),
    "palette, transparent": ("a.png", encoded(noise("P"), "PNG", transparency=0), (40, 30)),
    "black and white": ("a.png", encoded(noise("1"), "PNG"), (40, 30)),
    "animated WebP": ("a.webp", encoded(noise(), "WEBP", **FRAMES), (40, 30)),
    "turned by EXIF": ("a.jpg", encoded(noise(), "JPEG", exif=TURNED), (30, 40)),
    "JPEG named .bmp": ("a.bmp", JPEG, (40, 30)),
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
    "empty": b"", "PNG's signature": PNG[:8], "half a PNG": PNG[: len(PNG) // 2], "most of a PNG": PNG[:-30],
    "half a JPEG": JPEG[: len(JPEG) // 2], "half a WebP": WEBP[: len(WEBP) // 2], "zeros": bytes(5000),
    "wrong check sum": PNG[:29] + bytes(4) + PNG[33:], "less data than promised": bomb(100, 100),
    "bomb": bomb(2**31 - 1, 2**31 - 1), "bomb of one row": bomb(2**28, 1), "no width": bomb(0, 10),
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_pictures(kind: str, here: Path, model: SptSeg, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "a.png").write_bytes(BROKEN[kind])
    assert "a.png" in refused(capsys, "segment", here / "a.png", "--classes", "grass,water")
    assert not Path("segmentation.png").exists()


def test_a_folder_named_like_a_picture(here: Path, model: SptSeg, capsys: pytest.CaptureFixture[str]) -> None:
    Path("photos/a.png").mkdir(parents=True)
    assert "holds no pictures" in refused(capsys, "segment", "photos/a.png", "--classes", "grass")
    said = refused(capsys, "segment", "photos", "--classes", "grass", "--out", "out")
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
    return data_folder(tmp_path / "data", {"a": np.full((30, 40), 1)})


MASKS: dict[str, bytes] = {
    "RGB": PNG, "floating point": encoded(Image.new("F", (40, 30)), "TIFF"), "a JPEG's smears": JPEG,
    "turned": encoded(Image.new("L", (30, 40)), "PNG"), "value 3": encoded(Image.new("L", (40, 30), 3), "PNG"),
    "value -1": encoded(Image.fromarray(np.full((30, 40), -1, np.int32)), "TIFF"),
    "palette, value 7": encoded(Image.new("L", (40, 30), 7).convert("P"), "PNG"), "bomb": bomb(60_000, 60_000),
}  # fmt: skip


@pytest.mark.parametrize("kind", MASKS)
def test_wrong_masks(kind: str, folder: Path, model: SptSeg, capsys: pytest.CaptureFixture[str]) -> None:
    """Evaluation stops there, and `data check` names the file in its report too."""
    mask, report = folder / "masks" / "a.png", folder / "report.json"
    mask.write_bytes(MASKS[kind])
    assert str(mask) in refused(capsys, "evaluate", "--data", folder, "--json", report) and not report.exists()
    assert str(mask) in refused(capsys, "data", "check", folder, "--json", report)
    assert len(json.loads(report.read_text())["faults"]) == 1


# Checkpoints from strangers


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SPT-SEG of a small size on the embedded CLIP."""
    config = replace(EMBEDDED_CONFIG, image_size=(32, 32), prompt_tokens=1, decoder_layers=1)
    return save_model(build_model(config), tmp_path_factory.mktemp("models") / "model.safetensors")


DEEP = json.loads("[" * 300 + "]" * 300)
CONFIGS: list[dict[str, Any]] = [
    {name: value}
    for name, values in {
        "clip": ["/etc/passwd", "hf-hub:someone/model", None], "clip_weights": ["~/.ssh/id_rsa", "http://127.0.0.1/x"],
        "image_size": [[10**9, 10**9], [31, 32], DEEP], "prompt_tokens": [10**12, 1.5],
        "spectral_layers": [[-1], list(range(2000))], "decoder": ["unet"], "decoder_heads": [7],
        "dropout": [math.nan], "templates": [["{} {}"], ["{0.__class__}"]], "seen_offset": [math.inf],
    }.items()
    for value in values
]  # fmt: skip
HEADERS: list[Any] = [None, [], {"format": "sptseg-1"}, {"format": "sptseg-1", "config": DEEP}, {"format": "../x"}]
ARCHITECTURES: list[dict[str, Any]] = [
    {"vision_cfg": {"timm_model_name": "vit_base_patch16_224", "timm_model_pretrained": True}},
    {"vision_cfg": {"width": 2**19}}, {"vision_cfg": {"patch_size": [0, 4]}}, {"text_cfg": {"layers": 99}},
    {"text_cfg": {"hf_model_name": "someone/model"}}, {"embed_dim": 64}, {"more": 1},
]  # fmt: skip


@pytest.mark.parametrize("change", [*CONFIGS, *HEADERS], ids=lambda change: repr(change)[:40])
def test_hostile_headers(change: Any, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused in a moment and in little memory, whatever sizes they name, and no path in them is opened."""
    header = read_header(checkpoint)
    header = header | {"config": header["config"] | change} if change in CONFIGS else change
    path = tmp_path / "model.safetensors"
    save_file(load_file(checkpoint), path, metadata={"sptseg": json.dumps(header)})
    assert str(path) in refused(capsys, "evaluate", "--model", path, "--images", "1")


@pytest.mark.parametrize("change", ARCHITECTURES, ids=lambda change: repr(change)[:40])
def test_hostile_architectures(change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of an imported checkpoint, which brings its own CLIP: sizes fit the tensors, other keys are refused."""
    path = save_model(load_reference("spt").imported.model, tmp_path)
    header, tensors = read_header(path), load_file(path)
    own = header["architecture"]
    parts = {part: own[part] | change.get(part, {}) for part in ("vision_cfg", "text_cfg")}
    header["architecture"] = own | change | parts
    save_file(tensors, path, metadata={"sptseg": json.dumps(header)})
    assert str(path) in refused(capsys, "evaluate", "--model", path, "--images", "1")


def garbage(checkpoint: Path) -> Iterator[bytes]:
    whole, header = checkpoint.read_bytes(), json.dumps(read_header(checkpoint))
    yield from (whole[:size] for size in (0, 20, len(whole) // 2))
    yield whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]  # one bit
    yield struct.pack("<Q", 2**63) + whole[8:]  # a header of 2^63 bytes
    yield struct.pack("<Q", 62) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36000000]}}  '
    yield save({"a": torch.ones(3)}, metadata={"sptseg": header})  # other tensors
    yield save(load_file(checkpoint))  # without a header
    yield pickle.dumps({"state_dict": {}})


@pytest.mark.parametrize("number", range(9))
def test_broken_checkpoints(number: int, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes([*garbage(checkpoint)][number])
    assert str(path) in refused(capsys, "evaluate", "--model", path)
    start = ["--images", "2", "--start-from", path]
    assert str(path) in refused(capsys, "train", "--output", tmp_path / "out", *start)
    assert not (tmp_path / "out").exists()


class Intruder:
    """Would make a folder if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.path),))


RESEARCH: dict[str, Callable[[Path], bytes]] = {
    "pickle": lambda path: pickle.dumps({"state_dict": Intruder(path)}),
    "old pickle": lambda path: pickle.dumps(Intruder(path), protocol=0), "list": lambda _: pickle.dumps([1, 2]),
    "text": lambda _: b"no checkpoint", "zip": lambda _: b"PK\x03\x04" + bytes(99), "memo": lambda _: b"h\x09.",
}  # fmt: skip


@pytest.mark.parametrize("kind", RESEARCH)
def test_research_files_that_are_none(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"model{suffix}"
        path.write_bytes(RESEARCH[kind](tmp_path / "intruded"))
        refused(capsys, "import", path, "--output", tmp_path / "out")
    assert {file.name for file in tmp_path.iterdir()} == {"model.pth", "model.safetensors"}, "nothing ran"


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
