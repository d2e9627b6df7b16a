"""The reward manager: one answer in, one `Score` out, in the caller's process.

A pool of worker processes (`pool.py`) holds one manager each, made from `spec`, and gives the same scores.

Invariants
- As many scores as items, in the same order; a score depends on its own item only.
- An error in one answer fails that answer only.
- More failures than `max_failure_rate` of a batch raise, with the counts by reason (`failure_rate.py`).
- Every manager name of verl means this one manager.
"""

from __future__ import annotations

import asyncio
import difflib
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from verl.protocol import Prompt, Score
from verl.utils.event_loop import LoopThread
from verl.utils.reward_score import (
    AnswerFormat,
    declaration,
    declare_from_row,
    declared_parts,
    get_scorer,
    known_classes,
)
from verl.utils.reward_score.adapter import RewardFunction
from verl.utils.reward_score.composite import Composite
from verl.utils.reward_score.custom import CustomFunction
from verl.utils.reward_score.judge import JudgeConfig, shared_judge
from verl.utils.reward_score.length import RESPONSE_TOKENS, add_lengths, length_rules
from verl.utils.reward_score.parts import PartKind, merge_parts
from verl.workers.reward_manager.failure_rate import why_stop

logger = logging.getLogger(__name__)


class RewardItem(NamedTuple):
    """A prompt and one answer, decoded without special tokens; `tokens` is its length, None where nobody counted."""

    prompt: Prompt
    text: str
    tokens: int | None = None


MANAGER_NAMES = ("naive", "ts", "batch", "prime", "dapo", "rate_limited")


class RewardFailureRateError(RuntimeError):
    """Too many answers of a batch could not be scored."""


