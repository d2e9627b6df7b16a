"""Calls of expensive parts (models, workers, files, trackers), written down instead of made."""

from __future__ import annotations

import dataclasses
import enum
import io
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import torch

PASSED_WHOLE = "config"
"""An argument or entry of this name holds the whole config; that it arrives shows nothing about one key."""

CLOCKS = ("timing_s/", "perf/")
"""Metrics that differ from run to run."""


class Calls:
    """What was called with which values, in order."""

    def __init__(self) -> None:
        self.made: list[Any] = []
        self.folder = ""
        """A temporary folder, whose name is another one each time."""

    def to(self, name: str, result: Any = None) -> Callable[..., Any]:
        """A stand-in that notes its arguments and returns `result` (None: a mock)."""

        def noted(*args: Any, **kwargs: Any) -> Any:
            self.made.append((name, self._plain(args), self._plain(kwargs)))
            if result is None:
                return MagicMock()
            return result(*args, **kwargs) if callable(result) and not isinstance(result, MagicMock) else result

        return noted

    def _plain(self, value: Any) -> Any:
        return _renamed(plain(value), self.folder)

    def replacing(self, place: str, *names: str, **results: Any) -> ExitStack:
        """A context in which `names` of the module or class `place` note their calls, and so do those with a result."""
        stack = ExitStack()
        for name, result in {**dict.fromkeys(names), **results}.items():
            stack.enter_context(patch(f"{place}.{name}", self.to(name, result)))
        return stack


def plain(value: Any) -> Any:
    """A comparable form. Nodes of the config become their names: only what was read from them counts."""
    if isinstance(value, MagicMock) or callable(value):
        return "object"
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items() if k != PASSED_WHOLE and not str(k).startswith(CLOCKS)}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray | torch.Tensor):
        return value.tolist()
    if dataclasses.is_dataclass(value):
        kind = type(value)
        if kind.__module__.startswith("verl.config"):
            return kind.__name__
        fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {kind.__name__: fields}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, torch.dtype | torch.device | enum.Enum):
        return repr(value)
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    return value if isinstance(value, str | int | float | bool | None) else "object"


def _renamed(value: Any, folder: str) -> Any:
    if isinstance(value, dict):
        return {k: _renamed(v, folder) for k, v in value.items()}
    if isinstance(value, list):
        return [_renamed(v, folder) for v in value]
    return value.replace(folder, "RUN") if isinstance(value, str) and folder else value


@contextmanager
def run_folder(calls: Calls) -> Iterator[Path]:
    """A folder to write to, noted under a fixed name."""
    with tempfile.TemporaryDirectory() as folder:
        calls.folder = folder
        yield Path(folder)
        calls.folder = ""


@contextmanager
def quiet() -> Iterator[None]:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield
