"""When the failures of a batch stop the run (pure).

Invariants
- Failures of the judge are divided by the answers that it was asked about: the answers that never needed it cannot hide
  that it is down. One failure alone is no rate: few answers are right early in a run.
- All failures are divided by all answers.
- When every answer that was asked about, and more than one, failed in ways that no retry mends, the run stops whatever
  the rate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from verl.protocol import Score
from verl.utils.reward_score.composite import asked_judge
from verl.utils.reward_score.returns import FailureKind, failure_kind

_FINAL = (FailureKind.AUTH, FailureKind.REJECTED, FailureKind.BUDGET)
_SHOWN = 5
_JUDGE_KEYS = {
    FailureKind.AUTH: "judge.api_key_env",
    FailureKind.REJECTED: "judge.model",
    FailureKind.BUDGET: "judge.max_calls, judge.max_total_tokens",
    FailureKind.RATE_LIMITED: "judge.max_rpm, judge.max_tpm, judge.max_concurrent",
    FailureKind.SERVER_ERROR: "judge.base_url",
    FailureKind.REFUSED_CONNECTION: "judge.base_url",
    FailureKind.TIMEOUT: "judge.timeout_s, judge.max_concurrent",
    FailureKind.MALFORMED: "judge.model, judge.max_answer_tokens",
    FailureKind.OUT_OF_RANGE: "judge.model",
}


def why_stop(scores: Sequence[Score], max_failure_rate: float) -> str | None:
    """Why a run must not go on with these scores: counts by reason, and the keys to change; None: it may."""
    failed = [score for score in scores if not score.is_ok]
    asked = [score for score in scores if asked_judge(score)]
    unjudged = [score for score in asked if not score.is_ok]
    kinds = Counter(failure_kind(score) for score in unjudged)
    above = f"above reward.max_failure_rate={max_failure_rate:g}"
    if len(failed) > max_failure_rate * len(scores):
        what = f"{len(failed)} of {len(scores)} answers could not be scored, {above}"
    elif len(unjudged) > max(1.0, max_failure_rate * len(asked)):
        what = f"the judge failed for {len(unjudged)} of the {len(asked)} answers it was asked about, {above}"
    elif len(asked) > 1 and sum(kinds[kind] for kind in _FINAL) == len(asked):
        what = f"the judge failed for all {len(asked)} answers it was asked about, in ways that no retry mends"
    else:
        return None
    return f"{what}: {_listed(failed)}{_hint(kinds)}"


def _listed(failed: Sequence[Score]) -> str:
    reasons = Counter(score.reason for score in failed)
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(_SHOWN))
    more = f"; and {len(reasons) - _SHOWN} other reasons" if len(reasons) > _SHOWN else ""
    return listed + more


def _hint(kinds: Counter[FailureKind]) -> str:
    keys = [
        f"{count} x {kind.value}: {_JUDGE_KEYS[kind]}" for kind, count in kinds.most_common() if kind in _JUDGE_KEYS
    ]
    return f" (failures of the judge, and the keys to look at: {'; '.join(keys)})" if keys else ""
