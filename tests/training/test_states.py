"""A run goes on from its last state, whatever stopped it; what is no state, or cannot be written, is named."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from toys import SPLIT, ActsAt, Intruder, Toys, interrupt, same, toy_config, toy_model

from sptseg.datasets import Scenes, splits
from sptseg.model import EMBEDDED_CONFIG, build_model
from sptseg.training import fit
from sptseg.training import state as states
from sptseg.training.loop import Trainer
from sptseg.training.state import STATE, read_tensors, write_tensors


def run(folder: Path | None, resume: bool = False, **changes: Any) -> dict[str, Tensor]:
    config = toy_config(iterations=6, save_every=2, **changes)
    return fit(toy_model(dropout=0.1), Toys(), SPLIT, config, output=folder, resume=resume).model.trained_state()


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The state of a run killed after five iterations: an exception stands for the signal."""
    dataset, config = ActsAt(interrupt, 4 * 5), toy_config(iterations=6, save_every=2)
    with pytest.raises(KeyboardInterrupt):
        fit(toy_model(dropout=0.1), dataset, SPLIT, config, output=tmp_path)
    return tmp_path / STATE


NO_STATE: dict[str, Callable[[Path], object]] = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "a text": lambda path: path.write_text("a text"),
    "other tensors": lambda path: torch.save([torch.zeros(3)], path),
    "sealed and cut off": lambda path: path.write_bytes(states.SEAL + b"0" * 64 + b"\n" + path.read_bytes()[:500]),
}


@pytest.mark.parametrize("kind", NO_STATE)
def test_what_is_no_state_is_named(kind: str, stopped: Path) -> None:
    NO_STATE[kind](stopped)
    with pytest.raises(ValueError, match=r"state.pt cannot be read: it is damaged, or no state of a run; delete it"):
        run(stopped.parent, resume=True)


def test_a_state_executes_nothing(tmp_path: Path) -> None:
    write_tensors(tmp_path / STATE, {"model": Intruder(tmp_path / "intruded"), "optimizer": {}})
    with pytest.raises(ValueError, match="state.pt cannot be read"):
        read_tensors(tmp_path / STATE)
    assert not (tmp_path / "intruded").exists()


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of iteration 3 is finite, its gradient is not; the state of iteration 2 stays the last."""
    model, steps = toy_model(), []
    original = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *arguments: Any, **options: Any) -> Any:
        steps.append(len(steps))
        if len(steps) == 3:
            next(p for p in model.parameters() if p.requires_grad).grad.fill_(float("nan"))
        return original(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(FloatingPointError, match="weights are no numbers after iteration 3: encoder.prompts"):
        fit(model, Toys(), SPLIT, toy_config(save_every=1), output=tmp_path)
    state = read_tensors(tmp_path / STATE)
    assert state["iteration"] == 2 and all(value.isfinite().all() for value in state["model"].values())


def test_the_scaler_of_half_precision_goes_along(tmp_path: Path) -> None:
    def trainer(scale: float, resume: bool) -> Trainer:
        trainer = Trainer(toy_model(), Toys(), SPLIT, toy_config(), tmp_path)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.accelerator.scaler.scale(torch.ones(()))  # it begins with the first loss
        if resume:
            trainer.load(tmp_path / STATE)
        return trainer

    trainer(1024.0, resume=False).save(3)
    new = trainer(2.0, resume=True)
    assert new.accelerator.scaler.get_scale() == 1024.0 and new.done == 3


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
    if (child := os.fork()) == 0:
        try:
            train_on_scenes(folder, save_every)
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
    here = Path(__file__).parent
    script = f"import test_states as t; print(t.kill_runs(t.Path({str(tmp_path)!r})))"
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) > 4
