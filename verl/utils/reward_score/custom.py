"""A user's own reward function: `custom_reward_function.{path,name,reward_kwargs}`.

Invariants
- What travels to a worker is the path and the name; the file is imported where it is used.
- A missing file or name is an error at start that says what was found instead.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass(frozen=True, slots=True)
class CustomFunction:
    """Where a reward function lies. Example: `CustomFunction("my_reward.py", "compute_score", {"alpha": 0.5})`."""

    path: str
    name: str = "compute_score"
    reward_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Passed to every call by keyword."""

    def absolute(self) -> CustomFunction:
        """The same function, whatever folder the caller stands in."""
        return dataclasses.replace(self, path=str(Path(self.path).expanduser().resolve()))

    def load(self) -> Callable[..., Any]:
        """Import the file and return the function.

        Raises ValueError when the file is absent or cannot be imported, or when the name is absent or not callable.
        """
        module = _import_file(Path(self.path).expanduser())
        function = getattr(module, self.name, None)
        if not callable(function):
            own = (
                k for k, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__
            )
            names = ", ".join(sorted(own)) or "none"
            raise ValueError(
                f"custom_reward_function.name={self.name!r} is no function of {self.path} (functions there: {names})"
            )
        return function


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"custom_reward_function.path={path}: no such file (looked from {Path.cwd()})")
    path = path.resolve()
    # In sys.modules under a name of its own: dataclasses and pickling look the module up there.
    name = f"verl_custom_reward_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"custom_reward_function.path={path}: not a python file (expected a name ending in .py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(
            f"custom_reward_function.path={path} fails on import: {type(error).__name__}: {error}"
        ) from error
    return module
