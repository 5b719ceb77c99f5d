"""What `sptseg ablate` runs: several configurations over several seeds, trained for equal steps and scored on the same
pictures; or a study from one file: which rows, how their rates are chosen, which trials, in order of priority."""

import json
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from accelerate import PartialState
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.data import Dataset

from sptseg.checkpoints import load_model, with_tuples
from sptseg.datasets import STRENGTHS, Corrupted, Pool, Sample, Scenes, Split
from sptseg.inference import FIGURES, Scores, confusion_matrices, evaluate, metrics, new_accelerator
from sptseg.model import Clip, ModelConfig, SptSeg, build_model, fingerprint, load_clip
from sptseg.system import bytes_of, is_main_process, write
from sptseg.training.config import EMBEDDED_TRAINING, TrainConfig
from sptseg.training.loop import fit
from sptseg.training.presets import CONFIGURATIONS, in_setting
from sptseg.training.state import HALFWAY, STATE, differing, identity

Pictures = Dataset[Sample]
Measure = Callable[[SptSeg, Pictures], dict[str, float]]
RESULT, COUNTS = "result.json", "counts.npz"
SPOILT: dict[str, tuple[Any, int]] = {
    f"{kind}-{strength}": (kind, strength) for kind in STRENGTHS for strength in (1, 2, 3)
}


