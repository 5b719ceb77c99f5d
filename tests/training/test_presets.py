"""The literature's protocol figure by figure; miniature data sets in the real layouts from training to the table."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from miniatures import MINIATURES, context, voc

from sptseg.checkpoints.checkpoint import read_header
from sptseg.cli import main
from sptseg.datasets import IMAGENET_MEAN, IMAGENET_STD, splits
from sptseg.model import SPT_RELEASED, ZEGCLIP, new_tiny_clip, save_tiny_clip
from sptseg.training import PRESETS, PresetName, in_setting, training_augmentation
from sptseg.training import loop as training

REAL = ("voc", "coco-stuff", "context")
SMALL = "--image-size 64 64 --prompt-tokens 2 --decoder-layers 1 --templates {} --train.precision no".split()
STEPS = "--train.iterations 4 --train.batch-size 2 --train.workers 0 --train.save-every 0".split()


# The protocol


@pytest.mark.parametrize(
    ("name", "iterations", "tokens", "templates", "subsets", "seen", "unseen"),
    [
        ("voc", 20_000, 10, 1, ("trainaug", "val"), 15, 5),
        ("coco-stuff", 80_000, 100, 15, ("train", "val"), 156, 15),
        ("context", 40_000, 10, 15, ("train", "val"), 49, 10),
    ],
)
@pytest.mark.parametrize("method", ["", "-zegclip"])
def test_presets_are_the_protocol(
    name: str, method: str, iterations: int, tokens: int, templates: int, subsets: tuple, seen: int, unseen: int
) -> None:
    preset = PRESETS[name + method]
    model, train = preset.model, preset.train
    assert (model.clip, model.clip_weights, model.image_size) == ("ViT-B-16-quickgelu", "openai", (512, 512))
    assert (model.prompt_tokens, model.prompt_depth, len(model.templates)) == (tokens, None, templates)
    released = replace(ZEGCLIP if method else SPT_RELEASED, templates=model.templates, prompt_tokens=tokens)
    own = {"clip": model.clip, "clip_weights": model.clip_weights, "image_size": model.image_size}
    assert model == replace(released, **own), "nothing else deviates from the released model"
    assert (model.spectral_layers, model.loss, model.seen_offset) == (() if method else (0, 1), released.loss, 0.1)
    assert (train.iterations, train.batch_size, train.learning_rate, train.weight_decay) == (iterations, 16, 2e-4, 0.01)
    assert (train.warmup, train.power, train.last_rate, train.setting) == (1500, 0.9, 1e-6, "inductive")
    crops = training_augmentation(SimpleNamespace(config=model), train)  # pyright: ignore[reportArgumentType]
    assert (crops.crop, crops.resize_base, crops.scale, crops.largest_share) == (512, (2048, 512), (0.5, 2.0), 0.75)
    assert (crops.flip, crops.distortion, crops.mean, crops.std) == (0.5, 0.5, IMAGENET_MEAN, IMAGENET_STD)
    assert tuple(preset.data.resolved(stream).subset for stream in ("training", "evaluation")) == subsets
    split = splits.BY_NAME[preset.data.layout]()
    assert (len(split.seen), len(split.unseen)) == (seen, unseen)
    for setting, share in (("transductive", 0.5), ("supervised", 1)):  # the former goes on from the half-way checkpoint
        other, steps = in_setting(model, train, setting)
        assert (steps.iterations, steps.setting, other.seen_offset) == (share * iterations, setting, 0.0)
    assert in_setting(model, train, "inductive") == (model, train)


def test_every_preset_has_a_name_for_the_command_line() -> None:
    assert set(get_args(PresetName)) == set(PRESETS)
    assert PRESETS["voc"].with_method(SPT_RELEASED) == PRESETS["voc"]


# Training and scores


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options for a tiny CLIP with random weights that knows the words of all three data sets."""
    names = [name for preset in REAL for name in splits.BY_NAME[PRESETS[preset].data.layout]().classes]
    file = tmp_path_factory.mktemp("clip") / "tiny.safetensors"
    torch.manual_seed(0)
    save_tiny_clip(new_tiny_clip(sorted({word for name in names for word in name.split()})), file)
    return ["--clip", "tiny", "--clip-weights", str(file)]


