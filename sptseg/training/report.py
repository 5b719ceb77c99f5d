"""What a study found: means over seeds, differences of rows with intervals, curves, as tables and as one record."""

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sptseg.datasets import STRENGTHS, Split, listed
from sptseg.inference import FIGURES, metrics, ratios_of_tallies, table
from sptseg.model import data_file
from sptseg.system import write
from sptseg.training.ablation import COUNTS, SPOILT, Study, Trial, mean_and_deviation

FLAT_STEPS, FLAT_GAIN = 500, 0.005  # the rule of `flat`
KINDS = {kind: [name for name, (k, _) in SPOILT.items() if k == kind] for kind in STRENGTHS}
SETS = {"test": ["test"], **KINDS, "all spoilt": [*SPOILT]}


class Group(NamedTuple):
    """Rows that are compared with one another."""

    clip: str
    world: str
    steps: int


def flat(curve: Mapping[int, float]) -> int | None:
    """The step from which on a curve is flat up to its end, None if it is not flat there. Flat: the best value of the
    last 500 steps is less than 0.5 points (0.005) above the best before them."""
    since = None
    for step in sorted(curve):
        before = [value for at, value in curve.items() if at <= step - FLAT_STEPS]
        last = [value for at, value in curve.items() if step - FLAT_STEPS < at <= step]
        if before:
            since = (since or step) if max(last) < max(before) + FLAT_GAIN else None
    return since


def interval(mine: Tensor, other: Tensor, split: Split, draws: int = 2000) -> dict[str, list[float]]:
    """Difference of two rows, mine less other, with the ends of its 95 % interval, of each figure of `FIGURES` and of
    the gap, mIoU of seen less that of unseen classes.

    Counts (S, P, K, 3, C), see `tallies`. Seeds and pictures are drawn with replacement, the same ones for both rows; a
    seed's figures are those of its pooled pictures, means over the K data sets."""
    seeds, pictures = metrics.drawn(len(mine), draws, 0), metrics.drawn(mine.shape[1], draws, 1)

    def figures(counts: Tensor) -> Tensor:  # (S, P, K, 3, C) -> (1 + draws, S, 5)
        by_seed = [(pictures @ each.flatten(1)).unflatten(1, each.shape[1:]) for each in counts.double()]
        values = torch.stack([ratios_of_tallies(each, split)[..., :4].mean(1) for each in by_seed], dim=1)
        return torch.cat([values, values[..., 1:2] - values[..., 2:3]], dim=-1)

    means = (seeds[:, :, None] * (figures(mine) - figures(other))).sum(1) / len(mine)
    return dict(zip((*FIGURES, "gap"), metrics.with_ends(means).T.tolist(), strict=True))


