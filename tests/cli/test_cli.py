"""Every command on miniature data, in this process; bad input is one sentence on standard error and exit code 2."""

import csv
import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import Reference, refused
from PIL import Image
from torch.testing import assert_close
from toys import data_folder, same

from sptseg import evaluate, load_model, scenes, segment
from sptseg.checkpoints import import_report
from sptseg.cli import Which, main
from sptseg.cli import commands as cli
from sptseg.datasets import Data, Scenes
from sptseg.datasets.images import open_mask
from sptseg.model import load_clip, new_tiny_clip, save_tiny_clip
from sptseg.training import CONFIGURATIONS, PRESETS, ablation

SMALL = "--prompt-tokens 2 --prompt-depth 1 --decoder-layers 2".split()
STEPS = "--train.iterations 2 --train.batch-size 2 --train.precision no --train.workers 0 --train.save-every 1".split()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options for a tiny CLIP with random weights, in a file, that knows a Russian word too."""
    file = tmp_path_factory.mktemp("clip") / "tiny.safetensors"
    torch.manual_seed(0)
    save_tiny_clip(new_tiny_clip([*scenes.WORDS, "дом"]), file)
    return ["--clip", "tiny", "--clip-weights", str(file)]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed, name in enumerate(("a.png", "b.jpg")):
        Image.fromarray(scenes.draw(seed, 200)[0]).save(folder / name)  # more than one window of 128
    return folder


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """A folder of two pictures with the classes grass and water, one picture portrait."""
    masks = {name: scenes.draw(seed, 64)[1][:, :width] % 2 for seed, name, width in ((0, "a", 64), (1, "b", 40))}
    return data_folder(tmp_path / "data", masks, ["grass", "water"], ["water"])


@pytest.mark.parametrize("group", ["", "data", "notebooks"])
def test_groups_list_commands(group: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match="0"):
        main([*group.split(), "--help"])
    said = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    assert said[0].startswith(f"usage: sptseg {group}".strip())
    listed = [" ".join(line.split()[1:]) for line in said if line.startswith("•")]
    lines = {name: command.__doc__.splitlines()[0] for name, command in cli.COMMANDS.items() if name.startswith(group)}
    assert listed == [f"{name.removeprefix(group).strip()} {line}" for name, line in lines.items()]
    with pytest.raises(SystemExit, match="2"):
        main([*group.split(), "unknown"])


def test_evaluate_writes_what_it_returns(clip: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "new" / "scores.json"
    options = ["--images", "3", "--seed", "5", "--seen-offset", "0.02", "--limit", "2"]
    main(["evaluate", "--data", "scenes", *options, "--json", str(report), *clip])
    found = json.loads(report.read_text())
    model = Which(clip="tiny", clip_weights=clip[-1]).load()
    data = Scenes(3, 5)
    expected = evaluate(model, data, data.split, seen_offset=0.02, limit=2, progress=False)
    assert found == expected.as_dict() != evaluate(model, data, data.split, limit=2, progress=False).as_dict()
    assert expected.table() in capsys.readouterr().out


def test_evaluate_reads_folders(clip: list[str], labelled: Path, tmp_path: Path) -> None:
    reports = []
    for unseen in ([], ["--unseen", "grass"], ["--unseen", "none"], ["--prompts", "grass=big tree"]):
        main(["evaluate", "--data", str(labelled), *unseen, "--json", str(tmp_path / "a.json"), *clip])
        reports.append(json.loads((tmp_path / "a.json").read_text()))
    assert all(set(report["iou"]) == {"grass", "water"} for report in reports)
    assert reports[0]["miou_seen"] == reports[0]["iou"]["grass"] == reports[1]["miou_unseen"]
    assert reports[2]["miou_unseen"] is None and reports[2]["hiou"] is None
    assert reports[2]["miou_seen"] == pytest.approx(np.mean(list(reports[0]["iou"].values())))


def test_a_run_is_evaluated_gone_on_with_and_started_from(clip: list[str], tmp_path: Path) -> None:
    trained, new = tmp_path / "run", tmp_path / "new"
    train = ["train", "--output", str(trained), "--images", "4", *clip, *SMALL, *STEPS]
    main(train)
    assert [row["iteration"] for row in json.loads((trained / "history.json").read_text())] == [1, 2]
    config = json.loads((trained / "config.json").read_text())
    assert config["train"]["batch_size"] == 2 and config["model"]["clip_weights"] == clip[-1]
    assert config["model"]["prompt_tokens"] == 2 and config["model"]["selection"] is False, "as the embedded preset"
    main(["evaluate", "--model", str(trained), "--images", "2", "--json", str(tmp_path / "a.json"), *clip])
    assert set(json.loads((tmp_path / "a.json").read_text())["iou"]) == set(scenes.CLASSES)
    before = (trained / "model.safetensors").read_bytes()
    main([*train, "--resume"])
    assert (trained / "model.safetensors").read_bytes() == before, "a finished run has nothing left to do"
    options = ["train", "--output", str(new), "--start-from", str(trained), "--images", "4", *STEPS, *clip]
    main([*options, "--train.setting", "transductive", "--train.iterations", "1", "--train.learning-rate", "1e-9"])
    started, base = (load_model(folder, load_clip("tiny", clip[-1])) for folder in (new, trained))
    assert started.config == base.config
    for name, value in base.trained_state().items():
        assert_close(started.trained_state()[name], value, atol=1e-6, rtol=0)


def test_whether_a_state_counts_is_said(clip: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "--output", str(tmp_path), "--images", "2", *clip, *SMALL, *STEPS]
    main([*train, "--resume"])
    assert f"{tmp_path}/state.pt is not there: starting anew" in capsys.readouterr().out
    main(train)
    assert f"{tmp_path}/state.pt is overwritten; --resume goes on" in capsys.readouterr().out


def test_training_never_reads_what_is_scored_by_default() -> None:
    first, other = (Data(images=1).load(stream)[0][0]["image"] for stream in ("training", "evaluation"))
    assert not torch.equal(first, other)
    for layout in ("voc2012", "coco-stuff", "context-otseg", "context-cascade", "ade20k", "cityscapes", "camvid"):
        subsets = [Data("x", layout).resolved(stream).subset for stream in ("training", "evaluation")]
        assert (subsets[0] != subsets[1]) == (layout != "camvid"), "camvid is named by its two folders"
        assert Data("x", layout, subset="mine").resolved("evaluation").subset == "mine"


@pytest.mark.parametrize("name", ["a b", "it's"])
def test_the_command_that_training_prints_can_be_pasted(
    name: str, clip: list[str], labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the folder, its names and words, and CLIP's file; that of a folder for many pictures too."""
    root = labelled.rename(tmp_path / f"data {name}")
    data = ["--data", str(root), "--unseen", "grass", "--prompts", "water=big tree"]
    main(["train", "--output", str(tmp_path / name), *data, *clip, *SMALL, *STEPS])
    program, *words = shlex.split(capsys.readouterr().out.splitlines()[-1].partition("score it: ")[2])
    main(words)
    assert program == "sptseg" and set(words) >= {*data, str(tmp_path / name), *clip}
    out = tmp_path / f"{name}.png"
    said = refused(capsys, "segment", root / "images", "--classes", "grass", "--out", out)
    assert shlex.split(said.partition("such as ")[2]) == ["--out", str(tmp_path / name)]


