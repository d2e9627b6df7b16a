"""Sends each step's metrics to every tracker asked for.

Invariants
- No tracker stops or delays the run without bound: an error is one log line, and a tracker that fails three times in a
  row is switched off, said once.
- metrics.jsonl is written whatever trackers are asked for.
- Nothing secret is sent: the config is masked, and texts are masked.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from verl.config.secrets import mask_secrets, mask_text
from verl.utils.tracking.base import Backend, BackendUnavailable, RunInfo, Sample, Scalar, to_scalar
from verl.utils.tracking.console import ConsoleBackend
from verl.utils.tracking.files import FileBackend, TensorboardBackend
from verl.utils.tracking.remote import MlflowBackend, SwanlabBackend, VemlpWandbBackend, WandbBackend

_LOG = logging.getLogger("verl.tracking")
_MAX_FAILURES = 3

BACKENDS: Mapping[str, Callable[[RunInfo], Backend]] = {
    "console": ConsoleBackend,
    "file": FileBackend,
    "tensorboard": TensorboardBackend,
    "wandb": WandbBackend,
    "tracking": WandbBackend,
    "mlflow": MlflowBackend,
    "swanlab": SwanlabBackend,
    "vemlp_wandb": VemlpWandbBackend,
}


class Tracker:
    """Opens the trackers in `names` for one run; use it as a context manager or call `close`.

    `config` is the resolved config as nested mappings. `resume_step` k continues the files after step k; 0 starts anew
    and sets older files aside. Raises ValueError on an unknown name; nothing after that raises.
    """

    def __init__(
        self,
        names: Sequence[str],
        run_dir: Path,
        *,
        project: str,
        experiment: str,
        config: Mapping[str, Any],
        total_steps: int | None = None,
        resume_step: int = 0,
    ) -> None:
        unknown = [name for name in names if name not in BACKENDS]
        if unknown:
            raise ValueError(f"trainer.logger={unknown[0]}: unknown tracker; choose from {', '.join(BACKENDS)}")
        run = RunInfo(run_dir, project, experiment, mask_secrets(config), total_steps, resume_step)
        self._backends: dict[str, Backend] = {}
        self._failures: dict[str, int] = {}
        opened: set[Callable[[RunInfo], Backend]] = set()
        for name in dict.fromkeys(("file", *names)):
            if BACKENDS[name] not in opened:
                opened.add(BACKENDS[name])
                self._open(name, run)

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the trackers that work."""
        return tuple(self._backends)

    def _open(self, name: str, run: RunInfo) -> None:
        try:
            self._backends[name] = BACKENDS[name](run)
        except BackendUnavailable as reason:
            _LOG.warning("tracker %s is off: %s; the run goes on", name, reason)
        except Exception as error:
            _LOG.warning("tracker %s is off: %s; the run goes on", name, _brief(error))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One step's metrics: numbers, 0-d arrays or tensors, texts. Others are dropped with a warning."""
        scalars: dict[str, Scalar] = {}
        for key, value in metrics.items():
            try:
                scalars[key] = to_scalar(value)
            except Exception as error:
                _LOG.warning("metric %s of step %d is dropped: %s", key, step, _brief(error))
        self._each(lambda backend: backend.log(step, scalars))

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Answers to look at; the files hold their texts, trackers also the plots."""
        masked = [dataclasses.replace(s, prompt=mask_text(s.prompt), answer=mask_text(s.answer)) for s in samples]
        if masked:
            self._each(lambda backend: backend.log_samples(step, masked))

    def _each(self, call: Callable[[Backend], None]) -> None:
        for name, backend in list(self._backends.items()):
            try:
                call(backend)
                self._failures.pop(name, None)
            except Exception as error:
                self._failed(name, error)

    def _failed(self, name: str, error: Exception) -> None:
        count = self._failures[name] = self._failures.get(name, 0) + 1
        if count == 1:
            _LOG.warning("tracker %s dropped a line: %s", name, _brief(error))
        # The file stays: a full disk may be emptied, and it is the one record that is always there.
        if count >= _MAX_FAILURES and name != "file":
            _LOG.warning("tracker %s is switched off after %d failures in a row", name, count)
            del self._backends[name]

    def close(self) -> None:
        """Flush and end every tracker; calling it twice is harmless."""
        for name, backend in list(self._backends.items()):
            try:
                backend.close()
            except Exception as error:
                _LOG.warning("tracker %s did not close: %s", name, _brief(error))
        self._backends.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return mask_text(f"{type(error).__name__}: {lines[0]}")
