"""A study from one file: which rows, how their rates are chosen, which runs, in order of priority.

Processes that share a folder take the first run that is ready and that nobody works on; what is finished stays.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sptseg.datasets import STRENGTHS, Corrupted, Pool, Sample, Scenes
from sptseg.inference import Scores, confusion_matrices, new_accelerator, ratios_of_tallies, tallies
from sptseg.model import Clip, ModelConfig, SptSeg, build_model, fingerprint, load_clip
from sptseg.system import claimed, write
from sptseg.training.ablation import mean_and_deviation
from sptseg.training.config import EMBEDDED_TRAINING, TrainConfig
from sptseg.training.loop import fit
from sptseg.training.presets import CONFIGURATIONS
from sptseg.training.state import HALFWAY, STATE, differing
from sptseg.training.stream import label_table

Measure = Callable[[SptSeg, Dataset[Sample]], dict[str, float]]
RESULT, COUNTS = "result.json", "counts.npz"
SPOILT = tuple((kind, strength) for kind in STRENGTHS for strength in (1, 2, 3))


@dataclass(frozen=True)
class Part:
    """Rows that are trained alike: on one CLIP, with these seeds, for so many steps.

    `corrupted`: the trained models are also scored on spoilt pictures; `one_colour`: all scenes are of one colour.
    """

    question: str
    clip: str
    rows: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    corrupted: bool = False
    one_colour: bool = False


@dataclass(frozen=True)
class After:
    """What is changed in the trained models of some rows, without training: no spectral prompts, another offset."""

    rows: tuple[str, ...]
    without_spectral_prompts: bool = False
    seen_offset: float | None = None


@dataclass(frozen=True)
class Plan:
    """A study.

    Attributes:
        scenes: how many, and of which seed, to "train" on, for "validation" (and choosing), and to "test" on.
        train: what all trainings have in common; their warm-up is a tenth of the steps.
        rates, choosing_steps, choosing_seed: each row is trained with each rate; it gets the one with the best hIoU on
            the validation scenes.
        rows: configurations by name.
        parts: which of them are trained, in order of priority.
        pairs: (question, row, other row) to compare; a row may also be "ROW, NAME" with a NAME of `after`.
    """

    scenes: dict[str, tuple[int, int]]
    train: TrainConfig
    rates: tuple[float, ...]
    choosing_steps: int
    choosing_seed: int
    rows: dict[str, ModelConfig]
    parts: tuple[Part, ...]
    pairs: tuple[tuple[str, str, str], ...]
    after: dict[str, After] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> Plan:
        """From JSON; a row is {"base": one of `CONFIGURATIONS`, and fields of ModelConfig}. Raises ValueError."""
        try:
            given = tuples(json.loads(file.read_text()))
            rows = {
                name: replace(CONFIGURATIONS[row.pop("base")], **row) for name, row in given.pop("rows").items()
            }  # fmt: skip
            given["train"] = replace(EMBEDDED_TRAINING, **given["train"])
            given["parts"] = tuple(Part(**part) for part in given["parts"])
            given["after"] = {name: After(**after) for name, after in given.get("after", {}).items()}
            plan = cls(rows=rows, **given)
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            wanted = ", ".join(f.name for f in fields(cls))
            raise ValueError(f"{file} is no plan of a study ({error}); wanted an object of {wanted}") from error
        named = {row for part in plan.parts for row in part.rows} | {row for a in plan.after.values() for row in a.rows}
        if unknown := sorted(named - rows.keys()):
            raise ValueError(f"{file} names the rows {', '.join(unknown)}, which its rows lack")
        return plan

    def choosing(self, part: Part, row: str) -> list[Run]:
        """The runs that choose a row's rate."""
        return [Run(part, row, self.choosing_seed, self.choosing_steps, rate) for rate in self.rates]

    def runs(self, share: tuple[int, int] = (1, 1)) -> list[Run]:
        """All runs, each once, in order of priority: of each part first those that choose rates.

        Of share I of N, those of every N-th row from the I-th on: a row's runs wait for one another, rows for none.
        """
        found: dict[str, Run] = {}
        for part in self.parts:
            trained = [row for row in part.rows if self.rows[row].trains]
            runs = [run for row in trained for run in self.choosing(part, row)]
            steps = {row: part.steps if row in trained else 0 for row in part.rows}
            runs += [Run(part, row, seed if steps[row] else 0, steps[row]) for row in part.rows for seed in part.seeds]
            for run in runs:
                found.setdefault(run.place, run)
        rows = list(dict.fromkeys((run.part.clip, run.row) for run in found.values()))
        mine = set(rows[share[0] - 1 :: share[1]])
        return [run for run in found.values() if (run.part.clip, run.row) in mine]


