"""How long a stranger waits: the README's two commands, each in a clean clone of HEAD without an environment.

    python3 benchmarks/fresh_machine.py [--only quickstart tests]

Ends with exit code 1 where a command fails or takes longer than promised.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import rows


@dataclass(frozen=True)
class Command:
    """A line of the README, and the minutes it may take, installation included."""

    script: str
    minutes: float


COMMANDS = {"quickstart": Command("example/quickstart.sh", 15), "tests": Command("tests/run.sh", 25)}


def run(name: str, logs: Path) -> tuple[rows.BenchmarkRow, list[str]]:
    """The row of one command, and what it missed. Its output goes to `<logs>/<name>.log`."""
    command, log = COMMANDS[name], logs / f"{name}.log"
    with tempfile.TemporaryDirectory(prefix="clone-") as clone, log.open("w") as out:
        subprocess.run(["git", "clone", "--quiet", str(rows.ROOT), clone], check=True)
        begin = time.monotonic()
        code = subprocess.run(
            ["bash", command.script], cwd=clone, env=_bare(), stdout=out, stderr=out, check=False
        ).returncode
        seconds = time.monotonic() - begin
    last = (log.read_text().splitlines() or [""])[-1].strip("= ")
    missed = [] if code == 0 else [f"{name}: exit code {code}, see {log}"]
    if seconds > 60 * command.minutes:
        missed.append(f"{name}: {seconds / 60:.1f} minutes, at most {command.minutes:g} are promised")
    row = rows.BenchmarkRow(
        row=f"{name}_s",
        workload=f"clean clone, bash {command.script}",
        value=seconds,
        unit="s",
        mode=f"installation included; exit code {code}; {last}",
    )
    return row, missed


def _bare() -> dict[str, str]:
    """The environment without what would spare the clone its installation."""
    ours = ("TIMEMASTER_", "VIRTUAL_ENV", "PYTHONPATH", "HF_", "RAY_", "OMP_")
    found = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    bin_of_this = str(Path(sys.prefix) / "bin")
    found["PATH"] = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if p != bin_of_this)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    parser.add_argument("--logs", type=Path, default=rows.ROOT / "checkpoints" / "fresh_machine")
    args = parser.parse_args()
    args.logs.mkdir(parents=True, exist_ok=True)
    made, missed = zip(*(run(name, args.logs) for name in args.only), strict=True)
    rows.write("fresh_machine", made, append=True)
    for line in (line for lines in missed for line in lines):
        print(f"missed: {line}", file=sys.stderr)
    return 1 if any(missed) else 0


if __name__ == "__main__":
    sys.exit(main())
