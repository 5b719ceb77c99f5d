"""The notebooks as programs: run by papermill, their figures compared with recorded ones, saved with their outputs.

A notebook has one cell tagged `parameters`, and its last cell writes its figures to `metrics.json`. `OUTPUT/NAME/` gets
both the executed notebook and these figures. Recorded ones lie in `tests/baselines/`, beside the notebooks' folder."""

import ast
import base64
import hashlib
import io
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Annotated, Any

import tyro
from PIL import Image

from sptseg.inference import table
from sptseg.system import bytes_of, cores, output_place, write

Notebook = dict[str, Any]  # as JSON
Given = Annotated[
    tuple[tuple[str, str], ...], tyro.conf.arg(aliases=["-p"], metavar="KEY VALUE"), tyro.conf.UseAppendAction
]
Names = tyro.conf.Positional[tuple[str, ...]]

LARGEST = 1_500_000  # bytes of a committed notebook
WIDGET = "application/vnd.jupyter.widget-view+json"
TIMING = re.compile(r"(^|_)(seconds?|milliseconds?|ms)(_|$)")  # in the name of a figure that no other machine gives


@dataclass
class Outcome:
    """What came of a run: `figures` is its metrics.json, `error` empty if all went well, `drift` a line per figure."""

    name: str
    seconds: float
    figures: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    drift: tuple[str, ...] = ()
    held: str = ""

    @property
    def verdict(self) -> str:
        return "failed" if self.error else "drifted" if self.drift else "ok"


def find(names: Sequence[str] = ()) -> list[Path]:
    """Notebooks by number ("01"), name or path; all of the folder for none."""
    folders = (Path("notebooks"), Path(__file__).parents[2] / "notebooks")
    known = {path.stem: path for path in next(filter(None, (sorted(f.glob("*.ipynb")) for f in folders)), [])}
    found = []
    for name in names or known or [""]:
        matches = [path for stem, path in known.items() if name in (stem, stem.partition("_")[0])]
        if name.endswith(".ipynb") and Path(name).is_file():
            matches = [Path(name)]
        if not matches:
            nowhere = "no folder notebooks/ is here or beside the package; run this in a clone, or give a path"
            raise ValueError(f"no notebook {name}: {'there are ' + ', '.join(known) if known else nowhere}")
        found += matches
    return list(dict.fromkeys(found))


def read(path: Path) -> Notebook:
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell: Mapping[str, Any]) -> str:
    return "".join(cell["source"])  # a string, or its lines


def parameters(path: Path) -> dict[str, Any]:
    """Names and defaults from the one cell tagged `parameters`."""
    cells = [cell for cell in read(path)["cells"] if "parameters" in cell["metadata"].get("tags", ())]
    try:
        (lines,) = (ast.parse(source(cell)).body for cell in cells)
        return {line.targets[0].id: ast.literal_eval(line.value) for line in lines}  # pyright: ignore
    except (ValueError, AttributeError, SyntaxError) as error:
        raise ValueError(f"{path}: wanted one cell tagged 'parameters', of NAME = LITERAL only ({error})") from error


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
        with suppress(ValueError, yaml.YAMLError):
            values[key] = kind(text) if kind in (str, float) else yaml.safe_load(text)
        if type(values.get(key)) is not kind:
            wanted = f"{kind.__name__}, such as {defaults[key]!r}"
            raise ValueError(f"{name}: the parameter {key} is {text!r}; wanted {wanted}")
    return values


def digest(notebook: Notebook) -> str:
    """A hash of all cells' types and sources: what outputs are outputs of."""
    cells = [[cell["cell_type"], source(cell)] for cell in notebook["cells"]]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def save(executed: Path, target: Path, seconds: float) -> None:
    """Writes an executed notebook over its source as it is committed: with its outputs, how long it took, and a hash of
    the sources that they belong to; without what depends on the machine or the hour.

    Papermill's cell and metadata go; folders become relative; of widgets their words stay, as their state would only
    show where their scripts can be loaded. The figure of a cell tagged `picture` also becomes a file, for the README.
    """
    cells, pictures = [], []
    for cell in read(executed)["cells"]:
        tags = cell["metadata"].get("tags", [])
        if "injected-parameters" in tags:
            continue
        cells.append(cell := {**cell, "metadata": {"tags": tags} if tags else {}})
        if cell["cell_type"] == "code":
            cell["execution_count"] = sum(each["cell_type"] == "code" for each in cells)
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop(WIDGET, None)
            if "execution_count" in output:
                output["execution_count"] = cell["execution_count"]
            if "picture" in tags and (figure := output.get("data", {}).get("image/png")):
                pictures.append(base64.b64decode("".join(figure)))
    text = json.dumps(cells)
    for folder in (executed.parent.resolve(), executed.parent, target.resolve().parents[1]):
        text = text.replace(json.dumps(str(folder))[1:-1], ".")
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    notebook: Notebook = {"cells": json.loads(text), "nbformat": 4, "nbformat_minor": 5}
    about = {"sources": digest(notebook), "seconds": round(seconds)}
    notebook["metadata"] = {"kernelspec": kernel, "language_info": {"name": "python"}, "sptseg": about}
    text = json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    if (size := len(text.encode())) > LARGEST:
        raise ValueError(f"{target} would have {size / 1e6:.1f} MB; wanted {LARGEST / 1e6} at most: show fewer figures")
    write(target, text)
    for figure in pictures:
        image = Image.open(io.BytesIO(figure)).convert("RGB")
        image.thumbnail((480, 300), Image.Resampling.LANCZOS)
        small = image.quantize(256, Image.Quantize.FASTOCTREE)
        png = bytes_of(partial(small.save, format="png", optimize=True))
        write(target.parent / "pictures" / f"{target.stem}.png", png)


