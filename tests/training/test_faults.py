"""Pictures that cannot be read and losses that are no numbers stop a run, by name; mended, it goes on."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import SPLIT, Toys, data_folder, same, toy_config, toy_model

from sptseg.datasets import ImageMaskFolder, Unreadable
from sptseg.training import TrainingStream, fit, training_augmentation
from sptseg.training import loop as training
from sptseg.training.state import STATE, read_tensors

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


NAMES = "abcdefghijklmnopqrstuvwxyz012345"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty-two pictures with masks of the toys' classes."""
    masks = {name: np.asarray(Toys()[i % 6]["label"]) for i, name in enumerate(NAMES)}
    return data_folder(tmp_path / "data", masks, SPLIT.classes, SPLIT.names(SPLIT.unseen))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_stops_at_an_unreadable_picture_with_its_name_and_goes_on_once_it_is_whole(
    folder: Path, workers: int, tmp_path: Path
) -> None:
    """In one line, also from a data-loading process, whose exceptions bring their traceback as text."""
    config = toy_config(iterations=6, workers=workers, save_every=1)
    whole = fit(toy_model(), ImageMaskFolder(folder), SPLIT, config).model.trained_state()
    picture = folder / "images" / "d.png"
    content = picture.read_bytes()
    picture.write_bytes(content[: len(content) // 2])
    with pytest.raises(Unreadable, match=r"^\S+images/d.png is damaged or cut off[^\n]*$"):
        fit(toy_model(), ImageMaskFolder(folder), SPLIT, config, output=tmp_path / "run")
    assert 0 < read_tensors(tmp_path / "run" / STATE)["iteration"] < 6
    picture.write_bytes(content)
    resumed = fit(toy_model(), ImageMaskFolder(folder), SPLIT, config, output=tmp_path / "run", resume=True)
    assert same(resumed.model.trained_state(), whole)


def test_pictures_that_make_the_loss_no_number_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message holds the names of the batch and the iteration; the last state stays a good one."""
    original, steps = training.step, itertools.count()

    def step(*arguments: Any) -> dict[str, float]:
        return {**original(*arguments), **({"total": math.nan} if next(steps) == 3 else {})}

    monkeypatch.setattr(training, "step", step)
    model, config = toy_model(), toy_config(save_every=2)
    stream = TrainingStream(Toys(), training_augmentation(model, config), torch.arange(256), 0)
    names = ", ".join(stream[position].name for position in range(12, 16))
    with pytest.raises(FloatingPointError) as raised:
        fit(model, Toys(), SPLIT, config, output=tmp_path)
    advice = "lower learning_rate, or use precision='no'"
    assert str(raised.value) == f"the loss is nan at iteration 3, on {names}; {advice}"
    assert read_tensors(tmp_path / STATE)["iteration"] == 2
