"""Results of long runs, kept beside what made them: a benchmark that was interrupted goes on where it stood.

Invariant: a result is read only where tree and settings are those that made it; anything else runs again.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import rows


def tree() -> str:
    """Identifies the tracked files as they are: the commit, and a digest of what differs from it."""

    def git(*args: str) -> bytes:
        return subprocess.run(["git", *args], cwd=rows.ROOT, capture_output=True, check=True).stdout

    changes = git("diff", "HEAD", "--", ".", ":!README.md", ":!benchmarks/README.md", ":!benchmarks/results")
    return git("rev-parse", "HEAD").decode().strip() + (hashlib.sha256(changes).hexdigest()[:12] if changes else "")


def stored(path: Path, settings: Mapping[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `run` returned with these settings on this tree, from the file `path` or, where it has none, by calling it.

    `run` returns plain json. Where it raises, nothing is kept.
    """
    key = {"tree": tree(), "settings": json.loads(json.dumps(settings))}
    if path.is_file():
        kept = json.loads(path.read_text())
        if kept["key"] == key:
            found: dict[str, Any] = kept["result"]
            return found
    path.unlink(missing_ok=True)
    result = run()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"key": key, "result": result}, indent=1))
    part.replace(path)
    return result