def stopped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM in the third step of training from now on, after the two of the preflight."""
    original, steps = training.step, []

    def step(*arguments: Any) -> dict[str, float]:
        steps.append(1)
        if len(steps) == 2 + 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(training, "step", step)


@pytest.mark.parametrize("preset", REAL)
def test_from_training_to_the_table(
    preset: str, clip: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped by SIGTERM after three of four iterations, resumed, evaluated; then on to transductive training."""
    data, run = tmp_path / "data", tmp_path / "run"
    present = MINIATURES[PRESETS[preset].data.layout](tmp_path / "released", data)
    train = ["train", "--preset", preset, "--data", str(data), *clip, *SMALL, *STEPS]
    stopped_once(monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        main([*train, "--output", str(run)])
    assert stopped.value.code == 143
    assert f"stopped by SIGTERM after iteration 3 of 4; the state is in {run}" in capsys.readouterr().err
    assert not (run / "model.safetensors").exists() and (run / "state.pt").exists()
    main([*train, "--output", str(run), "--resume"])
    assert [row["iteration"] for row in json.loads((run / "history.json").read_text())] == [1, 2, 3, 4]

    config, layout = json.loads((run / "config.json").read_text()), PRESETS[preset].data.layout
    subset = "trainaug" if preset == "voc" else "train"
    assert config["about"]["preset"] == preset and config["train"]["warmup"] == 1500
    assert {"data": str(data), "layout": layout, "subset": subset}.items() <= config["about"]["data_options"].items()
    header = read_header(run / "model.safetensors")
    assert header["about"].items() >= config["about"].items() and header["about"]["train"] == config["train"]
    assert header["config"] == config["model"] and read_header(run / "halfway.safetensors")["about"]["iteration"] == 2

    evaluate = ["evaluate", "--data", str(data), "--layout", layout, *clip, "--json", str(tmp_path / "a.json")]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*train, "--output", str(tmp_path / "more"), "--train.setting=transductive"])
    assert "give --start-from an inductive checkpoint" in capsys.readouterr().err
    main([*evaluate, "--model", str(run)])
    assert "| pAcc | mIoU(S) | mIoU(U) | hIoU |" in capsys.readouterr().out
    iou = json.loads((tmp_path / "a.json").read_text())["iou"]
    split = splits.BY_NAME[layout]()
    assert tuple(iou) == split.classes
    assert {name for name, value in iou.items() if value is not None} >= present
    assert "training" not in json.loads((tmp_path / "a.json").read_text()), "the same data set"

    onwards = ["--start-from", str(run / "halfway.safetensors"), "--train.setting", "transductive"]
    main([*train, *onwards, "--output", str(tmp_path / "more"), "--train.iterations", "1"])
    header = read_header(tmp_path / "more/model.safetensors")
    assert header["config"]["seen_offset"] == 0.0 and header["about"]["start_from"] == onwards[1]


@pytest.mark.slow
@pytest.mark.parametrize("guarded", [True, False])
def test_readmes_script_where_processes_are_spawned(guarded: bool, clip: list[str], tmp_path: Path) -> None:
    """As on macOS and Windows, where each process imports the script; that it lacks its main guard is said."""
    voc(tmp_path / "released", tmp_path / "voc")
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (script,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "fit(" in block)
    size = f'clip="tiny", clip_weights={clip[-1]!r}, image_size=(64, 64), prompt_tokens=2, templates=("{{}}",)'
    script = re.sub(r"clip=.*prompt_tokens=10", size, script).replace("data/VOCdevkit/VOC2012", str(tmp_path / "voc"))
    script = script.replace("iterations=20_000", 'iterations=2, batch_size=2, workers=1, precision="no"')
    script = script.replace("val, split)", "val, split, workers=1)")
    if not guarded:
        script = re.sub(r"if __name__ .*", "if True:", script)
    spawned = "import multiprocessing\nmultiprocessing.set_start_method('spawn', force=True)\n"
    (tmp_path / "script.py").write_text(spawned + script)
    options: Any = {"env": {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, "timeout": 300}
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, **options)
    if guarded:
        assert done.returncode == 0 and done.stdout.count("| pAcc |") == 1, done.stderr
    else:
        assert done.returncode == 1 and "a script that starts processes needs its main guard" in done.stderr


def test_across_data_sets(clip: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained on VOC, told Context's names: seen classes are not favoured, and figures of shared names stand apart."""
    voc(tmp_path / "released", tmp_path / "voc")
    context(tmp_path / "released", tmp_path / "context")
    train = ["train", "--preset", "voc-zegclip", "--data", str(tmp_path / "voc"), *clip, *SMALL, *STEPS]
    main([*train, "--output", str(tmp_path / "run"), "--train.iterations", "1"])
    assert read_header(tmp_path / "run/model.safetensors")["config"]["decoder"] == "cross_attention"
    evaluate = ["evaluate", "--model", str(tmp_path / "run"), "--data", str(tmp_path / "context")]
    evaluate += ["--layout", "context-cascade", *clip, "--json", str(tmp_path / "a.json")]
    capsys.readouterr()
    reports = []
    for offset in ([], ["--seen-offset", "0"], ["--seen-offset", "0.1"]):
        main([*evaluate, *offset])
        reports.append(json.loads((tmp_path / "a.json").read_text()))
    assert reports[0] == reports[1] and reports[0]["iou"] != reports[2]["iou"]
    assert "trained on voc2012: mIoU" in capsys.readouterr().out
    report, found = reports[0]["training"], {k: v for k, v in reports[0]["iou"].items() if v is not None}
    voc_seen = set(splits.voc2012().names(splits.voc2012().seen))
    shared = {"aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dog", "horse",
              "motorbike", "person"}  # fmt: skip
    assert set(report["shown"]) == shared == voc_seen - {"dining table"}
    assert report["miou"] == pytest.approx(np.mean(list(found.values())))
    assert report["miou_shown"] == pytest.approx(np.mean([v for k, v in found.items() if k in shared]))
    assert report["miou_new"] == pytest.approx(np.mean([v for k, v in found.items() if k not in shared]))
