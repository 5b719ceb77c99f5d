"""A run knows its CLIP and its pictures by what they hold, whatever they are called and wherever they lie."""

from __future__ import annotations

import json
import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toys import SPLIT, Toys, toy_config, toy_model

from sptseg import scenes
from sptseg.datasets import ImageMaskFolder, Scenes
from sptseg.model import DENSE_CLIP, fingerprint, load_clip, new_tiny_clip, save_tiny_clip
from sptseg.training import TrainConfig, fit
from sptseg.training.ablation import run_one
from sptseg.training.state import identity


def photographs(root: Path, masks: int, names: tuple[str, ...] = ("a", "b")) -> Path:
    for part, value in (("images", 100), ("masks", masks)):
        (root / part).mkdir(parents=True)
        for name in names:
            Image.fromarray(np.full((8, 8), value, np.uint8)).save(root / part / f"{name}.png")
    (root / "classes.txt").write_text("grass\nwater\n")
    return root


def test_folders_are_told_apart_by_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len({str(identity(Scenes(*each))) for each in ((3,), (4,), (3, 1), (3, 0, "training"))}) == 4
    one, other = photographs(tmp_path / "one", 0), photographs(tmp_path / "other", 1)
    copy = shutil.copytree(one, tmp_path / "elsewhere" / "one")
    monkeypatch.chdir(tmp_path)
    assert identity(ImageMaskFolder(one)) == identity(ImageMaskFolder(copy)) == identity(ImageMaskFolder("one"))
    assert identity(ImageMaskFolder(one)) != identity(ImageMaskFolder(other))
    composed, decomposed = (
        identity(ImageMaskFolder(photographs(tmp_path / form, 0, (unicodedata.normalize(form, "Bäume"),))))
        for form in ("NFC", "NFD")
    )
    assert composed == decomposed != identity(ImageMaskFolder(photographs(tmp_path / "Baume", 0, ("Baume",))))


def test_a_run_goes_on_with_its_clip_at_another_path_only(tmp_path: Path) -> None:
    model = toy_model()
    model.config = replace(model.config, clip_weights="/one/clip.pt")
    fit(model, Toys(), SPLIT, toy_config(save_every=2, iterations=4), output=tmp_path)
    model = toy_model()
    model.config = replace(model.config, clip_weights="clip.pt")
    fit(model, Toys(), SPLIT, toy_config(save_every=2, iterations=4), output=tmp_path, resume=True)
    model.clip.model.state_dict()["text_projection"].mul_(2)
    with pytest.raises(ValueError, match=r"trained with other settings of clip.fingerprint; resume"):
        fit(model, Toys(), SPLIT, toy_config(save_every=2, iterations=4), output=tmp_path, resume=True)


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
