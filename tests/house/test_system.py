"""What is asked of the operating system: places for results, one voice of many processes, room to read ahead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import small_clip
from toys import SPLIT, Toys, toy_config

from sptseg import DENSE_CLIP, build_model, system
from sptseg.cli import main
from sptseg.inference import windows
from sptseg.model import ModelConfig
from sptseg.training import fit


def test_places_are_tried_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for place, folder in ((tmp_path, False), (tmp_path / "file", True), (tmp_path / "file" / "x", False)):
        with pytest.raises(OSError, match=r"nothing can be written to .*; name another place for the results"):
            system.output_place(place, folder=folder)
    assert system.output_place(tmp_path / "new" / "x.json") == tmp_path / "new" / "x.json"
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is left there"
    for command in (
        ["evaluate", "--images", "1", "--json", str(tmp_path)],
        ["train", "--output", str(tmp_path / "file")],
        ["ablate", "--output", str(tmp_path / "file")],
        ["pretrain", "--output", str(tmp_path / "file" / "clip.safetensors")],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(command)
        assert stopped.value.code == 2 and "nothing can be written to" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_speak_and_write_once(tmp_path: Path) -> None:
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "sptseg.cli", "evaluate"]
    options = ["--model", "dense-clip", "--images", "3", "--json", "scores.json", "--workers", "0"]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, "-m", *command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("hIoU") == 1 and json.loads((tmp_path / "scores.json").read_text())["hiou"] > 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]


def test_without_shared_memory_pictures_are_read_in_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = system.shutil.disk_usage(tmp_path)
    for free, workers in ((64 * 2**20, 0), (2**31, 3)):
        monkeypatch.setattr(system.shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        if workers:
            assert system.usable_workers(3, str(tmp_path)) == 3
        else:
            with pytest.warns(UserWarning, match=r"has 64 MiB free, too few for 3 workers: .* docker run --shm-size"):
                assert system.usable_workers(3, str(tmp_path)) == 0
    assert system.usable_workers(3, str(tmp_path / "no such folder")) == 3


def test_prompts_without_a_decoder_train_in_half_precision() -> None:
    """Where 1 - 1e-6 is 1: the probabilities' logits stay finite."""
    config = ModelConfig(clip="small", image_size=(32, 32), prompt_tokens=2, decoder="none", dropout=0.0)
    model = build_model(config, small_clip())
    rows = fit(model, Toys(), SPLIT, toy_config(iterations=2, precision="bf16")).history
    assert all(torch.tensor(row["total"]).isfinite() for row in rows)
    half = windows.at_precision(build_model(DENSE_CLIP), "bf16")
    assert half(torch.zeros(1, 3, 32, 32), half.class_embeddings(["tree", "boat"])).isfinite().all()
