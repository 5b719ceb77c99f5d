"""Several configurations over several seeds, trained for equal steps and scored on the same pictures: one table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import Dataset

from sptseg.checkpoints import load_model
from sptseg.datasets import Sample, Split
from sptseg.inference import FIGURES, evaluate, metrics
from sptseg.model import ModelConfig, build_model, fingerprint, load_clip
from sptseg.system import is_main_process, write
from sptseg.training.config import TrainConfig
from sptseg.training.loop import fit
from sptseg.training.presets import in_setting
from sptseg.training.state import HALFWAY, differing, identity

RESULT = "result.json"


def earlier(file: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result of a finished run, None without one. Raises ValueError if it was asked for with other settings."""
    result = json.loads(file.read_text()) if file.is_file() else None
    if result and (other := differing(result["asked"], asked)):
        differ = f"{file} holds a run with other settings of {', '.join(other)}"
        raise ValueError(f"{differ}; choose another output folder, or delete it")
    return result


def run_one(
    name: str,
    config: ModelConfig,
    dataset: Dataset[Sample],
    validation: Dataset[Sample],
    split: Split,
    train: TrainConfig,
    folder: Path,
) -> dict[str, Any]:
    """Trains and scores one configuration with one seed; a stopped run goes on, a finished one is read from `folder`.

    The name may end in @supervised or @transductive (`in_setting`); the latter goes on from the half-way checkpoint of
    the run without that ending, which is made if need be. Raises ValueError if `folder` holds a run with another model,
    CLIP, split, training, or other pictures.
    """
    base, _, setting = name.partition("@")
    file, start = folder / f"{name}-seed{train.seed}" / RESULT, None
    if setting == "transductive":
        run_one(base, config, dataset, validation, split, train, folder)
        start = folder / f"{base}-seed{train.seed}" / HALFWAY
    config, train = in_setting(config, train, setting or "inductive")  # pyright: ignore[reportArgumentType]
    torch.manual_seed(train.seed)  # for all that is random from here on: making a CLIP draws numbers too
    clip = load_clip(config.clip, config.clip_weights)
    like = json.loads(file.read_text())["asked"]["clip"] if file.is_file() else ""
    asked = {
        "model": asdict(config), "train": asdict(train), "split": asdict(split), "data": identity(dataset),
        "validation": identity(validation), "clip": fingerprint(clip, like=like),
    }  # fmt: skip
    if before := earlier(file, asked):
        return before
    model = build_model(config, clip) if start is None else load_model(start, clip)
    model.config = config
    if config.trains:
        fit(model, dataset, split, train, output=file.parent, resume=True)
    scores = evaluate(model, validation, split, progress=train.progress)
    result = {"name": name, "seed": train.seed, "scores": scores.as_dict(), "asked": asked}
    if is_main_process():
        write(file, json.dumps(result, indent=1) + "\n")
    PartialState().wait_for_everyone()  # who comes later must find it
    return result


def ablate(
    configurations: Mapping[str, ModelConfig],
    dataset: Dataset[Sample],
    validation: Dataset[Sample],
    split: Split,
    train: TrainConfig,
    seeds: Sequence[int],
    folder: Path,
) -> str:
    """Runs every configuration with every seed (those without training once) and returns the table as Markdown.

    Results go to `folder` as they come, so a stopped ablation goes on where it was. Names: as for `run_one`.
    """
    if train.setting != "inductive":
        raise ValueError(f"the setting {train.setting} goes behind a configuration's name, such as spt@{train.setting}")
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