class Found:
    """The finished trials of a study, by group, row and seed; a row "ROW, NAME" is ROW with a change after training.
    `unscored`: what the plan asks of them and did not yet when they ended."""

    def __init__(self, study: Study) -> None:
        self.study, self.trials, self.unscored = study, {}, []
        for trial in study.plan.trials():
            if trial.rate is not None or "failed" in (study.result(trial) or {"failed": "not run"}):
                continue
            group = self.trials.setdefault(Group(trial.part.clip, trial.world, trial.steps), {})
            with np.load(study.folder / trial.place / COUNTS) as file:
                kept = file.files
            for name in study.scored(trial):
                if name not in kept:
                    self.unscored.append(f"{name} of {trial.place}")
                elif name not in SPOILT:
                    group.setdefault(trial.row if name == "test" else f"{trial.row}, {name}", {})[trial.seed] = trial

    def seeds(self, group: Group, row: str) -> dict[int, Trial]:
        """A row's trials by seed; a row that is not trained is the same with all seeds and after all steps."""
        untrained = self.trials.get(group._replace(steps=0), {}).get(row, {})
        seeds = {seed for trials in self.trials[group].values() for seed in trials}
        return self.trials[group].get(row) or {seed: trial for trial in untrained.values() for seed in seeds}

    def counts(self, group: Group, row: str, seeds: Iterable[int], names: Sequence[str]) -> Tensor | None:
        """(S, P, K, 3, C), None if a trial was not scored on one of the data sets."""
        changed, found = row.partition(", ")[2], []
        wanted = [changed] if changed and names == ["test"] else [f"{changed}{name}" for name in names]
        for seed in seeds:
            with np.load(self.study.folder / self.seeds(group, row)[seed].place / COUNTS) as file:
                if not set(wanted) <= set(file.files):
                    return None
                found.append(np.stack([file[name] for name in wanted], axis=1).astype(np.int32))
        return torch.from_numpy(np.stack(found))

    def rows(self, group: Group) -> Iterator[dict[str, Any]]:
        """Every row: scores seed by seed, its rate, its curve, when that is flat."""
        for row, trials in self.trials[group].items():
            results = [result for trial in trials.values() if (result := self.study.result(trial))]
            counts: Any = self.counts(group, row, trials, ["test"])
            curves, spectra = [r["curve"] for r in results], [r["spectra"] for r in results if r.get("spectra")]
            curve = {int(step): statistics.mean(each[step] for each in curves) for step in curves[0]}
            spoilt = {kind: self.counts(group, row, trials, names) for kind, names in SETS.items() if kind != "test"}
            yield {
                **group._asdict(), "row": row, "seeds": [*trials], "rate": results[0]["rate"],
                "scores": [self.study.summary(each[:, 0]) for each in counts], "curve": curve, "flat": flat(curve),
                "seconds": [result.get("seconds") for result in results],
                "spectra": {name: [each[name] for each in spectra] for name in (spectra[0] if spectra else ())},
                "spoilt": {kind: self.means(each) for kind, each in spoilt.items() if each is not None},
            }  # fmt: skip

    def means(self, counts: Tensor) -> dict[str, float]:
        """The `FIGURES` of counts (S, P, K, 3, C), means over seeds and data sets."""
        ratios = ratios_of_tallies(counts.sum(1), self.study.split)[..., : len(FIGURES)]
        return dict(zip(FIGURES, ratios.mean((0, 1)).tolist(), strict=True))

    def pairs(self, group: Group) -> Iterator[dict[str, Any]]:
        """Every pair of the plan that has both rows, on plain and on spoilt pictures, on the seeds that both have."""
        for question, row, other in self.study.plan.pairs:
            seeds = sorted(self.seeds(group, row).keys() & self.seeds(group, other).keys())
            for pictures, names in SETS.items() if seeds else ():
                mine, theirs = (self.counts(group, each, seeds, names) for each in (row, other))
                if mine is not None and theirs is not None:
                    about = {"question": question, "row": row, "other": other, "pictures": pictures, "seeds": seeds}
                    yield {**group._asdict(), **about, **interval(mine, theirs, self.study.split)}


def study_record() -> dict[str, list[dict[str, Any]]]:
    """The embedded record of the study: "rows" and "pairs" as `write_report` writes them, each with the "machine" that
    it is of, "CPU" or "GPU" (one H100). The GPU's, which have more seeds, come last."""
    found: dict[str, list[dict[str, Any]]] = {"rows": [], "pairs": []}
    for machine, name in (("CPU", "study_record_cpu.json"), ("GPU", "study_record.json")):
        for kind, values in json.loads(data_file(name).read_text()).items():
            found[kind] += [{**each, "machine": machine} for each in values]
    return found


def write_report(study: Study) -> str:
    """Writes tables.md and record.json, what the tables and curves are made of, to the study's folder: the tables."""
    found, record = Found(study), {"rows": [], "pairs": []}
    left = sum(not study.result(trial) for trial in study.plan.trials())
    text = f"Mean ± sd over seeds, in %; differences with 95 % intervals. {left} runs are left.\n"
    if found.unscored:
        text += f"\nNot scored, as the plan did not ask for it when these runs ended: {listed(found.unscored)}.\n"
    for group in found.trials:
        rows, pairs = [*found.rows(group)], [*found.pairs(group)]
        record = {"rows": record["rows"] + rows, "pairs": record["pairs"] + pairs}
        text += f"\n## {group.clip}, {group.world}, {group.steps} steps\n\n"
        lines: list[list[object]] = [["row", "rate", "seeds", *FIGURES.values(), "validation hIoU", "flat at"]]
        for row in rows:
            means = [mean_and_deviation([scores[figure] for scores in row["scores"]]) for figure in FIGURES]
            end = mean_and_deviation([*row["curve"].values()][-1:])
            lines.append([row["row"], row["rate"], len(row["seeds"]), *means, end, row["flat"] or "-"])
        text += table(*lines) + "\n"
        lines = [["question", "difference", "pictures", "seeds", "mIoU(S)", "mIoU(U)", "hIoU", "gap"]]
        for pair in pairs:
            cells = [metrics.Change(*pair[name]) for name in ("miou_seen", "miou_unseen", "hiou", "gap")]
            what = f"{pair['row']} less {pair['other']}"
            lines.append([pair["question"], what, pair["pictures"], len(pair["seeds"]), *cells])
        if pairs:
            text += "\n" + table(*lines) + "\n"
    write(study.folder / "tables.md", text)
    write(study.folder / "record.json", json.dumps(record) + "\n")
    return text
