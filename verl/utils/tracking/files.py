"""metrics.jsonl and samples.jsonl in the run folder, and tensorboard event files.

Invariants
- One json object per call and line, valid json: a number that is not finite is null.
- A resumed run continues the file after its step; what is set aside is kept under another name, never lost.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from verl.config.secrets import mask_text
from verl.utils.files import write_text_atomic
from verl.utils.tracking.base import BackendUnavailable, Metrics, RunInfo, Sample, finite

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"


class FileBackend:
    """Appends to `metrics.jsonl` and `samples.jsonl`, flushed at every call."""

    def __init__(self, run: RunInfo) -> None:
        run.run_dir.mkdir(parents=True, exist_ok=True)
        self._metrics = _continue_file(run.run_dir / METRICS_FILE, run.resume_step)
        self._samples = _continue_file(run.run_dir / SAMPLES_FILE, run.resume_step)

    def log(self, step: int, metrics: Metrics) -> None:
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        _write(self._metrics, {"step": step, "time": round(time.time(), 3), **values})

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        for sample in samples:
            row = {k: v for k, v in dataclasses.asdict(sample).items() if k != "image"}
            _write(self._samples, {"step": step, **row})

    def close(self) -> None:
        for file in (self._metrics, self._samples):
            file.close()


def _write(file: TextIO, row: Mapping[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    file.flush()


def _continue_file(path: Path, resume_step: int) -> TextIO:
    """Open for appending, holding only whole rows of steps up to `resume_step` (0: none)."""
    if path.exists():
        text = path.read_text(encoding="utf-8", errors="replace")
        kept = "".join(f"{line}\n" for line in text.splitlines() if _step_of(line) <= (resume_step or -1))
        if kept != text:
            shutil.copy2(path, _free_name(path))
            write_text_atomic(path, kept)
    return open(path, "a", encoding="utf-8")


def _step_of(line: str) -> float:
    """The step of a row; infinite for a line that a crash cut."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _free_name(path: Path) -> Path:
    """`metrics.1.jsonl`, `metrics.2.jsonl`, ..."""
    number = 1
    while (candidate := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return candidate


class TensorboardBackend:
    """Event files under `$TENSORBOARD_DIR` (default `tensorboard_log`) / project / experiment."""

    def __init__(self, run: RunInfo) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise BackendUnavailable("tensorboard is not installed (pip install tensorboard)") from error
        folder = Path(os.environ.get("TENSORBOARD_DIR") or "tensorboard_log") / run.project / run.experiment
        # Points after the step we resume from belong to the attempt that was cut off.
        self._writer = SummaryWriter(str(folder), purge_step=run.resume_step + 1 if run.resume_step else None)
        self._writer.add_text("config", "```json\n" + json.dumps(run.config, indent=1, default=str) + "\n```", 0)

    def log(self, step: int, metrics: Metrics) -> None:
        for key, value in finite(metrics).items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        for number, sample in enumerate(samples):
            text = f"{sample.uid}: label {sample.label}, score {sample.score}\n\n    " + "\n    ".join(
                mask_text(sample.answer).splitlines()
            )
            self._writer.add_text(f"samples/{number}", text, step)
            if sample.image is not None:
                self._writer.add_image(f"samples/{number}", _pixels(sample.image), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _pixels(image: bytes) -> Any:
    """(H, W, 3) uint8."""
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
