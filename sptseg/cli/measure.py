"""Time and memory: cases in turns on one stopwatch, peaks above what was there, the machine, a table of rows."""

from __future__ import annotations

import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
import torch

from sptseg.system import cores

Work = Callable[[], object]
HEADER = "| suite | case | seconds | ratio | peak GiB | |\n|---|---|---|---|---|---|"


@dataclass(frozen=True)
class Row:
    """One case: median seconds and half the spread between quartiles; its ratio to the case `against`; GiB at the peak.

    `extra` holds what only this case has, such as rates, each a number by name.
    """

    suite: str
    case: str
    seconds: float | None = None
    spread: float | None = None
    against: str = ""
    ratio: float | None = None
    peak_gib: float | None = None
    extra: Mapping[str, float] = field(default_factory=dict)

    def with_rate(self, name: str, count: int) -> Row:
        assert self.seconds is not None
        return replace(self, extra={name: count / self.seconds})

    def line(self) -> str:
        """A row of the Markdown table below HEADER."""
        seconds = "" if self.seconds is None else f"{self.seconds:.4g} ± {self.spread:.2g}"
        ratio = "" if self.ratio is None else f"{self.ratio:.3f} of {self.against}"
        memory = "" if self.peak_gib is None else f"{self.peak_gib:.2f}"
        extra = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in self.extra.items())
        return f"| {self.suite} | {self.case} | {seconds} | {ratio} | {memory} | {extra} |"


@dataclass(frozen=True)
class Stopwatch:
    """Runs cases in `turns`: what disturbs one turn disturbs all cases alike, so their ratios hold."""

    device: torch.device
    turns: int

    def seconds(self, work: Work) -> float:
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - start

    def compare(self, suite: str, cases: Mapping[str, Work], against: Mapping[str, str]) -> list[Row]:
        """One row a case; `against` names the case that a case is compared with. Each runs once before, unmeasured."""
        for work in cases.values():
            work()
        turns = [{name: self.seconds(work) for name, work in cases.items()} for _ in range(self.turns)]
        rows = []
        for name in cases:
            low, middle, high = statistics.quantiles([turn[name] for turn in turns], n=4)
            other = against.get(name, "")
            ratio = statistics.median(turn[name] / turn[other] for turn in turns) if other else None
            rows.append(Row(suite, name, middle, (high - low) / 2, other, ratio))
        return rows


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    about = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in about.read_text().splitlines()] if about.is_file() else []
    told = {key.strip(): value.strip() for key, _, value in lines}
    return {
        "cpu": told.get("model name") or platform.processor() or platform.machine(),
        **{flag: flag in told.get("flags", "").split() for flag in ("avx512f", "avx512_bf16", "amx_tile")},
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def peak_memory(make: Callable[..., Work], *arguments: Any, device: torch.device) -> float:
    """GiB that the work which make(*arguments) returns needs at its peak, above what was there before it began.

    A GPU's allocator keeps count. On a CPU it is made and run in a process of its own, so `make` must be a function of
    a module.
    """
    if device.type == "cuda":
        work = make(*arguments)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**30
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak, make, arguments, torch.get_num_threads()).result()


def _peak(make: Callable[..., Work], arguments: tuple[Any, ...], threads: int) -> float:
    torch.set_num_threads(threads)
    work = make(*arguments)
    process, done = psutil.Process(), Event()
    taken = [process.memory_info().rss]

    def look() -> None:
        while not done.wait(0.003):
            taken.append(process.memory_info().rss)

    watcher = Thread(target=look)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return (max(taken) - taken[0]) / 2**30
