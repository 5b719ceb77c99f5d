"""The literature's protocols figure by figure; from data sets in the real layouts to the table."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refused, small_clip
from miniatures import MINIATURES, context, voc
from torch.testing import assert_close
from torchvision import tv_tensors
from toys import child_environment, toy_model

from sptseg.checkpoints.checkpoint import read_header
from sptseg.cli import main
from sptseg.datasets import CLIP_MEAN, IMAGENET_MEAN, IMAGENET_STD, Scenes, splits
from sptseg.datasets.transforms import test_transform as transform_of
from sptseg.inference import augmentation, evaluate, segment
from sptseg.model import DENSE_CLIP, SPT_RELEASED, ZEGCLIP, ModelConfig, build_model, read_out
from sptseg.model.clip import new_tiny_clip, save_tiny_clip
from sptseg.training import PRESETS, PresetName, in_setting, training_augmentation
from sptseg.training.presets import IMAGENET_TEMPLATES, beside_published, training_free

REAL = ("voc", "coco-stuff", "context")
SMALL = "--image-size 64 64 --prompt-tokens 2 --decoder-layers 1 --templates {} --train.precision no".split()
STEPS = "--train.iterations 4 --train.batch-size 2 --train.workers 0 --train.save-every 0".split()


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


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options for a tiny CLIP with random weights that knows the words of all three data sets."""
    names = [name for preset in REAL for name in splits.BY_NAME[PRESETS[preset].data.layout]().classes]
    file = tmp_path_factory.mktemp("clip") / "tiny.safetensors"
    torch.manual_seed(0)
    save_tiny_clip(new_tiny_clip(sorted({word for name in names for word in name.split()})), file)
    return ["--clip", "tiny", "--clip-weights", str(file)]


@pytest.mark.parametrize("preset", REAL)
def test_training_to_the_table(
    preset: str, clip: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And on to transductive training."""
    data, run = tmp_path / "data", tmp_path / "run"
    present = MINIATURES[PRESETS[preset].data.layout](tmp_path / "released", data)
    train = ["train", "--preset", preset, "--data", str(data), *clip, *SMALL, *STEPS]
    main([*train, "--output", str(run)])
    config, layout = json.loads((run / "config.json").read_text()), PRESETS[preset].data.layout
    subset = "trainaug" if preset == "voc" else "train"
    assert config["about"]["preset"] == preset and config["train"]["warmup"] == 1500
    assert {"data": str(data), "layout": layout, "subset": subset}.items() <= config["about"]["data_options"].items()
    header = read_header(run / "model.safetensors")
    assert header["about"].items() >= config["about"].items() and header["about"]["train"] == config["train"]
    assert header["config"] == config["model"] and read_header(run / "halfway.safetensors")["about"]["iteration"] == 2

    evaluate = ["evaluate", "--data", str(data), "--layout", layout, *clip, "--json", str(tmp_path / "a.json")]
    capsys.readouterr()
    main([*evaluate, "--model", str(run)])
    assert "| pAcc | mIoU(S) | mIoU(U) | hIoU |" in capsys.readouterr().out
    scores = json.loads((tmp_path / "a.json").read_text())
    assert "training" not in scores and tuple(scores["iou"]) == splits.BY_NAME[layout]().classes, "the same data set"
    assert {name for name, value in scores["iou"].items() if value is not None} >= present
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
    options: Any = {"env": child_environment(), "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, **options)
    assert done.returncode == (not guarded) and done.stdout.count("| pAcc |") == guarded, done.stderr
    assert guarded or "a script that starts processes needs its main guard" in done.stderr


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
    shared = {*"aeroplane bicycle bird boat bottle bus car cat chair cow dog horse motorbike person".split()}
    assert {*report["shown"]} == shared == {*splits.voc2012().names(splits.voc2012().seen)} - {"dining table"}
    for figure, names in {"miou": {*found}, "miou_shown": {*found} & shared, "miou_new": {*found} - shared}.items():
        assert report[figure] == pytest.approx(np.mean([found[name] for name in names])), figure


def test_the_recipe_equals_its_plain_twin() -> None:
    """Windows of 24 every 12 pixels, averaged, resized, softmax of 40 times these, the best of a class's words."""
    changes: dict[str, Any] = {"short_side": 40, "window_stride": 0.5, "bicubic": True, "softmax_scale": 40.0}
    clip = small_clip()
    config = {**DENSE_CLIP.__dict__, "clip": "small", "image_size": (24, 24), "readout": "naclip", **changes}
    model = build_model(ModelConfig(**config), clip).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (50, 65, 3), np.uint8)
    found = segment(model, pixels, ["grass|boat", "tree"], background="water")
    image = transform_of(augmentation(model.config))(tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1)))
    assert image.shape == (3, 40, 52)
    text = model.class_embeddings(["grass", "boat", "tree", "water"])
    total, count = torch.zeros(4, 40, 52), torch.zeros(40, 52)
    for y in (0, 12, 16):
        for x in (0, 12, 24, 28):
            patches, _ = read_out(clip.visual, image[None, :, y : y + 24, x : x + 24], "naclip", bicubic=True)
            cosine = torch.einsum("behw,ce->bchw", patches, text)
            total[:, y : y + 24, x : x + 24] += F.interpolate(cosine, (24, 24), mode="bilinear")[0]
            count[y : y + 24, x : x + 24] += 1
    words = (40 * F.interpolate((total / count)[None], (50, 65), mode="bilinear")[0]).softmax(dim=0)
    scores = torch.stack([words[:2].amax(0), words[2], words[3]])
    for i, name in enumerate(found.named.values()):
        assert_close(torch.from_numpy(found.scores(name)), scores[i], atol=1e-5, rtol=1e-4)
    labels = torch.from_numpy(np.where(found.labels == 255, 2, found.labels))
    assert_close(scores.gather(0, labels[None])[0], scores.amax(0), atol=1e-5, rtol=0)
    assert 0 < (labels == 2).float().mean() < 1


