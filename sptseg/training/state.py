"""The state of a training run: all that `fit` needs to go on with the same bits after a kill."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import signal
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from sptseg.checkpoints import completed
from sptseg.datasets import Sample
from sptseg.model import SptSeg, fingerprint

if TYPE_CHECKING:  # plots write files too, without PyTorch
    import torch
from sptseg.system import write

History = list[dict[str, Any]]
Settings = dict[str, dict[str, Any]]
STATE, PREVIOUS, DAMAGED = "state.pt", "state.previous.pt", "state.damaged.pt"
HALFWAY = "halfway.safetensors"  # the inductive checkpoint from which transductive training goes on
FREE = {"workers", "progress", "save_every", "validate_every", "validation_images", "tensorboard", "skip_unreadable"}


@dataclass
class Progress:
    """How far a run has come: iterations done, their history, and what was said of each unreadable picture left out."""

    iteration: int = 0
    history: History = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def save_state(
    folder: Path,
    model: SptSeg,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    progress: Progress,
    settings: Settings,
) -> None:
    """Writes `state.pt`, whole or not at all; the one before becomes `state.previous.pt`.

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
        "left_out": progress.left_out,
    }
    write_sealed(folder / STATE, content, keep=folder / PREVIOUS)


def load_state(
    folder: Path,
    model: SptSeg,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    settings: Settings,
) -> Progress:
    """Puts the last good state into model and optimiser; without any, the run begins.

    A damaged `state.pt` is renamed to `state.damaged.pt`, and the previous one counts; the log says so. Raises
    ValueError if no state can be read though there is one, or if it was trained with other settings.
    """
    state, path = last_state(folder, model.device)
    if state is None:
        return Progress()
    before = json.loads(state["settings"])
    before["model"] = completed(before["model"])
    settings = {**settings, "clip": {"fingerprint": fingerprint(model.clip, like=before["clip"]["fingerprint"])}}
    changed = [
        f"{part}.{name}"
        for part, values in json.loads(json.dumps(settings)).items()
        for name, value in values.items()
        if not (part == "train" and name in FREE)
        and name != "clip_weights"  # wherever the file lies: the fingerprint tells the weights
        and not (part == "data" and name not in before[part])  # younger than the state
        and before[part].get(name) != value
    ]
    if changed:
        raise ValueError(
            f"{path} was trained with other settings of {', '.join(changed)}; "
            f"resume with the same, or choose another output"
        )
    model.load_state_dict(state["model"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    if scaler is not None:
        scaler.load_state_dict(state["scaler"])
    return Progress(state["iteration"], json.loads(state["history"]), state["left_out"])


def last_state(folder: Path, device: torch.device) -> tuple[dict[str, Any] | None, Path]:
    """The newest readable state in a folder, and its path; None if there is none at all."""
    damage = ""
    for path in (folder / STATE, folder / PREVIOUS):
        try:
            state = read_sealed(path, device)
        except FileNotFoundError:
            continue
        except ValueError as error:
            damage = str(error)
            continue
        if damage:
            with contextlib.suppress(FileNotFoundError):  # another process was first
                (folder / STATE).replace(folder / DAMAGED)  # else the next save would put it in the good one's place
            logging.getLogger("sptseg").warning(f"{damage}; going on from {path}")
        return state, path
    if damage:
        raise ValueError(f"{damage}, and there is no good state before it in {folder}; start anew without resume")
    return None, folder / STATE


def identity(dataset: Dataset[Sample]) -> dict[str, Any]:
    """What tells a data set from others: how many pictures, hashes of their names, in whatever Unicode form these are,
    and of mapped values, and of some pictures' and masks' files; not where they lie."""
    told = [*getattr(dataset, "names", ()), *getattr(dataset, "mapped", ())]
    names = unicodedata.normalize("NFC", "\n".join(told))
    files, content = getattr(dataset, "_files", ()), hashlib.sha256()
    for pair in files[:: max(1, len(files) // 16)]:
        for path in pair:
            with path.open("rb") as file:
                content.update(f"{path.stat().st_size}".encode() + file.read(1 << 16))
    digests = {"names": hashlib.sha256(names.encode()).hexdigest()[:16], "content": content.hexdigest()[:16]}
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


def agreed(accelerator: Accelerator, noted: Sequence[int]) -> int:
    """The highest signal that any process noted, in all processes alike; 0 for none."""
    if accelerator.num_processes == 1:
        return max(noted, default=0)
    every: Any = accelerator.gather(torch.tensor([max(noted, default=0)], device=accelerator.device))
    return int(every.max())


SEAL = b"sptseg sha256 "  # begins a sealed file; the hexadecimal digest of what follows, and a line end, come next


def write_sealed(path: Path, value: Any, *, keep: Path | None = None) -> None:
    """Writes tensors, numbers and texts, nested in lists and dictionaries, with a checksum; see `write`."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    payload = buffer.getvalue()
    write(path, SEAL + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload, keep=keep)


def read_sealed(path: Path, device: torch.device | str = "cpu") -> Any:
    """What `write_sealed` wrote; ValueError if one bit of it is another. Nothing in it is executed."""
    import torch

    head, _, payload = path.read_bytes().partition(b"\n")
    if head != SEAL + hashlib.sha256(payload).hexdigest().encode():
        raise ValueError(f"{path} is damaged, cut off or of another version: its checksum is wrong")
    return torch.load(io.BytesIO(payload), map_location=device, weights_only=True)
