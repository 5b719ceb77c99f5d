"""A GPU held to the CPU, and its speed: `make test-gpu`. SPTSEG_TEST_DEVICE=cpu runs the same, small, on the CPU."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from conftest import DEVICE, Reference, small_clip
from torch.testing import assert_close
from toys import SPLIT, ActsAt, Toys, interrupt, same, toy_config, toy_model

from sptseg import scenes
from sptseg.analysis import failures, spectra
from sptseg.checkpoints import load_model
from sptseg.cli.benchmark import benchmark
from sptseg.datasets import Scenes, splits
from sptseg.inference import Precision, at_precision, evaluate, segment
from sptseg.model import build_model, ops
from sptseg.model.clip import TEMPLATES, TINY
from sptseg.model.readouts import OPTIONS, read_out
from sptseg.training import PRESETS, preflight
from sptseg.training.loop import FitResult, fit

GPU = DEVICE == "cuda"
if GPU and not torch.cuda.is_available():
    pytest.skip("PyTorch finds no GPU; SPTSEG_TEST_DEVICE=cpu runs these small, on the CPU", allow_module_level=True)
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # else cuBLAS's sums may differ from run to run
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]  # what libraries say of a GPU is no fault of ours


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in float32 proper, where cuDNN would take TF32 by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@contextmanager
def accelerated_by(device: str) -> Iterator[None]:
    """Where accelerate trains and evaluates."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=device == "cpu")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def trained(device: str = DEVICE, dropout: float = 0.0, reads: int = 10**6, **options: Any) -> FitResult:
    """A toy model trained on a device; with `reads`, interrupted when so many pictures were read."""
    folder = {name: options.pop(name) for name in ("output", "resume") if name in options}
    with accelerated_by(device):
        result = fit(toy_model(dropout=dropout), ActsAt(interrupt, reads), SPLIT, toy_config(**options), **folder)
        assert result.model.device.type == device
        return result


@pytest.mark.parametrize(("narrow", "most", "floor"), [(False, 1e-3, 1e-5), (True, 0.2, 1e-3)])
def test_reference_sets_forward_and_backward(narrow: bool, most: float, floor: float, reference: Reference) -> None:
    errors = reference.errors(DEVICE, narrow, floor)
    assert max(errors.values()) < most, max(errors, key=errors.__getitem__)


@pytest.mark.parametrize("grid", [(5, 7), (32, 32), (1, 1), (40, 27)])
def test_learned_filters_of_any_grid(grid: ops.Grid) -> None:
    """Made for 8 x 8; on every grid the filtered features and both gradients."""
    features, weight = torch.randn(2, *grid, 3), torch.randn(8, 5, 3, dtype=torch.complex64)
    cotangent, found = torch.randn_like(features), []
    for device in (DEVICE, "cpu"):
        x, w = (each.to(device).requires_grad_() for each in (features, weight))
        y = ops.fourier_filter(x, ops.resample_filter(w, (8, 8), grid))
        found.append([each.cpu() for each in (y, *torch.autograd.grad(y, (x, w), cotangent.to(device)))])
    assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_read_outs(name: str) -> None:
    """Embeddings are unit vectors, so the largest difference of one is relative."""
    images = torch.randn(2, 3, 32, 48)
    expected = read_out(small_clip().visual, images, name)
    for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        found = read_out(small_clip().visual.to(DEVICE, dtype), images.to(DEVICE), name)
        apart = [(ours.cpu().float() - theirs).norm(dim=1).max() for ours, theirs in zip(found, expected, strict=True)]
        assert max(apart) < most


@pytest.mark.parametrize("options", [{}, {"setting": "transductive"}, {"accumulation": 2, "checkpointing": True}])
def test_a_hundred_steps(options: dict[str, Any]) -> None:
    """Rounding grows from step to step: the first losses are equal, the last ones nearly."""
    runs = (trained(device, iterations=100, **options) for device in (DEVICE, "cpu"))
    ours, expected = ([row["total"] for row in run.history] for run in runs)
    assert ours[:3] == pytest.approx(expected[:3], rel=1e-3)
    assert sum(ours[-10:]) == pytest.approx(sum(expected[-10:]), rel=0.05)


