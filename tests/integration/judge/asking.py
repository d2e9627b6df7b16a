"""Shared by the judge's tests: a fast config, and asking many answers at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from judge_server import JudgeServer

from verl.utils.reward_score.emg_soft import RUBRIC
from verl.utils.reward_score.judge import JudgeConfig, JudgeError, JudgeRequest, LLMJudge, Verdict


def config(server: JudgeServer, **changes: Any) -> JudgeConfig:
    fast: dict[str, Any] = {
        "base_url": server.url,
        "model": "stub",
        "api_key_env": None,
        "timeout_s": 5.0,
        "attempt_timeout_s": 1.0,
        "queue_timeout_s": 20.0,
        "max_retries": 2,
        "backoff_s": 0.01,
        "give_up_after": 1000,
    }
    return JudgeConfig(**(fast | changes))


def request(extension: str = "Repeat the needle study in six weeks.", reasoning: str = "spikes") -> JudgeRequest:
    return JudgeRequest(RUBRIC, {"reasoning": reasoning, "class": "Neuropathy", "extension": extension})


@dataclass
class Outcome:
    """What asking gave: a verdict or an error for each, the time it took, and the judge's own numbers."""

    found: list[Verdict | JudgeError]
    seconds: float
    metrics: dict[str, float]

    @property
    def kinds(self) -> list[str]:
        return ["ok" if isinstance(f, Verdict) else f.kind.value for f in self.found]

    @property
    def only(self) -> Verdict | JudgeError:
        (found,) = self.found
        return found


def ask(settings: JudgeConfig, requests: Sequence[JudgeRequest], *, window_s: float = 60.0) -> Outcome:
    """Ask for all at once with a new judge."""

    async def run() -> Outcome:
        judge = LLMJudge(settings, window_s=window_s)
        start = time.monotonic()
        found = await asyncio.gather(*(judge.judge(r) for r in requests), return_exceptions=True)
        seconds = time.monotonic() - start
        metrics = judge.metrics()
        await judge.close()
        for f in found:
            if not isinstance(f, Verdict | JudgeError):
                raise f
        return Outcome(found, seconds, metrics)  # type: ignore[arg-type]

    return asyncio.run(run())


def different(count: int) -> list[JudgeRequest]:
    return [request(f"Answer number {i}.") for i in range(count)]
