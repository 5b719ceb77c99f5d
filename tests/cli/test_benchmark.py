"""The benchmark runs every suite at tiny sizes, and its ratios, spreads and peaks are what they say."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from sptseg.cli import benchmark
from sptseg.cli.benchmark import Work, compare, drawn_labels, line, peak_memory

CPU = torch.device("cpu")


@pytest.mark.parametrize("suite", ["inference", "training", "loss"])
def test_every_suite(suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its table and its JSON, without a process of its own for each peak; it prints no warnings."""

    def run_here(make: Callable[[], Work], device: torch.device) -> float:
        make()()
        return 1.0

    monkeypatch.setattr(benchmark, "peak_memory", run_here)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        benchmark.benchmark((suite,), quick=True, json_file=tmp_path / "a.json")
    report = json.loads((tmp_path / "a.json").read_text())
    assert (report["machine"]["torch"], report["machine"]["gpu"]) == (torch.__version__, None)
    rows = {row["case"]: row for row in report["rows"] if row["suite"] == suite}
    assert len(rows) == len(report["rows"]) and all(row.get("ratio", 1) > 0 for row in rows.values())
    against = {name: row["against"] for name, row in rows.items() if "ratio" in row}
    if suite == "inference":
        for width in ("float32", "bf16"):
            for count in (20, 171):
                assert against[f"{count} classes, {width}"] == f"bare encoder, {width}"
            assert against[f"read-out naclip, {width}"] == f"read-out plain, {width}"
        assert against["plain PyTorch, 20 classes, float32"] == against["bare encoder, bf16"] == "bare encoder, float32"
        assert rows["171 classes, picture of 256 x 256, float32, above the weights"]["peak_gib"] == 1
    elif suite == "training":
        assert set(against.values()) == {"bare encoder, forward, batch 2"}
        for name in (
            "step, batch 2, 20 classes",
            "step, batch 2, 171 classes",
            "plain PyTorch, step, batch 2, 20 classes",
        ):
            assert rows[name]["ratio"] > 1 and ("peak_gib" in rows[name]) == (not name.startswith("plain"))
        few, many = (rows[f"steps, loading included, {count} classes"] for count in (20, 171))
        assert few["hours_voc"] == pytest.approx(20_000 * 16 / few["per_second"] / 3600)
        assert few["hours_context"] == pytest.approx(2 * few["hours_voc"])
        assert many["hours_coco-stuff"] == pytest.approx(80_000 * 16 / many["per_second"] / 3600)
    else:
        cases = [f"loss, 156 classes, {present} present" for present in (8, 156)]
        assert against == {f"our {case}": f"plain {case}" for case in cases}
        assert len(rows) == 4 and all(rows[name]["memory_ratio"] == 1 for name in against)


def test_ratios_are_medians_of_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cases in turns; the times of three turns are 1, 2, 4 and 2, 6, 6 seconds."""
    ran, times = [], iter([1.0, 2.0, 2.0, 6.0, 4.0, 6.0])
    monkeypatch.setattr(benchmark, "wall_time", lambda work: (work(), next(times))[1])
    a, b = compare({"a": (lambda: ran.append("a"), "a"), "b": (lambda: ran.append("b"), "a")}, 12)
    assert ran == ["a", "b"] * 4  # once to warm up
    assert a == {"case": "a", "seconds": 2, "spread": 1.5, "per_second": 6}
    assert b == {"case": "b", "seconds": 6, "spread": 2, "per_second": 2, "ratio": 2, "against": "a"}
    assert line({"suite": "s", **b}) == "| s | b | seconds 6, spread 2, per second 2, ratio 2, against a |"


def allocate(mebibytes: int) -> Work:
    torch.zeros(1)

    def work() -> None:
        kept = torch.ones(mebibytes * 2**18)
        kept.mul_(2).mul_(0.5).mul_(2).mul_(0.5)

    return work


@pytest.mark.slow
def test_peak_memory_is_what_was_allocated() -> None:
    assert peak_memory(partial(allocate, 256), CPU) == pytest.approx(0.25, abs=0.05)


def test_every_label_of_the_drawn_maps_occurs() -> None:
    labels = drawn_labels(2, 50, [0, 3, 7])
    assert labels.shape == (2, 50, 50) and labels.unique().tolist() == [0, 3, 7]
