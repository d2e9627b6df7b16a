"""One line per step on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from verl.utils.tracking.base import Metrics, RunInfo, Sample, finite

_COLUMNS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("time", ("timing_s/step", "perf/time_per_step"), "{:.1f}s"),
    ("score", ("critic/score/mean",), "{:.3f}"),
    ("loss", ("actor/pg_loss", "train/loss"), "{:+.4f}"),
    ("kl", ("actor/kl_loss", "critic/kl", "actor/ppo_kl"), "{:.2g}"),
    ("entropy", ("actor/entropy",), "{:.3f}"),
    ("grad", ("actor/grad_norm", "train/grad_norm"), "{:.3g}"),
    ("lr", ("actor/lr", "train/lr"), "{:.2g}"),
    ("len", ("response_length/mean",), "{:.0f}"),
    ("tok/s", ("perf/throughput", "train/throughput"), "{:,.0f}"),
    ("mem", ("perf/max_memory_allocated_gb", "perf/cpu_memory_used_gb"), "{:.1f}GB"),
)
_SCORES = ("acc", "f1_score", "parse_failure", "loss", "test_score")
_MAX_OTHERS = 6


class ConsoleBackend:
    """Prints the columns a step has; a step with none of them shows its first few metrics."""

    def __init__(self, run: RunInfo) -> None:
        self._total = run.total_steps
        self._seconds: list[float] = []

    def log(self, step: int, metrics: Metrics) -> None:
        print(self.line(step, metrics), flush=True)

    def line(self, step: int, metrics: Metrics) -> str:
        """Example: `step 12/300 | time 3.4s | score 0.512 | loss +0.0031 | val acc computer_dataset 0.610`."""
        numbers = finite(metrics)
        cells = [
            f"{name} {form.format(value)}"
            for name, keys, form in _COLUMNS
            if (value := _first(numbers, keys)) is not None
        ]
        cells += _evaluations(numbers)
        if not cells:
            cells = [f"{key} {value:.4g}" for key, value in list(numbers.items())[:_MAX_OTHERS]]
        head = f"step {step}" if self._total is None else f"step {step}/{self._total}"
        return " | ".join([head, *cells, *self._left(step, _first(numbers, _COLUMNS[0][1]))])

    def _left(self, step: int, seconds: float | None) -> list[str]:
        if seconds is not None:
            self._seconds = [*self._seconds[-9:], seconds]
        if self._total is None or not self._seconds or step >= self._total:
            return []
        left = (self._total - step) * sum(self._seconds) / len(self._seconds)
        return [
            f"left {left / 3600:.1f}h"
            if left >= 3600
            else f"left {left / 60:.0f}m"
            if left >= 60
            else f"left {left:.0f}s"
        ]

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Answers go to files and trackers; the terminal keeps its one line."""

    def close(self) -> None:
        pass


def _first(numbers: dict[str, float], keys: tuple[str, ...]) -> float | None:
    """The first key present; a memory of 0 (no GPU) gives way to the next."""
    found = [numbers[key] for key in keys if key in numbers]
    return next((value for value in found if value != 0.0), found[0] if found else None)


def _evaluations(numbers: dict[str, float]) -> list[str]:
    cells: list[str] = []
    for split in ("val", "test"):
        for score in _SCORES:
            begin = f"{split}/{score}"
            for key, value in numbers.items():
                if key == begin or key.startswith(f"{begin}/"):
                    cells.append(f"{split} {key.removeprefix(f'{split}/').replace('/', ' ')} {value:.3f}")
    return cells