def test_ablate_knows_its_runs_by_model_and_data(
    clip: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Settings behind a name; finished runs are read; other data are refused."""
    small = {"clip_weights": clip[-1], "image_size": (64, 64), "prompt_tokens": 2, "decoder_layers": 1}
    for name in ("spt", "zegclip"):
        monkeypatch.setitem(CONFIGURATIONS, name, replace(CONFIGURATIONS[name], **small))
    embedded = PRESETS["embedded"]
    monkeypatch.setitem(PRESETS, "embedded", replace(embedded, model=replace(embedded.model, **small)))
    steps = [*STEPS[:-1], "0", "--train.iterations", "4", "--data.images", "4", "--validation.images", "2"]
    wanted = {"spt@transductive": ("transductive", 2), "spt": ("inductive", 4), "zegclip@supervised": ("supervised", 4)}
    command = ["ablate", "--output", str(tmp_path), "--configurations", ",".join(wanted), "--seeds", "3", *steps]
    main(command)
    table = capsys.readouterr().out
    assert [row.split(" | ")[0] for row in table.splitlines()[2:5]] == [f"| {name}" for name in wanted]
    assert (tmp_path / "table.md").read_text() in table
    for name, settings in wanted.items():
        asked = json.loads((tmp_path / f"{name}-seed3/result.json").read_text())["asked"]["train"]
        assert (asked["setting"], asked["iterations"]) == settings
    monkeypatch.setattr(ablation, "fit", None)
    main(command)
    assert capsys.readouterr().out.splitlines()[:5] == table.splitlines()[:5], "nothing is trained again"
    for options, part in (
        (["--data.images", "5"], "data.pictures, data.names"),
        (["--validation.unseen", "tree"], "split.unseen"),
        (["--train.learning-rate", "1e-4"], "train.learning_rate"),
    ):
        assert f"holds a run with other settings of {part}; choose another" in refused(capsys, *command, *options)


def test_data_show(labelled: Path, tmp_path: Path) -> None:
    main(["data", "show", str(labelled), "--out", str(tmp_path / "new" / "sheet.png"), "--count", "2"])
    assert (tmp_path / "new" / "sheet.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("full_resolution", [False, True])
def test_segment_a_folder_and_one_picture(
    full_resolution: bool, clip: list[str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, classes = tmp_path / "masks", ["grass", "water", "tree"]
    full = ["--full-resolution"] if full_resolution else []
    main(["segment", str(photos), "--classes", ",".join(classes), "--out", str(out), *clip, *full])
    of_each = {f"{name}{end}" for name in "ab" for end in (".png", "-labels.png", "-scores.npz")}
    assert {f.name for f in out.iterdir()} == {*of_each, "areas.csv", "coco.json", "names.json"}
    rows = list(csv.reader((out / "areas.csv").read_text().splitlines()))
    assert rows[0] == ["picture", *classes] and [row[0] for row in rows[1:]] == ["a.png", "b.jpg"]
    model = Which(clip="tiny", clip_weights=clip[-1]).load()
    for row, name in zip(rows[1:], ("a.png", "b.jpg"), strict=True):
        expected = segment(model, photos / name, classes, full_resolution=full_resolution)
        assert np.array_equal(open_mask(out / f"{name[0]}-labels.png"), expected.labels)
        areas = expected.areas()
        assert [float(v) for v in row[1:]] == pytest.approx(list(areas.values()), abs=5e-5)
    single = tmp_path / "new" / "b.jpg"
    capsys.readouterr()
    main(["segment", str(photos / "b.jpg"), "--classes", "grass, water ,tree", "--out", str(single), *clip, *full])
    said = [f"{value:7.1%}  {name}" for name, value in areas.items()]
    assert capsys.readouterr().out.splitlines()[:4] == [*said, f"wrote {single}"] and single.is_file()


def test_segment_never_overwrites_a_picture(clip: list[str], photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, twin = photos / "a.png", photos.parent / "a.bmp"
    twin.write_bytes(before := one.read_bytes())
    for pictures, out in (([photos], photos), ([one], one), ([one, twin], photos.parent / "out")):
        message = refused(capsys, "segment", *pictures, "--classes", "grass,water", "--out", out, *clip)
        assert message == "results would overwrite pictures or each other: give another --out, or rename pictures"
    assert one.read_bytes() == before


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_an_encoding_lacks_is_printed_as_an_escape_and_written_as_it_is(
    encoding: str, clip: list[str], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "a.png").rename(photos / "дом.png")
    (photos / "b.jpg").rename(os.fsdecode(os.fsencode(photos) + b"/b\xff.jpg"))  # a name that is no UTF-8
    options = ["--classes", "grass,дом", *clip]
    with (tmp_path / "said.txt").open("w", encoding=encoding) as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        main(["segment", str(photos), "--out", str(tmp_path / "out"), *options])
        main(["segment", str(photos / "дом.png"), "--out", str(tmp_path / "a.png"), *options])
    said = (tmp_path / "said.txt").read_text(encoding=encoding)
    shown = "дом" if encoding == "utf-8" else "\\u0434\\u043e\\u043c"
    assert f"%  {shown}\n" in said and f"{shown}.png\n" in said and "b\\udcff.png\n" in said
    rows = list(csv.reader((tmp_path / "out" / "areas.csv").read_text(encoding="utf-8").splitlines()))
    assert [row[0] for row in rows] == ["picture", "b\\udcff.jpg", "дом.png"] and rows[0][1:] == ["grass", "дом"]


def test_work_outlasts_those_who_read_what_is_printed(
    clip: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    report = tmp_path / "scores.json"
    command = ["evaluate", "--images", "1", "--json", str(report), *clip]
    with os.fdopen(writer, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        main(command)
    report.rename(tmp_path / "first.json")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)  # as closed by a shell's 2>&-
        main(command)
    report.rename(tmp_path / "second.json")
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert refused(capsys, *command) == "what was printed is not whole: No space left on device"
    assert report.read_text() == (tmp_path / "first.json").read_text() > ""


def test_import_says_what_it_left_out(reference: Reference, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "research.pth", tmp_path / "model.safetensors"
    torch.save({"state_dict": reference.state}, source)
    sizes = [f"--{name}={reference.config[name]}" for name in ("image_size", "heads", "decoder_heads")]
    main(["import", str(source), "--output", str(target), *sizes])
    assert import_report(reference.imported) in capsys.readouterr().out
    imported = load_model(target)
    assert imported.about["imported_from"] == "research.pth"
    assert same(imported.trained_state(), reference.imported.trained_state())


def test_pretrain_scales_and_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "pretrain", pretrain := Mock())
    monkeypatch.setattr(cli, "retrieval", lambda _: 0.5)
    main(["pretrain", "--output", str(tmp_path / "x"), "--seed", "3", "--no-dense-losses", "--images", "2000"])
    config, output = pretrain.call_args.args
    assert (config.seed, config.dense_losses, output) == (3, False, tmp_path / "x")
    assert abs(sum(stage.images for stage in config.stages) - 2000) < 300


@pytest.mark.parametrize(
    ("raised", "seen"),
    [(KeyboardInterrupt(), "130"), (MemoryError(), "2"), (OverflowError("port"), "2"), (KeyError("a bug"), "a bug")],
)
def test_interrupts_exit_with_130_bugs_raise(raised: BaseException, seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "pretrain", Mock(side_effect=raised))
    with pytest.raises((SystemExit, KeyError), match=seen):
        main(["pretrain"])
