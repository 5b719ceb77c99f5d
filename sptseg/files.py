"""Files that are written whole or not at all, and values sealed with a checksum."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # plots write files too, without PyTorch
    import torch

SEAL = b"sptseg sha256 "  # begins a sealed file; the hexadecimal digest of what follows, and a line end, come next


def write(path: str | os.PathLike[str], content: bytes | str, *, keep: Path | None = None) -> Path:
    """Writes a file, texts in UTF-8: beside its place and through to the disk, then renamed. Makes its folder.

    A process killed at any moment leaves the old file or the new one. `keep`: what the old one is renamed to.
    Raises OSError with one sentence, the old file in place and nothing beside it, where the disk is full or refuses.
    """
    path, data = Path(path), content.encode() if isinstance(content, str) else content
    part: Path | None = None
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # a device or a pipe: nothing to replace
            path.write_bytes(data)
            return path
        place = path.resolve()  # a link stays a link
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_name(f".{place.name[:200]}.part")
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and place.is_file():
            place.replace(keep)
        part.replace(place)
        sync_folder(place.parent)
    except OSError as error:
        raise OSError(f"{path} could not be written ({error.strerror or error}); make room, or name another") from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
    return path


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder outlast a power cut, where the system lets one open folders."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
