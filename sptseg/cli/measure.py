"""Time and memory: cases in turns on one stopwatch, peaks in processes of their own, the machine, a table of rows."""

from __future__ import annotations

import multiprocessing
import platform
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from sptseg.system import cores, ended_helpers

Clock = Literal["wall", "cpu"]
Work = Callable[[], object]


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
    extra: Mapping[str, float] | None = None


class Stopwatch:
    """Runs cases in turns and keeps the seconds of each. `clock` "cpu" counts the process's own CPU time instead of
    wall time, which other programs disturb less; on a GPU it is always wall time."""

    def __init__(self, device: torch.device, repeats: int, clock: Clock) -> None:
        self.device, self.repeats = device, repeats
        self.now = time.process_time if clock == "cpu" and device.type == "cpu" else time.perf_counter

    def seconds(self, work: Work) -> float:
        self.wait()
        start = self.now()
        work()
        self.wait()
        return self.now() - start

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def wall(self, work: Work) -> float:
        """Seconds of wall time, whatever the clock: for work in which other processes take part."""
        return Stopwatch(self.device, 1, "wall").seconds(work)

    def compare(self, suite: str, cases: Mapping[str, Work], against: Mapping[str, str]) -> list[Row]:
        """One row a case; `against` names the case that a case is compared with. Each runs once before, unmeasured."""
        for work in cases.values():
            work()
        turns = [{name: self.seconds(work) for name, work in cases.items()} for _ in range(self.repeats)]
        rows = []
        for name in cases:
            taken = [turn[name] for turn in turns]
            low, _, high = statistics.quantiles(taken, n=4)
            other = against.get(name, "")
            ratio = statistics.median(turn[name] / turn[other] for turn in turns) if other else None
            rows.append(Row(suite, name, statistics.median(taken), (high - low) / 2, other, ratio))
        return rows


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    names, flags = [platform.processor() or platform.machine()], ""
    if Path("/proc/cpuinfo").is_file():
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
        names = [value.strip() for key, _, value in lines if key.strip() == "model name"] or names
        flags = next((value for key, _, value in lines if key.strip() == "flags"), "")
    return {
        "cpu": names[0],
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "amx": "amx_tile" in flags,
        "avx512_bf16": "avx512_bf16" in flags,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def utilisation(watch: Stopwatch, work: Work, seconds: float, dtype: torch.dtype) -> dict[str, float]:
    """On a GPU, {"utilisation": operations a second, as a share of those in a large matrix product}."""
    if watch.device.type == "cpu":
        return {}  # there it would compare oneDNN with MKL, see `sptseg.model.ops.linear`
    return {"utilisation": operations(work) / seconds / matrix_product_rate(watch, dtype)}


@torch.inference_mode()
def matrix_product_rate(watch: Stopwatch, dtype: torch.dtype) -> float:
    """Floating-point operations a second in a large matrix product: what utilisation is measured against."""
    n = 8192
    a = torch.randn(n, n, device=watch.device).to(dtype)
    (row,) = watch.compare("", {"product": lambda: a @ a}, {})
    assert row.seconds is not None
    return 2 * n**3 / row.seconds


def operations(work: Work) -> int:
    """Floating-point operations of matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def peak_memory(make: Callable[..., Work], *arguments: Any, device: torch.device) -> float:
    """GiB that the work which make(*arguments) returns needs at its peak, above what was there before it began.

    Made and run in a process of its own, so `make` must be a function of a module.
    """
    context = multiprocessing.get_context("spawn")
    with ended_helpers("leave this suite out, or make room"), ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak, make, arguments, str(device), torch.get_num_threads()).result()


def _peak(make: Callable[..., Work], arguments: tuple[Any, ...], device_name: str, threads: int) -> float:
    torch.set_num_threads(threads)
    device, work = torch.device(device_name), make(*arguments)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**30
    process, done = psutil.Process(), threading.Event()
    before = highest = process.memory_info().rss

    def look() -> None:
        nonlocal highest
        while not done.wait(0.003):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=look)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return (highest - before) / 2**30


HEADER = "| suite | case | seconds | ratio | peak GiB | |\n|---|---|---|---|---|---|"


def line(row: Row) -> str:
    """A row of the Markdown table below HEADER."""
    seconds = "" if row.seconds is None else f"{row.seconds:.4g} ± {row.spread:.2g}"
    ratio = "" if row.ratio is None else f"{row.ratio:.3f} of {row.against}"
    memory = "" if row.peak_gib is None else f"{row.peak_gib:.2f}"
    extra = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in (row.extra or {}).items())
    return f"| {row.suite} | {row.case} | {seconds} | {ratio} | {memory} | {extra} |"