class RewardManager:
    """Scores answers by the parts that their task and `parts` declare, or by a custom function plus the length parts.

    `max_concurrent` bounds the calls in flight of an async function or of one with a time limit (`timeout_s`, seconds a
    call). `judge` holds the options of `JudgeConfig`; None: soft parts are left out. The judge keeps limits of its own,
    not `timeout_s` and `max_concurrent`. `max_tokens` is the default limit of length parts.
    `guarded`: somebody outside ends a plain function that takes too long, so it runs here without a thread.
    `sources`: what is to be scored, by data source the `extra_info` of a row; built now, not within the time of the
    first answer.
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
        judge: Mapping[str, Any] | JudgeConfig | None = None,
        parts: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
        guarded: bool = False,
        sources: Mapping[str, Mapping[str, Any]] | None = None,
        warn: Callable[[str], None] = logger.warning,
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
        if custom is not None and judge is not None:
            raise ValueError("judge options have no effect on a custom function: pass them in its reward_kwargs")
        self.max_failure_rate = max_failure_rate
        self.timeout_s = timeout_s
        self.judge = judge if judge is None or isinstance(judge, JudgeConfig) else JudgeConfig.from_mapping(judge)
        self._max_concurrent, self._guarded, self._warn = max_concurrent, guarded, warn
        self._custom, self._parts, self._max_tokens = custom, dict(parts or {}), max_tokens
        self._composites: dict[str, Composite] = {}
        self._own = None if custom is None else self._wrap(custom)
        # Beside a custom function, which knows no other parts.
        self._lengths = [] if custom is None else length_rules(self._parts, max_tokens)
        self._rules = RewardFunction(self._rule, name="registered rule", warn=warn, copy_extra=False)
        self._waiting_rules = RewardFunction(self._waiting_rule, name="registered rule", warn=warn, copy_extra=False)
        for source, extra in (sources or {}).items():
            self._declared(source, extra)

    @property
    def spec(self) -> dict[str, Any]:
        """Arguments for the same manager in another process, where somebody guards the time limit."""
        return {
            "max_failure_rate": 1.0,
            "custom": None if self._custom is None else self._custom.absolute(),
            "answer_format": self._format.value,
            "timeout_s": self.timeout_s,
            "judge": self.judge,
            "parts": _absolute_paths(self._parts),
            "max_tokens": self._max_tokens,
            "guarded": not self.is_async,
            "sources": {source: declaration(source) for source in self._composites},
        }

    @property
    def needs_loop(self) -> bool:
        """Calls wait (for a judge, a coroutine, a time limit), at least for one source that was checked."""
        if self._own is not None:
            return self._own.needs_loop
        return any(composite.needs_loop for composite in self._composites.values())

    @property
    def is_async(self) -> bool:
        """Scoring waits for a judge or a coroutine, at least for one source that was checked."""
        if self._own is not None:
            return self._own.is_async
        return any(composite.is_async for composite in self._composites.values())

    @property
    def runs_user_code(self) -> bool:
        """A user's function is called, so that a time limit must be kept."""
        return self._own is not None or any(c.runs_user_code for c in self._composites.values())

    @property
    def asks_judge(self) -> bool:
        """A judge is asked for at least one source that was checked."""
        return any(part.kind is PartKind.SOFT for c in self._composites.values() for part in c.parts)

    def check_prompts(self, prompts: Iterable[Prompt]) -> None:
        """At load: every row can be scored. Does nothing for a custom function, whose ground truths are its own.

        Raises ValueError naming the row when its data source is not registered or its ground truth is no label.
        """
        if self._own is not None:
            return
        for prompt in prompts:
            try:
                self._declared(prompt.data_source, prompt.extra_info).scorer.label_id(prompt.ground_truth)
            except ValueError as error:
                raise ValueError(f"row {prompt.row} ({prompt.uid}): {error}") from error

    def score(self, items: Sequence[RewardItem | tuple[Prompt, str]]) -> list[Score]:
        """One score an item, in order.

        Raises RewardFailureRateError as `check_rate` does.
        """
        scores = self.score_unchecked(items)
        self.check_rate(scores)
        return scores

    def score_unchecked(self, items: Sequence[RewardItem | tuple[Prompt, str]]) -> list[Score]:
        """As `score`, however many failed."""
        asked = [RewardItem(*item) for item in items]
        self._prepare(asked)
        scores = self._loop.run(self._score_bounded(asked)) if self.needs_loop else self.score_now(asked)
        assert len(scores) == len(items), f"{len(scores)} scores for {len(items)} items"
        return scores

    def score_now(self, items: Sequence[RewardItem]) -> list[Score]:
        """Scores in this thread, one after the other, where no call waits."""
        function = self._own or self._rules
        return [add_lengths(function.score(**_arguments(item)), self._lengths, item.tokens) for item in items]

    async def score_one(self, item: RewardItem) -> Score:
        """One score, without blocking the event loop while it waits."""
        score = await (self._own or self._waiting_rules).score_async(**_arguments(item))
        return add_lengths(score, self._lengths, item.tokens)

    def composite(self, data_source: str) -> Composite:
        """The parts by which a source is scored. Raises ValueError for one that nothing scores."""
        return self._composite(data_source)

    @functools.cached_property
    def _loop(self) -> LoopThread:
        return LoopThread()

    async def _score_bounded(self, items: Sequence[RewardItem]) -> list[Score]:
        # The limits start inside the semaphore: waiting for a free slot must not use up a call's time, nor a backlog
        # the judge's queue_timeout_s.
        slots = asyncio.Semaphore(self._max_concurrent if self.judge is None else self.judge.max_concurrent)

        async def one(item: RewardItem) -> Score:
            async with slots:
                return await self.score_one(item)

        return list(await asyncio.gather(*map(one, items)))

    def _prepare(self, items: Sequence[RewardItem]) -> None:
        """Build what the sources need; a source that nothing scores fails its answers later, one by one."""
        prompts = {item.prompt.data_source: item.prompt for item in items} if self._own is None else {}
        for source, prompt in prompts.items():
            try:
                self._declared(source, prompt.extra_info)
            except ValueError:
                continue

    def _declared(self, data_source: str, extra_info: Mapping[str, Any]) -> Composite:
        declare_from_row(data_source, extra_info)
        return self._composite(data_source)

    def _composite(self, data_source: str) -> Composite:
        found = self._composites.get(data_source)
        if found is None:
            found = self._composites[data_source] = self._build(data_source)
        return found

    def _build(self, data_source: str) -> Composite:
        scorer = get_scorer(data_source, self._format)
        parts = merge_parts(declared_parts(data_source), self._parts)
        if self.judge is None:
            soft = [part.name for part in parts if part.kind is PartKind.SOFT]
            if any(name in self._parts for name in soft):
                raise ValueError(f"reward.parts.{soft[0]} asks a judge: set reward.judge.enable=True")
            parts = tuple(part for part in parts if part.name not in soft)
            if soft:
                self._warn(
                    f"{data_source} is scored without its part {', '.join(soft)}: no judge (reward.judge.enable)"
                )
        asks = any(part.kind is PartKind.SOFT for part in parts)
        return Composite(
            scorer,
            parts,
            judge=shared_judge(self.judge) if asks and self.judge is not None else None,
            max_tokens=self._max_tokens,
            make_function=self._wrap,
        )

    def _wrap(self, custom: CustomFunction) -> RewardFunction:
        wrap = functools.partial(
            RewardFunction,
            custom.load(),
            name=f"{custom.path}:{custom.name}",
            reward_kwargs=custom.reward_kwargs,
            warn=self._warn,
        )
        function = wrap(timeout_s=None)
        return function if self._guarded and not function.is_async else wrap(timeout_s=self.timeout_s)

    def _rule(self, data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any]) -> Score:
        return self._declared(data_source, extra_info).score_now(solution_str, ground_truth, extra_info)

    async def _waiting_rule(
        self, data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any]
    ) -> Score:
        return await self._declared(data_source, extra_info).score(solution_str, ground_truth, extra_info)

    def check_rate(self, scores: Sequence[Score]) -> None:
        """Raises RewardFailureRateError, with the counts by reason, when too many scores of a batch failed.

        That is more than `max_failure_rate` of all, or of those that the judge was asked about, or all of those by a
        refused key, a refused model or an empty purse.
        """
        why = why_stop(scores, self.max_failure_rate)
        if why is not None:
            raise RewardFailureRateError(why)


def _check_name(name: str) -> None:
    if name in MANAGER_NAMES:
        return
    close = difflib.get_close_matches(name, MANAGER_NAMES, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(
        f"unknown reward manager {name!r}: {hint}One manager serves the names {', '.join(MANAGER_NAMES)}; "
        "for your own rule set custom_reward_function.path"
    )


def _arguments(item: RewardItem) -> dict[str, Any]:
    prompt, extra = item.prompt, item.prompt.extra_info
    if item.tokens is not None:
        extra = {**extra, RESPONSE_TOKENS: item.tokens}
    return {
        "data_source": prompt.data_source,
        "solution_str": item.text,
        "ground_truth": prompt.ground_truth,
        "extra_info": extra,
        "classes": known_classes(prompt.data_source),
    }


def _absolute_paths(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The parts with the paths of their functions absolute: a worker may stand elsewhere."""
    found = {}
    for name, settings in parts.items():
        if isinstance(settings, Mapping) and isinstance(settings.get("path"), str):
            settings = {**settings, "path": CustomFunction(settings["path"]).absolute().path}
        found[name] = settings
    return found
