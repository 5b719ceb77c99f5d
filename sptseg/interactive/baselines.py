"""Figures that runs of notebooks are held to: recorded ones with tolerances, and what drifted from them.

Baselines lie beside the notebooks' folder, in `tests/baselines/`, as {"figure": {"value": v, "tolerance": t}}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from sptseg.system import write

TIMING = re.compile(r"(^|_)(seconds?|milliseconds?|ms)(_|$)")


def baseline_file(path: Path, full: bool = False) -> Path:
    return path.resolve().parents[1] / "tests" / "baselines" / ("full" if full else "") / f"{path.stem}.json"


def lasting(figures: Mapping[str, float]) -> dict[str, float]:
    """The figures that another machine should give too: all but timings, told by their names."""
    return {name: value for name, value in figures.items() if not TIMING.search(name)}


def compare(recorded: Mapping[str, Mapping[str, float]], figures: Mapping[str, float]) -> dict[str, str]:
    """A sentence for every figure that drifted, is missing, or is new."""
    found, drift = lasting(figures), {}
    for name, wanted in recorded.items():
        value, room = wanted["value"], wanted["tolerance"]
        if name not in found:
            drift[name] = f"{name} is missing; recorded is {value:g}"
        elif abs(found[name] - value) > room:
            off = f"it drifted by {found[name] - value:+g}"
            drift[name] = f"{name} is {found[name]:g}; recorded is {value:g} ± {room:g}: {off}"
    new = {name: f"{name} is new, {value:g}: record it with --update" for name, value in found.items()}
    return drift | {name: line for name, line in new.items() if name not in recorded}


def tolerance(name: str, value: float) -> float:
    """Room for other machines' rounding: 1 %, and 0.002 at least; for what a training ends with 5 %, and 0.05.

    For a loss 3 %: without AVX2 PyTorch resizes pictures by other code, every seventh value comes out one level of 255
    apart, and in bf16 a first loss moved by 0.8 %.
    """
    share, least = (0.05, 0.05) if "train" in name else (0.03, 0.002) if "loss" in name else (0.01, 0.002)
    return float(f"{max(share * abs(value), least):.2g}")


def record(file: Path, figures: Mapping[str, float]) -> list[str]:
    """Writes a baseline; tolerances set there by hand stay. Returns a line for every change."""
    old = json.loads(file.read_text()) if file.is_file() else {}
    new = {
        name: {"value": value, "tolerance": old[name]["tolerance"] if name in old else tolerance(name, value)}
        for name, value in lasting(figures).items()
    }
    write(file, json.dumps(new, indent=1) + "\n")
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    lines = [f"{file.stem}: {name}: {_shown(old.get(name))} -> {_shown(new.get(name))}" for name in changed]
    return lines or [f"{file.stem}: nothing changed"]


def _shown(figure: Mapping[str, float] | None) -> str:
    return f"{figure['value']:g} ± {figure['tolerance']:g}" if figure else "none"
