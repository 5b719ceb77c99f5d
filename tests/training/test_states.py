"""Files whole or not at all, wherever a write breaks off; the last good state is found, a damaged one is named."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import SPLIT, Toys, toy_config, toy_model

from sptseg import system as files
from sptseg.model import fingerprint
from sptseg.system import write
from sptseg.training import state as states
from sptseg.training.loop import fit
from sptseg.training.state import read_sealed, write_sealed

FOUND = {"state.pt", "state.previous.pt", "config.json", "history.json", "model.safetensors", "halfway.safetensors"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def fails_with(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


# One file

STAGES = ["system.os.fsync", "system.Path.replace", "system.Path.open"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_a_write_that_breaks_off_leaves_the_old_file_and_nothing_else(
    stage: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a" / "scores.json", "old")
    monkeypatch.setattr(f"sptseg.{stage}", fails_with(error))
    with pytest.raises(type(error)) as raised:
        write(path, "new" * 1000)
    monkeypatch.undo()
    assert path.read_text() == "old" and names(path.parent) == {"scores.json"}
    if isinstance(error, OSError):
        assert str(raised.value) == (
            f"{path} could not be written (No space left on device); make room, or name another"
        )


def test_a_write_that_the_system_ends_leaves_the_old_file(tmp_path: Path) -> None:
    """A real limit: no file may be longer than 64 KiB."""
    path = write(tmp_path / "scores.json", "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(OSError, match="scores.json could not be written .File too large.; make room"):
            write(path, b"x" * (1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "old" and names(tmp_path) == {"scores.json"}


def test_a_killed_write_is_repaired_by_the_next(tmp_path: Path) -> None:
    (tmp_path / ".scores.json.part").write_bytes(b"half")
    assert write(tmp_path / "scores.json", "ä\n").read_bytes() == b"\xc3\xa4\n"
    assert names(tmp_path) == {"scores.json"}


def test_links_and_devices_stay_what_they_are(tmp_path: Path) -> None:
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    link.symlink_to(target)
    write(link, "through")
    assert link.is_symlink() and target.read_text() == "through"
    write("/dev/null", "gone")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(OSError, match="/dev/full could not be written .No space left on device."):
        write("/dev/full", "gone")
    with pytest.raises(OSError, match="could not be written .Is a directory."):
        write(tmp_path, "gone")
    with pytest.raises(OSError, match="target.json.x could not be written .File exists."):
        write(target / "x", "a file is no folder")


def test_the_old_file_is_kept_under_another_name(tmp_path: Path) -> None:
    for content in ("one", "two", "three"):
        write(tmp_path / "a", content, keep=tmp_path / "b")
    assert (tmp_path / "a").read_text() == "three" and (tmp_path / "b").read_text() == "two"


def test_every_changed_byte_of_a_sealed_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "sealed"
    write_sealed(path, {"x": torch.arange(3), "text": "ä"})
    value, content = read_sealed(path), path.read_bytes()
    assert value["text"] == "ä" and value["x"].tolist() == [0, 1, 2]
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(ValueError, match="sealed is damaged, cut off or of another version"):
            read_sealed(path)
    for length in (0, 5, 40, 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="sealed is damaged, cut off or of another version"):
            read_sealed(path)


def test_a_sealed_file_executes_nothing(tmp_path: Path) -> None:
    class Intruder:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(tmp_path / "intruded"),))

    write_sealed(tmp_path / "sealed", Intruder())
    with pytest.raises(Exception, match="Weights only load failed"):
        read_sealed(tmp_path / "sealed")
    assert not (tmp_path / "intruded").exists()


# States


def run(folder: Path | None, resume: bool = False, **changes: Any) -> dict[str, torch.Tensor]:
    config = toy_config(iterations=6, save_every=2, **changes)
    return fit(toy_model(dropout=0.1), Toys(), SPLIT, config, output=folder, resume=resume).model.trained_state()


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, torch.Tensor]:
    return run(None)


def stopped_after(iterations: int, folder: Path) -> None:
    """A run killed after so many iterations: exceptions stand for signals."""

    class Killed(Toys):
        def __getitem__(self, index: int) -> Any:
            if len(self.read) == 4 * iterations:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        fit(toy_model(dropout=0.1), Killed(), SPLIT, toy_config(iterations=6, save_every=2), output=folder)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "one bit": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "another file": lambda path: path.write_text("a text"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_named_and_the_one_before_goes_on_with_the_same_bits(
    damage: str, tmp_path: Path, undisturbed: dict, caplog: pytest.LogCaptureFixture
) -> None:
    stopped_after(5, tmp_path)
    assert [read_sealed(tmp_path / name)["iteration"] for name in (states.STATE, states.PREVIOUS)] == [4, 2]
    DAMAGE[damage](tmp_path / states.STATE)
    with caplog.at_level(logging.WARNING, "sptseg"):
        assert equal(run(tmp_path, resume=True), undisturbed)
    assert f"{tmp_path / 'state.pt'} is damaged, cut off or of another version" in caplog.text
    assert f"going on from {tmp_path / 'state.previous.pt'}" in caplog.text
    assert names(tmp_path) == FOUND | {"state.damaged.pt"}
    assert [read_sealed(tmp_path / name)["iteration"] for name in (states.STATE, states.PREVIOUS)] == [6, 4]


def test_a_kill_between_the_renames_leaves_the_one_before(tmp_path: Path, undisturbed: dict) -> None:
    stopped_after(5, tmp_path)
    (tmp_path / states.STATE).unlink()
    assert equal(run(tmp_path, resume=True), undisturbed)


def test_two_damaged_states_are_one_sentence(tmp_path: Path) -> None:
    stopped_after(5, tmp_path)
    for name in (states.STATE, states.PREVIOUS):
        (tmp_path / name).write_text("a text")
    with pytest.raises(ValueError, match=r"state.previous.pt is damaged.* no good state before it .* start anew"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_stops_the_run_and_the_last_state_goes_on(
    stage: str, tmp_path: Path, undisturbed: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up while the state of iteration 4 is written, at each stage of the write."""
    real = states.write_sealed

    def on_a_full_disk(path: Path, value: dict, **options: Any) -> None:
        if value["iteration"] == 4:
            monkeypatch.setattr(f"sptseg.{stage}", fails_with(OSError(errno.ENOSPC, "No space left on device")))
        real(path, value, **options)

    monkeypatch.setattr(states, "write_sealed", on_a_full_disk)
    with pytest.raises(OSError, match="state.pt could not be written .No space left on device.; make room"):
        run(tmp_path)
    monkeypatch.undo()
    assert not any(name.endswith(".part") for name in names(tmp_path))
    assert read_sealed(tmp_path / states.STATE)["iteration"] == 2
    assert equal(run(tmp_path, resume=True), undisturbed)


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
    state = read_sealed(tmp_path / states.STATE)
    assert state["iteration"] == 2 and all(value.isfinite().all() for value in state["model"].values())