def execute(path: Path, folder: Path, values: Mapping[str, Any], timeout: int) -> Outcome:
    """Runs one notebook in a kernel, in a thread of its own; its folder gets it, executed, and its metrics.json."""
    try:
        import papermill
        from jupyter_core.utils import ensure_event_loop
        from nbclient.exceptions import CellTimeoutError
        from papermill.exceptions import PapermillExecutionError
    except ImportError as error:
        raise ValueError("notebooks need papermill and Jupyter: pip install 'sptseg[notebooks]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    (metrics := folder / "metrics.json").unlink(missing_ok=True)  # the last run's
    started = time.perf_counter()
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # the outcome says it
    try:
        papermill.execute_notebook(
            path, folder / path.name, {**values, "output_dir": str(folder)}, kernel_name="python3", language="python",
            progress_bar=False, execution_timeout=timeout, extra_arguments=["--log-level=CRITICAL"],
        )  # fmt: skip
        error = "" if metrics.is_file() else "no metrics.json: its last cell should call lesson.write_metrics"
    except CellTimeoutError:
        error = f"a cell took longer than {timeout} seconds; more go with --timeout"
    except PapermillExecutionError as failure:
        last = failure.evalue.strip().splitlines()[-1:]
        lines = last or re.findall(r"^-+> \d+ (.*)", str(failure), re.M)  # an assert without words is its own
        error = f"In [{failure.exec_count}]: {failure.ename}: {''.join(lines[:1])}"
    except RuntimeError as failure:  # such as a dead kernel
        error = f"{type(failure).__name__}: {failure}"
    ensure_event_loop().close()  # this thread's, which papermill leaves open
    figures = json.loads(metrics.read_text(encoding="utf-8")) if metrics.is_file() else {}
    return Outcome(path.stem, time.perf_counter() - started, figures, error)


def run_all(
    paths: Sequence[Path], given: Sequence[tuple[str, str]], output: Path, *, quick: bool, timeout: int, jobs: int
) -> Iterator[tuple[Path, Outcome]]:
    """Runs notebooks, `jobs` at a time, in the order in which they end; a failure stops none of the others."""
    if timeout < 0 or jobs < 1:
        raise ValueError(f"--timeout is {timeout}, --jobs {jobs}; wanted 0 (as usual) or seconds, and at least 1")
    defaults = {path: parameters(path) for path in paths}
    given = [*given, ("quick", "true")] if quick else given
    values = {path: chosen(given, known, path.stem) for path, known in defaults.items()}
    timeout = timeout or (300 if quick else 900)  # the longest cells take a few
    os.environ.pop("JUPYTER_PATH", None)  # a kernel "python3" found there would win over this interpreter's
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // jobs)))
    with ThreadPool(jobs) as pool:
        runs = pool.imap_unordered(lambda path: (path, execute(path, output / path.stem, values[path], timeout)), paths)
        for path, outcome in runs:
            print(f"{outcome.name}: {outcome.error or 'ran through'} ({outcome.seconds:.0f} s)", flush=True)
            yield path, outcome


def tell(outcomes: Sequence[Outcome]) -> None:
    """Prints a Markdown table, and under it what went wrong; then the exit code is 1."""
    outcomes = sorted(outcomes, key=lambda o: o.name)
    rows = ((o.name, f"{o.seconds:.0f}", o.held or len(o.figures), o.verdict) for o in outcomes)
    wrong = [f"{o.name}: {line}" for o in outcomes for line in ([o.error] if o.error else o.drift)]
    print(table(("notebook", "seconds", "figures", "verdict"), *rows), *wrong, sep="\n")
    if wrong:
        raise SystemExit(1)


def baseline_file(path: Path, full: bool = False) -> Path:
    return path.resolve().parents[1] / "tests" / "baselines" / ("full" if full else "") / f"{path.stem}.json"


def compare(recorded: Mapping[str, Mapping[str, float]], found: Mapping[str, float]) -> dict[str, str]:
    """A sentence for every figure that drifted, is missing, or is new."""
    drift = {name: f"{name} is new, {found[name]:g}; --update records it" for name in found if name not in recorded}
    for name, wanted in recorded.items():
        value, room = wanted["value"], wanted["tolerance"]
        if name not in found:
            drift[name] = f"{name} is missing; recorded is {value:g}"
        elif abs(off := found[name] - value) > room:
            drift[name] = f"{name} is {found[name]:g}; recorded is {value:g} ± {room:g}: it drifted by {off:+g}"
    return drift


def recording(recorded: Mapping[str, Mapping[str, float]], found: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """A baseline of figures; tolerances set by hand stay.

    New ones leave room for other machines' rounding: 1 %, and 0.002 at least; for the end of a training 5 %, and 0.05;
    for a loss 3 %: without AVX2 PyTorch resizes pictures by other code, every seventh value is one level of 255 apart,
    and in bf16 a first loss moved by 0.8 %."""
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
        jobs: how many to run at a time."""
    if save_outputs and (param or quick):
        raise ValueError("--save keeps outputs of the default parameters only; leave out -p and --quick")
    output_place(output, folder=True)
    outcomes = []
    for path, outcome in run_all(find(names), param, output, quick=quick, timeout=timeout, jobs=jobs):
        if save_outputs and not outcome.error:
            try:
                save(output / path.stem / path.name, path, outcome.seconds)
            except ValueError as error:
                outcome.error = str(error)
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
        jobs: how many to run at a time."""
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
            outcome.held = f"{len(recorded.keys() - drift)} of {len(recorded)} held"
            outcome.drift = tuple(drift.values())
        outcomes.append(outcome)
    tell(outcomes)
