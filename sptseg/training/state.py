"""The state of a training run: all that `fit` needs to go on with the same bits after a kill."""

import contextlib
import hashlib
import io
import json
import signal
import threading
import unicodedata
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from sptseg.checkpoints import completed
from sptseg.datasets import Sample
from sptseg.system import bytes_of, write

STATE = "state.pt"
HALFWAY = "halfway.safetensors"  # the inductive checkpoint from which transductive training goes on
MAY_CHANGE_ON_RESUME = ("workers", "progress", "save_every", "validate_every", "validation_images", "tensorboard")
SEAL = b"sptseg sha256 "  # the first line of states that an earlier version wrote; the same content follows


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings, such as "train.seed", in which an earlier run differs from one of now.

    What the model's settings and the data's identity had not yet when that ran is no difference; nor is where CLIP's
    weights lie, as the fingerprint tells them."""
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
    write(path, bytes_of(partial(torch.save, state)))


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `write_tensors` wrote. Nothing in it is executed."""
    content = path.read_bytes()
    if content.startswith(SEAL):
        content = content.partition(b"\n")[2]
    try:
        state = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
        return {**state, "model": state["model"], "optimizer": state["optimizer"]}
    except Exception as error:  # there is no list of what torch may raise at a file
        said = f"{path} cannot be read: it is damaged, or no state of a run; delete it to begin anew"
        raise ValueError(said) from error


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
