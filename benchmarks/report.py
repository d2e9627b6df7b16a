"""The tables of the documents, made from `benchmarks/results`.

`python3 benchmarks/report.py --write` replaces what stands between the marks in README.md (the figures at a glance, the
learning tables) and writes benchmarks/README.md (every row with its command); without `--write` it prints them.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import rows
from recipe import RL_LR

from verl.utils.report.wilson import wilson_half_width

Row = Mapping[str, Any]

_TASKS = ("ctu", "har", "ecg", "emg", "tee", "rcw")
_TRAINED = re.compile(
    r"(?P<task>\w+) \(image\), "
    r"(?:hf engine(?:, SFT on (?P<share>\d+%) of the rows)?(?:, GRPO at (?P<rate>\S+))?"
    r"|SFT alone on (?P<alone>all|\d+%)(?: of the)? rows)"
)
"""Workloads of `learning.py` that the table shows: plots, the start made for them, the hf engine or SFT alone."""

_CTU = "CTU-3B"
_GLANCE = (
    ("whole GRPO step", "grpo_step", "step_s", _CTU, "1x NVIDIA H200"),
    ("the same, tokens per second and GPU", "grpo_step", "step_tokens_per_s_per_gpu", _CTU, "1x NVIDIA H200"),
    ("whole step, twice the batch", "grpo_step", "step_s", _CTU, "2x NVIDIA H200"),
    ("`run_ctu.sh` on real CTU plots", "grpo_step", "step_s", "run_ctu.sh, 3B shape", "1x NVIDIA H200"),
    ("forward + backward of 160 answers, shared prefix", "train_step", "train_shared_s", _CTU, "1x NVIDIA H200"),
    ("two updates, 320 answers", "train_step", "update_s", _CTU, "1x NVIDIA H200"),
    ("reference log-probs, 320 answers", "train_step", "reference_s", _CTU, "1x NVIDIA H200"),
    ("generation by vLLM alone", "generation", "generate_tokens_per_s", _CTU, "1x NVIDIA H200"),
    ("7.5 GB of weights to an engine, CUDA IPC", "weight_sync", "weight_sync_s", _CTU, "1x NVIDIA H200"),
    ("the same, NCCL between two GPUs", "weight_sync_broadcast", "weight_sync_s", _CTU, "2x NVIDIA H200"),
    ("10,000 plots of 1,500 points", "data_build", "draw", None, None),
    ("`example/quickstart.sh`, installation included", "fresh_machine", "quickstart_s", None, None),
    ("`tests/run.sh`, installation included", "fresh_machine", "tests_s", None, None),
)
"""What is measured, its file, row, workload and hardware (None: whatever the row has)."""


def at_a_glance(results: Mapping[str, Sequence[Row]]) -> str:
    """One line for each of `_GLANCE`: the newest such row."""
    lines = ["| what | measured | hardware | commit |", "|---|---|---|---|"]
    for what, file, name, workload, hardware in _GLANCE:
        found = [
            row
            for row in results[file]
            if row["row"] == name and workload in (None, row["workload"]) and hardware in (None, row["hardware"])
        ]
        if not found:
            raise LookupError(f"benchmarks/results/{file}.json has no row {name} of {workload} on {hardware}")
        row = found[-1]
        lines.append(f"| {what} | {quantity(row['value'], row['unit'])} | {row['hardware']} | {row['commit']} |")
    return "\n".join(lines)


def quantity(value: float, unit: str) -> str:
    """Three digits, thousands apart: 12.4 s, 29,800 response tokens/s."""
    digits = 3 - len(str(int(abs(value)))) if abs(value) >= 1 else 3
    return f"{round(value, digits):,.{max(digits, 0)}f} {unit}"


def _by_workload(found: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """The rows of each workload, by name: those of its last run, never of two machines or commits together."""
    runs: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in found:
        runs.setdefault((row["workload"], row["hardware"], row["commit"]), {})[row["row"]] = row
    return {workload: of for (workload, *_), of in runs.items()}


def with_error(row: Row) -> str:
    """Mean over seeds and the standard error (Wilson) of its test rows, which seeds share: more do not help."""
    return f"{row['value']:.3f} ± {wilson_half_width(row['value'], row['samples']):.3f}"


def added(row: Row) -> str:
    """What GRPO added on the same rows, and the standard error over seeds that `learning.py` writes into the mode."""
    _, found, error = row["mode"].partition("standard error over seeds ")
    return f"{row['value']:+.3f}" + (f" ± {error.split(';')[0]}" if found else "")


@dataclass(frozen=True)
class Line:
    """One line of the learning table."""

    share: str
    """Of the rows that SFT saw."""
    rate: float | None
    """Learning rate of GRPO; None: SFT alone."""
    rows: Mapping[str, Row]

    def cells(self) -> tuple[str, ...]:
        of, sft = self.rows, self.rows["sft_acc"]
        size = f"{sft['parameters'] / 1e6:.1f} M"
        if self.rate is None:
            alone = (f"{of['sft_parse_failure']['value']:.1%}", f"{of['sft_f1']['value']:.3f}")
            return self.share, "no GRPO", with_error(sft), "", "", *alone, size
        gained = (with_error(sft), with_error(of["rl_acc"]), added(of["gain"]))
        f1 = f"{of['sft_f1']['value']:.3f} → {of['rl_f1']['value']:.3f}"
        return self.share, f"{self.rate:g}", *gained, malformed(of), f1, size


def malformed(of: Mapping[str, Row]) -> str:
    """Share of the test answers before and after GRPO that name no class."""
    return f"{of['sft_parse_failure']['value']:.1%} → {of['rl_parse_failure']['value']:.1%}"


def lines_of(task: str, trained: Mapping[str, Mapping[str, Row]]) -> list[Line]:
    """A share of the rows before all of them; SFT alone before GRPO by falling learning rate."""
    found: list[Line] = []
    for workload, of in trained.items():
        match = _TRAINED.fullmatch(workload)
        if match and match["task"] == task:
            rate = None if match["alone"] else float(match["rate"] or RL_LR)
            found.append(Line(match["alone"] or match["share"] or "all", rate, of))
    return sorted(found, key=lambda line: (line.share == "all", line.rate is not None, -(line.rate or 0)))


def learning(results: Mapping[str, Sequence[Row]]) -> str:
    """Test accuracy and macro-F1 before and after GRPO beside the baselines, one line for each way of training."""
    baselines = {row["row"]: row["value"] for row in results["baselines"]}
    trained = _by_workload(results["learning"])
    head = ("task", "test rows", "majority", "1-NN", "ROCKET", "MiniRocket", "SFT on", "GRPO's rate")
    head += ("after SFT", "after GRPO", "added", "malformed", "macro-F1", "parameters")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for task in _TASKS:
        beside = [f"{task} {name}" for name in ("majority", "1-NN", "ROCKET", "MiniRocket")]
        shown = [f"{baselines[name]:.3f}" if name in baselines else "" for name in beside]
        for line in lines_of(task, trained):
            cells = (f"`{task}`", str(line.rows["sft_acc"]["samples"]), *shown, *line.cells())
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def modalities(results: Mapping[str, Sequence[Row]]) -> str:
    """Plots against digits at one training budget, for every task that was trained with both."""
    trained = _by_workload(results["learning"])
    head = ("task", "input", "prompt tokens", "after SFT", "after GRPO", "added", "malformed", "a GRPO step")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for task in _TASKS:
        names = [f"{task} ({modality}), hf engine, SFT on 25% of the rows" for modality in ("image", "numeric")]
        if not all(name in trained for name in names):
            continue
        for name, input_ in zip(names, ("plot", "digits"), strict=True):
            found = trained[name]
            cells = (
                *(f"`{task}`", input_, f"{found['prompt_tokens']['value']:,.0f}"),
                *(with_error(found["sft_acc"]), with_error(found["rl_acc"]), added(found["gain"])),
                malformed(found),
                found["reward_gain"]["mode"].rpartition("median step ")[2],
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


_TABLES = {"at a glance": at_a_glance, "learning": learning, "modalities": modalities}


def between(text: str, name: str, content: str) -> str:
    """The document with `content` between the marks of `name`."""
    begin, end = f"<!-- {name}: made by benchmarks/report.py -->", f"<!-- end of {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"README.md needs the marks {begin!r} and {end!r} once each")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def all_rows(results: Mapping[str, Sequence[Row]]) -> str:
    sections = (f"## {name}\n\n{rows.tables(found)}" for name, found in results.items())
    about = (
        "Every row of `benchmarks/results`, with the command that made it, what it ran on and the commit; losing rows"
        " stay.\nMade by `python3 benchmarks/report.py --write`; what the scripts measure is in their docstrings."
    )
    return "\n\n".join(("# Measured", about, *sections)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into README.md and benchmarks/README.md")
    args = parser.parse_args()
    results = {path.stem: json.loads(path.read_text()) for path in sorted(rows.RESULTS.glob("*.json"))}
    made = {name: table(results) for name, table in _TABLES.items()}
    if not args.write:
        print("\n\n".join((*made.values(), all_rows(results))))
        return
    readme = rows.ROOT / "README.md"
    text = readme.read_text()
    for name, content in made.items():
        text = between(text, name, content)
    readme.write_text(text)
    (rows.ROOT / "benchmarks" / "README.md").write_text(all_rows(results))


if __name__ == "__main__":
    main()
