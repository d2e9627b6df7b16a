"""One judge per process and config, callable from any thread and any event loop.

This is the seam for one judge per cluster: whoever holds a `Judge` does not see where its client lives.
"""

from __future__ import annotations

import asyncio
import functools
import os

from verl.utils.event_loop import LoopThread
from verl.utils.reward_score.judge.config import JudgeConfig
from verl.utils.reward_score.judge.judge import LLMJudge, Verdict
from verl.utils.reward_score.judge.rubric import JudgeRequest


class SharedJudge:
    """An `LLMJudge` in an event loop of its own, so that all callers meet the same limits."""

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config
        self._loop = LoopThread("judge")
        self._judge = self._loop.run(_build(config))

    async def judge(self, request: JudgeRequest) -> Verdict:
        """As `LLMJudge.judge`, from any event loop."""
        return await asyncio.wrap_future(self._loop.submit(self._judge.judge(request)))

    def metrics(self) -> dict[str, float]:
        """As `LLMJudge.metrics`."""
        return self._loop.run(self._metrics())

    async def _metrics(self) -> dict[str, float]:
        return self._judge.metrics()


def shared_judge(config: JudgeConfig) -> SharedJudge:
    """The judge of this process for that config. Raises ValueError when its cache file cannot be used."""
    # By process: a forked child inherits the object but not its thread.
    return _shared(config, os.getpid())


@functools.cache
def _shared(config: JudgeConfig, _process: int) -> SharedJudge:
    return SharedJudge(config)


async def _build(config: JudgeConfig) -> LLMJudge:
    return LLMJudge(config)
