"""What is asked of the operating system: files written whole or not at all, the cores that may be used."""

from __future__ import annotations

import os
from pathlib import Path


def write(path: str | os.PathLike[str], content: bytes | str, *, keep: Path | None = None) -> Path:
    """Writes a file, texts in UTF-8: beside its place and through to the disk, then renamed. Makes its folder.

    A process killed at any moment leaves the old file or the new one. `keep`: what the old one is renamed to.
    Raises OSError with one sentence, the old file in place and nothing beside it, where the disk is full or refuses.
    """
    path, data = Path(path), content.encode(errors="backslashreplace") if isinstance(content, str) else content
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


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
