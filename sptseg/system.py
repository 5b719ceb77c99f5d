"""What is asked of the operating system: files written whole or not at all, other processes, the cores to be used."""

import io
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path


def output_place(path: str | os.PathLike[str], *, folder: bool = False) -> Path:
    """The file (or the folder) that results will go to, tried before the work for them begins (of several processes by
    the main one); leaves nothing there. Raises OSError with one sentence if nothing can be written there."""
    path = Path(path)
    try:
        if (is_device(path) and not folder) or not is_main_process():
            return path
        if folder != path.is_dir() and path.exists():
            raise OSError(f"it is a {'file' if folder else 'folder'}, wanted a {'folder' if folder else 'file'}")
        place = Path(os.path.realpath(path))
        place = place if folder else place.parent
        while not place.exists():
            place = place.parent
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        said = error.strerror or str(error)
        raise OSError(f"nothing can be written to {path} ({said}); name another place for the results") from error
    return path


def is_device(path: Path) -> bool:
    """Whether a path is there and neither file nor folder, such as a pipe: nothing to replace."""
    return path.exists() and not path.is_file() and not path.is_dir()


def write(path: str | os.PathLike[str], content: bytes | str) -> Path:
    """Writes a file, texts in UTF-8: beside its place and through to the disk, then renamed. Makes its folder. A
    process killed at any moment leaves the old file or the new one; OSError, in one sentence, leaves the old one."""
    path, data = Path(path), content.encode(errors="backslashreplace") if isinstance(content, str) else content
    part: Path | None = None
    try:
        if is_device(path):
            path.write_bytes(data)
            return path
        place = Path(os.path.realpath(path))  # a link stays a link; of a circle `resolve` raises RuntimeError
        place.parent.mkdir(parents=True, exist_ok=True)
        rank = "" if is_main_process() else f".{os.environ['RANK']}"  # each its own, should several write
        part = place.with_name(f".{place.name[:200]}{rank}.part")
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(place)
    except OSError as error:
        raise OSError(f"{path} could not be written ({error.strerror or error}); make room, or name another") from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
    return path


def bytes_of(save: Callable[[io.BytesIO], object]) -> bytes:
    """What a function writes into the file that it is given."""
    save(buffer := io.BytesIO())
    return buffer.getvalue()


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes() -> int:
    """Of how many processes this one is, as torchrun and accelerate launch start them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return processes() == 1 or os.environ.get("RANK", "0") == "0"


@contextmanager
def one_voice() -> Iterator[None]:
    """Of several processes the main one speaks, and another of its failure only if that has not ended the main one too:
    a launcher ends all as soon as one has failed, so those whose failure may follow from another's wait a bit."""
    main, said = is_main_process(), io.StringIO()
    try:
        if main:
            yield
        else:
            with redirect_stdout(io.StringIO()), redirect_stderr(said):
                yield
    except (Exception, SystemExit) as error:
        failed = error.code in (1, 2) and not main if isinstance(error, SystemExit) else processes() > 1
        if failed:
            time.sleep(3 if main else 10)
            print(said.getvalue(), end="", file=sys.stderr)
        raise


@contextmanager
def ended_helpers(remedy: str) -> Iterator[None]:
    """Raises OSError with one sentence where the system ended a process that works for this one."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, BrokenExecutor) and not str(error).startswith("DataLoader worker"):
            raise
        guard = "; and a script that starts processes needs its main guard, if __name__ == '__main__':"
        remedy += "" if multiprocessing.get_start_method() == "fork" else guard
        said = " ".join(str(error).split())
        raise OSError(f"a helping process ended before its time, as when memory runs out ({said}); {remedy}") from error
