"""The shape of the package: modules in one order, each importing only from those before it, each short."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sptseg"
ORDER = """
    files measure ops splits textures pen drawings scenes losses metrics plots transforms datasets clip readouts encoder
    decoder model research checkpoints pretraining inference evaluation streams states training presets datacheck
    preflight ablation hub spectra failures charts lesson panels browser widgets benchmark explore baselines
    notebooks demo options cli
""".split()
EXEMPT = ("__init__", "__main__")
MODULES = sorted(path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))


def imported(source: str) -> Iterator[str]:
    """The names imported from sptseg, wherever in the file: modules of the package, or "" for the package itself."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            paths = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["sptseg"] if node.level else []
            base += node.module.split(".") if node.module else []
            paths = [[*base, alias.name] for alias in node.names]
        else:
            continue
        yield from ("".join(path[1:2]) for path in paths if path[0] == "sptseg")


def test_every_kind_of_import_is_read() -> None:
    source = """
import sptseg, torch.nn
import sptseg.ops as o
from sptseg import clip, scenes
from sptseg.model import SptSeg
def late():
    from . import demo
    from .cli import main
"""
    assert list(imported(source)) == ["", "ops", "clip", "scenes", "model", "demo", "cli"]


@pytest.mark.parametrize("module", [module for module in MODULES if module not in EXEMPT])
def test_a_module_imports_only_from_those_before_it(module: str) -> None:
    assert module in ORDER, f"{module}.py has no place in the order of modules yet"
    later = set(imported((PACKAGE / f"{module}.py").read_text())) - set(ORDER[: ORDER.index(module)])
    assert not later, f"{module}.py imports from {', '.join(sorted(later)) or 'the package itself'}"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_read_in_one_sitting(module: str) -> None:
    lines = len((PACKAGE / f"{module}.py").read_text().splitlines())
    assert lines <= 400, f"{module}.py has {lines} lines; 400 at most"


def test_the_command_line_needs_none_of_the_optional_parts() -> None:
    extras = "IPython ipywidgets nbformat papermill skimage tensorboard voila".split()
    hidden = f"import sys; sys.modules.update(dict.fromkeys({extras})); import sptseg.cli"
    subprocess.run([sys.executable, "-c", hidden], check=True)