def test_the_scaler_of_half_precision_goes_along(tmp_path: Path) -> None:
    model, folder = toy_model(), tmp_path
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))  # it begins with the first loss
    settings = {"train": {"precision": "fp16"}, "model": asdict(model.config)}
    settings["clip"] = {"fingerprint": fingerprint(model.clip)}
    states.save_state(folder, model, optimizer, scaler, states.Progress(3, [{"x": 1}], ["a"]), settings)
    new = torch.amp.GradScaler("cpu", init_scale=2.0)
    progress = states.load_state(folder, toy_model(), optimizer, new, settings)
    assert new.get_scale() == 1024.0
    assert progress == states.Progress(3, [{"x": 1}], ["a"])


def test_what_is_written_beside_is_whole_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.json, history.json and the model go through the same door."""
    written = []
    original = files.write
    for module in ("training.loop", "checkpoints.checkpoint", "training.state"):
        monkeypatch.setattr(
            f"sptseg.{module}.write", lambda path, *a, **o: written.append(Path(path).name) or original(path, *a, **o)
        )
    run(tmp_path)
    assert set(written) == names(tmp_path) - {states.PREVIOUS} == FOUND - {states.PREVIOUS}
    assert json.loads((tmp_path / "config.json").read_text())["train"]["iterations"] == 6
