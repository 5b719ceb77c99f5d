"""Every command on miniature data, in this process; bad input is one sentence on standard error and exit code 2."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from conftest import load_reference
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from sptseg import scenes
from sptseg.checkpoints.checkpoint import load_model, read_header
from sptseg.cli import commands as cli
from sptseg.cli.commands import COMMANDS, main
from sptseg.cli.options import Which
from sptseg.datasets import folders as datasets
from sptseg.datasets.named import Data
from sptseg.inference.evaluation import evaluate
from sptseg.inference.segmentation import segment
from sptseg.model.clip import data_file, load_clip, new_tiny_clip, save_tiny_clip
from sptseg.model.config import DENSE_CLIP, ZEGCLIP, ModelConfig
from sptseg.training import ablation
from sptseg.training import loop as training
from sptseg.training.presets import EMBEDDED, PRESETS

SMALL = "--prompt-tokens 2 --prompt-depth 1 --decoder-layers 2".split()
STEPS = "--train.iterations 2 --train.batch-size 2 --train.precision no --train.workers 0 --train.save-every 1".split()
FIGURES = {"pixel_accuracy", "miou_seen", "miou_unseen", "hiou", "iou"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options for a tiny CLIP with random weights, in a file."""
    file = tmp_path_factory.mktemp("clip") / "tiny.safetensors"
    torch.manual_seed(0)
    save_tiny_clip(new_tiny_clip(scenes.WORDS), file)
    return ["--clip", "tiny", "--clip-weights", str(file)]


