"""Prints the quickstart's last line from the reports that its two runs left behind."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def only_report(run: Path) -> dict[str, Any]:
    """The test report of a run with one data source."""
    reports = json.loads((run / "reports" / "test.json").read_text())["reports"]
    (report,) = reports.values()
    return report


def rl_steps(run: Path) -> int:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return max(json.loads(line)["step"] for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--sft", type=Path, required=True)
    parser.add_argument("--rl", type=Path, required=True)
    parser.add_argument("--seconds", type=int, required=True)
    args = parser.parse_args()
    sft, rl = only_report(args.sft), only_report(args.rl)
    classes = rl["classification"]
    print(
        f"quickstart: data={args.data} test_n={rl['n_prompts']} majority={rl['majority_share']:.3f} "
        f"sft_acc={sft['accuracy']:.3f} rl_acc={rl['accuracy']:.3f} rl_f1={classes['macro_f1']:.3f} "
        f"parse_fail={classes['parse_failure_rate']:.3f} rl_steps={rl_steps(args.rl)} seconds={args.seconds}"
    )


if __name__ == "__main__":
    main()
