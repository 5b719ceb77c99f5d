"""The committed notebooks, the runner, and what happens when something is broken on purpose."""

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import nbformat
import pytest

from sptseg.interactive import notebooks
from sptseg.interactive.notebooks import Notebook, Outcome, source

ROOT = Path(__file__).parents[2]
COMMITTED = sorted((ROOT / "notebooks").glob("*.ipynb"))
PARAMETERS = 'quick = False\nseed = 0\ndevice = "cpu"\ndata_root = ""\noutput_dir = "."\n'
FIGURES = """import json, pathlib

class lesson:  # importing the true one takes seconds
    write_metrics = lambda folder, figures: pathlib.Path(folder, "metrics.json").write_text(json.dumps(figures))

lesson.write_metrics(output_dir, {"hiou": share, "run_seconds": 9.0})"""
PICTURE = """import base64
from IPython.display import Image

display(Image(base64.b64decode("iVBORw0KGgo="), format="png", alt="Nothing."))
print(output_dir)"""
ABSOLUTE = re.compile(r"(?<![\w:/.])/\w[\w.-]*/\w[\w.-]*/")
MOST_LINES = 15
INSTALL = notebooks.source(notebooks.read(COMMITTED[0])["cells"][1])  # installs the package where it is missing


def problems(notebook: Notebook) -> list[str]:
    """What is wrong with a committed notebook."""
    nbformat.validate(nbformat.from_dict(deepcopy(notebook)))
    cells = notebook["cells"]
    codes = [cell for cell in cells if cell["cell_type"] == "code"]
    outputs = [output for cell in codes for output in cell["outputs"]]
    data = [output.get("data", {}) for output in outputs]
    alternatives = [output.get("metadata", {}).get("image/png", {}).get("alt") for output in outputs]
    lines = [[x for x in source(cell).splitlines() if not x.startswith(("import ", "from "))] for cell in codes]
    wrong = {
        "sources and outputs": notebook["metadata"].get("sptseg", {}).get("sources") != notebooks.digest(notebook),
        "widgets": "widgets" in notebook["metadata"] or any(notebooks.WIDGET in each for each in data),
        "not run in order": [cell["execution_count"] for cell in codes] != list(range(1, len(codes) + 1)),
        "errors or warnings": any(o["output_type"] == "error" or o.get("name") == "stderr" for o in outputs),
        "alternative text": any("image/png" in o and not alt for o, alt in zip(data, alternatives, strict=True)),
        "no figure": not any("image/png" in each for each in data),
        "long cell": any(len(cell) > MOST_LINES for cell in lines),
        "metrics": not re.search(r"lesson\.write_metrics\(\s*output_dir", source(codes[-1])),
        "solution": "<summary>Solution</summary>" not in "".join(source(cell) for cell in cells),
        "absolute path": ABSOLUTE.search(re.sub(r'"image/png": "[^"]*"', "", json.dumps(outputs))),
    }
    return [name for name, found in wrong.items() if found]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_notebook_is_whole(path: Path) -> None:
    notebook = notebooks.read(path)
    assert problems(notebook) == []
    assert notebooks.source(notebook["cells"][1]) == INSTALL
    assert path.stat().st_size <= notebooks.LARGEST
    common = {"quick": False, "seed": 0, "device": "cpu", "data_root": "", "output_dir": "."}
    assert list(notebooks.parameters(path).items())[: len(common)] == list(common.items())
    recorded = json.loads(notebooks.baseline_file(path).read_text()).values()
    assert recorded and all(each.keys() == {"value", "tolerance"} and each["tolerance"] > 0 for each in recorded)


# The runner, on tiny notebooks


def write(path: Path, *codes: str, parameters: str = PARAMETERS + "share = 0.5\ntimes = 3\n") -> Path:
    """A notebook of a parameters cell and other code cells."""
    cells = [nbformat.v4.new_code_cell(code) for code in (parameters, *codes)]
    cells[0].metadata["tags"] = ["parameters"]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Outcome]]:
    """A good notebook and one that fails, run side by side: their folder and what came of them."""
    folder = tmp_path_factory.mktemp("ran")
    slider = "import ipywidgets\n\nipywidgets.IntSlider()"
    codes = {
        "01_good": [PICTURE, slider, FIGURES],
        "02_bad": ["raise ValueError('first line\\nlast line')", FIGURES],
        "03_claim": ["a = 1\n\nassert a == 2"],
    }
    paths = [write(folder / "notebooks" / f"{name}.ipynb", *cells) for name, cells in codes.items()]
    found = notebooks.run_all(paths, [("times", "4")], folder / "runs", quick=True, timeout=60, jobs=2)
    return folder, {path.stem: outcome for path, outcome in found}


