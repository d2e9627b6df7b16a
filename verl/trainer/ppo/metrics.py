"""Metrics of a step under verl's names (pure)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from verl.algorithms.advantage import Advantages
from verl.protocol import Group, StopReason


def _spread(name: str, values: Sequence[float] | NDArray) -> dict[str, float]:
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        return {}
    return {f"{name}/mean": array.mean(), f"{name}/max": array.max(), f"{name}/min": array.min()}


def score_metrics(
    raw: Sequence[Group], rewarded: Sequence[Group], advantages: Sequence[Advantages]
) -> dict[str, float]:
    """`critic/{score,rewards,advantages,returns}`: totals before and after a KL penalty; kept answers."""
    values = np.concatenate([a.values[a.keep] for a in advantages]) if advantages else np.zeros(0)
    return (
        _spread("critic/score", [s.total for g in raw for s in g.scores if s.is_ok])
        | _spread("critic/rewards", [s.total for g in rewarded for s in g.scores if s.is_ok])
        | _spread("critic/advantages", values)
        | _spread("critic/returns", values)
    )


def length_metrics(groups: Sequence[Group], *, max_prompt: int, max_response: int) -> dict[str, float]:
    """`response_length/*`, `prompt_length/*` and the share of answers that were cut off."""
    prompts = np.array([len(g.prompt.token_ids) for g in groups])
    responses = np.array([len(r.token_ids) for g in groups for r in g.responses])
    cut = [r.stop_reason is StopReason.LENGTH for g in groups for r in g.responses]
    return (
        _spread("response_length", responses)
        | _spread("prompt_length", prompts)
        | {
            "response_length/clip_ratio": float((responses >= max_response).mean()),
            "prompt_length/clip_ratio": float((prompts >= max_prompt).mean()),
            "response/cut_ratio": float(np.mean(cut)),
        }
    )


def balance_metrics(groups: Sequence[Group], loads: Sequence[int]) -> dict[str, float]:
    """`global_seqlen/*`: tokens of a rank in this step, a prompt counted once for its answers.

    `min`, `max` and `minmax_diff` are of an equal cut in order, `balanced_*` of the plan, which gave each rank `loads`
    (empty when nothing was trained).
    """
    tokens = [len(g.prompt.token_ids) + _response_tokens(g) for g in groups]
    in_order = [float(sum(part)) for part in np.array_split(tokens, max(1, len(loads)))]
    metrics = _spread("global_seqlen", in_order)
    metrics["global_seqlen/minmax_diff"] = max(in_order) - min(in_order)
    if loads:
        metrics |= {"global_seqlen/balanced_min": float(min(loads)), "global_seqlen/balanced_max": float(max(loads))}
    return metrics


def actor_metrics(steps: Sequence[Mapping[str, float]], kl_coef: float) -> dict[str, float]:
    """Means over the step's optimizer steps; `lr` of the last one.

    `grad_norm` is the mean over the steps where it was finite, and missing when it never was; the others are the
    skipped ones, which `training/skipped_steps` counts.
    """
    if not steps:
        return {}
    hidden = ("rollout_", "skipped", "grad_norm")
    computed = [s for s in steps if "pg_loss" in s]  # the others held no scored answer
    names = [n for n in (computed or steps)[0] if not n.startswith(hidden)]
    metrics = {f"actor/{name}": float(np.mean([s[name] for s in computed or steps])) for name in names}
    norms = [s["grad_norm"] for s in computed or steps if math.isfinite(s["grad_norm"])]
    metrics |= {"actor/grad_norm": float(np.mean(norms))} if norms else {}
    metrics["actor/lr"] = steps[-1]["lr"]
    metrics["training/skipped_steps"] = float(sum(s["skipped"] for s in steps))
    if "actor/kl_loss" in metrics:
        metrics["actor/kl_coef"] = kl_coef
    return metrics | _mismatch(steps)


def _mismatch(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """How far sampler and trainer disagree about the sampled tokens, before any update."""
    found = [s for s in steps if s.get("rollout_tokens")]
    if not found:
        return {}
    count = sum(s["rollout_tokens"] for s in found)
    mean = sum(s["rollout_probs_diff_sum"] for s in found) / count
    squares = sum(s["rollout_probs_diff_squares"] for s in found) / count
    return {
        "training/rollout_probs_diff_mean": mean,
        "training/rollout_probs_diff_max": max(s["rollout_probs_diff_max"] for s in found),
        "training/rollout_probs_diff_std": max(0.0, squares - mean**2) ** 0.5,
        "training/rollout_actor_probs_pearson_corr": _correlation(found, count),
        "rollout_corr/kl": sum(s["rollout_kl_sum"] for s in found) / count,
        "rollout_corr/k3_kl": sum(s["rollout_k3_sum"] for s in found) / count,
    }


def _correlation(steps: Sequence[Mapping[str, float]], count: float) -> float:
    """Pearson correlation of the sampler's and the trainer's probabilities; nan where one of them is constant."""

    def mean(name: str) -> float:
        return sum(s[f"rollout_{name}_sum"] for s in steps) / count

    p, q = mean("p"), mean("q")
    spread = (mean("pp") - p * p) * (mean("qq") - q * q)
    return (mean("pq") - p * q) / spread**0.5 if spread > 0 else float("nan")


def throughput_metrics(groups: Sequence[Group], seconds: Mapping[str, float], ranks: int) -> dict[str, float]:
    """`perf/*` and `timing_per_token_ms/*`. Tokens count a prompt once per answer ("logical" tokens)."""
    tokens = sum(len(g.prompt.token_ids) * len(g.responses) + _response_tokens(g) for g in groups)
    responses = sum(_response_tokens(g) for g in groups)
    step = seconds["step"]
    metrics = {
        "perf/total_num_tokens": float(tokens),
        "perf/time_per_step": step,
        "perf/throughput": tokens / (step * ranks),
        "perf/gen_tokens_per_s": responses / max(seconds.get("gen", 0.0), 1e-9),
    }
    for phase, count in (("gen", responses), ("ref", tokens), ("adv", tokens), ("update_actor", tokens)):
        if phase in seconds:
            metrics[f"timing_per_token_ms/{phase}"] = 1000.0 * seconds[phase] / max(count, 1)
    return metrics


def _response_tokens(group: Group) -> int:
    return sum(len(r.token_ids) for r in group.responses)
