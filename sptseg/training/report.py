"""What a study found: means over seeds, differences of rows with intervals, curves, as tables and as one record."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sptseg.datasets import CORRUPTIONS, Split
from sptseg.inference import SUMMARY, ratios_of_tallies
from sptseg.system import write
from sptseg.training.ablation import FIGURES, mean_and_deviation
from sptseg.training.study import COUNTS, SPOILT, Run, Study

FLAT_STEPS, FLAT_GAIN = 500, 0.005  # the rule of `flat`
KINDS = {kind: [f"{kind}-{strength}" for k, strength in SPOILT if k == kind] for kind in CORRUPTIONS}
SETS = {"": ["test"], **KINDS, "all corruptions": [name for names in KINDS.values() for name in names]}


class Group(NamedTuple):
    """Rows that are compared with one another."""

    clip: str
    world: str
    steps: int


def flat(curve: Mapping[int, float]) -> int | None:
    """The first step at which a curve is flat, None if it never is.

    Flat: the best value of the last 500 steps is less than 0.5 points (0.005) above the best before them.
    """
    for step in sorted(curve):
        before = [value for at, value in curve.items() if at <= step - FLAT_STEPS]
        last = [value for at, value in curve.items() if step - FLAT_STEPS < at <= step]
        if before and max(last) < max(before) + FLAT_GAIN:
            return step
    return None


def drawn(count: int, draws: int, seed: int) -> Tensor:
    """How often each of `count` is drawn in as many draws with replacement: (1 + draws, count); first each once."""
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(count, (draws, count), generator=generator)
    often = torch.zeros(draws, count, dtype=torch.float64).scatter_add_(
        1, picked, torch.ones(1, 1).double().expand(draws, count)
    )
    return torch.cat([torch.ones(1, count, dtype=torch.float64), often])


def interval(mine: Tensor, other: Tensor, split: Split, draws: int = 2000) -> Tensor:
    """Difference of two rows, mine less other, its lower and its upper end (95 %): (3, 4), the figures of SUMMARY.

    Counts (S, P, K, 3, C) of the same seeds and pictures, see `tallies`. Seeds and pictures are drawn with replacement,
    the same ones for both rows; a seed's figures are those of its pooled pictures, means over the K data sets.
    """
    seeds, pictures = drawn(len(mine), draws, 0), drawn(mine.shape[1], draws, 1)

    def figures(counts: Tensor) -> Tensor:  # (S, P, K, 3, C) -> (1 + draws, S, 4)
        by_seed = [(pictures @ each.flatten(1)).unflatten(1, each.shape[1:]) for each in counts.double()]
        return torch.stack([ratios_of_tallies(each, split)[..., : len(SUMMARY)].mean(1) for each in by_seed], dim=1)

    gain = figures(mine) - figures(other)
    means = (seeds[:, :, None] * gain).sum(1) / len(mine)
    ends = means[1:].nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return torch.cat([means[:1], ends])


class Found:
    """The finished runs of a study, by group, row and seed; a row "ROW, NAME" is ROW with a change after training."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.runs: dict[Group, dict[str, dict[int, Run]]] = {}
        for run in study.plan.runs():
            if run.rate is None and study.finished(run) and "failed" not in study.result(run.place):
                group = self.runs.setdefault(Group(run.part.clip, run.world, run.steps), {})
                changed = [f"{run.row}, {name}" for name, after in study.plan.after.items() if run.row in after.rows]
                for row in (run.row, *changed):
                    group.setdefault(row, {})[run.seed] = run

    def seeds(self, group: Group, row: str) -> dict[int, Run]:
        """A row's runs by seed; a row that is not trained is the same with all seeds and after all steps."""
        untrained = self.runs.get(group._replace(steps=0), {}).get(row, {})
        seeds = {seed for runs in self.runs[group].values() for seed in runs}
        return self.runs[group].get(row) or {seed: run for run in untrained.values() for seed in seeds}

    def counts(self, group: Group, row: str, seeds: Sequence[int], names: Sequence[str]) -> Tensor | None:
        """(S, P, K, 3, C), None if a run was not scored on one of the data sets."""
        _, _, changed = row.partition(", ")
        found = []
        for seed in seeds:
            with np.load(self.study.folder / self.seeds(group, row)[seed].place / COUNTS) as file:
                wanted = [changed or name for name in names]
                if not set(wanted) <= set(file.files) or (changed and names != ["test"]):
                    return None
                found.append(np.stack([file[name] for name in wanted], axis=1).astype(np.int32))
        return torch.from_numpy(np.stack(found))

    def rows(self) -> list[dict[str, Any]]:
        """Every row of every group: scores seed by seed, its rate, its curve, when that is flat."""
        found = []
        for group, rows in self.runs.items():
            for row, runs in rows.items():
                results = [self.study.result(run.place) for run in runs.values()]
                scores = [self.scores(group, row, seed) for seed in runs]
                curves = [result["curve"] for result in results]
                curve = {int(step): statistics.mean(c[step] for c in curves) for step in curves[0]}
                spectra = [r["spectra"] for r in results if r.get("spectra")] if ", " not in row else []
                found.append({
                    **group._asdict(), "row": row, "seeds": list(runs), "rate": results[0]["rate"], "scores": scores,
                    "curve": curve, "flat": flat(curve), "seconds": [result.get("seconds") for result in results],
                    "spectra": {name: [s[name] for s in spectra] for name in (spectra[0] if spectra else ())},
                })  # fmt: skip
        return found

    def scores(self, group: Group, row: str, seed: int) -> dict[str, Any]:
        counts = self.counts(group, row, [seed], ["test"])
        assert counts is not None
        return self.study.summary(counts[0, :, 0])

    def pairs(self) -> list[dict[str, Any]]:
        """Every pair of the plan in every group that has both rows, plainly and on spoilt pictures, on common seeds."""
        found = []
        for group in self.runs:
            for question, row, other in self.study.plan.pairs:
                seeds = sorted(self.seeds(group, row).keys() & self.seeds(group, other).keys())
                for pictures, names in SETS.items() if seeds else ():
                    both = [self.counts(group, each, seeds, names) for each in (row, other)]
                    if both[0] is not None and both[1] is not None:
                        ends = interval(both[0], both[1], self.study.split).tolist()
                        figures = {name: [each[i] for each in ends] for i, name in enumerate(SUMMARY)}
                        found.append({
                            **group._asdict(), "question": question, "row": row, "other": other, "pictures": pictures,
                            "seeds": seeds, **figures,
                        })  # fmt: skip
        return found