def test_the_recipe_of_each_data_set() -> None:
    for readout, layout, *sizes in (
        ("naclip", "voc2012", 224, 112, 336, 40), ("naclip", "cityscapes", 224, 112, 560, 40),
        ("sclip", "coco-stuff", 224, 112, 448, 40), ("clearclip", "ade20k", 448, 224, 448, 50),
        ("clearclip", "cityscapes", 224, 224, 448, 50),
    ):  # fmt: skip
        config = training_free("ViT-B-16-quickgelu", "openai", readout, layout)
        window, other = config.image_size
        assert [window, config.window_stride * window, config.short_side, config.softmax_scale] == sizes
        assert (config.readout, config.normalization, config.bicubic, config.trains) == (readout, "clip", True, False)
        assert config.templates == IMAGENET_TEMPLATES and window == other and augmentation(config).mean == CLIP_MEAN
    assert len(set(IMAGENET_TEMPLATES)) == len(IMAGENET_TEMPLATES) == 80
    some = [IMAGENET_TEMPLATES[i] for i in (0, 39, 73, 79)]
    assert some == ["a bad photo of a {}.", "a photo of a {}.", "itap of a {}.", "a tattoo of the {}."]
    with pytest.raises(ValueError, match="softmax_scale is dense CLIP's"):
        toy_model(softmax_scale=40.0)


def test_published_figures_stand_beside_yours() -> None:
    naclip = training_free("ViT-B-16-quickgelu", "openai", "naclip")
    assert beside_published(naclip, "cityscapes", 0.3512)[0].splitlines()[-1] == "| naclip | Cityscapes | 35.5 | 35.1 |"
    for readout, layout, figure in (("gem", "voc2012", "79.9"), ("maskclip", "ade20k", "9.8 to 11.9")):
        config = training_free("ViT-B-16", "openai", readout)
        assert f"| {figure} | 50.0 |" in beside_published(config, layout, 0.5)[0]
    others = (training_free("ViT-B-16-quickgelu", None, "naclip"), "voc2012"), (naclip, "camvid")
    assert [beside_published(*each, 0.5) for each in others] == [[], []]


def test_evaluate_takes_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["evaluate", "--model", "training-free", "--readout", "naclip", "--images", "2"]
    main([*options, "--json", str(tmp_path / "a.json"), "--workers", "0"])
    model, data = build_model(training_free("tiny", None, "naclip")), Scenes(2)
    expected = evaluate(model, data, data.split, progress=False)
    assert json.loads((tmp_path / "a.json").read_text()) == expected.as_dict()
    capsys.readouterr()
    assert "readout is 'clip'; wanted one of plain" in refused(capsys, *options[:-3], "clip")
    tiny, plain = (build_model(training_free(name)) for name in ("tiny", "tiny-plain"))
    assert plain.config == replace(tiny.config, clip="tiny-plain", readout="naclip"), "both in their own words"
