"""Several configurations over several seeds, trained for equal steps and scored on the same pictures: one table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import PartialState
from torch.utils.data import Dataset

from sptseg.checkpoints import completed, load_model
from sptseg.datasets import Sample, Split
from sptseg.inference import evaluate
from sptseg.model import (
    DENSE_CLIP,
    EMBEDDED_CONFIG,
    SPT_RELEASED,
    ZEGCLIP,
    ModelConfig,
    ReadOut,
    build_model,
    fingerprint,
    load_clip,
)
from sptseg.system import is_main_process, write
from sptseg.training.config import TrainConfig
from sptseg.training.loop import fit
from sptseg.training.presets import in_setting
from sptseg.training.state import HALFWAY, identity

FIGURES = {"pixel_accuracy": "pAcc", "miou_seen": "mIoU(S)", "miou_unseen": "mIoU(U)", "hiou": "hIoU"}
# 97.5 % quantiles of Student's t by degrees of freedom.
STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
DENSE_ZEGCLIP = replace(ZEGCLIP, start="dense_clip", class_embedding_twice=False, seen_offset=0.0)
CONFIGURATIONS: dict[str, ModelConfig] = {
    "dense-clip": DENSE_CLIP,
    **{f"dense-clip-{name}": replace(DENSE_CLIP, readout=name) for name in get_args(ReadOut) if name != "plain"},
    "zegclip-released": ZEGCLIP,
    "spt-released": SPT_RELEASED,
    "zegclip": DENSE_ZEGCLIP,
    "zegclip+spectral-prompts": replace(DENSE_ZEGCLIP, spectral_layers=(0, 1)),
    "spt": EMBEDDED_CONFIG,
    "spt+selection": replace(EMBEDDED_CONFIG, selection=True),
    "spt-spectral-prompts": replace(EMBEDDED_CONFIG, spectral_layers=()),
    "spt-deep-prompts": replace(EMBEDDED_CONFIG, prompt_tokens=0),
    "spt+ssim": replace(EMBEDDED_CONFIG, loss="spt"),
    "zegclip-released+spectral-prompts": replace(ZEGCLIP, spectral_layers=(0, 1)),
    "spt-released-ssim": replace(SPT_RELEASED, loss="zegclip"),
}
# The paper's ablation, part by part: nothing trained, ZegCLIP, + spectral prompts, + spectral guided decoder, + SSIM.
LADDER = ("dense-clip", "zegclip-released", "zegclip-released+spectral-prompts", "spt-released-ssim", "spt-released")


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
    if setting not in ("", "inductive", "supervised", "transductive"):
        raise ValueError(f"{name} asks for the setting {setting!r}; wanted {base}@supervised or {base}@transductive")
    place = folder / f"{name}-seed{train.seed}"
    start = None
    if setting == "transductive":
        run_one(base, config, dataset, validation, split, train, folder)
        start = folder / f"{base}-seed{train.seed}" / HALFWAY
    config, train = in_setting(config, train, setting or "inductive")
    torch.manual_seed(train.seed)  # for all that is random from here on: making a CLIP draws numbers too
    clip = load_clip(config.clip, config.clip_weights)
    result_file = place / "result.json"
    parts = {"model": asdict(config), "train": asdict(train), "split": asdict(split), "clip": fingerprint(clip)}
    data = {"data": identity(dataset), "validation": identity(validation)}
    asked = json.loads(json.dumps({**parts, **data}))
    if result_file.is_file():
        result = json.loads(result_file.read_text())
        before = {**result["asked"], "model": completed(result["asked"]["model"])}
        before["model"]["clip_weights"] = config.clip_weights  # wherever the file lies: the fingerprint tells it
        asked["clip"] = fingerprint(clip, like=before.get("clip", ""))
        for part in ("data", "validation"):  # what is younger than the file
            before[part] = {**asked[part], **before.get(part, {"pictures": 0})}
        other = [part for part in asked if before.get(part) != asked[part]]
        if not other:
            return result
        raise ValueError(
            f"{result_file} holds a run with other {', '.join(other)}; choose another output folder, or delete it"
        )
    model = build_model(config, clip) if start is None else load_model(start, clip)
    model.config = config
    if config.trains:
        fit(model, dataset, split, train, output=place, resume=True)
    scores = evaluate(model, validation, split, progress=train.progress)
    result = {"name": name, "seed": train.seed, "scores": scores.as_dict(), "asked": asked}
    if is_main_process():
        write(result_file, json.dumps(result, indent=1) + "\n")
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
    lines = ["| configuration | seeds | " + " | ".join(FIGURES.values()) + " |", "|---|---|" + "---|" * len(FIGURES)]
    for name in dict.fromkeys(result["name"] for result in results):
        own = [result["scores"] for result in results if result["name"] == name]
        cells = [mean_and_deviation([scores[figure] for scores in own]) for figure in FIGURES]
        lines.append(f"| {name} | {len(own)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def mean_and_deviation(values: Sequence[float | None]) -> str:
    """Mean ± sample standard deviation in percent."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{statistics.mean(known):.1f}"
    return f"{mean} ± {statistics.stdev(known):.1f}" if len(known) > 1 else mean


@dataclass(frozen=True)
class Paired:
    """What one configuration has more than another, seed by seed, in percentage points.

    `by_class` holds each class's differences in IoU, a value per seed; seeds that only one of the two has are left out.
    """

    seeds: tuple[int, ...]
    hiou: tuple[float, ...]
    miou_seen: tuple[float, ...]
    miou_unseen: tuple[float, ...]
    by_class: dict[str, tuple[float, ...]]


def paired(results: Sequence[Mapping[str, Any]], name: str, other: str) -> Paired:
    """Compares two configurations on the seeds that both have: name minus other."""
    mine, theirs = ({r["seed"]: r["scores"] for r in results if r["name"] == wanted} for wanted in (name, other))
    seeds = tuple(sorted(mine.keys() & theirs.keys()))
    if not seeds:
        raise ValueError(
            f"{name!r} has the seeds {sorted(mine)} and {other!r} {sorted(theirs)}; wanted a seed that both have"
        )

    def gain(figure: str) -> tuple[float, ...]:
        return tuple(100 * (mine[seed][figure] - theirs[seed][figure]) for seed in seeds)

    both = [
        c for c in mine[seeds[0]]["iou"] if all(s["iou"][c] is not None for r in (mine, theirs) for s in r.values())
    ]
    by_class = {c: tuple(100 * (mine[seed]["iou"][c] - theirs[seed]["iou"][c]) for seed in seeds) for c in both}
    return Paired(seeds, gain("hiou"), gain("miou_seen"), gain("miou_unseen"), by_class)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval of a mean: mean ± t sd / sqrt(n), Student's t with n - 1 degrees of freedom."""
    if len(values) - 1 not in STUDENT_T:
        raise ValueError(f"mean_interval: {len(values)} values; wanted 2 to {max(STUDENT_T) + 1}")
    mean = statistics.mean(values)
    half = STUDENT_T[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return mean - half, mean + half
