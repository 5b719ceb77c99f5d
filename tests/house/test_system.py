"""Files whole or not at all, wherever a write breaks off; places for results tried first; ended helpers are named."""

import errno
import os
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from sptseg.system import output_place, write

linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux's folders of the kernel")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("stage", ["os.fsync", "Path.replace", "Path.open"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_a_write_that_breaks_off_leaves_the_old_file_and_nothing_else(
    stage: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a" / "scores.json", "old")
    (path.parent / ".scores.json.part").write_bytes(b"of a killed process")
    monkeypatch.setattr(f"sptseg.system.{stage}", Mock(side_effect=error))
    with pytest.raises(type(error)) as raised:
        write(path, "new" * 1000)
    monkeypatch.undo()
    assert path.read_text() == "old" and names(path.parent) == {"scores.json"}
    if isinstance(error, OSError):
        said = f"{path} could not be written (No space left on device); make room, or name another"
        assert str(raised.value) == said


def test_links_and_devices_stay_what_they_are(tmp_path: Path) -> None:
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    link.symlink_to(target)
    write(output_place(link), "through")
    assert link.is_symlink() and target.read_text() == "through"
    write(output_place("/dev/null"), "gone")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(OSError, match="/dev/full could not be written .No space left on device."):
        write("/dev/full", "gone")
    with pytest.raises(OSError, match="could not be written .Is a directory."):
        write(tmp_path, "gone")


def test_processes_that_write_one_file_share_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each renames its own; the part of the main process, which alone tries the place, has the name that the next run
    cleans up."""
    parts = []
    monkeypatch.setattr("sptseg.system.os.fsync", lambda _: parts.extend(names(tmp_path) - {"a"}))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        write(tmp_path / "a", rank)
    assert [part for part in parts if part.endswith("part")] == [".a.part", ".a.1.part"]
    assert names(tmp_path) == {"a"}
    monkeypatch.setattr("sptseg.system.tempfile.TemporaryFile", Mock(side_effect=AssertionError()))
    output_place(tmp_path / "new" / "a.json")


def test_a_place_where_results_can_go_stays_as_it_is(tmp_path: Path) -> None:
    """What a run that never begins would leave behind."""
    (tmp_path / "old.json").write_text("kept until it is replaced")
    for place, folder in (("new/folder/a.json", False), ("new/other", True), ("old.json", False), (".", True)):
        assert output_place(tmp_path / place, folder=folder) == tmp_path / place
    assert names(tmp_path) == {"old.json"} and (tmp_path / "old.json").read_text() == "kept until it is replaced"


@pytest.mark.parametrize(
    ("place", "folder", "said"),
    [
        ("folder", False, "it is a folder, wanted a file"), ("file", True, "it is a file, wanted a folder"),
        ("file/new", True, "Not a directory|File exists"), ("x" * 300, False, "File name too long"),
        pytest.param("/proc/a/b", True, "No such file", marks=linux),
    ],
)  # fmt: skip
def test_a_place_where_nothing_can_be_written_is_refused(place: str, folder: bool, said: str, tmp_path: Path) -> None:
    """Folders of the kernel's refuse root too."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    path = tmp_path / place
    with pytest.raises(OSError, match=rf"^nothing can be written to \S+ \(({said})[^\n]*\); name another place"):
        output_place(path, folder=folder)
    assert names(tmp_path) == {"folder", "file"}