@pytest.fixture(scope="module")
def trained(clip: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    main(["train", "--output", str(folder), "--images", "4", *clip, *SMALL, *STEPS])
    return folder


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """SIGTERM to this process in a step of training."""
    original, steps = training.step, []

    def interrupted(*arguments: Any) -> dict[str, float]:
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(training, "step", interrupted)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed, name in enumerate(("a.png", "b.jpg")):
        Image.fromarray(scenes.draw(seed, 200)[0]).save(folder / name)  # more than one window of 128
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """A folder of two scenes with the classes grass and water, one picture portrait."""
    for part in ("images", "masks"):
        (tmp_path / "data" / part).mkdir(parents=True)
    for seed, (name, width) in enumerate((("a", 64), ("b", 40))):
        image, label = (array[:, :width] for array in scenes.draw(seed, 64))
        Image.fromarray(image).save(tmp_path / "data" / "images" / f"{name}.png")
        Image.fromarray(np.uint8(label % 2)).save(tmp_path / "data" / "masks" / f"{name}.png")
    (tmp_path / "data" / "classes.txt").write_text("grass\nwater\n")
    (tmp_path / "data" / "unseen.txt").write_text("water\n")
    return tmp_path / "data"


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The sentence on standard error of a command that exits with code 2."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("sptseg: ")]
    assert len(lines) == 1 and "Traceback" not in captured.err
    return lines[0].removeprefix("sptseg: ")


# Help


@pytest.mark.parametrize("command", ["", "train", "ablate", *COMMANDS])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: sptseg {command}".strip() in out
    for name in {*COMMANDS, "train", "ablate"} if not command else ():
        assert name.split()[0] in out


@pytest.mark.parametrize("arguments", ["nonsense", "data", "data x", "evaluate --no", "segment", "train", "import x"])
def test_unknown_and_missing_options_exit_with_2(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    assert stopped.value.code == 2
    assert capsys.readouterr().err


# evaluate


def test_evaluate_writes_what_evaluate_returns(
    clip: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "new" / "scores.json"
    main(["evaluate", "--data", "scenes", "--images", "3", "--seed", "5", "--json", str(report), *clip])
    found = json.loads(report.read_text())
    assert set(found) == FIGURES and set(found["iou"]) == set(scenes.CLASSES)
    model = Which(clip="tiny", clip_weights=clip[-1]).load()
    assert (model.config.decoder, model.config.prompt_tokens) == ("none", 0)
    data = datasets.Scenes(3, 5)
    expected = evaluate(model, data, data.split, progress=False)
    assert found == expected.as_dict()
    assert expected.table() in capsys.readouterr().out


def test_evaluate_takes_an_offset_and_a_limit(clip: list[str], tmp_path: Path) -> None:
    main(["evaluate", "--images", "3", "--limit", "1", "--seen-offset", "2", "--json", str(tmp_path / "a.json"), *clip])
    found = json.loads((tmp_path / "a.json").read_text())
    seen = [scenes.CLASSES[i] for i in datasets.Scenes(1).split.seen]
    present = [scenes.CLASSES[i] for i in np.unique(scenes.draw((0, 0, 0))[1])]
    assert all(found["iou"][name] in (0, None) for name in seen), "everything is called unseen"
    assert {name for name in seen if found["iou"][name] == 0} == set(seen) & set(present), "of the first picture only"


def test_evaluate_reads_folders(clip: list[str], labelled: Path, tmp_path: Path) -> None:
    reports = []
    for unseen in ([], ["--unseen", "grass"], ["--unseen", "none"], ["--prompts", "grass=big tree"]):
        main(["evaluate", "--data", str(labelled), *unseen, "--json", str(tmp_path / "a.json"), *clip])
        reports.append(json.loads((tmp_path / "a.json").read_text()))
    assert all(set(report["iou"]) == {"grass", "water"} for report in reports)
    assert reports[0]["miou_seen"] == reports[0]["iou"]["grass"] == reports[1]["miou_unseen"]
    assert reports[2]["miou_unseen"] is None and reports[2]["hiou"] is None
    assert reports[2]["miou_seen"] == pytest.approx(np.mean(list(reports[0]["iou"].values())))


# train


def test_train_writes_a_folder_that_evaluate_reads(trained: Path, tmp_path: Path, clip: list[str]) -> None:
    names = {file.name for file in trained.iterdir()}
    assert {"model.safetensors", "history.json", "config.json", "state.pt"} <= names
    assert [row["iteration"] for row in json.loads((trained / "history.json").read_text())] == [1, 2]
    config = json.loads((trained / "config.json").read_text())
    assert config["train"]["batch_size"] == 2 and config["model"]["clip_weights"] == clip[-1]
    assert config["model"]["selection"] is False and config["model"]["start"] == "dense_clip", "the embedded preset"
    assert config["split"]["classes"] == list(scenes.CLASSES)
    main(["evaluate", "--model", str(trained), "--images", "2", "--json", str(tmp_path / "a.json"), *clip])
    assert set(json.loads((tmp_path / "a.json").read_text())) == FIGURES


@pytest.mark.parametrize("preset", ["spt", "zegclip"])
def test_presets_are_defaults(preset: str, clip: list[str], tmp_path: Path) -> None:
    main(["train", "--output", str(tmp_path), "--preset", preset, "--images", "2", *clip, *SMALL, *STEPS])
    config: ModelConfig = load_model(tmp_path, load_clip("tiny", clip[-1])).config
    base = ZEGCLIP if preset == "zegclip" else ModelConfig()
    for name in ("decoder", "loss", "spectral_layers", "selection", "start", "seen_offset"):
        assert getattr(config, name) == getattr(base, name), name
    assert (config.prompt_tokens, config.decoder_layers) == (2, 2), "but what is given counts"


def test_train_goes_on_and_starts_from_checkpoints(
    trained: Path, clip: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (trained / "model.safetensors").read_bytes()
    main(["train", "--output", str(trained), "--resume", "--images", "4", *clip, *SMALL, *STEPS])
    assert (trained / "model.safetensors").read_bytes() == before, "a finished run has nothing left to do"
    options = ["train", "--output", str(tmp_path), "--start-from", str(trained), "--images", "4", *STEPS, *clip]
    main([*options, "--train.setting", "transductive", "--train.iterations", "1", "--train.learning-rate", "1e-9"])
    started, base = (load_model(folder, load_clip("tiny", clip[-1])) for folder in (tmp_path, trained))
    assert started.config == base.config
    for name, value in base.trained_state().items():
        assert_close(started.trained_state()[name], value, atol=1e-6, rtol=0)
    capsys.readouterr()
    options = ["--output", trained, "--resume", "--images", "4", *clip, *SMALL, *STEPS, "--train.seed", "1"]
    message = fails(capsys, "train", *options)
    assert "was trained with other settings of train.seed; resume with the same" in message


def test_train_validates_on_other_pictures(clip: list[str], tmp_path: Path) -> None:
    looking = ["--train.validate-every", "1", "--train.validation-images", "2"]
    main(["train", "--output", str(tmp_path), "--images", "2", *clip, *SMALL, *STEPS, *looking])
    rows = json.loads((tmp_path / "history.json").read_text())
    assert all(0 <= row["pixel_accuracy"] <= 1 for row in rows)
    data = datasets.Scenes(2)
    model = load_model(tmp_path, load_clip("tiny", clip[-1]))
    assert rows[-1]["pixel_accuracy"] == evaluate(model, data, data.split, progress=False).pixel_accuracy


@pytest.mark.parametrize(
    ("layout", "training", "evaluation"),
    [
        ("voc2012", "trainaug", "val"),
        ("coco_stuff", "train", "val"),
        ("context", "train", "val"),
        ("ade20k", "training", "validation"),
    ],
)
def test_training_never_reads_the_validation_subset_by_default(
    layout: str, training: str, evaluation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def spy(root: Path, subset: str, *_: str) -> Any:
        read.append(subset)
        return datasets.Scenes(1)

    monkeypatch.setattr(datasets, layout, spy)
    for name in {"coco_stuff": ["coco-stuff"], "context": ["context-otseg", "context-cascade"]}.get(layout, [layout]):
        Data(data="x", layout=name).load("training")
        Data(data="x", layout=name).load("evaluation")
        Data(data="x", layout=name, subset="mine").load("training")
        assert read[-3:] == [training, evaluation, "mine"]


def test_training_and_evaluation_scenes_differ() -> None:
    first = [Data(images=1).load(stream)[0][0]["image"] for stream in ("training", "evaluation")]
    assert not torch.equal(first[0], first[1])


# ablate


def test_ablate_knows_its_runs_by_model_data_and_clip(
    clip: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Settings behind a name; a stopped run goes on; finished ones are read; other data or another CLIP are refused."""
    small = {"clip_weights": clip[-1], "image_size": (64, 64), "prompt_tokens": 2, "decoder_layers": 1}
    for name in ("spt", "zegclip"):
        monkeypatch.setitem(ablation.CONFIGURATIONS, name, replace(ablation.CONFIGURATIONS[name], **small))
    monkeypatch.setitem(PRESETS, "embedded", replace(EMBEDDED, model=replace(EMBEDDED.model, **small)))
    steps = [*STEPS[:-1], "0", "--train.iterations", "4", "--data.images", "4", "--validation.images", "2"]
    names = "spt@transductive,spt,zegclip@supervised"
    command = ["ablate", "--output", str(tmp_path), "--configurations", names, "--seeds", "3", *steps]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(SystemExit) as stopped:
            main(command)
    assert stopped.value.code == 143 and (tmp_path / "spt-seed3" / "state.pt").exists()
    capsys.readouterr()
    main(command)
    table = capsys.readouterr().out
    assert [row.split(" | ")[:2] for row in table.splitlines()[2:5]] == [
        [f"| {name}", "1"] for name in names.split(",")
    ]
    assert (tmp_path / "table.md").read_text() in table
    results = {file.parent.name: json.loads(file.read_text()) for file in tmp_path.glob("*/result.json")}
    asked = {name: result["asked"] for name, result in results.items()}
    settings = {name: (each["train"]["setting"], each["train"]["iterations"]) for name, each in asked.items()}
    assert settings == {
        "spt-seed3": ("inductive", 4),
        "spt@transductive-seed3": ("transductive", 2),
        "zegclip@supervised-seed3": ("supervised", 4),
    }
    rows = json.loads((tmp_path / "spt@transductive-seed3" / "history.json").read_text())
    assert [row["iteration"] for row in rows] == [1, 2]
    assert load_model(tmp_path / "spt@transductive-seed3", load_clip("tiny", clip[-1])).config.prompt_tokens == 2

    monkeypatch.setattr(ablation, "fit", None)
    main(command)
    assert capsys.readouterr().out.splitlines()[:5] == table.splitlines()[:5], "nothing is trained again"
    for options, part in (
        (["--data.seed", "1"], "data"), (["--data.images", "5"], "data"), (["--validation.seed", "7"], "validation"),
        (["--validation.unseen", "tree"], "split"), (["--train.learning-rate", "1e-4"], "train"),
    ):  # fmt: skip
        assert f"holds a run with other {part}; choose another output folder" in fails(capsys, *command, *options)
    torch.manual_seed(1)
    save_tiny_clip(new_tiny_clip(scenes.WORDS), tmp_path / "other.safetensors")
    monkeypatch.setattr(ablation, "load_clip", lambda *_: load_clip("tiny", str(tmp_path / "other.safetensors")))
    assert "holds a run with other clip;" in fails(capsys, *command)


def test_bad_input_of_ablate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        ("--configurations spt,unicorn", "there is no configuration unicorn; there are dense-clip, "),
        ("--configurations spt@zero-shot", "asks for the setting 'zero-shot'; wanted spt@supervised or"),
        ("--train.setting supervised", "the setting supervised goes behind a configuration's name"),
    ):
        assert message in fails(capsys, "ablate", "--output", tmp_path, *options.split())


# data


def test_missing_data_name_the_command_that_makes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for layout, made_by in {
        "voc2012": "tools/dataset_converters/voc_aug.py",
        "coco-stuff": "tools/dataset_converters/coco_stuff164k.py",
        "context-cascade": "tools/dataset_converters/pascal_context.py",
        "ade20k": "ADEChallengeData2016.zip",
    }.items():
        message = fails(capsys, "data", "check", tmp_path, "--layout", layout)
        assert made_by in message and str(tmp_path) in message


def test_data_check_and_show(labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["data", "check", str(labelled), "--json", str(tmp_path / "report.json")])
    assert "grass" in capsys.readouterr().out and json.loads((tmp_path / "report.json").read_text())
    main(["data", "show", str(labelled), "--out", str(tmp_path / "new" / "sheet.png"), "--count", "2"])
    assert (tmp_path / "new" / "sheet.png").read_bytes().startswith(b"\x89PNG")
    (labelled / "masks" / "a.png").write_bytes(b"junk")
    message = fails(capsys, "data", "check", labelled)
    assert message.startswith("1 files are faulty") and "a.png" in message


# segment


def test_segment_one_picture(clip: list[str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "mask.png"
    main(["segment", str(photos / "a.png"), "--classes", "grass, water ,tree", "--out", str(out), *clip])
    assert out.read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    expected = segment(Which(clip="tiny", clip_weights=clip[-1]).load(), photos / "a.png", ["grass", "water", "tree"])
    assert [line.split() for line in lines[:3]] == [[f"{v:.1%}", name] for name, v in expected.areas().items()]
    assert lines[3] == f"wrote {out}"


@pytest.mark.parametrize("full_resolution", [False, True])
def test_segment_a_folder(full_resolution: bool, clip: list[str], photos: Path, tmp_path: Path) -> None:
    out, classes = tmp_path / "masks", ["grass", "water", "tree"]
    full = ["--full-resolution"] if full_resolution else []
    main(["segment", str(photos), "--classes", ",".join(classes), "--out", str(out), *clip, *full])
    assert {f.name for f in out.iterdir()} == {"a.png", "a-labels.png", "b.png", "b-labels.png", "areas.csv"}
    rows = list(csv.reader((out / "areas.csv").read_text().splitlines()))
    assert rows[0] == ["picture", *classes] and [row[0] for row in rows[1:]] == ["a.png", "b.jpg"]
    model = Which(clip="tiny", clip_weights=clip[-1]).load()
    for row, name in zip(rows[1:], ("a.png", "b.jpg"), strict=True):
        expected = segment(model, photos / name, classes, full_resolution=full_resolution)
        with Image.open(out / f"{name[0]}-labels.png") as labels:
            assert np.array_equal(np.asarray(labels), expected.labels)
        assert [float(v) for v in row[1:]] == pytest.approx(list(expected.areas().values()), abs=5e-5)


def test_segment_never_overwrites_a_picture(clip: list[str], photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (photos / "a.png").read_bytes()
    for pictures, out in (([photos], photos), ([photos / "a.png"], photos / "a.png")):
        message = fails(capsys, "segment", *pictures, "--classes", "grass,water", "--out", out, *clip)
        assert message == "results would overwrite pictures or each other: give another --out, or rename pictures"
    Image.open(photos / "a.png").save(photos / "a.bmp")
    twice = [photos / "a.png", photos / "a.bmp", "--classes", "grass", "--out", photos.parent / "out", *clip]
    assert "each other" in fails(capsys, "segment", *twice)
    assert (photos / "a.png").read_bytes() == before


# import, pretrain


@pytest.mark.parametrize("kind", ["spt", "zegclip"])
def test_import_writes_a_model_and_names_what_it_left_out(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = load_reference(kind)
    torch.save({"state_dict": reference.state}, tmp_path / "research.pth")
    names = ("image_size", "heads", "decoder_heads")
    sizes = [f"--{name.replace('_', '-')}={reference.config[name]}" for name in names]
    main(["import", str(tmp_path / "research.pth"), "--output", str(tmp_path / "model.safetensors"), *sizes])
    out = capsys.readouterr().out
    assert reference.imported.report() in out and f"wrote {tmp_path / 'model.safetensors'}" in out
    assert read_header(tmp_path / "model.safetensors")["about"] == {"imported_from": "research.pth"}
    imported = load_model(tmp_path / "model.safetensors").trained_state()
    expected = reference.imported.model.trained_state()
    assert imported.keys() == expected.keys()
    assert all(torch.equal(value, imported[name]) for name, value in expected.items())


def test_pretrain_scales_and_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[Any] = []
    monkeypatch.setattr(cli, "pretrain", lambda *arguments: given.append(arguments))
    main(["pretrain", "--output", str(tmp_path / "x"), "--seed", "3", "--no-dense-losses", "--images", "2000"])
    ((config, output),) = given
    assert (config.seed, config.dense_losses, output) == (3, False, tmp_path / "x")
    assert abs(sum(stage.images for stage in config.stages) - 2000) < 300


# Refusals


def test_bad_input_of_segment(
    clip: list[str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "empty").mkdir()
    a, out = photos / "a.png", ["--out", tmp_path / "out.png"]
    cases: dict[str, list[str | Path]] = {
        "gone.png does not exist": [photos / "gone.png", "--classes", "grass", *out, *clip],
        "notes.txt is not an image that Pillow can read": [photos / "notes.txt", "--classes", "grass", *out, *clip],
        "the tiny CLIP does not know 'unicorn'": [a, "--classes", "grass,unicorn", *out, *clip],
        "class names given twice: grass": [a, "--classes", "grass,grass", *out, *clip],
        "the list of classes is empty": [a, "--classes", " , ", *out, *clip],
        f"2 pictures do not fit into one file {tmp_path / 'out.png'}": [photos, "--classes", "grass", *out, *clip],
        "empty holds no pictures": [photos / "empty", "--classes", "grass", *out, *clip],
        "is a web address; sptseg reads files only": ["https://x.org/a.jpg", "--classes", "grass", *out, *clip],
        "there is no checkpoint": [a, "--classes", "grass", *out, "--model", tmp_path / "gone.safetensors"],
    }
    for message, arguments in cases.items():
        assert message in fails(capsys, "segment", *arguments)
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--clip ViT-B-17 --clip-weights none", "'ViT-B-17' is no open_clip model with a standard VisionTransformer"),
        ("--clip RN50 --clip-weights openai", "'RN50' is no open_clip model with a standard VisionTransformer"),
        ("--clip ViT-B-16 --clip-weights openai", "QuickGELU, which 'ViT-B-16' lacks; use 'ViT-B-16-quickgelu'"),
        ("--clip ViT-B-16-quickgelu", "--clip ViT-B-16-quickgelu needs --clip-weights"),
        ("--clip ViT-B-16-quickgelu --clip-weights openai", "'openai' of ViT-B-16-quickgelu could not be loaded"),
        ("--clip-weights openai", "--clip-weights openai needs --clip"),
        ("--model embedded --clip tiny", "model embedded has its own CLIP: leave out --clip"),
        ("--data gone", "gone does not exist"),
        ("--images 0", "length is 0; wanted at least 1"),
        ("--unseen unicorn", "split 'scenes' has no class unicorn; it has "),
        ("--prompts unicorn=tree", "prompts for unicorn, no classes of it"),
    ],
)
def test_bad_input_of_evaluate(
    options: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", offline)
    assert message in fails(capsys, "evaluate", *options.split())


def test_bad_input_of_train_and_import(clip: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "junk.pth").write_bytes(b"junk")
    train = ["train", "--output", tmp_path / "run", "--images", "2"]
    cases: dict[str, list[str | Path]] = {
        "needs --clip-weights": [*train, "--clip", "ViT-B-32"],
        "has no unseen classes; use setting='supervised'": [*train, *clip, *SMALL, *STEPS, "--unseen", "none"],
        "batch_size 2 cannot be shared": [*train, *clip, *SMALL, *STEPS, "--train.accumulation", "3"],
        "nothing to train": [*train, *STEPS, *clip, *"--decoder none --prompt-tokens 0 --spectral-layers".split()],
        "there is no checkpoint file": ["import", tmp_path / "gone.pth", "--output", tmp_path / "x"],
        "cannot be read as a checkpoint": ["import", tmp_path / "junk.pth", "--output", tmp_path / "x"],
        "pictures are too few to pre-train on": ["pretrain", "--output", tmp_path / "x", "--images", "10"],
    }
    for message, arguments in cases.items():
        assert message in fails(capsys, *arguments)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_an_interrupted_command_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "pretrain", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain"])
    assert stopped.value.code == 130


@pytest.mark.slow
def test_sigterm_to_the_command_saves_and_resume_ends_in_the_same_bits(clip: list[str], tmp_path: Path) -> None:
    """Sent after a random while; the moment is in the message."""
    steps = [*STEPS[:-1], "0", "--train.iterations", "60"]
    train = ["train", "--images", "8", *clip, *SMALL, *steps, "--output"]
    main([*train, str(tmp_path / "whole")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sptseg.cli", *train, str(tmp_path / "run")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment) as process:
        while not (tmp_path / "run" / "config.json").exists():
            assert process.poll() is None
            time.sleep(0.05)
        wait = random.uniform(0.5, 5)
        time.sleep(wait)
        process.terminate()
        _, said = process.communicate(timeout=120)
    assert process.returncode == 143, (wait, said[-1000:])
    assert b"stopped by SIGTERM after iteration " in said and b"the same command and --resume" in said
    main([*train, str(tmp_path / "run"), "--resume"])
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(resumed[name].equal(value) for name, value in whole.items()), said[-200:]


def test_what_is_no_users_fault_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(cli, "pretrain", broken)
    with pytest.raises(KeyError, match="a bug"):
        main(["pretrain"])


# The embedded model


@pytest.mark.slow
def test_the_embedded_model_segments_unseen_classes(tmp_path: Path) -> None:
    """Better than its CLIP alone, on scenes of another seed."""
    try:
        for name in ("tiny_clip.safetensors", "spt_seg.safetensors"):
            data_file(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    figures = {}
    for model in ("embedded", "dense-clip"):
        report = tmp_path / f"{model}.json"
        main(["evaluate", "--model", model, "--images", "30", "--seed", "17", "--json", str(report)])
        figures[model] = json.loads(report.read_text())
    assert figures["embedded"]["hiou"] > figures["dense-clip"]["hiou"] > 0.1
    assert load_model("dense-clip", load_clip()).config == DENSE_CLIP