def write_report(study: Study) -> str:
    """Writes tables.md and record.json, what the tables and curves are made of, to the study's folder: the tables."""
    found = Found(study)
    rows, pairs = found.rows(), found.pairs()
    lines = []
    for group in found.runs:
        lines += [f"\n## {group.clip}, {group.world}, {group.steps} steps\n"]
        head = " | ".join(("row", "rate", "seeds", *FIGURES.values(), "validation hIoU", "flat at"))
        lines += [f"| {head} |", "|---" * 9 + "|"]
        for row in (row for row in rows if Group(row["clip"], row["world"], row["steps"]) == group):
            cells = [mean_and_deviation([scores[figure] for scores in row["scores"]]) for figure in FIGURES]
            last = [f"{100 * [*row['curve'].values()][-1]:.1f}" if row["curve"] else "-", str(row["flat"] or "-")]
            cells = [row["row"], f"{row['rate']:g}", str(len(row["seeds"])), *cells, *last]
            lines.append(f"| {' | '.join(cells)} |")
        own = [pair for pair in pairs if Group(pair["clip"], pair["world"], pair["steps"]) == group]
        if own:
            head = " | ".join(list(FIGURES.values())[1:])
            lines += [f"\n| question | difference | pictures | seeds | {head} |", "|---" * 7 + "|"]
        for pair in own:
            cells = ["{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * x for x in pair[name])) for name in SUMMARY[1:]]
            what = f"{pair['row']} less {pair['other']}"
            cells = [pair["question"], what, pair["pictures"] or "test", str(len(pair["seeds"])), *cells]
            lines.append(f"| {' | '.join(cells)} |")
    left = sum(not study.finished(run) for run in study.plan.runs())
    text = f"Mean ± sd over seeds, in %; differences with 95 % intervals. {left} runs are left.\n" + "\n".join(lines)
    write(study.folder / "tables.md", text + "\n")
    write(study.folder / "record.json", json.dumps({"rows": rows, "pairs": pairs}) + "\n")
    return text