def tuples(value: Any) -> Any:
    """JSON's lists as tuples."""
    if isinstance(value, dict):
        return {name: tuples(each) for name, each in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list) else value


@dataclass(frozen=True)
class Run:
    """One training of one row; with a rate, to choose it: then it is scored on the validation scenes."""

    part: Part
    row: str
    seed: int
    steps: int
    rate: float | None = None

    @property
    def world(self) -> str:
        return "one-colour" if self.part.one_colour and self.rate is None else "scenes"

    @property
    def place(self) -> str:
        """Its folder; a rate is chosen on ordinary scenes."""
        kind = f"{self.steps}-steps-seed-{self.seed}" if self.rate is None else f"rate-{self.rate}"
        return f"{self.part.clip}/{self.world}/{self.row}/{kind}"


class Study:
    """A plan and the folder of its results."""

    def __init__(self, plan: Plan, folder: Path, measure: Measure | None = None) -> None:
        self.plan, self.folder, self.measure = plan, folder, measure
        self.split = Scenes(1).split
        self.clip, self.pool, self.result = cache(self._clip), cache(self._pool), cache(self._result)
        self.fingerprint = cache(lambda name: fingerprint(self.clip(name)))

    def _clip(self, name: str) -> Clip:
        clip = load_clip(name)
        for queries in (None, label_table(self.split, "inductive")[0]):
            clip.class_embeddings(self.split.texts(queries))  # now, on the CPU: the same bits in any order of runs
        return clip

    def _pool(self, world: str, name: str, corruption: tuple[Any, int] | None = None) -> Pool:
        length, seed = self.plan.scenes[name]
        file = self.folder / "pools" / f"{world}-{name}-{length}-{seed}.npy"
        stream = "training" if name == "train" else "evaluation"
        if corruption:
            spoilt = Corrupted(self.pool(world, name), *corruption)
            return Pool(spoilt, file.with_stem(f"{file.stem}-{corruption[0]}-{corruption[1]}"))
        return Pool(Scenes(length, seed, stream, one_colour=world == "one-colour"), file)

    def _result(self, place: str) -> dict[str, Any]:
        return json.loads((self.folder / place / RESULT).read_text())

    def finished(self, run: Run) -> bool:
        return (self.folder / run.place / RESULT).is_file()

    def rate(self, run: Run) -> float | None:
        """The row's rate: the run's own, or that of the best choosing run, None while one of them is missing."""
        if run.rate is not None or not self.plan.rows[run.row].trains:
            return run.rate or self.plan.rates[0]
        tried = self.plan.choosing(run.part, run.row)
        if not all(map(self.finished, tried)):
            return None
        return max(tried, key=lambda each: self.result(each.place)["scores"].get("hiou") or 0.0).rate

    def do(self, run: Run, rate: float) -> str:
        """Trains and scores; writes counts.npz, of every data set that it was scored on, and result.json; says what."""
        place, train = self.folder / run.place, self.plan.train
        config = replace(self.plan.rows[run.row], clip=run.part.clip)
        train = replace(
            train, iterations=max(1, run.steps), warmup=run.steps // 10, learning_rate=rate, seed=run.seed,
            validate_every=train.validate_every if run.rate is None else 0, progress=False, workers=0,
        )  # fmt: skip
        validation, clip = self.pool(run.world, "validation"), self.clip(run.part.clip)
        torch.manual_seed(run.seed)
        model, started = build_model(config, clip).to(new_accelerator("no").device), time.perf_counter()
        about = {"row": run.row, "seed": run.seed, "steps": run.steps, "rate": rate}
        result: dict[str, Any] = {**about, "asked": self.asked(run), "scores": {}, "curve": {}}
        try:
            if config.trains:
                options = {"validation": validation if train.validate_every else None, "output": place, "resume": True}
                history = fit(model, self.pool(run.world, "train"), self.split, train, **options).history
                result["curve"] = {row["iteration"]: row["hiou"] for row in history if "hiou" in row}
                result["seconds"] = round(time.perf_counter() - started, 1)
            counts = dict(self.scored(run, model))
            if not config.trains:
                result["curve"] = {0: self.summary(counts.pop("validation"))["hiou"]}
            if self.measure and run.rate is None:
                result["spectra"] = self.measure(model, validation)
            arrays: Any = {name: each.numpy().astype(np.uint16) for name, each in counts.items()}
            np.savez_compressed(buffer := BytesIO(), **arrays)
            write(place / COUNTS, buffer.getvalue())
            result["scores"] = self.summary(counts["test"])
            said = f"hIoU {mean_and_deviation([result['scores']['hiou']])}"
        except FloatingPointError as error:
            said = result["failed"] = str(error)
        write(place / RESULT, json.dumps(result, indent=1) + "\n")
        for name in (STATE, HALFWAY, *(["model.safetensors"] if run.rate is not None else [])):
            (place / name).unlink(missing_ok=True)
        return f"{run.place}, rate {rate}, {time.perf_counter() - started:.0f} s: {said}"

    def summary(self, counts: Tensor) -> dict[str, Any]:
        """The figures of counts (P, 3, C) by name, and "iou", each class's."""
        return Scores.of(ratios_of_tallies(counts.sum(0), self.split), self.split).as_dict()

    def counts(self, model: SptSeg, dataset: Dataset[Sample], seen_offset: float | None = None) -> Tensor:
        """Pixels right, labelled and predicted of each class, picture by picture: (P, 3, C)."""
        return tallies(confusion_matrices(model, dataset, self.split, seen_offset=seen_offset))

    def scored(self, run: Run, model: SptSeg) -> Iterator[tuple[str, Tensor]]:
        """Counts (P, 3, C) by name: "test", those of `after`, and each corruption's, such as "blur-1"."""
        validation = self.pool(run.world, "validation")
        test = validation if run.rate is not None else self.pool(run.world, "test")
        yield "test", self.counts(model, test)
        if run.rate is not None:
            return
        if not model.config.trains:
            yield "validation", self.counts(model, validation)
        for name, after in self.plan.after.items():
            if run.row in after.rows:
                layers = model.encoder.spectral_layers
                if after.without_spectral_prompts:
                    model.encoder.spectral_layers = frozenset()
                yield name, self.counts(model, test, after.seen_offset)
                model.encoder.spectral_layers = layers
        for kind, strength in SPOILT if run.part.corrupted else ():
            yield f"{kind}-{strength}", self.counts(model, self.pool(run.world, "test", (kind, strength)))

    def asked(self, run: Run) -> dict[str, Any]:
        """What a finished run must have been asked for, to be the same."""
        plan = self.plan
        about = {"model": asdict(plan.rows[run.row]), "train": asdict(plan.train), "scenes": plan.scenes}
        if run.rate is None:
            about |= {"choosing": (plan.rates, plan.choosing_steps, plan.choosing_seed)}
        return json.loads(json.dumps(about | {"clip": self.fingerprint(run.part.clip)}))

    def work(self, share: tuple[int, int], until: float, say: Callable[[str], object]) -> bool:
        """Does a share's runs that nobody has done, until all are done or `until` (time.monotonic); whether all are."""
        todo = self.plan.runs(share)
        for run in filter(self.finished, todo):
            if other := differing(self.result(run.place)["asked"], self.asked(run)):
                what = f"{self.folder / run.place} is of another plan or CLIP ({', '.join(other)})"
                raise ValueError(f"{what}; choose another output folder, or delete it")
        with ended_at(until):
            while (todo := [run for run in todo if not self.finished(run)]) and time.monotonic() < until:
                if not any(self.tried(run, say) for run in todo):
                    time.sleep(0.5)
        if todo:
            say(f"{len(todo)} runs are left, the first {todo[0].place}: the same command goes on")
        return not todo

    def tried(self, run: Run, say: Callable[[str], object]) -> bool:
        """Does a run, if its rate is known and no other process is at it; whether it did."""
        rate = self.rate(run)
        if rate is None:
            return False
        with claimed(self.folder / run.place / "lock") as mine:
            if not mine or self.finished(run):
                return False
            say(self.do(run, rate))
        return True


@contextmanager
def ended_at(until: float) -> Iterator[None]:
    """SIGTERM at a time (time.monotonic), upon which `fit` saves its state, ends the block."""

    def end(*_: object) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, end)
    rest = min(max(0, until - time.monotonic()), threading.TIMEOUT_MAX)
    timer = threading.Timer(rest, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        yield
    except SystemExit:
        if time.monotonic() < until:
            raise
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)
