"""Runs that are killed, pictures that cannot be read, losses that are no numbers: named, counted, gone on from."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from toys import SPLIT, Toys, toy_config, toy_model

from sptseg.cli.commands import main
from sptseg.datasets import splits
from sptseg.datasets.folders import ImageMaskFolder, Scenes
from sptseg.datasets.images import Unreadable
from sptseg.inference.evaluation import evaluate
from sptseg.model.config import EMBEDDED_CONFIG
from sptseg.model.spt_seg import build_model
from sptseg.training import loop as training
from sptseg.training.checks import preflight
from sptseg.training.loop import fit
from sptseg.training.state import STATE, last_state, read_sealed

# Kills


def train_on_scenes(folder: Path, save_every: int) -> None:
    """A tiny model on drawn scenes, with dropout; goes on from the folder's state."""
    torch.manual_seed(0)
    config = replace(EMBEDDED_CONFIG, image_size=(32, 32), prompt_tokens=2, decoder_layers=1, spectral_layers=(0,))
    steps = toy_config(iterations=12, batch_size=2, save_every=save_every, seed=3)
    data = Scenes(16, stream="training", size=32)
    fit(build_model(config), data, splits.scenes(), steps, output=folder, resume=True)


def in_a_child(folder: Path, save_every: int) -> int:
    """Starts the training in a copy of this process, as everything is imported; returns its id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            train_on_scenes(folder, save_every)
            status = 0
        finally:
            os._exit(status)
    return child


def kill_at(child: int, moment: float, part: Path | None) -> bool:
    """Kills a child at a moment, or in its first write to `part` after it; False if it ended well before."""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0
            return False
        if time.perf_counter() >= moment and (part is None or part.exists()):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True


def kill_runs(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kills run after run, at random moments or while a state is written, until there were `kills`; lets each end.

    Every run must end with the bits of an undisturbed one, and have a good state after every kill. Returns the counts.
    """
    chance, started = random.Random(seed), time.perf_counter()
    assert not kill_at(in_a_child(folder / "undisturbed", 1), math.inf, None)
    seconds = time.perf_counter() - started
    expected = load_file(folder / "undisturbed" / "model.safetensors")
    report: dict[str, Any] = {"kills": 0, "in a write": 0, "iterations": [], "runs": 0}
    while report["kills"] < kills:
        place = folder / str(report["runs"])
        part = place / f".{STATE}.part"
        for attempt in itertools.count():
            last = report["kills"] == kills or attempt == 7  # kills a run
            moment = math.inf if last else time.perf_counter() + chance.uniform(0, 0.7) * seconds
            aim = part if chance.random() < 0.5 else None
            if not kill_at(in_a_child(place, save_every=1 + report["runs"] % 3), moment, aim):
                break
            report["kills"] += 1
            report["in a write"] += part.exists()
            state, _ = last_state(place, torch.device("cpu"))
            report["iterations"].append(state["iteration"] if state else 0)
        found = load_file(place / "model.safetensors")
        assert found.keys() == expected.keys() and all(torch.equal(value, expected[k]) for k, value in found.items())
        report["runs"] += 1
    return {**report, "seconds": round(time.perf_counter() - started, 1), "undisturbed": round(seconds, 2)}


@pytest.mark.slow
def test_killed_runs_end_with_the_bits_of_an_undisturbed_one(tmp_path: Path) -> None:
    """kill -9 at random moments and in the middle of writes, in a process of its own: forks want a single thread."""
    here = Path(__file__).parent
    script = f"import test_faults as t, json; print(json.dumps(t.kill_runs(t.Path({str(tmp_path)!r}), 20, 0)))"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (here, *here.parents[:2]))),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kills"] == 20 and report["runs"] >= 20 / 8
    assert report["in a write"] > 2 and len(set(report["iterations"])) > 4, "moments of all kinds"


# Pictures that cannot be read


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve pictures with masks, of the toys' classes; of d.png only the first half is there, i.png is a text."""
    for part in ("images", "masks"):
        (tmp_path / "data" / part).mkdir(parents=True)
    for index, name in enumerate("abcdefghijkl"):
        sample = Toys()[index]
        pixels = sample["image"].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / "data" / "images" / f"{name}.png")
        Image.fromarray(sample["label"].to(torch.uint8).numpy()).save(tmp_path / "data" / "masks" / f"{name}.png")
    broken = tmp_path / "data" / "images" / "d.png"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    (tmp_path / "data" / "images" / "i.png").write_text("no picture")
    (tmp_path / "data" / "classes.txt").write_text("\n".join(SPLIT.classes))
    (tmp_path / "data" / "unseen.txt").write_text("boat\nhouse\n")
    return tmp_path / "data"


