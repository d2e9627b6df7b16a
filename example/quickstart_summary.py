"""Prints the quickstart's last line from the reports that its runs left behind."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def test_report(run: Path) -> dict[str, Any]:
    """The test report of a run with one data source."""
    reports = json.loads((run / "reports" / "test.json").read_text())["reports"]
    (report,) = reports.values()
    return report


def steps(run: Path) -> list[dict[str, Any]]:
    """Metrics of the training steps."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "timing_s/step" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rl-seconds", type=Path, help="only print how long the steps of this run took")
    parser.add_argument("--data")
    parser.add_argument("--sft", type=Path)
    parser.add_argument("--rl", type=Path)
    parser.add_argument("--sft-long", type=Path)
    parser.add_argument("--rl-shuffled", type=Path)
    parser.add_argument("--seconds", type=int)
    args = parser.parse_args()
    if args.rl_seconds is not None:
        print(round(sum(step["timing_s/step"] for step in steps(args.rl_seconds))))
        return
    sft, rl = test_report(args.sft), test_report(args.rl)
    classes = rl["classification"]
    controls = {"sft_long_acc": args.sft_long, "rl_shuffled_acc": args.rl_shuffled}
    for name, run in controls.items():
        if run is not None:
            print(f"control: {name}={test_report(run)['accuracy']:.3f}")
    print(
        f"quickstart: data={args.data} test_n={rl['n_prompts']} majority={rl['majority_share']:.3f} "
        f"sft_acc={sft['accuracy']:.3f} rl_acc={rl['accuracy']:.3f} rl_f1={classes['macro_f1']:.3f} "
        f"parse_fail={classes['parse_failure_rate']:.3f} rl_steps={len(steps(args.rl))} seconds={args.seconds}"
    )


if __name__ == "__main__":
    main()
