"""What installs the package says the same everywhere: pyproject, constraints, environment, README, wheel."""

import re
import tomllib
import zipfile
from pathlib import Path

import yaml
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
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
    source = (ROOT / "sptseg" / "__init__.py").read_text()
    assert re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE) == [PROJECT["version"]]


def test_wheel_carries_the_embedded_files_and_nothing_else(tmp_path: Path) -> None:
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sptseg").rglob("*.py")}
    embedded = {path for pattern in ("*.safetensors", "*.json", "README.md") for path in (ROOT / "data").glob(pattern)}
    read = "cli/demo.html", "datasets/data_sets.toml", "checkpoints/card.txt", "checkpoints/research.toml"
    texts = {f"sptseg/{path}" for path in ("py.typed", "interactive/widgets.toml", "scenes/world.toml", *read)}
    assert inside == modules | texts | {f"sptseg/data/{path.name}" for path in embedded}
