"""The notebooks as programs: run by papermill, their figures compared with recorded ones, saved with their outputs.

A notebook has one cell tagged `parameters`, and its last cell writes its figures to `metrics.json`. Every run has a
folder of its own, `OUTPUT/NAME/`, which gets both the executed notebook and these figures. Recorded figures lie beside
the notebooks' folder, in `tests/baselines/`, as {"figure": {"value": v, "tolerance": t}}.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import io
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Annotated, Any

import tyro
from PIL import Image

from sptseg.system import cores, output_place, write

Notebook = dict[str, Any]  # as JSON
Given = Annotated[
    tuple[tuple[str, str], ...], tyro.conf.arg(aliases=["-p"], metavar="KEY VALUE"), tyro.conf.UseAppendAction
]
Names = tyro.conf.Positional[tuple[str, ...]]

LARGEST = 1_500_000  # bytes of a committed notebook
WIDGET = "application/vnd.jupyter.widget-view+json"
TIMING = re.compile(r"(^|_)(seconds?|milliseconds?|ms)(_|$)")  # in the name of a figure that no other machine gives


@dataclass(frozen=True)
class Outcome:
    """What came of a run: `figures` is its metrics.json, `error` empty if all went well, `drift` a line per figure."""

    name: str
    seconds: float
    cells: int
    figures: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    stalled: bool = False
    drift: tuple[str, ...] = ()
    held: str = ""

    @property
    def verdict(self) -> str:
        word = "failed" if self.error else "drifted" if self.drift else "ok"
        return f"{word}, at the second try" if self.stalled else word


def find(names: Sequence[str] = ()) -> list[Path]:
    """Notebooks by number ("01"), name or path; all of the folder for none."""
    folders = (Path("notebooks"), Path(__file__).parents[2] / "notebooks")
    known = {path.stem: path for path in next(filter(None, (sorted(f.glob("*.ipynb")) for f in folders)), [])}
    found: dict[Path, None] = {}
    for name in names or known or [""]:
        path = Path(name)
        by_name = [path for stem, path in known.items() if name in (stem, stem.partition("_")[0])]
        matches = [path] if path.suffix == ".ipynb" and path.is_file() else by_name
        if not matches:
            nowhere = "no folder notebooks/ is here or beside the package; run this in a clone, or give a path"
            raise ValueError(f"no notebook {name}: {'there are ' + ', '.join(known) if known else nowhere}")
        found |= dict.fromkeys(matches)
    return list(found)


def read(path: Path) -> Notebook:
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell: Mapping[str, Any]) -> str:
    return "".join(cell["source"])  # a string, or its lines


def parameters(path: Path) -> dict[str, Any]:
    """Names and defaults from the one cell tagged `parameters`."""
    cells = [cell for cell in read(path)["cells"] if "parameters" in cell["metadata"].get("tags", ())]
    try:
        (cell,) = cells
        lines: list[Any] = ast.parse(source(cell)).body
        return {line.targets[0].id: ast.literal_eval(line.value) for line in lines}
    except (ValueError, AttributeError, SyntaxError) as error:
        wanted = "wanted one, which holds NAME = LITERAL only"
        raise ValueError(f"{path} has {len(cells)} cells tagged 'parameters'; {wanted} ({error})") from error


def chosen(given: Sequence[tuple[str, str]], defaults: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Parameters given as text, which is YAML as for papermill's own -p; unknown and ill-typed ones are refused."""
    import yaml  # comes with papermill

    values = {}
    for key, text in given:
        if key == "output_dir":
            raise ValueError("every notebook writes to a folder of its own; give --output, not output_dir")
        if key not in defaults:
            raise ValueError(f"{name} has no parameter {key}; it has {', '.join(defaults)}")
        kind = type(defaults[key])
        try:
            value = kind(text) if kind in (str, float) else yaml.safe_load(text)
        except (ValueError, yaml.YAMLError):
            value = None
        if type(value) is not kind:
            wanted = f"{kind.__name__}, such as {defaults[key]!r}"
            raise ValueError(f"{name}: the parameter {key} is {text!r}; wanted {wanted}")
        values[key] = value
    return values


