"""What installs the package says the same everywhere; rooms import downward only; links of the book lead somewhere."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from graphlib import TopologicalSorter
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sptseg"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def ranges_of(lines: list[str]) -> dict[str, SpecifierSet]:
    """Package names and ranges, with the package's own extras unfolded."""
    ranges: dict[str, SpecifierSet] = {}
    for requirement in map(Requirement, lines):
        assert not requirement.url and not requirement.marker, f"{requirement}: a name and a range only"
        if requirement.name == PROJECT["name"]:
            for extra in requirement.extras:
                ranges |= ranges_of(PROJECT["optional-dependencies"][extra])
        else:
            ranges[canonicalize_name(requirement.name)] = requirement.specifier
    return ranges


EVERYTHING = ranges_of([*PROJECT["dependencies"], "sptseg[all]"])


def test_environment_holds_the_same_packages_and_ranges() -> None:
    extras = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    assert ranges_of([*PROJECT["dependencies"], *extras]) == EVERYTHING, "all means every extra"
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment.keys() == {"name", "channels", "dependencies"} and environment["channels"] == ["conda-forge"]
    *conda, block = environment["dependencies"]
    assert [Requirement(entry).name for entry in conda] == ["python", "pip"], "pip does nothing unless conda has it"
    assert set(SpecifierSet(PROJECT["requires-python"])) <= set(Requirement(conda[0]).specifier)
    options = [line for line in block["pip"] if line.startswith("-")]
    packages = [line for line in block["pip"] if not line.startswith("-")]
    assert len(ranges_of(packages)) == len(packages) and ranges_of(packages) == EVERYTHING, "each package once"
    assert options[0] == "-c constraints.txt" and (ROOT / "constraints.txt").is_file()
    assert len(options) == 2 and options[1].startswith("-e .["), "sptseg itself comes last, from this folder"
    assert set(options[1][5:].rstrip("]").split(",")) <= set(PROJECT["optional-dependencies"])


def test_constraints_are_names_and_versions_that_every_range_admits() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {name: version for name, _, version in (line.partition("==") for line in lines)}
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines), "names and versions only"
    assert list(pins) == sorted(pins) and len(pins) == len(lines)
    for name, allowed in EVERYTHING.items():
        assert name in pins, f"{name} has no tested version"
        assert pins[name] in allowed, f"{name} {pins[name]} is outside {allowed}"


def test_no_address_decides_where_packages_come_from() -> None:
    for file in ("constraints.txt", "environment.yml", "pyproject.toml", "Makefile"):
        text = (ROOT / file).read_text().replace("https://arxiv.org/abs/2312.12754", "")
        assert not re.search(r"https?\b|://|index-url|find-links|trusted-host", text), file


def test_readme_names_extras_that_exist_and_there_is_one_version() -> None:
    named = re.findall(r"(?:\.|sptseg)\[([a-z,]+)\]", (ROOT / "README.md").read_text())
    assert {extra for group in named for extra in group.split(",")} <= set(PROJECT["optional-dependencies"])
    source = (PACKAGE / "__init__.py").read_text()
    assert re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE) == [PROJECT["version"]]


def test_wheel_carries_the_embedded_files_and_nothing_else(tmp_path: Path) -> None:
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    embedded = {path for pattern in ("*.safetensors", "*.json", "README.md") for path in (ROOT / "data").glob(pattern)}
    read = "cli/demo.html", "datasets/data_sets.toml", "checkpoints/card.txt", "checkpoints/research.toml"
    texts = {f"sptseg/{path}" for path in ("py.typed", "interactive/widgets.toml", "scenes/world.toml", *read)}
    assert inside == modules | texts | {f"sptseg/data/{path.name}" for path in embedded}


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
    """Without circles; and each module is read in one sitting."""
    entries = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert entries == {*ROOMS, f"{GROUND}.py", "__init__.py", "py.typed"}
    order = TopologicalSorter({room: below.split() for room, below in ROOMS.items()}).static_order()
    assert set(order) == set(ROOMS)
    assert [path for path in PACKAGE.rglob("*.py") if len(path.read_text().splitlines()) > 400] == []


def test_the_command_line_needs_none_of_the_optional_parts() -> None:
    extras = "IPython ipywidgets nbformat papermill skimage tensorboard voila".split()
    hidden = f"import sys; sys.modules.update(dict.fromkeys({extras})); import sptseg.cli"
    subprocess.run([sys.executable, "-c", hidden], check=True)


def test_the_picture_in_the_readme_is_true() -> None:
    """Its arrows are imports that exist; followed downward, they lead to all that a room may import, and to no more."""
    readme = (ROOT / "README.md").read_text()
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


@pytest.mark.slow
def test_links_of_the_book_lead_somewhere_and_it_needs_no_network(tmp_path: Path) -> None:
    for package in ("furo", "myst_nb"):
        pytest.importorskip(package, reason="pip install 'sptseg[book]'")
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "book", "-d", tmp_path / "pages"]
    subprocess.run([*build, ".", tmp_path / "book"], cwd=ROOT, check=True)
    pages = {path: path.read_text() for path in (tmp_path / "book").rglob("*.html")}
    assert {path.stem for path in pages} >= {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} | {"index"}
    for path, page in pages.items():
        loaded = re.findall(r'<(?:link|script|img|iframe)\b[^>]*?\b(?:src|href)="([^"]*)"', page)
        assert not [link for link in loaded if urlsplit(link).netloc], path
        for link in {*loaded, *re.findall(r'<a\b[^>]*?\bhref="([^"]*)"', page)}:
            parts = urlsplit(unescape(link))
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            place = f'id="{unquote(parts.fragment)}"' if parts.fragment else ""
            there = target.is_file() and place in pages.get(target, place)
            assert parts.scheme or parts.netloc or there, f"{path.name}: {link}"
    assert "naclip" in (tmp_path / "book" / "searchindex.js").read_text()
