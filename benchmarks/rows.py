"""Result rows: every benchmark script writes `benchmarks/results/<script>.json` through this module.

`report.py` makes the tables of the documents from those files.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_PACKAGES = ("torch", "transformers", "ray", "vllm", "sktime", "matplotlib")


@dataclass(frozen=True, kw_only=True)
class BenchmarkRow:
    """One measured value. `ratio` is value / value of the row `ratio_to`. Value None: `mode` says why there is none."""

    row: str
    workload: str
    value: float | None
    unit: str
    parameters: int | None = None
    samples: int | None = None
    ratio: float | None = None
    ratio_to: str | None = None
    mode: str = ""
    hardware: str = field(default_factory=lambda: hardware())
    versions: Mapping[str, str] = field(default_factory=lambda: versions())
    commit: str = field(default_factory=lambda: commit())
    command: str = field(default_factory=lambda: command())
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())


def hardware() -> str:
    """E.g. `1x NVIDIA H200` or `2 CPU cores (x86_64)`."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()}x {torch.cuda.get_device_name(0)}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Short hash of HEAD, with `+` when the tree differs from it; without git, what TIMEMASTER_COMMIT says."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    head = git("rev-parse", "--short", "HEAD")
    if not head:
        return os.environ.get("TIMEMASTER_COMMIT", "")
    return head + ("+" if git("status", "--porcelain", "-uno") else "")


def parameters_of(model: Path) -> int:
    """Numbers in the weights of a Hugging Face folder of one file."""
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", framework="numpy") as file:
        return sum(int(file.get_tensor(name).size) for name in file.keys())  # noqa: SIM118 - not a dict


def command() -> str:
    return "python3 " + shlex.join([str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *sys.argv[1:]])


def write(
    script: str, rows: Sequence[BenchmarkRow], *, folder: Path = RESULTS, show: bool = True, append: bool = False
) -> None:
    """Write the rows as `<folder>/<script>.json` and print them.

    `append` keeps what is there, but for rows of the same name, workload and hardware, which these replace.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{script}.json"
    made = [asdict(row) for row in rows]
    new = {_identity(row) for row in made}
    kept = json.loads(file.read_text()) if append and file.exists() else []
    content = [row for row in kept if _identity(row) not in new] + made
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    if show:
        print(tables(made))


def read(script: str, folder: Path = RESULTS) -> list[BenchmarkRow]:
    """The rows that `write` left there, none when it did not."""
    path = folder / f"{script}.json"
    return [BenchmarkRow(**row) for row in json.loads(path.read_text())] if path.is_file() else []


def _identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["row"], row["workload"], row["hardware"]


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """One table for each command, machine and commit among the rows, in order of first appearance."""
    by_run: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        by_run.setdefault((row["command"], row["hardware"], row["commit"], row["date"]), []).append(row)
    return "\n\n".join(map(table, by_run.values()))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of one run as a markdown table, with what they share above it."""
    shared = rows[0]
    stack = ", ".join(f"{name} {version}" for name, version in shared["versions"].items())
    common = common_mode([row["mode"] for row in rows])
    lines = [
        f"`{shared['command']}` on {shared['hardware']}, {stack} ({shared['date']}, {shared['commit']})"
        f"{': ' + common if common else ':'}",
        "",
        "| row | workload | value | n | ratio | mode |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f} x {row['ratio_to']}"
        samples = "" if row["samples"] is None else str(row["samples"])
        value = "none" if row["value"] is None else f"{row['value']:.4g} {row['unit']}"
        lines.append(
            f"| {row['row']} | {row['workload']} | {value} | {samples} | {ratio} | "
            f"{row['mode'].removeprefix(common).lstrip('; ')} |"
        )
    return "\n".join(lines)


def common_mode(modes: Sequence[str]) -> str:
    """What the modes of several rows begin with, up to a semicolon; empty for what is short enough to repeat."""
    columns = zip(*(mode.split("; ") for mode in modes), strict=False)
    common = "; ".join(column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    return common if len(modes) > 1 and len(common) > 40 else ""
