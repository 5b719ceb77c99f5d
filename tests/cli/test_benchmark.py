"""The benchmark runs every suite at tiny sizes, and its ratios, spreads and peaks are what they say."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sptseg.cli import benchmark
from sptseg.cli.benchmark import drawn_labels
from sptseg.cli.measure import Stopwatch, Work, peak_memory

CPU = torch.device("cpu")


def rows_of(suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict]:
    """Runs a suite, without a process of its own for each peak, and reads its JSON; it prints no warnings."""

    def run_here(make: Callable[..., Work], *arguments: Any, device: torch.device) -> float:
        make(*arguments)()
        return 1.0

    monkeypatch.setattr(benchmark, "peak_memory", run_here)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        benchmark.benchmark((suite,), quick=True, json_file=tmp_path / "a.json")
    report = json.loads((tmp_path / "a.json").read_text())
    about = report["machine"]
    assert (about["torch"], about["gpu"]) == (torch.__version__, None) and about["cpu"] and about["memory_gib"] > 0
    assert {row["suite"] for row in report["rows"]} == {suite}
    return {row["case"]: row for row in report["rows"]}


def test_inference_against_the_bare_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of("inference", tmp_path, monkeypatch)
    for width in ("float32", "bf16"):
        for count in (3, 5):
            row = rows[f"{count} classes, {width}"]
            assert row["against"] == f"bare encoder, {width}" and row["ratio"] > 0.3
            assert row["extra"]["windows_per_second"] == pytest.approx(1 / row["seconds"])
        assert rows[f"read-out naclip, {width}"]["against"] == f"read-out plain, {width}"
    assert rows["plain PyTorch, 3 classes, float32"]["ratio"] > 0.3
    assert rows["5 classes, picture of 160 x 160, float32, above the weights"]["peak_gib"] == 1


def test_training_against_the_bare_encoders_forward_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few classes and many: peak memory, pictures a second, and what the presets would take."""
    rows = rows_of("training", tmp_path, monkeypatch)
    for name in ("step, batch 2, 3 classes", "step, batch 2, 5 classes", "plain PyTorch, step, batch 2, 3 classes"):
        assert rows[name]["ratio"] > 1 and rows[name]["peak_gib"] == (None if "plain" in name else 1)
    few, many = (rows[f"steps, loading included{more}"]["extra"] for more in ("", ", 5 classes"))
    assert few["hours_voc"] == pytest.approx(20_000 * 16 / few["images_per_second"] / 3600)
    assert few["hours_context"] == pytest.approx(2 * few["hours_voc"])
    assert many["hours_coco-stuff"] == pytest.approx(80_000 * 16 / many["images_per_second"] / 3600)


def test_loss_against_the_plain_twin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of("loss", tmp_path, monkeypatch)
    ours = [row for name, row in rows.items() if name.startswith("our loss, 6 classes")]
    assert len(rows) == 4 and len(ours) == 2
    for row in ours:
        assert row["ratio"] > 0 and row["against"] in rows and row["extra"]["memory_ratio"] == 1


def test_ratios_are_medians_of_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cases in turns; the times of three turns are 1, 2, 4 and 2, 6, 6 seconds."""
    ran, times = [], iter([1.0, 2.0, 2.0, 6.0, 4.0, 6.0])
    monkeypatch.setattr(Stopwatch, "seconds", lambda _, work: (work(), next(times))[1])
    a, b = Stopwatch(CPU, 3).compare("s", {"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, {"b": "a"})
    assert ran == ["a", "b"] * 4  # once to warm up
    assert (a.seconds, a.against, a.ratio) == (2.0, "", None)
    assert (b.seconds, b.against, b.ratio) == (6.0, "a", 2.0)
    assert "| s | b | 6 ± 2 | 2.000 of a |" in b.line()


def allocate(mebibytes: int) -> Work:
    torch.zeros(1)

    def work() -> None:
        kept = torch.ones(mebibytes * 2**18)
        kept.mul_(2).mul_(0.5).mul_(2).mul_(0.5)

    return work


@pytest.mark.slow
def test_peak_memory_is_what_was_allocated() -> None:
    assert peak_memory(allocate, 256, device=CPU) == pytest.approx(0.25, abs=0.05)


def test_every_label_of_the_drawn_maps_occurs() -> None:
    labels = drawn_labels(2, 50, [0, 3, 7])
    assert labels.shape == (2, 50, 50) and labels.unique().tolist() == [0, 3, 7]
