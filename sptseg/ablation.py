"""Several configurations over several seeds, trained for equal steps and scored on the same pictures: one table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from sptseg.datasets import Sample
from sptseg.model import DENSE_CLIP, EMBEDDED_CONFIG, SPT_RELEASED, ZEGCLIP, ModelConfig, build_model
from sptseg.splits import Split
from sptseg.training import TrainConfig, evaluate, fit

FIGURES = {"pixel_accuracy": "pAcc", "miou_seen": "mIoU(S)", "miou_unseen": "mIoU(U)", "hiou": "hIoU"}
CONFIGURATIONS: dict[str, ModelConfig] = {
    "dense-clip": DENSE_CLIP,
    "zegclip-released": ZEGCLIP,
    "spt-released": SPT_RELEASED,
    "zegclip": replace(ZEGCLIP, start="dense_clip", class_embedding_twice=False, seen_offset=0.0),
    "zegclip+spectral-prompts": replace(
        ZEGCLIP, start="dense_clip", class_embedding_twice=False, seen_offset=0.0, spectral_layers=(0, 1)
    ),
    "spt": EMBEDDED_CONFIG,
    "spt+selection": replace(EMBEDDED_CONFIG, selection=True),
    "spt-spectral-prompts": replace(EMBEDDED_CONFIG, spectral_layers=()),
    "spt-deep-prompts": replace(EMBEDDED_CONFIG, prompt_tokens=0),
    "spt+ssim": replace(EMBEDDED_CONFIG, loss="spt"),
}


def run(
    name: str,
    config: ModelConfig,
    dataset: Dataset[Sample],
    validation: Dataset[Sample],
    split: Split,
    train: TrainConfig,
    folder: Path,
) -> dict[str, Any]:
    """Trains and scores one configuration with one seed; a finished run is read from `folder` instead."""
    place = folder / f"{name}-seed{train.seed}"
    result_file = place / "result.json"
    asked = json.loads(json.dumps({"model": asdict(config), "train": asdict(train), "split": split.name}))
    if result_file.is_file():
        result = json.loads(result_file.read_text())
        if result["asked"] == asked:
            return result
        raise ValueError(f"{result_file} holds a run with other settings; choose another output folder, or delete it")
    torch.manual_seed(train.seed)
    model = build_model(config)
    if config.trains:
        fit(model, dataset, split, train, output=place)
    scores = evaluate(model, validation, split, progress=train.progress)
    place.mkdir(parents=True, exist_ok=True)
    result = {"name": name, "seed": train.seed, "scores": scores.as_dict(), "asked": asked}
    result_file.write_text(json.dumps(result, indent=1) + "\n")
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

    Results go to `folder` as they come, so a stopped ablation goes on where it was.
    """
    results: list[dict[str, Any]] = []
    for name, config in configurations.items():
        for seed in seeds if config.trains else seeds[:1]:
            results.append(run(name, config, dataset, validation, split, replace(train, seed=seed), folder))
            (folder / "table.md").write_text(table(results))
    return table(results)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Mean ± standard deviation over seeds, in percent, one row a configuration."""
    lines = ["| configuration | seeds | " + " | ".join(FIGURES.values()) + " |", "|---|---|" + "---|" * len(FIGURES)]
    for name in dict.fromkeys(result["name"] for result in results):
        own = [result["scores"] for result in results if result["name"] == name]
        cells = [spread([scores[figure] for scores in own]) for figure in FIGURES]
        lines.append(f"| {name} | {len(own)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float | None]) -> str:
    """Mean ± sample standard deviation in percent."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{statistics.mean(known):.1f}"
    return f"{mean} ± {statistics.stdev(known):.1f}" if len(known) > 1 else mean
