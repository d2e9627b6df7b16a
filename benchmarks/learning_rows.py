"""Rows of `learning.py`: means over seeds, what GRPO added, whether the reward rose, two engines on the same rows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import rows
from scipy.stats import binomtest

from verl.utils.report.wilson import wilson_half_width

_EDGE = 10  # steps at each end of the reward curve that are compared
_UNITS = {"acc": "accuracy", "f1": "macro-F1", "failure": "of the answers"}

Found = Mapping[int, Mapping[str, Any]]
"""What `learning.train` returned for each seed of a task and engine."""


def reward_gain(curves: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean over seeds of (last ten steps - first ten steps), and its standard error from the steps' spread.

    The error is that of a difference of two means over `_EDGE` steps each, combined over independent seeds.
    """
    gains = [statistics.mean(c[-_EDGE:]) - statistics.mean(c[:_EDGE]) for c in curves]
    variances = [(statistics.variance(c[-_EDGE:]) + statistics.variance(c[:_EDGE])) / _EDGE for c in curves]
    return statistics.mean(gains), (sum(variances) ** 0.5) / len(curves)


def mcnemar(one: dict[str, bool], other: dict[str, bool]) -> tuple[int, int, float]:
    """Rows that only one of two models gets right, each way, and the exact two-sided p-value (McNemar 1947)."""
    assert one.keys() == other.keys(), "McNemar's test compares the same rows"
    first = sum(one[row] and not other[row] for row in one)
    second = sum(other[row] and not one[row] for row in one)
    return first, second, float(binomtest(first, first + second).pvalue) if first + second else 1.0


def rows_of(workload: str, found: Found, parameters: int) -> list[rows.BenchmarkRow]:
    """All rows of a task and engine, those of SFT alone where there was no GRPO."""
    row = partial(rows.BenchmarkRow, workload=workload, parameters=parameters)
    one = next(iter(found.values()))
    kinds = [f"{stage}_{what}" for what in ("acc", "f1", "parse_failure") for stage in ("sft", "rl")]
    made = [row(**_mean(name, found)) for name in ("majority", *(kind for kind in kinds if kind in one))]
    if "rl_acc" in one:
        made += [row(**_added(found)), row(**_prompt_tokens(found)), row(**_reward_gain(found))]
    return made


def _mean(name: str, found: Found) -> dict[str, Any]:
    values, n = {seed: f[name] for seed, f in found.items()}, next(iter(found.values()))["n"]
    mean = statistics.mean(values.values())
    mode = "seeds " + ", ".join(f"{seed}: {value:.3f}" for seed, value in values.items())
    if len(values) > 1:
        mode += f"; standard deviation over seeds {statistics.stdev(values.values()):.3f}"
    if "acc" in name:
        mode += f"; standard error of one seed's rows (Wilson) {wilson_half_width(mean, n):.3f}"
    unit = _UNITS.get(name.rpartition("_")[2], "accuracy")
    return {"row": name, "value": mean, "unit": unit, "samples": n, "mode": mode}


def _added(found: Found) -> dict[str, Any]:
    """What GRPO added to each seed's test accuracy, and each seed's own McNemar test on its rows."""
    gains = {seed: f["rl_acc"] - f["sft_acc"] for seed, f in found.items()}
    mode = "seeds " + ", ".join(f"{seed}: {gain:+.3f}" for seed, gain in gains.items())
    if len(gains) > 1:
        mode += f"; standard error over seeds {statistics.stdev(gains.values()) / len(gains) ** 0.5:.3f}"
    if all("sft_right" in f for f in found.values()):
        mode += "; rows won and lost"
        for seed, f in found.items():
            won, lost, p = mcnemar(f["rl_right"], f["sft_right"])
            mode += f", {seed}: {won} and {lost} (p {p:.2g})"
    n = next(iter(found.values()))["n"]
    return {"row": "gain", "value": statistics.mean(gains.values()), "unit": "accuracy", "samples": n, "mode": mode}


def _prompt_tokens(found: Found) -> dict[str, Any]:
    tokens = statistics.mean(f["prompt_tokens"] for f in found.values())
    mode = "mean over the prompts of GRPO, picture and text, with the tokenizer trained on the task's texts"
    return {"row": "prompt_tokens", "value": tokens, "unit": "tokens", "mode": mode}


def _reward_gain(found: Found) -> dict[str, Any]:
    gain, error = reward_gain([f["rewards"] for f in found.values()])
    steps = len(next(iter(found.values()))["rewards"])
    seconds = statistics.median(f["step_seconds"] for f in found.values())
    mode = f"last {_EDGE} of {steps} steps minus first {_EDGE}; median step {seconds:.2f} s"
    ratio = {"ratio": gain / error, "ratio_to": "standard errors"} if error else {}
    return {"row": "reward_gain", "value": gain, "unit": "reward", "samples": steps, "mode": mode, **ratio}


def comparison(task: str, hf: Found, vllm: Found) -> rows.BenchmarkRow:
    """McNemar's test on the test rows of all seeds together, and each seed's own: seeds share their rows."""
    hf_right, vllm_right = (
        {f"{seed}/{row}": ok for seed, one in seeds.items() for row, ok in one["rl_right"].items()}
        for seeds in (hf, vllm)
    )
    first, second, p = mcnemar(hf_right, vllm_right)
    each = (f"{seed}: {mcnemar(hf[seed]['rl_right'], vllm[seed]['rl_right'])[2]:.2g}" for seed in hf)
    return rows.BenchmarkRow(
        row="mcnemar_p",
        workload=f"{task}, hf against vllm, same rows",
        value=p,
        unit="p",
        samples=len(hf_right),
        mode=f"right with hf only {first}, with vllm only {second}, over all seeds; p of each seed {', '.join(each)}",
    )
