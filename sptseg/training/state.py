"""The state of a training run: all that `fit` needs to go on with the same bits after a kill."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import signal
import threading
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from sptseg.checkpoints import completed
from sptseg.datasets import Sample
from sptseg.model import SptSeg, fingerprint
from sptseg.system import write

History = list[dict[str, Any]]
Settings = dict[str, dict[str, Any]]
Optimizer = torch.optim.Optimizer
Scaler = torch.amp.GradScaler | None
STATE = "state.pt"
HALFWAY = "halfway.safetensors"  # the inductive checkpoint from which transductive training goes on
MAY_CHANGE_ON_RESUME = ("workers", "progress", "save_every", "validate_every", "validation_images", "tensorboard")
SEAL = b"sptseg sha256 "  # the first line of states that an earlier version wrote; the same content follows


@dataclass
class Progress:
    """How far a run has come: iterations done, and their history."""

    iteration: int = 0
    history: History = field(default_factory=list)


def save_state(
    folder: Path, model: SptSeg, optimizer: Optimizer, scaler: Scaler, progress: Progress, settings: Settings
) -> None:
    """Writes `state.pt`, whole or not at all.

    Raises FloatingPointError, and writes nothing, if a weight is not a number: the last state stays a good one.
    """
    state = model.trained_state()
    broken = [name for name, value in state.items() if not value.isfinite().all()]
    if broken:
        raise FloatingPointError(
            f"weights are no numbers after iteration {progress.iteration}: {', '.join(broken[:3])}"
        )
    content = {
        "iteration": progress.iteration,
        "settings": json.dumps(settings),
        "model": state,
        "optimizer": optimizer.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "history": json.dumps(progress.history),
    }
    write_tensors(folder / STATE, content)


def load_state(folder: Path, model: SptSeg, optimizer: Optimizer, scaler: Scaler, settings: Settings) -> Progress:
    """Puts the folder's state into model and optimiser; without any, the run begins.

    Raises ValueError if the state cannot be read, or if it was trained with other settings.
    """
    path = folder / STATE
    if not path.is_file():
        return Progress()
    state = read_tensors(path, model.device)
    before = json.loads(state["settings"])
    settings = {**settings, "clip": {"fingerprint": fingerprint(model.clip, like=before["clip"]["fingerprint"])}}
    free = {f"train.{name}" for name in MAY_CHANGE_ON_RESUME}
    if changed := [name for name in differing(before, settings) if name not in free]:
        raise ValueError(
            f"{path} was trained with other settings of {', '.join(changed)}; "
            f"resume with the same, or choose another output"
        )
    model.load_state_dict(state["model"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    if scaler is not None:
        scaler.load_state_dict(state["scaler"])
    return Progress(state["iteration"], json.loads(state["history"]))


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings, such as "train.seed", in which an earlier run differs from one of now.

    What the model's settings and the data's identity had not yet when that ran is no difference; nor is where CLIP's
    weights lie, as the fingerprint tells them.
    """
    before, found = {**before, "model": completed(before["model"])}, []
    for part, values in json.loads(json.dumps(now)).items():
        old = before.get(part)
        if isinstance(old, dict) and isinstance(values, dict):
            old = {**(values if part in ("data", "validation") else {}), **old}
            changed = [name for name, value in values.items() if old.get(name) != value and name != "clip_weights"]
            found += [f"{part}.{name}" for name in changed]
        elif old != values:
            found.append(part)
    return found


def write_tensors(path: Path, state: dict[str, Any]) -> None:
    """Writes a state of tensors, numbers and texts, nested in lists and dictionaries, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write(path, buffer.getvalue())


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `write_tensors` wrote. Nothing in it is executed."""
    content = path.read_bytes()
    if content.startswith(SEAL):
        content = content.partition(b"\n")[2]
    try:
        state = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
        return {**state, "model": state["model"], "optimizer": state["optimizer"]}
    except Exception as error:  # there is no list of what torch may raise at a file
        raise ValueError(
            f"{path} cannot be read: it is damaged, or no state of a run; delete it to begin anew"
        ) from error


def identity(dataset: Dataset[Sample]) -> dict[str, Any]:
    """What tells a data set from others: how many pictures, hashes of their names, in whatever Unicode form these are,
    and of mapped values, and of some pictures' and masks' files; not where they lie."""
    names = "\n".join([*getattr(dataset, "names", ()), *getattr(dataset, "mapped", ())])
    told = hashlib.sha256(unicodedata.normalize("NFC", names).encode(errors="surrogateescape"))
    files, content = getattr(dataset, "_files", ()), hashlib.sha256()
    for pair in files[:: max(1, len(files) // 16)]:
        for path in pair:
            with path.open("rb") as file:
                content.update(f"{path.stat().st_size}".encode() + file.read(1 << 16))
    digests = {"names": told.hexdigest()[:16], "content": content.hexdigest()[:16]}
    return {"pictures": len(dataset), **digests}  # pyright: ignore[reportArgumentType]


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Within, SIGTERM and a first SIGINT only enter the list; in the main thread, as Python tells no other of them."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def note(number: int, _frame: object) -> None:
        if number == signal.SIGINT and number in noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def agreed_signal(accelerator: Accelerator, noted: Sequence[int]) -> int:
    """The highest signal that any process noted, in all processes alike; 0 for none."""
    if accelerator.num_processes == 1:
        return max(noted, default=0)
    every: Any = accelerator.gather(torch.tensor([max(noted, default=0)], device=accelerator.device))
    return int(every.max())