def earlier(file: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result of a finished run, None without one. Raises ValueError if it was asked for with other settings."""
    result = json.loads(file.read_text()) if file.is_file() else None
    if result and (other := differing(result["asked"], asked)):
        differ = f"{file} holds a run with other settings of {', '.join(other)}"
        raise ValueError(f"{differ}; choose another output folder, or delete it")
    return result


def run_one(
    name: str, config: ModelConfig, data: Pictures, validation: Pictures, split: Split, train: TrainConfig, folder: Path
) -> dict[str, Any]:
    """Trains and scores one configuration with one seed; a stopped run goes on, a finished one is read from `folder`.

    The name may end in @supervised or @transductive (`in_setting`); the latter goes on from the half-way checkpoint of
    the run without that ending, which is made if need be."""
    base, _, setting = name.partition("@")
    file, start = folder / f"{name}-seed{train.seed}" / RESULT, None
    if setting == "transductive":
        run_one(base, config, data, validation, split, train, folder)
        start = folder / f"{base}-seed{train.seed}" / HALFWAY
    config, train = in_setting(config, train, setting or "inductive")  # pyright: ignore[reportArgumentType]
    torch.manual_seed(train.seed)  # for all that is random from here on: making a CLIP draws numbers too
    clip = load_clip(config.clip, config.clip_weights)
    like = json.loads(file.read_text())["asked"]["clip"] if file.is_file() else ""
    asked = {
        "model": asdict(config), "train": asdict(train), "split": asdict(split), "data": identity(data),
        "validation": identity(validation), "clip": fingerprint(clip, like=like),
    }  # fmt: skip
    if before := earlier(file, asked):
        return before
    model = build_model(config, clip) if start is None else load_model(start, clip)
    model.config = config
    if config.trains:
        fit(model, data, split, train, output=file.parent, resume=True)
    scores = evaluate(model, validation, split, progress=train.progress)
    result = {"name": name, "seed": train.seed, "scores": scores.as_dict(), "asked": asked}
    if is_main_process():
        write(file, json.dumps(result, indent=1) + "\n")
    PartialState().wait_for_everyone()  # who comes later must find it
    return result


def ablate(
    configurations: Mapping[str, ModelConfig],
    dataset: Pictures,
    validation: Pictures,
    split: Split,
    train: TrainConfig,
    seeds: Sequence[int],
    folder: Path,
) -> str:
    """Runs every configuration with every seed (those without training once) and returns the table as Markdown. Results
    go to `folder` as they come, so a stopped ablation goes on where it was. Names: as for `run_one`."""
    if train.setting != "inductive":
        raise ValueError(f"the setting {train.setting} goes behind a configuration's name, such as spt@{train.setting}")
    if not seeds or len({*seeds}) < len(seeds):
        raise ValueError(f"seeds are {', '.join(map(str, seeds)) or 'none'}; wanted one or more, each once")
    results: list[dict[str, Any]] = []
    for name, config in configurations.items():
        for seed in seeds if config.trains else seeds[:1]:
            results.append(run_one(name, config, dataset, validation, split, replace(train, seed=seed), folder))
            if is_main_process():
                write(folder / "table.md", table(results))
                rows = [{key: result[key] for key in ("name", "seed", "scores")} for result in results]
                write(folder / "ablation.json", json.dumps({"rows": rows}, indent=1) + "\n")
    return table(results)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Mean ± standard deviation over seeds, in percent, one row a configuration."""
    rows: list[list[object]] = [["configuration", "seeds", *FIGURES.values()]]
    for name in dict.fromkeys(result["name"] for result in results):
        own = [result["scores"] for result in results if result["name"] == name]
        rows.append([name, len(own), *(mean_and_deviation([scores[figure] for scores in own]) for figure in FIGURES)])
    return metrics.table(*rows) + "\n"


def mean_and_deviation(values: Sequence[float | None]) -> str:
    """Mean ± sample standard deviation in percent."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{statistics.mean(known):.1f}"
    return f"{mean} ± {statistics.stdev(known):.1f}" if len(known) > 1 else mean


@dataclass(frozen=True)
class Part:
    """Rows of a study that are trained alike."""

    question: str
    clip: str
    rows: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    corrupted: bool = False  # the trained models are also scored on spoilt pictures
    one_colour: bool = False  # all scenes are of one colour


@dataclass(frozen=True)
class After:
    """What is changed in the trained models of some rows, without training: no spectral prompts, another offset."""

    rows: tuple[str, ...] = ()
    without_spectral_prompts: bool = False
    seen_offset: float | None = None


@dataclass(frozen=True)
class Trial:
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
        """Its folder."""
        kind = f"{self.steps}-steps-seed-{self.seed}" if self.rate is None else f"rate-{self.rate}"
        return f"{self.part.clip}/{self.world}/{self.row}/{kind}"


@dataclass(frozen=True)
class Plan:
    """A study. Each row is trained with each rate; it gets the one with the best hIoU on the validation scenes."""

    scenes: dict[str, tuple[int, int]]  # how many, and of which seed, for "train", "validation" and "test"
    train: TrainConfig  # what all trainings have in common; their warm-up is a tenth of the steps
    rates: tuple[float, ...]
    choosing_steps: int
    choosing_seed: int
    rows: dict[str, ModelConfig]
    parts: tuple[Part, ...]  # which rows are trained, in order of priority
    pairs: tuple[tuple[str, str, str], ...]  # (question, row, other row) to compare; "ROW, NAME" with a NAME of `after`
    after: dict[str, After] = field(default_factory=dict)
    given_rates: dict[str, float] = field(default_factory=dict)  # of rows whose rate is not chosen

    @classmethod
    def read(cls, file: Path) -> Self:
        """From JSON; a row is {"base": one of `CONFIGURATIONS`, and fields of ModelConfig}. Raises ValueError."""
        try:
            given = json.loads(file.read_text(), object_hook=with_tuples)
            given["rows"] = {
                name: replace(CONFIGURATIONS[row.pop("base")], **row) for name, row in given["rows"].items()
            }
            given["train"] = replace(EMBEDDED_TRAINING, **given["train"])
            given["parts"] = tuple(Part(**part) for part in given["parts"])
            given["given_rates"] = {row: float(rate) for row, rate in given.get("given_rates", {}).items()}
            given["after"] = {name: After(**after) for name, after in given.get("after", {}).items()}
            plan = cls(**given)
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            wanted = ", ".join(f.name for f in fields(cls))
            raise ValueError(f"{file} is no plan of a study ({error}); wanted an object of {wanted}") from error
        named = {row for each in (*plan.parts, *plan.after.values()) for row in each.rows} | {*plan.given_rates}
        if unknown := sorted(named - plan.rows.keys()):
            raise ValueError(f"{file} names the rows {', '.join(unknown)}, which its rows lack")
        return plan

    def choosing(self, part: Part, row: str) -> list[Trial]:
        """The trials that choose a row's rate, none if it is given."""
        rates = () if row in self.given_rates else self.rates
        return [Trial(part, row, self.choosing_seed, self.choosing_steps, rate) for rate in rates]

    def trials(self, share: tuple[int, int] = (1, 1)) -> list[Trial]:
        """All trials, each once, by priority, of each part first those that choose rates. Of share (I, N) those
        of every N-th row from the I-th on, as a row's trials wait for one another."""
        found: dict[str, Trial] = {}
        for part in self.parts:
            trained = [row for row in part.rows if self.rows[row].trains]
            trials = [trial for row in trained for trial in self.choosing(part, row)]
            for row in part.rows:
                steps = part.steps if row in trained else 0  # then it is the same with all seeds
                trials += [Trial(part, row, seed if steps else 0, steps) for seed in part.seeds]
            for trial in trials:
                found.setdefault(trial.place, trial)
        rows = list(dict.fromkeys((trial.part.clip, trial.row) for trial in found.values()))
        mine = rows[share[0] - 1 :: share[1]]
        return [trial for trial in found.values() if (trial.part.clip, trial.row) in mine]


@cache
def clip_and_fingerprint(name: str) -> tuple[Clip, str]:
    clip, split = load_clip(name), Scenes(1).split
    for names in (split.texts(), split.texts(split.seen)):
        clip.class_embeddings(names)  # now, on the CPU: the same bits in any order of trials
    return clip, fingerprint(clip)


class Study:
    """A plan and the folder of its results; `measure` makes figures of trained models and pictures, to be kept."""

    def __init__(self, plan: Plan, folder: Path, measure: Measure | None = None) -> None:
        self.plan, self.folder, self.measure, self.split = plan, folder, measure, Scenes(1).split
        self.results: dict[str, dict[str, Any]] = {}

    def pool(self, world: str, name: str, corruption: str = "") -> Pool:
        length, seed = self.plan.scenes[name]
        file = self.folder / "pools" / f"{world}-{name}-{length}-{seed}.npy"
        if corruption:
            spoilt = Corrupted(self.pool(world, name), *SPOILT[corruption])
            return Pool(spoilt, file.with_stem(f"{file.stem}-{corruption}"))
        stream = "training" if name == "train" else "evaluation"
        return Pool(Scenes(length, seed, stream, one_colour=world == "one-colour"), file)

    def result(self, trial: Trial) -> dict[str, Any] | None:
        """What a finished trial found. Raises ValueError if another plan asked for it, or it is of another CLIP."""
        file = self.folder / trial.place / RESULT
        if trial.place not in self.results and file.is_file():
            self.results[trial.place] = earlier(file, self.asked(trial)) or {}
        return self.results.get(trial.place)

    def rate(self, trial: Trial) -> float | None:
        """The trial's own rate, its row's given one, or that of the best choosing trial; None while one is missing."""
        given = trial.rate or self.plan.given_rates.get(trial.row)
        if given or not self.plan.rows[trial.row].trains:
            return given or self.plan.rates[0]
        found = [self.result(each) for each in self.plan.choosing(trial.part, trial.row)]
        if None in found:
            return None
        return max(filter(None, found), key=lambda each: each["scores"].get("hiou") or 0.0)["rate"]

    def do(self, trial: Trial) -> str:
        """Trains and scores; writes counts.npz, of every data set that it was scored on, and result.json; says what."""
        place, train, choosing = self.folder / trial.place, self.plan.train, trial.rate is not None
        rate: Any = self.rate(trial)
        config = replace(self.plan.rows[trial.row], clip=trial.part.clip)
        train = replace(
            train, iterations=max(1, trial.steps), warmup=trial.steps // 10, learning_rate=rate, seed=trial.seed,
            validate_every=0 if choosing else train.validate_every, progress=False, workers=0,
        )  # fmt: skip
        validation, (clip, _) = self.pool(trial.world, "validation"), clip_and_fingerprint(trial.part.clip)
        torch.manual_seed(trial.seed)
        model, started = build_model(config, clip).to(new_accelerator("no").device), time.perf_counter()
        about = {"row": trial.row, "seed": trial.seed, "steps": trial.steps, "rate": rate}
        result: dict[str, Any] = {**about, "asked": self.asked(trial), "scores": {}, "curve": {}}
        try:
            if config.trains:
                options = {"validation": validation if train.validate_every else None, "output": place, "resume": True}
                history = fit(model, self.pool(trial.world, "train"), self.split, train, **options).history
                result["curve"] = {row["iteration"]: row["hiou"] for row in history if "hiou" in row}
                result["seconds"] = round(time.perf_counter() - started, 1)
            else:
                result["curve"] = {0: self.summary(self.counts(trial, model, "validation"))["hiou"]}
            counts = {name: self.counts(trial, model, name) for name in self.scored(trial)}
            if self.measure and not choosing:
                result["spectra"] = self.measure(model, validation)
            arrays: Any = {name: each.numpy().astype(np.uint16) for name, each in counts.items()}
            write(place / COUNTS, bytes_of(partial(np.savez_compressed, **arrays)))
            result["scores"] = self.summary(counts["test"])
            said = f"hIoU {mean_and_deviation([result['scores']['hiou']])}"
        except FloatingPointError as error:
            said = result["failed"] = str(error)
        write(place / RESULT, json.dumps(result, indent=1) + "\n")
        for name in (STATE, HALFWAY, *(["model.safetensors"] if choosing else [])):
            (place / name).unlink(missing_ok=True)
        return f"{trial.place}, rate {rate}, {time.perf_counter() - started:.0f} s: {said}"

    def scored(self, trial: Trial) -> list[str]:
        """What a trial is scored on: "test", the changes of `after`, and each corruption, such as "blur-1"."""
        if trial.rate is not None:
            return ["test"]
        changes = [name for name, after in self.plan.after.items() if trial.row in after.rows]
        return ["test", *changes, *(SPOILT if trial.part.corrupted else ())]

    def counts(self, trial: Trial, model: SptSeg, name: str) -> Tensor:
        """Pixels right, labelled and predicted of each class, picture by picture: (P, 3, C)."""
        after, layers = self.plan.after.get(name, After()), model.encoder.spectral_layers
        scenes = "validation" if trial.rate is not None or name == "validation" else "test"
        if after.without_spectral_prompts:
            model.encoder.spectral_layers = frozenset()
        pictures = self.pool(trial.world, scenes, name if name in SPOILT else "")
        found = metrics.tallies(confusion_matrices(model, pictures, self.split, seen_offset=after.seen_offset))
        model.encoder.spectral_layers = layers
        return found

    def summary(self, counts: Tensor) -> dict[str, Any]:
        """The figures of counts (P, 3, C) by name, and "iou", each class's."""
        return Scores.of(metrics.ratios_of_tallies(counts.sum(0), self.split), self.split).as_dict()

    def asked(self, trial: Trial) -> dict[str, Any]:
        """What a finished trial must have been asked for, to be the same."""
        plan = self.plan
        about = {"model": asdict(plan.rows[trial.row]), "train": asdict(plan.train), "scenes": plan.scenes}
        if trial.rate is None:
            choosing = (plan.rates, plan.choosing_steps, plan.choosing_seed)
            about |= {"choosing": plan.given_rates.get(trial.row, choosing)}
        return json.loads(json.dumps(about | {"clip": clip_and_fingerprint(trial.part.clip)[1]}))

    def work(self, share: tuple[int, int], until: float, say: Callable[[str], object]) -> bool:
        """Does a share's open trials till `until` (monotonic), when SIGTERM has `fit` save; whether all are done."""
        todo = self.plan.trials(share)
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        rest = min(max(0, until - time.monotonic()), threading.TIMEOUT_MAX)
        timer = threading.Timer(rest, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        try:
            while (todo := [trial for trial in todo if not self.result(trial)]) and time.monotonic() < until:
                if not any(self.tried(trial, say) for trial in todo):
                    time.sleep(0.5)
        except SystemExit:
            if time.monotonic() < until:
                raise
        finally:
            timer.cancel()
            signal.signal(signal.SIGTERM, before)
        if todo:
            say(f"{len(todo)} runs are left, the first {todo[0].place}: the same command goes on")
        return not todo

    def tried(self, trial: Trial, say: Callable[[str], object]) -> bool:
        """Does a trial, if its rate is known and no other process is at it; whether it did."""
        with suppress(Timeout), FileLock(self.folder / trial.place / "lock", timeout=0):
            if not self.result(trial) and self.rate(trial) is not None:
                say(self.do(trial))
                return True
        return False
