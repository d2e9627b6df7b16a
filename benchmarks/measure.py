"""Timing of one thing on one device: warm up, then the median, with peak memory and what did not fit."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch

T = TypeVar("T")


class OutOfTime(RuntimeError):
    """The time limit of the whole benchmark has passed."""


@dataclass
class Deadline:
    """End of the benchmark on the monotonic clock; a measurement that would not start before it is not made."""

    end: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(time.monotonic() + seconds)

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat, and the largest number of GiB that tensors took (0 on a CPU)."""

    seconds: tuple[float, ...]
    peak_gib: float

    @property
    def median(self) -> float:
        return median(self.seconds)

    def __str__(self) -> str:
        spread = f"{min(self.seconds):.3g}-{max(self.seconds):.3g} s"
        memory = f", peak {self.peak_gib:.1f} GiB" if self.peak_gib else ""
        return f"median of {len(self.seconds)} ({spread}){memory}"


@dataclass(frozen=True)
class Missed:
    """Why a measurement has no value."""

    reason: str


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def once(run: Callable[[], object]) -> float:
    """Seconds of one call, the device's work included."""
    synchronize()
    begin = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - begin


def timed(run: Callable[[], object], deadline: Deadline, *, repeats: int = 5) -> Timing:
    """One warm-up call, then `repeats` timed ones; 3 where a call takes over 8 s, fewer when the deadline comes."""
    if deadline.left <= 0:
        raise OutOfTime("the time limit had passed")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    warm = once(run)
    wanted = min(repeats, 3) if warm > 8 else repeats
    seconds: list[float] = []
    while len(seconds) < wanted and (not seconds or deadline.left > seconds[-1]):
        seconds.append(once(run))
    return Timing(tuple(seconds), peak_gib())


def peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def release() -> None:
    """Give memory that nothing holds any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def attempt(run: Callable[[], T]) -> T | Missed:
    """The result, or why the device's memory or the time did not suffice. Other errors rise."""
    try:
        return run()
    except torch.cuda.OutOfMemoryError as error:
        missed = Missed(f"out of memory: {str(error).splitlines()[0]}")
    except OutOfTime as error:
        missed = Missed(str(error))
    release()  # outside of the handler: the exception's frames hold what was allocated
    return missed


def largest_that_fits(sizes: list[int], run: Callable[[int], float]) -> tuple[int, dict[int, float]] | Missed:
    """Try rising `sizes` until one does not fit. Returns the fastest, and the seconds of all that ran."""
    found: dict[int, float] = {}
    for size in sizes:
        result = attempt(lambda size=size: run(size))
        if isinstance(result, Missed):
            if not found:
                return result
            break
        found[size] = result
    return min(found, key=lambda size: found[size]), found


def profiled(run: Callable[[], object], path: Path, *, rows: int = 50) -> None:
    """One call under torch's profiler; operators and kernels by device time (CPU time on a CPU) as text in `path`."""
    cuda = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities) as profile:
        run()
        synchronize()
    averages = profile.key_averages()
    by_device = averages.table(sort_by="self_cuda_time_total" if cuda else "self_cpu_time_total", row_limit=rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(by_device + "\n\n" + averages.table(sort_by="self_cpu_time_total", row_limit=20) + "\n")
