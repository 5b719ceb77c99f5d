"""A printed next command can be pasted into a shell, whatever the paths in it are."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sptseg import scenes
from sptseg.cli.commands import main
from sptseg.model import new_tiny_clip, save_tiny_clip

STEPS = "--decoder-layers 1 --image-size 32 32 --train.iterations 1 --train.batch-size 1 --train.workers 0".split()


def test_the_commands_that_train_and_segment_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    odd = Path("it's a $HOME & more")
    odd.mkdir()
    torch.manual_seed(0)
    save_tiny_clip(new_tiny_clip(scenes.WORDS), odd / "clip.safetensors")
    for seed in range(2):
        for part, array in zip(("images", "masks"), scenes.draw(seed, 32), strict=True):
            (odd / "data" / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.uint8(array % 2 if part == "masks" else array)).save(odd / "data" / part / f"{seed}.png")
    (odd / "data" / "classes.txt").write_text("grass\nwater\n")
    (odd / "data" / "unseen.txt").write_text("water\n")
    own = ["--clip", "tiny", "--clip-weights", f"{odd}/clip.safetensors"]
    main(["train", "--output", f"{odd}/run", "--data", f"{odd}/data", *own, *STEPS])
    _, _, command = capsys.readouterr().out.partition("score it: ")
    assert shlex.split(command)[:2] == ["sptseg", "evaluate"]
    main([*shlex.split(command)[1:], "--workers", "0"])
    assert "hIoU" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["segment", f"{odd}/data/images", "--classes", "grass,water", "--out", f"{odd}/out.png"])
    suggested = shlex.split(capsys.readouterr().err.partition("such as ")[2])
    assert suggested == ["--out", f"{odd}/out"]
    main(["segment", f"{odd}/data/images", "--classes", "grass,water", *suggested])
    assert (odd / "out" / "areas.csv").is_file()
