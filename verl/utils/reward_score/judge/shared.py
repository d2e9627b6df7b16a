"""One judge per config, callable from any thread and any event loop.

It lives in this process unless `use_judges` names another place: a worker of the reward pool asks the one judge of the
whole run. Whoever holds a `Judge` does not see where its client lives.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable

from verl.utils.event_loop import LoopThread
from verl.utils.reward_score.judge.config import JudgeConfig
from verl.utils.reward_score.judge.judge import Judge, LLMJudge, Verdict
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


_elsewhere: Callable[[JudgeConfig], Judge] | None = None


def use_judges(find: Callable[[JudgeConfig], Judge] | None) -> None:
    """From now on `shared_judge` in this process asks `find`; None: judges of this process again."""
    global _elsewhere
    _elsewhere = find


def shared_judge(config: JudgeConfig) -> Judge:
    """The judge for that config. Raises ValueError when its cache file cannot be used."""
    if _elsewhere is not None:
        return _elsewhere(config)
    # By process: a forked child inherits the object but not its thread.
    return _shared(config, os.getpid())


@functools.cache
def _shared(config: JudgeConfig, _process: int) -> SharedJudge:
    return SharedJudge(config)


async def _build(config: JudgeConfig) -> LLMJudge:
    return LLMJudge(config)
