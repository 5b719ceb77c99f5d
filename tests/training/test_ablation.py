"""Comparing configurations seed by seed, against arithmetic by hand."""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from sptseg.training.ablation import mean_interval, paired


def row(name: str, seed: int, hiou: float, grass: float | None, boat: float) -> dict[str, Any]:
    scores = {"hiou": hiou, "miou_seen": hiou + 0.1, "miou_unseen": hiou - 0.1, "iou": {"grass": grass, "boat": boat}}
    return {"name": name, "seed": seed, "scores": scores}


ROWS = [
    row("with", 0, 0.80, 0.9, 0.5), row("with", 2, 0.70, 0.8, 0.6),
    row("without", 2, 0.75, 0.7, 0.5), row("without", 0, 0.78, 0.9, 0.7), row("without", 1, 0.1, 0.1, 0.1),
]  # fmt: skip


def test_differences_pair_equal_seeds_and_leave_out_the_others() -> None:
    found = paired(ROWS, "with", "without")
    assert found.seeds == (0, 2)
    assert found.hiou == pytest.approx((2, -5))
    assert found.miou_seen == pytest.approx((2, -5)) and found.miou_unseen == pytest.approx((2, -5))
    assert found.by_class == {"grass": pytest.approx((0, 10)), "boat": pytest.approx((-20, 10))}


def test_a_class_that_a_run_did_not_meet_is_left_out() -> None:
    rows = [*ROWS[:1], row("without", 0, 0.7, None, 0.4)]
    assert list(paired(rows, "with", "without").by_class) == ["boat"]


def test_configurations_without_a_common_seed_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'with' has the seeds \[0, 2\] and 'without' \[1\]; wanted a seed that both"):
        paired([ROWS[0], ROWS[1], ROWS[4]], "with", "without")


def test_the_interval_of_three_values_is_wide() -> None:
    """1, 2, 3: mean 2, sd 1, so 2 ± 4.303 / sqrt(3) = 2 ± 2.484."""
    assert mean_interval([1, 2, 3]) == pytest.approx((-0.484, 4.484), abs=1e-3)


def test_the_interval_holds_the_mean_in_95_of_100_cases() -> None:
    """Of many samples of four standard normal values, about 95 % have 0 in their interval."""
    draw = statistics.NormalDist().samples(4 * 4000, seed=1)
    samples = [mean_interval(draw[i : i + 4]) for i in range(0, len(draw), 4)]
    assert sum(low < 0 < high for low, high in samples) / len(samples) == pytest.approx(0.95, abs=0.012)


@pytest.mark.parametrize("count", [1, 11])
def test_too_few_or_too_many_values_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} values; wanted 2 to 10"):
        mean_interval([0.0] * count)