def broken_files(sentences: list[str] | tuple[str, ...]) -> list[str]:
    """The names at the beginning of sentences."""
    return sorted(Path(sentence.partition(" is ")[0]).name for sentence in sentences)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_training_stops_at_an_unreadable_picture_with_its_name(folder: Path, workers: int) -> None:
    """In one line, also from a data-loading process, whose exceptions bring their traceback as text."""
    with pytest.raises(Unreadable, match=r"^[^\n]+images/[di].png is (damaged or cut off|not an image)[^\n]*$"):
        fit(toy_model(), ImageMaskFolder(folder), SPLIT, toy_config(workers=workers))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_training_can_leave_unreadable_pictures_out_and_lists_them(folder: Path, workers: int, tmp_path: Path) -> None:
    """Batches are full, the rest is used, and a stopped run goes on with the same bits and the same list."""
    config = toy_config(iterations=6, workers=workers, skip_unreadable=True, save_every=2)
    whole = fit(toy_model(), ImageMaskFolder(folder), SPLIT, config)
    assert broken_files(whole.left_out) == ["d.png", "i.png"]
    original, calls = training.step, []

    def stops(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "step", stops)
        with pytest.raises(KeyboardInterrupt):
            fit(toy_model(), ImageMaskFolder(folder), SPLIT, config, output=tmp_path / "run")
    assert broken_files(read_sealed(tmp_path / "run" / STATE)["left_out"]) == ["d.png", "i.png"]
    resumed = fit(toy_model(), ImageMaskFolder(folder), SPLIT, config, output=tmp_path / "run", resume=True)
    assert resumed.left_out == whole.left_out
    for name, value in whole.model.trained_state().items():
        assert torch.equal(resumed.model.trained_state()[name], value)


def test_wrong_masks_are_no_unreadable_pictures(folder: Path) -> None:
    """A mask with values beyond the classes is a mistake in the data set: it is never left out in silence."""
    Image.new("L", (32, 32), 77).save(folder / "masks" / "a.png")
    with pytest.raises(ValueError, match="a.png has mask value 77"):
        fit(toy_model(), ImageMaskFolder(folder), SPLIT, toy_config(iterations=6, skip_unreadable=True))


def test_a_data_set_without_a_readable_picture_is_refused(folder: Path) -> None:
    for path in (folder / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 12 pictures can be read: .*png is not an image"):
        fit(toy_model(), ImageMaskFolder(folder), SPLIT, toy_config(skip_unreadable=True))


def test_evaluation_stops_or_leaves_out(folder: Path) -> None:
    """What is left out counts for nothing: the scores are those of the readable pictures alone."""
    model, data = toy_model(), ImageMaskFolder(folder)
    with pytest.raises(Unreadable, match="d.png is damaged or cut off"):
        evaluate(model, data, SPLIT, progress=False)
    scores = evaluate(model, data, SPLIT, progress=False, skip_unreadable=True)
    assert broken_files(scores.left_out) == ["d.png", "i.png"]
    rest = ImageMaskFolder(folder, names="abcefghjkl")
    assert replace(scores, left_out=()) == evaluate(model, rest, SPLIT, progress=False)


def test_preflight_names_them_as_faults_or_as_warnings(folder: Path) -> None:
    model, data = toy_model(), ImageMaskFolder(folder)
    report = preflight(model, data, SPLIT, toy_config())
    assert len(report.faults) == 2 and "d.png" in report.faults[0]
    report = preflight(model, data, SPLIT, toy_config(skip_unreadable=True))
    assert not report.faults and sum("d.png" in text or "i.png" in text for text in report.warnings) == 2
    assert report.terms["total"] > 0
    Image.new("L", (32, 32), 77).save(folder / "masks" / "a.png")
    report = preflight(model, data, SPLIT, toy_config(skip_unreadable=True))
    assert len(report.faults) == 1 and "mask value 77" in report.faults[0]


def test_the_commands_list_what_they_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "classes.txt").write_text("grass\nwater\nboat\ntree\nhouse\n")
    commands = {
        "evaluate": ["--model", "dense-clip", "--data", str(folder), "--json", str(folder / "new" / "scores.json")],
    }
    for command, options in commands.items():
        with pytest.raises(SystemExit) as stopped:
            main([command, *options])
        assert stopped.value.code == 2 and "d.png is damaged or cut off" in capsys.readouterr().err
        main([command, *options, "--skip-unreadable"])
        said = capsys.readouterr().out
        assert "left out 2 pictures that cannot be read:\n- " in said and "i.png is not an image" in said
    assert broken_files(json.loads((folder / "new" / "scores.json").read_text())["left_out"]) == ["d.png", "i.png"]


# Losses that are no numbers: see also test_training.py


def test_a_picture_that_makes_the_loss_no_number_is_named(folder: Path, tmp_path: Path) -> None:
    """The message holds the names of the batch, among them the guilty one, the iteration and the last good state."""

    class Infected(Toys):
        def __getitem__(self, index: int) -> Any:
            sample = super().__getitem__(index)
            return {**sample, "name": "guilty.jpg" if index == 4 else f"{index}.jpg"}

    original, steps = training.step, itertools.count()

    def step(*arguments: Any) -> dict[str, float]:
        return {**original(*arguments), **({"total": math.nan} if next(steps) == 3 else {})}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "step", step)
        with pytest.raises(FloatingPointError) as raised:
            fit(toy_model(), Infected(), SPLIT, toy_config(save_every=1), output=tmp_path / "run")
    said = str(raised.value)
    assert said.startswith("the loss is nan at iteration 3, on ") and said.count(".jpg") == 4 and "guilty.jpg" in said
    assert said.endswith(f"the last good state is {tmp_path / 'run' / STATE}") and "\n" not in said
    assert read_sealed(tmp_path / "run" / STATE)["iteration"] == 3