def test_a_failure_stops_no_other_run(ran: tuple[Path, dict[str, Outcome]], capsys: pytest.CaptureFixture[str]) -> None:
    folder, outcomes = ran
    good, runs = outcomes["01_good"], folder / "runs" / "01_good"
    assert good.error == ""
    assert good.figures == json.loads((runs / "metrics.json").read_text()) == {"hiou": 0.5, "run_seconds": 9.0}
    injected = notebooks.read(runs / "01_good.ipynb")["cells"][1]
    exec(source(injected), given := {})
    assert given.items() >= {"quick": True, "times": 4, "output_dir": str(runs)}.items()
    assert outcomes["02_bad"].error == "In [3]: ValueError: last line"
    assert outcomes["03_claim"].error == "In [3]: AssertionError: assert a == 2"
    with pytest.raises(SystemExit, match="1"):
        notebooks.tell(list(outcomes.values()))
    table = capsys.readouterr().out
    assert re.search(r"^\| 01_good \| \d+ \| 2 \| ok \|\n\| 02_bad \| \d+ \| 0 \| failed \|$", table, re.M)
    assert "\n02_bad: In [3]: ValueError: last line\n" in table


def test_a_cell_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    slow = write(tmp_path / "03_slow.ipynb", "import time\n\ntime.sleep(60)")
    ((_, outcome),) = notebooks.run_all([slow], [], tmp_path / "runs", quick=False, timeout=1, jobs=1)
    assert outcome.error == "a cell took longer than 1 seconds; more go with --timeout"


