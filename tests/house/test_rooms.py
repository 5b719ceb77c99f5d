"""The shape of the package: rooms that import downward only, past nobody's face, in short modules."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "sptseg"
ROOMS = {  # room: the rooms that it may import
    "model": "",
    "scenes": "",
    "datasets": "scenes",
    "inference": "model datasets",
    "checkpoints": "model inference",
    "analysis": "model datasets inference",
    "training": "model scenes datasets inference checkpoints",
    "interactive": "model scenes datasets inference checkpoints analysis",
    "cli": "model scenes datasets inference checkpoints analysis training interactive",
}
GROUND = "system"  # a module, not a room: everybody may import it
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def imported(source: str) -> Iterator[str]:
    """The dotted names that are imported from sptseg, wherever in the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "sptseg")
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield "." * node.level + (node.module or "")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sptseg":
            top = node.module == "sptseg"
            yield from {f"sptseg.{alias.name}" if top else f"{node.module}" for alias in node.names}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_downward_and_past_no_face(room: str) -> None:
    allowed = {GROUND, *ROOMS[room].split()}
    for path in (PACKAGE / room).glob("*.py"):
        for name in imported(path.read_text()):
            parts = name.split(".")
            assert name[0] != ".", f"{room}/{path.name} imports {name}: write the name out"
            assert parts[1] == room or (parts[1] in allowed and len(parts) == 2), f"{room}/{path.name} imports {name}"


def test_the_rooms_are_all_there_is() -> None:
    entries = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert entries == {*ROOMS, f"{GROUND}.py", "__init__.py", "py.typed"}
    order = TopologicalSorter({room: below.split() for room, below in ROOMS.items()}).static_order()
    assert set(order) == set(ROOMS)


def test_a_module_is_read_in_one_sitting() -> None:
    lines = {path: len((PACKAGE / path).read_text().splitlines()) for path in MODULES}
    assert {path: count for path, count in lines.items() if count > 400} == {}


def test_the_command_line_needs_none_of_the_optional_parts() -> None:
    extras = "IPython ipywidgets nbformat papermill skimage tensorboard voila".split()
    hidden = f"import sys; sys.modules.update(dict.fromkeys({extras})); import sptseg.cli"
    subprocess.run([sys.executable, "-c", hidden], check=True)


def test_the_picture_in_the_readme_is_true() -> None:
    """Its arrows are imports that exist; followed downward, they lead to all that a room may import, and to no more."""
    readme = (PACKAGE.parent / "README.md").read_text()
    arrows = re.findall(r"^    (\w+) --> (\w+)$", readme, re.MULTILINE)
    below: dict[str, set[str]] = {room: set() for room in ROOMS}
    for room, other in reversed(arrows):
        below[room] |= {other} | below[other]
        names = {name.split(".")[1] for path in (PACKAGE / room).glob("*.py") for name in imported(path.read_text())}
        assert other in names, f"{room} imports nothing of {other}"
    assert all(set(ROOMS[room].split()) <= below[room] for room in ROOMS)
    for room in ROOMS:
        promise = (PACKAGE / room / "__init__.py").read_text().splitlines()[0].strip('"')
        assert f"| `{room}/` | {promise} |" in readme
