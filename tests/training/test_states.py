"""A run goes on from its last state, whatever stopped it; it is known by what it holds, and what is faulty is named."""

import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toys import SPLIT, ActsAt, Intruder, Toys, child_environment, data_folder, interrupt, same, toy_config, toy_model

from sptseg import scenes
from sptseg.datasets import ImageMaskFolder, Scenes, Unreadable, splits
from sptseg.model import DENSE_CLIP, EMBEDDED_CONFIG, build_model, fingerprint, load_clip, new_tiny_clip, save_tiny_clip
from sptseg.training import TrainConfig, TrainingStream, fit, loop, training_augmentation
from sptseg.training import state as states
from sptseg.training.ablation import run_one
from sptseg.training.state import STATE, identity, read_tensors, write_tensors

NO_STATE: dict[str, Callable[[Path], object]] = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "a text": lambda path: path.write_text("a text"),
    "other tensors": lambda path: torch.save([torch.zeros(3)], path),
    "code": lambda path: write_tensors(path, {"model": Intruder(path.with_name("intruded")), "optimizer": {}}),
    "sealed and cut off": lambda path: path.write_bytes(states.SEAL + b"0" * 64 + b"\n" + path.read_bytes()[:500]),
}


@pytest.mark.parametrize("kind", NO_STATE)
def test_what_is_no_state_is_named(kind: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(toy_model(), ActsAt(interrupt, 4 * 3), SPLIT, toy_config(save_every=2), output=tmp_path)
    NO_STATE[kind](tmp_path / STATE)
    with pytest.raises(ValueError, match=r"state.pt cannot be read: it is damaged, or no state of a run; delete it"):
        fit(toy_model(), Toys(), SPLIT, toy_config(save_every=2), output=tmp_path, resume=True)
    assert not (tmp_path / "intruded").exists(), "a state executes nothing"


def test_the_scaler_of_half_precision_goes_along(tmp_path: Path) -> None:
    trainers = [loop.Trainer(toy_model(), Toys(), SPLIT, toy_config(), tmp_path) for _ in range(2)]
    for trainer, scale in zip(trainers, (1024.0, 2.0), strict=True):
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.accelerator.scaler.scale(torch.ones(()))  # it begins with the first loss
    trainers[0].save(3)
    trainers[1].load(tmp_path / STATE)
    assert trainers[1].accelerator.scaler.get_scale() == 1024.0 and trainers[1].done == 3


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_names_an_unreadable_picture_and_goes_on_once_it_is_whole(workers: int, tmp_path: Path) -> None:
    """In one line, also from a data-loading process, whose exceptions bring their traceback as text."""
    masks = {f"p{i}": np.asarray(Toys()[i % 6]["label"]) for i in range(32)}
    data = ImageMaskFolder(data_folder(tmp_path / "data", masks, SPLIT.classes, SPLIT.names(SPLIT.unseen)))
    config = toy_config(iterations=6, workers=workers, save_every=1)
    whole = fit(toy_model(), data, SPLIT, config).model.trained_state()
    picture = tmp_path / "data" / "images" / "p3.png"
    content = picture.read_bytes()
    picture.write_bytes(content[: len(content) // 2])
    with pytest.raises(Unreadable, match=r"^\S+images/p3.png is damaged or cut off[^\n]*$"):
        fit(toy_model(), data, SPLIT, config, output=tmp_path / "run")
    assert 0 < read_tensors(tmp_path / "run" / STATE)["iteration"] < 6
    picture.write_bytes(content)
    resumed = fit(toy_model(), data, SPLIT, config, output=tmp_path / "run", resume=True)
    assert same(resumed.model.trained_state(), whole)


def test_pictures_that_make_the_loss_no_number_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message holds the names of the batch and the iteration; the last state stays a good one."""
    original, losses = loop.step, iter([0.0, 0.0, 0.0, math.nan])
    monkeypatch.setattr(loop, "step", lambda *given: {**original(*given), "total": next(losses)})
    model, config = toy_model(), toy_config(save_every=2)
    stream = TrainingStream(Toys(), training_augmentation(model, config), torch.arange(256), 0)
    names = ", ".join(stream[position].name for position in range(12, 16))
    with pytest.raises(FloatingPointError) as raised:
        fit(model, Toys(), SPLIT, config, output=tmp_path)
    assert str(raised.value).startswith(f"the loss is nan at iteration 3, on {names}; lower learning_rate, or ")
    assert read_tensors(tmp_path / STATE)["iteration"] == 2


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of iteration 3 is finite, its gradient is not; the state of iteration 2 stays the last."""
    model, steps, original = toy_model(), itertools.count(1), torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *arguments: Any, **options: Any) -> Any:
        if next(steps) == 3:
            next(p for p in model.parameters() if p.requires_grad).grad.fill_(float("nan"))
        return original(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(FloatingPointError, match="weights are no numbers after iteration 3: encoder.prompts"):
        fit(model, Toys(), SPLIT, toy_config(save_every=1), output=tmp_path)
    state = read_tensors(tmp_path / STATE)
    assert state["iteration"] == 2 and all(value.isfinite().all() for value in state["model"].values())


def test_folders_are_told_apart_by_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def folder(place: str, value: int, name: str = "a") -> Path:
        return data_folder(tmp_path / place, {name: np.full((8, 8), value)})

    assert len({str(identity(Scenes(*each))) for each in ((3,), (4,), (3, 1), (3, 0, "training"))}) == 4
    one, other = folder("one", 0), folder("other", 1)
    copy = shutil.copytree(one, tmp_path / "elsewhere" / "one")
    monkeypatch.chdir(tmp_path)
    assert identity(ImageMaskFolder(one)) == identity(ImageMaskFolder(copy)) == identity(ImageMaskFolder("one"))
    assert identity(ImageMaskFolder(one)) != identity(ImageMaskFolder(other))
    names = {"NFC": unicodedata.normalize("NFC", "Bäume"), "NFD": unicodedata.normalize("NFD", "Bäume"), "no": "Baume"}
    composed, decomposed, plain = (identity(ImageMaskFolder(folder(form, 0, names[form]))) for form in names)
    assert composed == decomposed != plain


def test_a_run_goes_on_with_its_clip_at_another_path_only(tmp_path: Path) -> None:
    config = toy_config(save_every=2, iterations=4)
    for path in ("/one/clip.pt", "clip.pt"):
        model = toy_model()
        model.config = replace(model.config, clip_weights=path)
        fit(model, Toys(), SPLIT, config, output=tmp_path, resume=True)
    model.clip.model.state_dict()["text_projection"].mul_(2)
    with pytest.raises(ValueError, match=r"trained with other settings of clip.fingerprint; resume"):
        fit(model, Toys(), SPLIT, config, output=tmp_path, resume=True)


def test_a_finished_run_of_an_ablation_is_known_again(tmp_path: Path) -> None:
    """With its CLIP at another path, and by what earlier versions noted of CLIP and pictures."""
    save_tiny_clip(new_tiny_clip(scenes.WORDS), tmp_path / "a.safetensors")
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    torch.manual_seed(1)
    save_tiny_clip(new_tiny_clip(scenes.WORDS), tmp_path / "other.safetensors")
    data = Scenes(1, size=32)

    def result(file: str) -> dict:
        config = replace(DENSE_CLIP, image_size=(32, 32), clip_weights=str(tmp_path / file))
        return run_one("dense-clip", config, data, data, data.split, TrainConfig(progress=False), tmp_path)

    first = result("a.safetensors")
    path = tmp_path / "dense-clip-seed0" / "result.json"
    written = path.stat().st_mtime_ns
    assert result("b.safetensors")["scores"] == first["scores"] and path.stat().st_mtime_ns == written
    earlier = json.loads(path.read_text())
    earlier["asked"]["clip"] = fingerprint(load_clip("tiny", str(tmp_path / "a.safetensors")), like="0" * 16)
    del earlier["asked"]["data"]["content"], earlier["asked"]["validation"]["content"]
    path.write_text(json.dumps(earlier))
    assert result("b.safetensors")["scores"] == first["scores"]
    with pytest.raises(ValueError, match="holds a run with other settings of clip; choose another output folder"):
        result("other.safetensors")


def in_a_child(folder: Path, save_every: int) -> int:
    """Trains a tiny model on drawn scenes, with dropout, from the folder's state on, in a copy of this process, as
    everything is imported; returns its id."""
    if (child := os.fork()) == 0:
        try:
            torch.manual_seed(0)
            small: Any = {"image_size": (32, 32), "prompt_tokens": 2, "decoder_layers": 1, "spectral_layers": (0,)}
            model, data = build_model(replace(EMBEDDED_CONFIG, **small)), Scenes(16, stream="training", size=32)
            config = toy_config(iterations=12, batch_size=2, save_every=save_every, seed=3)
            fit(model, data, splits.scenes(), config, output=folder, resume=True)
        finally:
            os._exit(0)
    return child


def kill_runs(folder: Path) -> int:
    """Kills each of three runs five times at random moments, and lets it end. How many kills left a (good) state."""
    chance, started, kept = random.Random(0), time.perf_counter(), 0
    os.waitpid(in_a_child(folder / "undisturbed", 1), 0)
    seconds = time.perf_counter() - started
    for run in range(3):
        place = folder / str(run)
        for _ in range(5):
            child = in_a_child(place, 1 + run)
            time.sleep(chance.uniform(0, 0.7) * seconds)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            if (place / STATE).exists():
                read_tensors(place / STATE)
                kept += 1
        os.waitpid(in_a_child(place, 1 + run), 0)
        assert same(*(load_file(each / "model.safetensors") for each in (place, folder / "undisturbed")))
    return kept


@pytest.mark.slow
def test_killed_runs_end_with_the_bits_of_an_undisturbed_one(tmp_path: Path) -> None:
    """kill -9 at random moments, in a process of its own: forks want a single thread."""
    script = f"import test_states as t; print(t.kill_runs(t.Path({str(tmp_path)!r})))"
    options: Any = {"cwd": Path(__file__).parent, "env": child_environment(), "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", script], timeout=500, **options)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) > 4
