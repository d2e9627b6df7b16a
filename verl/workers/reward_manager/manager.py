"""The reward manager: one answer in, one `Score` out, in the caller's process.

`score` is the seam for a pool of workers: it needs only (prompt, text) pairs and returns scores in their order.

Invariants
- As many scores as items, in the same order.
- An error in one answer fails that answer only.
- More failures than `max_failure_rate` of a batch raise, with the counts by reason.
- Every manager name of verl means this one manager.
"""

from __future__ import annotations

import asyncio
import difflib
import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from verl.protocol import Prompt, Score
from verl.utils.event_loop import LoopThread
from verl.utils.reward_score import AnswerFormat, get_judged_scorer, get_scorer, known_classes
from verl.utils.reward_score.adapter import RewardFunction
from verl.utils.reward_score.custom import CustomFunction
from verl.utils.reward_score.judge import JudgeConfig, shared_judge
from verl.utils.reward_score.labels import ScoreTuple

RewardItem = tuple[Prompt, str]
"""A prompt and one answer, decoded without special tokens."""

MANAGER_NAMES = ("naive", "ts", "batch", "prime", "dapo", "rate_limited")


class RewardFailureRateError(RuntimeError):
    """Too many answers of a batch could not be scored."""


class RewardManager:
    """Scores answers by the registered rule of their data source, or by a custom function.

    `max_concurrent` bounds the calls in flight of an async function or of one with a time limit (`timeout_s`, seconds a
    call); the registered rules are quick and run in place.
    `judge` holds the options of `verl.utils.reward_score.judge.JudgeConfig`: sources with a judged part then use it.
    The judge has limits of its own, so `timeout_s` and `max_concurrent` do not apply.
    Raises ValueError for an illegal argument, and for a custom function that cannot be loaded or called.
    """

    def __init__(
        self,
        name: str = "naive",
        *,
        max_failure_rate: float,
        custom: CustomFunction | None = None,
        answer_format: str | AnswerFormat = AnswerFormat.LOOSE,
        timeout_s: float | None = None,
        max_concurrent: int = 8,
        judge: Mapping[str, Any] | None = None,
    ) -> None:
        _check_name(name)
        if not 0 <= max_failure_rate <= 1:
            raise ValueError(f"reward.max_failure_rate={max_failure_rate}: give a share between 0 and 1")
        if max_concurrent < 1:
            raise ValueError(f"max_concurrent={max_concurrent}: at least one reward call must be allowed")
        try:
            self._format = AnswerFormat(answer_format)
        except ValueError:
            legal = ", ".join(rule.value for rule in AnswerFormat)
            raise ValueError(f"unknown answer format {answer_format!r}: use one of {legal}") from None
        self.max_failure_rate = max_failure_rate
        self._max_concurrent = max_concurrent
        self._custom = custom
        if custom is not None and judge is not None:
            raise ValueError("judge options have no effect on a custom function: pass them in its reward_kwargs")
        if judge is not None:
            self._judge = JudgeConfig.from_mapping(judge)
            self._max_concurrent = 2**31
            self._function = RewardFunction(self._judged_rule, name="registered rule with a judge")
        elif custom is None:
            self._function = RewardFunction(self._rule, name="registered rule")
        else:
            self._function = RewardFunction(
                custom.load(),
                name=f"{custom.path}:{custom.name}",
                reward_kwargs=custom.reward_kwargs,
                timeout_s=timeout_s,
            )

    def check_prompts(self, prompts: Iterable[Prompt]) -> None:
        """At load: every row can be scored. Does nothing for a custom function, whose ground truths are its own.

        Raises ValueError naming the row when its data source is not registered or its ground truth is no label.
        """
        if self._custom is not None:
            return
        for prompt in prompts:
            try:
                get_scorer(prompt.data_source, self._format).label_id(prompt.ground_truth)
            except ValueError as error:
                raise ValueError(f"row {prompt.row} ({prompt.uid}): {error}") from error

    def score(self, items: Sequence[RewardItem]) -> list[Score]:
        """One score an item, in order.

        Raises RewardFailureRateError when more than `max_failure_rate` of the items failed.
        """
        scores = self._loop.run(self._score_all(items)) if self._function.needs_loop else self._score_in_place(items)
        assert len(scores) == len(items), f"{len(scores)} scores for {len(items)} items"
        self._check_rate(scores)
        return scores

    @functools.cached_property
    def _loop(self) -> LoopThread:
        return LoopThread()

    def _score_in_place(self, items: Sequence[RewardItem]) -> list[Score]:
        return [
            self._function.score(
                data_source=prompt.data_source,
                solution_str=text,
                ground_truth=prompt.ground_truth,
                extra_info=prompt.extra_info,
                classes=known_classes(prompt.data_source),
            )
            for prompt, text in items
        ]

    async def _score_all(self, items: Sequence[RewardItem]) -> list[Score]:
        # The limit starts inside the semaphore: waiting for a free slot must not use up a call's time.
        slots = asyncio.Semaphore(self._max_concurrent)

        async def one(prompt: Prompt, text: str) -> Score:
            async with slots:
                return await self._function.score_async(
                    data_source=prompt.data_source,
                    solution_str=text,
                    ground_truth=prompt.ground_truth,
                    extra_info=prompt.extra_info,
                    classes=known_classes(prompt.data_source),
                )

        return list(await asyncio.gather(*(one(prompt, text) for prompt, text in items)))

    def _rule(self, data_source: str, solution_str: str, ground_truth: str) -> ScoreTuple:
        return get_scorer(data_source, self._format)(solution_str, ground_truth)

    async def _judged_rule(self, data_source: str, solution_str: str, ground_truth: str) -> ScoreTuple | Score:
        scorer = get_judged_scorer(data_source)
        if scorer is None:
            return self._rule(data_source, solution_str, ground_truth)
        judge = shared_judge(self._judge)
        return await scorer(solution_str, ground_truth, judge=judge, answer_format=self._format.value)

    def _check_rate(self, scores: Sequence[Score]) -> None:
        reasons = Counter(score.reason for score in scores if score.reason is not None)
        failures = sum(reasons.values())
        if failures > self.max_failure_rate * len(scores):
            listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(5))
            more = f"; and {len(reasons) - 5} other reasons" if len(reasons) > 5 else ""
            raise RewardFailureRateError(
                f"{failures} of {len(scores)} answers could not be scored, above reward.max_failure_rate="
                f"{self.max_failure_rate:g}: {listed}{more}"
            )


def _check_name(name: str) -> None:
    if name in MANAGER_NAMES:
        return
    close = difflib.get_close_matches(name, MANAGER_NAMES, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(
        f"unknown reward manager {name!r}: {hint}One manager serves the names {', '.join(MANAGER_NAMES)}; "
        "for your own rule set custom_reward_function.path"
    )
