"""Pictures that cannot be read and losses that are no numbers stop a run, by name; mended, it goes on."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from toys import SPLIT, Toys, data_folder, same, toy_config, toy_model

from sptseg.datasets.folders import ImageMaskFolder
from sptseg.datasets.images import Unreadable
from sptseg.inference.evaluation import evaluate
from sptseg.training import loop as training
from sptseg.training.checks import preflight
from sptseg.training.loop import fit
from sptseg.training.state import STATE, read_tensors

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve pictures with masks of the toys' classes."""
    masks = {name: np.asarray(Toys()[i]["label"]) for i, name in enumerate("abcdefghijkl")}
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


def test_evaluation_and_preflight_name_them_too(folder: Path) -> None:
    (folder / "images" / "i.png").write_text("no picture")
    Image.new("L", (32, 32), 77).save(folder / "masks" / "a.png")
    model, data = toy_model(), ImageMaskFolder(folder)
    with pytest.raises(ValueError, match="a.png has mask value 77"):
        evaluate(model, data, SPLIT, progress=False)
    with pytest.raises(Unreadable, match="i.png is not an image"):
        evaluate(model, ImageMaskFolder(folder, names="bcdefghijkl"), SPLIT, progress=False)
    first, second = preflight(model, data, SPLIT, toy_config()).faults
    assert "mask value 77" in first and "i.png is not an image" in second


def test_a_picture_that_makes_the_loss_no_number_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message holds the names of the batch, among them the guilty one, the iteration and the last good state."""

    class Infected(Toys):
        def __getitem__(self, index: int) -> Any:
            sample = super().__getitem__(index)
            return {**sample, "name": "guilty.jpg" if index == 4 else f"{index}.jpg"}

    original, steps = training.step, itertools.count()

    def step(*arguments: Any) -> dict[str, float]:
        return {**original(*arguments), **({"total": math.nan} if next(steps) == 3 else {})}

    monkeypatch.setattr(training, "step", step)
    with pytest.raises(FloatingPointError) as raised:
        fit(toy_model(), Infected(), SPLIT, toy_config(save_every=1), output=tmp_path / "run")
    said = str(raised.value)
    assert said.startswith("the loss is nan at iteration 3, on ") and said.count(".jpg") == 4 and "guilty.jpg" in said
    assert said.endswith(f"the last good state is {tmp_path / 'run' / STATE}") and "\n" not in said
    assert read_tensors(tmp_path / "run" / STATE)["iteration"] == 3