def test_a_saved_notebook_keeps_outputs_and_nothing_of_the_machine(
    ran: tuple[Path, dict[str, Outcome]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executed, target = ran[0] / "runs" / "01_good" / "01_good.ipynb", tmp_path / "01_good.ipynb"
    notebooks.save(executed, target, 2.6)
    saved = notebooks.read(target)
    solution = {"cell_type": "markdown", "id": "a", "metadata": {}, "source": "<summary>Solution</summary>"}
    saved["cells"].append(solution)
    saved["metadata"]["sptseg"]["sources"] = notebooks.digest(saved)
    assert problems(saved) == []
    parameters, figure, widget, _, _ = saved["cells"]
    assert parameters["metadata"] == {"tags": ["parameters"]}  # and no cell that papermill injected
    assert [source({"source": o["text"]}) for o in figure["outputs"] if o["output_type"] == "stream"] == [".\n"]
    assert widget["outputs"][0]["data"].keys() == {"text/plain"}
    assert saved["metadata"].keys() == {"kernelspec", "language_info", "sptseg"}
    assert saved["metadata"]["sptseg"]["seconds"] == 3
    monkeypatch.setattr(notebooks, "LARGEST", 1000)
    with pytest.raises(ValueError, match=r"would have 0.0 MB; wanted 0.001 at most"):
        notebooks.save(executed, target, 1)


def test_parameters_given_as_text_get_the_types_of_their_defaults_or_are_refused() -> None:
    defaults = {"quick": False, "share": 0.5, "times": 3, "model": "embedded", "seeds": [0, 1]}
    given = [("quick", "true"), ("share", "1e-1"), ("times", "7"), ("model", "12"), ("seeds", "[2, 3]")]
    values = notebooks.chosen(given, defaults, "a")
    assert repr(values) == "{'quick': True, 'share': 0.1, 'times': 7, 'model': '12', 'seeds': [2, 3]}"
    for name, text, message in (
        ("sharee", "1", "a has no parameter sharee; it has quick, share,"),
        ("share", "half", "the parameter share is 'half'; wanted float, such as 0.5"),
        ("times", "[", "the parameter times is '['; wanted int, such as 3"),
        ("quick", "1", "the parameter quick is '1'; wanted bool"),
        ("output_dir", "here", "give --output, not output_dir"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            notebooks.chosen([(name, text)], defaults, "a")
    with pytest.raises(ValueError, match="--save keeps outputs of the default parameters only"):
        notebooks.run_notebooks([], given, save_outputs=True)


@pytest.mark.parametrize("code", ["quick = bool(0)", "a, b = 1, 2", "a ="])
def test_one_parameters_cell_holds_plain_assignments(tmp_path: Path, code: str) -> None:
    path = write(tmp_path / "a.ipynb", "a = 1", parameters=code)
    with pytest.raises(ValueError, match="a.ipynb: wanted one cell tagged 'parameters', of NAME = LITERAL only"):
        notebooks.parameters(path)


def test_notebooks_are_found_by_number_name_and_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (write(tmp_path / "notebooks" / f"{name}.ipynb").relative_to(tmp_path) for name in ("01_one", "02_two"))
    elsewhere = write(tmp_path / "mine.ipynb")
    monkeypatch.chdir(tmp_path)
    assert notebooks.find(["02", "01_one", str(elsewhere), "02_two"]) == [two, one, elsewhere]
    assert notebooks.find() == [one, two]
    with pytest.raises(ValueError, match="no notebook 02_tow: there are 01_one, 02_two"):
        notebooks.find(["02_tow"])
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setattr(notebooks, "__file__", str(tmp_path / "a" / "b" / "c" / "notebooks.py"))
    with pytest.raises(ValueError, match="no folder notebooks/ is here or beside the package"):
        notebooks.find(["01"])


def test_drift_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With its size; updating keeps tolerances. The notebook "runs" at once: figures follow from its parameters."""

    def execute(path: Path, folder: Path, values: dict[str, Any], *_: Any) -> Outcome:
        share = 0.5 if values.get("quick") else 0.75
        return Outcome(path.stem, 1.0, {"hiou": share, "trained_hiou": share, "step_ms": 3.0})

    monkeypatch.setattr(notebooks, "execute", execute)
    write(tmp_path / "notebooks" / "01_one.ipynb")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="1"):
        notebooks.check_notebooks()
    assert "01_one: hiou is new, 0.5; --update records it" in capsys.readouterr().out
    notebooks.check_notebooks(update=True)
    assert "| 01_one | 1 | 2 of 2 held | ok |" in capsys.readouterr().out
    file = tmp_path / "tests" / "baselines" / "01_one.json"
    recorded = json.loads(file.read_text())
    assert recorded["hiou"] == {"value": 0.5, "tolerance": 0.005}
    assert recorded["trained_hiou"] == {"value": 0.5, "tolerance": 0.05}
    assert "step_ms" not in recorded  # a timing
    notebooks.check_notebooks()
    notebooks.check_notebooks(update=True, full=True)
    assert json.loads((file.parent / "full" / "01_one.json").read_text())["hiou"]["value"] == 0.75
    file.write_text(file.read_text().replace("0.005", "0.3").replace("0.5,", "0.9,", 1))
    capsys.readouterr()
    drift = "01_one: hiou is 0.5; recorded is 0.9 ± 0.3: it drifted by -0.4\n"
    with pytest.raises(SystemExit, match="1"):
        notebooks.check_notebooks()
    printed = capsys.readouterr().out
    assert "| 1 of 2 held | drifted |" in printed and printed.endswith(drift)
    notebooks.check_notebooks(update=True)
    assert drift in capsys.readouterr().out
    assert json.loads(file.read_text())["hiou"] == {"value": 0.5, "tolerance": 0.3}
    gone = notebooks.compare({"hiou": {"value": 0.5, "tolerance": 0.1}}, {"miou": 0.5})
    assert gone == {"hiou": "hiou is missing; recorded is 0.5", "miou": "miou is new, 0.5; --update records it"}


# Broken on purpose

PLANTED = """from importlib.machinery import SourceFileLoader


def get_code(self, name, get_code=SourceFileLoader.get_code):
    if name != {module!r}:
        return get_code(self, name)
    return compile(self.get_source(name).replace({right!r}, {wrong!r}), self.path, "exec")


SourceFileLoader.get_code = get_code"""
FAULTS = [  # what is wrong, the notebook that should see it, what that should name; module, right, wrong
    ("spectrum conjugated", "02", "angle_once_across is -",
     "model.encoder", "as_complex(self.weight.float())", "as_complex(self.weight.float()).conj()"),
    ("band rejected", "01", "AssertionError: assert",
     "model.ops", "(~inside if reject else inside)", "(inside if reject else ~inside)"),
    ("alpha swapped", "04", 'assert math.isclose(loss["focal"]', "training.losses", "ALPHA = 0.25", "ALPHA = 0.75"),
    ("decoder's windows transposed", "03", "AssertionError: assert",
     "model.ops", "features.transpose(2, 3).reshape(batch", "features.permute(0, 2, 3, 1, 4, 5).reshape(batch"),
    ("sliding windows transposed", "07", "hiou_enlarged is ",
     "inference.windows", "top : top + h, left : left + w]", "left : left + w, top : top + h]"),
    ("branches swapped", "03", "AssertionError: ",
     "model.decoder", "in widths.items() if wide", "in [*widths.items()][::-1] if wide"),
    ("class token's gate dropped", "02", "assert torch.allclose(prompt(X, class_token, F), X + S",
     "model.encoder", "patches * class_token[:, None, None], weight", "patches, weight"),
    ("labelled and predicted swapped", "06", "sink_precision is ",
     "inference.metrics", "confusion.sum(-1), confusion.sum(-2)", "confusion.sum(-2), confusion.sum(-1)"),
    ("offset added", "07", "assert abs(kept.pixel_accuracy - again.pixel_accuracy)",
     "inference.windows", "scores.sub_(self.offset", "scores.add_(self.offset"),
    ("the other statistics", "05", "assert abs(given[kind] - wanted)",
     "inference.windows", 'if config.normalization == "clip":', 'if config.normalization != "clip":'),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault[0])
def test_the_check_names_what_is_broken(fault: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, number, named, module, right, wrong = fault
    assert (ROOT / "sptseg" / f"{module.replace('.', '/')}.py").read_text().count(right) == 1
    (notebook,) = notebooks.find([number])
    for path in (notebook, notebooks.baseline_file(notebook)):
        copy = tmp_path / path.resolve().relative_to(ROOT)
        copy.parent.mkdir(parents=True)
        copy.write_bytes(path.read_bytes())
    broken = tmp_path / "notebooks" / notebook.name
    edited = nbformat.read(broken, 4)
    planted = PLANTED.format(module=f"sptseg.{module}", right=right, wrong=wrong)
    edited.cells.insert(1, nbformat.v4.new_code_cell(planted))
    nbformat.write(edited, broken)
    with pytest.raises(SystemExit, match="1"):
        notebooks.check_notebooks([str(broken)], output=tmp_path / "runs")
    told = capsys.readouterr().out.rpartition("|")[2]  # what follows the table
    assert f"{notebook.stem}: " in told and named in told


STUB = re.compile(r"^(\w+ = \.\.\.|def .*?\.\.\.$)", re.MULTILINE | re.DOTALL)


def solved(path: Path, folder: Path) -> Path:
    """A copy of a notebook in which every task is done as its solution says."""
    notebook = nbformat.read(path, 4)
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type == "code" and (stub := STUB.search(cell.source)):
            after = "".join(each.source for each in notebook.cells[i:] if "<summary>Solution" in each.source)
            shown = re.search(r"```python\n(.*?)```|`(answer = .*?)`", after, re.DOTALL)
            assert shown, f"{path.stem}: a task without a solution"
            cell.source = cell.source.replace(stub[0], shown[1] or shown[2])
    folder.mkdir(exist_ok=True)
    nbformat.write(notebook, folder / path.name)
    return folder / path.name


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "scene"), [(1, 17), (2, 5195)])
def test_notebooks_run_with_other_seeds_and_scenes_solutions_are_right(seed: int, scene: int, tmp_path: Path) -> None:
    for path in COMMITTED:
        options = {"seed": str(seed), "scene": str(scene)}
        given = [(name, value) for name, value in options.items() if name in notebooks.parameters(path)]
        copy = solved(path, tmp_path / "notebooks")
        ((_, outcome),) = notebooks.run_all([copy], given, tmp_path, quick=True, timeout=600, jobs=1)
        assert outcome.error == "", path.stem
        executed = (tmp_path / path.stem / path.name).read_text()
        assert executed.count('"**Right.**"') == executed.count("lesson.check("), path.stem
