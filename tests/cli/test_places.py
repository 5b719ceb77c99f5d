"""Places where nothing can be written are refused in one sentence before the work begins, whatever the command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import refused
from toys import data_folder

from sptseg.cli import Which, main
from sptseg.datasets import Data

COMMANDS = {
    "evaluate --json": "file", "train --output": "folder", "ablate --output": "folder", "demo --output": "folder",
    "data check {data} --json": "file", "data show {data} --out": "picture", "pretrain --output": "file",
    "segment {data}/images --classes a --out": "folder", "segment {data}/images/a.png --classes a --out": "picture",
    "import {data}/classes.txt --output": "model", "benchmark --json": "file", "notebooks run --output": "folder",
    "notebooks check --output": "folder",
}  # fmt: skip


class Begun(BaseException):
    """Raised by what would be the first work."""


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(*_: object, **__: object) -> None:
        raise Begun

    monkeypatch.setattr(Data, "load", begin)
    places = "cli.which.load_model cli.commands.import_research cli.demo.load_model cli.benchmark.machine"
    for place in f"{places} training.pretraining.new_tiny_clip interactive.notebooks.run_all".split():
        monkeypatch.setattr(f"sptseg.{place}", begin)
    monkeypatch.setattr(Which, "load", begin)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.usefixtures("no_work")
def test_places_are_tried_before_the_work(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = data_folder(tmp_path / "data", dict.fromkeys("ab", np.zeros((8, 8))))
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder.png").mkdir()
    words, kind = command.format(data=data).split(), COMMANDS[command]
    suffix = {"file": ".json", "picture": ".png", "folder": "", "model": ".safetensors"}[kind]
    wrong = {"folder": tmp_path / "file", "picture": tmp_path / "folder.png"}.get(kind, tmp_path / "data")
    said = refused(capsys, *words, wrong) if kind != "model" else refused(capsys, *words, tmp_path / "file")
    assert said.startswith(f"nothing can be written to {tmp_path}") and said.endswith("another place for the results")
    beyond = tmp_path / "file" / f"new{suffix}"
    assert f"nothing can be written to {beyond}" in refused(capsys, *words, beyond)
    with pytest.raises(Begun):
        main([*words, str(tmp_path / "new" / "place" / f"result{suffix}")])
    assert not (tmp_path / "new").exists() and (tmp_path / "file").read_text() == "kept"


def test_pictures_of_unknown_formats_are_refused_before_the_work(
    tmp_path: Path, no_work: None, capsys: pytest.CaptureFixture[str]
) -> None:
    data = data_folder(tmp_path / "data", dict.fromkeys("a", np.zeros((8, 8))))
    for command in (["data", "show", str(data)], ["segment", str(data / "images" / "a.png"), "--classes", "a"]):
        said = refused(capsys, *command, "--out", tmp_path / "a.xyz")
        assert said == f"{tmp_path}/a.xyz ends in .xyz, which is no picture that can be written; use .png, .jpg or .pdf"