@pytest.mark.parametrize("precision", ["no", "bf16", *["fp16"] * GPU])
def test_a_stopped_run_goes_on_with_the_same_bits(precision: str, tmp_path: Path) -> None:
    """With dropout, whichever process reads the pictures; in PyTorch's deterministic mode, as attention on GPUs adds up
    its gradients in any order otherwise."""
    run = {"dropout": 0.1, "iterations": 8, "save_every": 2, "precision": precision}
    torch.use_deterministic_algorithms(True)
    try:
        whole = trained(**run, workers=1).model.trained_state()
        with pytest.raises(KeyboardInterrupt):
            trained(**run, output=tmp_path, reads=21)
        assert same(trained(**run, output=tmp_path, resume=True).model.trained_state(), whole)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", get_args(Precision))
def test_evaluation(precision: Precision) -> None:
    """Rounding turns few pixels."""
    scenes, scores = Scenes(60 if GPU else 4, seed=4), []
    for device in (DEVICE, "cpu"):
        with accelerated_by(device):
            model = at_precision(load_model().to(device), precision if device == DEVICE else "no")
            scores.append(evaluate(model, scenes, scenes.split, progress=False).as_dict())
    one, other = ({**each.pop("iou"), **each} for each in scores)
    assert one == pytest.approx(other, abs=0.005 if precision == "no" else 0.05)


def test_pictures_in_windows_and_their_analysis() -> None:
    data, (image, _), found = Scenes(4, seed=4), scenes.draw(3, size=200), []
    for device in (DEVICE, "cpu"):
        model = load_model().to(device)
        result = segment(model, image, data.split.classes, full_resolution=True)
        assert len(result.logits.boxes) == 4
        effects = spectra.prompt_effects(model.encoder, torch.ones(1, 3, 128, 128, device=device))
        pixels = failures.collect(model, data, data.split).confusions().diagonal(axis1=1, axis2=2).sum(axis=1)
        found.append((result.scores("sky"), result.labels, effects.astype(float).to_numpy(), pixels))
    (scores, labels, effects, pixels), expected = found
    assert_close(scores, expected[0], atol=1e-3, rtol=0)
    assert (labels != expected[1]).mean() < 0.005
    assert_close(effects, expected[2], atol=1e-3, rtol=1e-3)
    assert pixels == pytest.approx(expected[3], rel=0.005)


@pytest.mark.parametrize("name", ["voc", "coco-stuff"])
def test_a_step_of_a_preset_and_its_memory(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With random weights; time and memory are printed."""
    preset, config = PRESETS[name], replace(PRESETS[name].model, clip_weights=None, templates=TEMPLATES)
    split, train = splits.BY_NAME[preset.data.layout](), preset.train
    if not GPU:  # of words that the tiny CLIP knows
        split, train = splits.scenes(), replace(train, batch_size=2)
        config = replace(config, clip=TINY, image_size=(64, 64))
    with accelerated_by(DEVICE):
        report = preflight(build_model(config).to(DEVICE), Toys(32), split, train)
    with capsys.disabled():
        print(f"\n{name}, a step of {train.batch_size} pictures:", *report.findings[-3:], sep="\n  ")
    assert not report.faults and (not GPU or "on the GPU" in report.findings[-1]) and report.terms["total"] > 0


def test_speed_of_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps with and without loading, as `sptseg benchmark training` measures and prints them."""
    with capsys.disabled(), accelerated_by(DEVICE):
        print()
        benchmark(("training",), quick=not GPU, json_file=tmp_path / "rows.json")
    report = json.loads((tmp_path / "rows.json").read_text())
    assert bool(report["machine"]["gpu"]) == GPU
    loaded = [row["per_second"] for row in report["rows"] if row["case"].startswith("steps, loading included")]
    assert len(loaded) == 2 and min(loaded) > 0
