"""Numbers about the scores of one batch (pure).

Invariants
- A failed score is counted and enters no mean.
- A mean of one data source never mixes in another.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from verl.protocol import Score
from verl.utils.reward_score.returns import FailureKind, failure_kind, number


def reward_metrics(data_sources: Sequence[str], scores: Sequence[Score]) -> dict[str, float]:
    """Failure counts by kind, and the mean of the total and of each part per data source.

    `data_sources` names the source of each score. Keys: `reward/failed/{count,rate,<kind>}`, `reward/{data_source}/n`,
    `reward/{data_source}/{total,<part>}/mean`; a part's mean is over the ok scores that have it. Finite numbers among
    a custom function's extra fields count as parts. A source without an ok score has `n` 0 and no mean.
    """
    assert len(data_sources) == len(scores), f"{len(data_sources)} data sources but {len(scores)} scores"
    kinds = Counter(failure_kind(score) for score in scores if not score.is_ok)
    failed = sum(kinds.values())
    metrics = {"reward/failed/count": float(failed), "reward/failed/rate": failed / max(len(scores), 1)}
    metrics |= {f"reward/failed/{kind.value}": float(kinds[kind]) for kind in FailureKind}
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for source, score in zip(data_sources, scores, strict=True):
        if score.is_ok:
            for name, value in _numbers(score).items():
                values[source, name].append(value)
    for source in sorted(set(data_sources)):
        metrics[f"reward/{source}/n"] = float(len(values[source, "total"]))
    metrics |= {f"reward/{s}/{name}/mean": sum(v) / len(v) for (s, name), v in sorted(values.items()) if v}
    return metrics


def _numbers(score: Score) -> dict[str, float]:
    extra = {name: found for name, value in score.extra.items() if (found := number(value)) is not None}
    return {name: v for name, v in extra.items() if math.isfinite(v)} | {**score.parts, "total": score.total}