def digest(notebook: Notebook) -> str:
    """A hash of all cells' types and sources: what outputs are outputs of."""
    cells = [[cell["cell_type"], source(cell)] for cell in notebook["cells"]]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def committed(executed: Notebook, folders: Iterable[Path]) -> Notebook:
    """An executed notebook as it is committed: with its outputs, without what depends on the machine or the hour.

    Papermill's cell and metadata go; paths of `folders` become relative; of widgets their words stay, as their state
    would only show where their scripts can be loaded; the hash of the sources says what the outputs belong to.
    """
    cells, count = [], 0
    for cell in executed["cells"]:
        tags = cell["metadata"].get("tags", [])
        if "injected-parameters" in tags:
            continue
        cell = {**cell, "metadata": {"tags": tags} if tags else {}}
        if cell["cell_type"] == "code":
            count += 1
            cell["execution_count"] = count
            for output in cell["outputs"]:
                output.get("data", {}).pop(WIDGET, None)
                if "execution_count" in output:
                    output["execution_count"] = count
        cells.append(cell)
    text = json.dumps(cells)
    for folder in folders:
        text = text.replace(json.dumps(str(folder))[1:-1], ".")
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    notebook: Notebook = {"cells": json.loads(text), "nbformat": 4, "nbformat_minor": 5}
    about = {"sources": digest(notebook)}
    return {**notebook, "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}, "sptseg": about}}


def save(executed: Path, target: Path, seconds: float) -> None:
    """Writes an executed notebook with its outputs over its source, and how long it took."""
    notebook = committed(read(executed), (executed.parent.resolve(), executed.parent, target.resolve().parents[1]))
    notebook["metadata"]["sptseg"]["seconds"] = round(seconds)
    text = json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    if (size := len(text.encode())) > LARGEST:
        raise ValueError(f"{target} would have {size / 1e6:.1f} MB; wanted {LARGEST / 1e6} at most: show fewer figures")
    write(target, text)
    for figure in pictures(notebook):
        write(target.parent / "pictures" / f"{target.stem}.png", figure)


def pictures(notebook: Notebook) -> Iterator[bytes]:
    """The figures of the cell tagged `picture`, as small PNGs: the README's map shows one."""
    for cell in (cell for cell in notebook["cells"] if "picture" in cell["metadata"].get("tags", ())):
        for data in filter(None, (output.get("data", {}).get("image/png") for output in cell["outputs"])):
            image = Image.open(io.BytesIO(base64.b64decode("".join(data)))).convert("RGB")
            image.thumbnail((480, 300), Image.Resampling.LANCZOS)
            image.quantize(256, Image.Quantize.FASTOCTREE).save(buffer := io.BytesIO(), "png", optimize=True)
            yield buffer.getvalue()


def execute(path: Path, folder: Path, values: Mapping[str, Any], timeout: int) -> Outcome:
    """Runs one notebook in a kernel, in a thread of its own; its folder gets it, executed, and its metrics.json.

    A run that stalls is tried once more: now and then a kernel's reply to a cell with widgets is lost.
    """
    try:
        import papermill
        from jupyter_core.utils import ensure_event_loop
        from nbclient.exceptions import CellTimeoutError
        from papermill.exceptions import PapermillExecutionError
    except ImportError as error:
        raise ValueError("notebooks need papermill and Jupyter: pip install 'sptseg[notebooks]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    (metrics := folder / "metrics.json").unlink(missing_ok=True)  # the last run's
    cells = sum(cell["cell_type"] == "code" for cell in read(path)["cells"])
    started = time.perf_counter()
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # the outcome says it
    for tries in (1, 2):
        try:
            papermill.execute_notebook(
                path, folder / path.name, {**values, "output_dir": str(folder)}, kernel_name="python3",
                language="python", progress_bar=False, execution_timeout=timeout,
                extra_arguments=["--log-level=CRITICAL"],
            )  # fmt: skip
            error = "" if metrics.is_file() else "no metrics.json: its last cell should call lesson.write_metrics"
        except CellTimeoutError:
            error = f"a cell took longer than {timeout} seconds, twice; more go with --timeout"
            if tries == 1:
                continue
        except PapermillExecutionError as failure:
            last = failure.evalue.strip().splitlines()[-1:]
            lines = last or re.findall(r"^-+> \d+ (.*)", str(failure), re.M)  # an assert without words is its own
            error = f"In [{failure.exec_count}]: {failure.ename}: {''.join(lines[:1])}"
        except RuntimeError as failure:  # such as a dead kernel
            error = f"{type(failure).__name__}: {failure}"
        break
    ensure_event_loop().close()  # this thread's, which papermill leaves open
    figures = json.loads(metrics.read_text(encoding="utf-8")) if metrics.is_file() else {}
    return Outcome(path.stem, time.perf_counter() - started, cells, figures, error, stalled=tries == 2)


@contextmanager
def own_kernel(jobs: int) -> Iterator[None]:
    """Kernels of this interpreter only, which share the cores."""
    before = dict(os.environ)
    os.environ.pop("JUPYTER_PATH", None)  # a kernel "python3" found there would win
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // jobs)))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def run_all(
    paths: Sequence[Path], given: Sequence[tuple[str, str]], output: Path, *, quick: bool, timeout: int, jobs: int
) -> Iterator[tuple[Path, Outcome]]:
    """Runs notebooks, `jobs` at a time, in the order in which they end; a failure stops none of the others."""
    defaults = {path: parameters(path) for path in paths}
    given = [*given, ("quick", "true")] if quick else given
    values = {path: chosen(given, known, path.stem) for path, known in defaults.items()}
    doubled = [path.stem for path in paths if [other.stem for other in paths].count(path.stem) > 1]
    if doubled:
        raise ValueError(f"two notebooks are called {doubled[0]}, and would write to the same folder; run them apart")
    timeout = timeout or (300 if quick else 900)  # the longest cells take a few
    with own_kernel(jobs), ThreadPool(jobs) as pool:
        runs = pool.imap_unordered(lambda path: (path, execute(path, output / path.stem, values[path], timeout)), paths)
        for path, outcome in runs:
            print(f"{outcome.name}: {outcome.error or 'ran through'} ({outcome.seconds:.0f} s)", flush=True)
            yield path, outcome


def tell(outcomes: Sequence[Outcome]) -> None:
    """Prints a Markdown table, and under it what went wrong; then the exit code is 1."""
    rows = [
        f"| {o.name} | {o.seconds:.0f} | {o.cells} | {o.held or len(o.figures)} | {o.verdict} |"
        for o in sorted(outcomes, key=lambda o: o.name)
    ]
    wrong = [f"{o.name}: {line}" for o in outcomes for line in ([o.error] if o.error else o.drift)]
    print("| notebook | seconds | cells | figures | verdict |", "|---|---|---|---|---|", *rows, *wrong, sep="\n")
    if wrong:
        raise SystemExit(1)


def baseline_file(path: Path, full: bool = False) -> Path:
    return path.resolve().parents[1] / "tests" / "baselines" / ("full" if full else "") / f"{path.stem}.json"


def compare(recorded: Mapping[str, Mapping[str, float]], found: Mapping[str, float]) -> dict[str, str]:
    """A sentence for every figure that drifted, is missing, or is new."""
    drift = {}
    for name, wanted in recorded.items():
        value, room = wanted["value"], wanted["tolerance"]
        if name not in found:
            drift[name] = f"{name} is missing; recorded is {value:g}"
        elif abs(found[name] - value) > room:
            off = f"it drifted by {found[name] - value:+g}"
            drift[name] = f"{name} is {found[name]:g}; recorded is {value:g} ± {room:g}: {off}"
    new = {name: f"{name} is new, {value:g}; --update records it" for name, value in found.items()}
    return drift | {name: line for name, line in new.items() if name not in recorded}


def recording(recorded: Mapping[str, Mapping[str, float]], found: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """A baseline of figures; tolerances set by hand stay.

    New ones leave room for other machines' rounding: 1 %, and 0.002 at least; for the end of a training 5 %, and 0.05;
    for a loss 3 %: without AVX2 PyTorch resizes pictures by other code, every seventh value is one level of 255 apart,
    and in bf16 a first loss moved by 0.8 %.
    """
    made = {}
    for name, value in found.items():
        share, least = (0.05, 0.05) if "train" in name else (0.03 if "loss" in name else 0.01, 0.002)
        usual = {"tolerance": float(f"{max(share * abs(value), least):.2g}")}
        made[name] = {"value": value, "tolerance": recorded.get(name, usual)["tolerance"]}
    return made


def run_notebooks(
    names: Names = (),
    param: Given = (),
    quick: bool = False,
    output: Path = Path("runs/notebooks"),
    save_outputs: Annotated[bool, tyro.conf.arg(name="save")] = False,
    timeout: int = 0,
    jobs: int = 1,
) -> None:
    """Runs notebooks with papermill and tells how it went.

    Args:
        names: numbers (01), names or paths; all by default.
        param: a parameter of the notebooks; may be given several times.
        quick: fewer pictures and steps.
        output: where each notebook gets a folder, for its executed copy and its metrics.json.
        save_outputs: write the executed notebooks back over their sources, as they are committed.
        timeout: seconds that a cell may take; by default 300 with --quick, else 900.
        jobs: how many to run at a time.
    """
    if save_outputs and (param or quick):
        raise ValueError("--save keeps outputs of the default parameters only; leave out -p and --quick")
    output_place(output, folder=True)
    outcomes = []
    for path, outcome in run_all(find(names), param, output, quick=quick, timeout=timeout, jobs=jobs):
        if save_outputs and not outcome.error:
            try:
                save(output / path.stem / path.name, path, outcome.seconds)
            except ValueError as error:
                outcome = replace(outcome, error=str(error))
        outcomes.append(outcome)
    tell(outcomes)


def check_notebooks(
    names: Names = (),
    update: bool = False,
    full: bool = False,
    output: Path = Path("runs/notebooks-check"),
    timeout: int = 0,
    jobs: int = 1,
) -> None:
    """Runs notebooks, quick, and compares their figures with the recorded ones in tests/baselines.

    Args:
        names: numbers (01), names or paths; all by default.
        update: record the figures anew, and print what changed; tolerances that are there stay.
        full: at the default parameters, with baselines of their own in tests/baselines/full.
        output: where each notebook gets a folder.
        timeout: seconds that a cell may take; by default 300, with --full 900.
        jobs: how many to run at a time.
    """
    output_place(output, folder=True)
    outcomes = []
    for path, outcome in run_all(find(names), (), output, quick=not full, timeout=timeout, jobs=jobs):
        if not outcome.error:
            file = baseline_file(path, full)
            recorded = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            lasting = {name: value for name, value in outcome.figures.items() if not TIMING.search(name)}
            drift = compare(recorded, lasting)
            if update:
                print(*(f"{path.stem}: {line}" for line in drift.values()), sep="\n")
                recorded, drift = recording(recorded, lasting), {}
                write(file, json.dumps(recorded, indent=1) + "\n")
            held = f"{len(recorded.keys() - drift)} of {len(recorded)} held"
            outcome = replace(outcome, drift=tuple(drift.values()), held=held)
        outcomes.append(outcome)
    tell(outcomes)
