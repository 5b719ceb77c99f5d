"""The benchmark runs every suite at tiny sizes, and its ratios, spreads and peaks are what they say."""

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from sptseg.cli import benchmark
from sptseg.cli.benchmark import Work, compare, line, peak_memory


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
        assert against["171 classes, bf16"] == "bare encoder, bf16"
        assert against["read-out naclip, float32"] == "read-out plain, float32"
        assert against["plain PyTorch, 20 classes, float32"] == against["bare encoder, bf16"] == "bare encoder, float32"
        assert rows["171 classes, picture of 256 x 256, float32, above the weights"]["peak_gib"] == 1
    elif suite == "training":
        assert set(against.values()) == {"bare encoder, forward, batch 2"}
        assert rows["step, batch 2, 171 classes"]["ratio"] > 1 and "peak_gib" in rows["step, batch 2, 171 classes"]
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
    ran, times = [], iter([9.0, 9.0, 1.0, 2.0, 2.0, 6.0, 4.0, 6.0])
    monkeypatch.setattr(benchmark, "wall_time", lambda work: (work(), next(times))[1])
    a, b = compare({"a": (lambda: ran.append("a"), "a"), "b": (lambda: ran.append("b"), "a")}, 12)
    assert ran == ["a", "b"] * 4  # once to warm up
    assert a == {"case": "a", "seconds": 2, "spread": 1.5, "per_second": 6}
    assert b == {"case": "b", "seconds": 6, "spread": 2, "per_second": 2, "ratio": 2, "against": "a"}
    assert line("s", **b) == "| s | b | seconds 6, spread 2, per second 2, ratio 2, against a |"


def allocate(mebibytes: int) -> Work:
    torch.zeros(1)
    return lambda: torch.ones(mebibytes * 2**18).mul_(2).mul_(0.5).mul_(2).mul_(0.5)


@pytest.mark.slow
def test_peak_memory_is_what_was_allocated() -> None:
    found = peak_memory(partial(allocate, 256), torch.device("cpu"))
    assert found == pytest.approx(0.25, abs=0.05)
