"""Scores one answer by the parts that a task or the config declares.

Invariants
- `total` is the sum of weight x value over the parts whose conditions hold; a part left out is not in `Score.parts`.
- A part that could not be computed fails the whole answer, with that part's reason: nothing is put in its place.
- The judge is asked only where its part counts, and never about an answer without an `<extension>`.
- What a part tells beside its number is in `extra` as `<part>/<key>`, so that parts cannot overwrite each other.
- With the published parts the result equals `LabelScorer`'s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from verl.protocol import Score
from verl.utils.reward_score.adapter import RewardFunction
from verl.utils.reward_score.custom import CustomFunction
from verl.utils.reward_score.judge import Judge, JudgeError, JudgeRequest, Rubric
from verl.utils.reward_score.labels import LabelScorer
from verl.utils.reward_score.length import LengthRule
from verl.utils.reward_score.parts import PartKind, RewardPart, check_parts
from verl.utils.reward_score.returns import failed
from verl.utils.reward_score.tags import AnswerFormat, ParsedAnswer, fold

CAPPED = "capped"
"""Beside a judge's criteria in `Score.extra`: a stock phrase capped the score."""

_JUDGE_FAILED = "judge_failed"
"""In `Score.extra` of an answer that the judge was asked about in vain."""

_FIELDS = ("reasoning", "class", "extension")
"""What a judge is shown of an answer."""


def asked_judge(score: Score) -> bool:
    """Whether a judge was asked about that answer, with or without success."""
    return _JUDGE_FAILED in score.extra or any(key.endswith(f"/{CAPPED}") for key in score.extra)


class Composite:
    """The reward of one data source.

    `scorer` brings classes, default rule and whether the task asks for an extension. `judge` is None where no part
    asks one. `max_tokens` is the default limit of length parts. `make_function` wraps a custom part's function.
    Raises ValueError, naming the key, for parts that cannot work for this source.
    """

    def __init__(
        self,
        scorer: LabelScorer,
        parts: Sequence[RewardPart],
        *,
        judge: Judge | None = None,
        max_tokens: int | None = None,
        make_function: Callable[[CustomFunction], RewardFunction] | None = None,
    ) -> None:
        check_parts(parts)
        self.scorer = scorer
        self.parts = tuple(parts)
        self._judge = judge
        self._max_tokens = max_tokens
        self._reader = _reader(scorer, parts, PartKind.FORMAT, scorer)
        self._labels = _reader(scorer, parts, PartKind.LABEL, self._reader)
        if self._reader.answer_format is AnswerFormat.LOOSE:
            # The loose rule asks for a legal label, so it needs the label part's spellings.
            self._reader = dataclasses.replace(self._labels, answer_format=AnswerFormat.LOOSE)
        self._rubrics: dict[str, Rubric] = {}
        self._functions: dict[str, RewardFunction] = {}
        self._lengths: dict[str, LengthRule] = {}
        for part in self.parts:
            self._prepare(part, make_function or _plain_function)

    def _prepare(self, part: RewardPart, make_function: Callable[[CustomFunction], RewardFunction]) -> None:
        where, options = f"reward.parts.{part.name}", part.options
        if part.kind is PartKind.SOFT:
            if self._judge is None:
                raise ValueError(f"{where} asks a judge: set reward.judge.enable=True, or {where}=null")
            if not self.scorer.extension:
                raise ValueError(f"{where}: {self.scorer.data_source} asks for no <extension> that could be judged")
            self._rubrics[part.name] = _rubric(options.get("rubric"), where)
        elif part.kind is PartKind.LENGTH:
            self._lengths[part.name] = LengthRule.of(part, self._max_tokens)
        elif part.kind is PartKind.CUSTOM:
            if not isinstance(options.get("path"), str):
                raise ValueError(f"{where}.path={options.get('path')!r}: name a python file with the function")
            function = CustomFunction(
                options["path"], options.get("function", "compute_score"), options.get("reward_kwargs") or {}
            )
            self._functions[part.name] = make_function(function)

    @property
    def needs_loop(self) -> bool:
        """Some part waits: for a judge, for a coroutine, or within a time limit."""
        return bool(self._rubrics) or any(f.needs_loop for f in self._functions.values())

    @property
    def is_async(self) -> bool:
        """Some part waits for a judge or a coroutine."""
        return bool(self._rubrics) or any(f.is_async for f in self._functions.values())

    @property
    def runs_user_code(self) -> bool:
        """Some part is a user's function."""
        return bool(self._functions)

    def read(self, text: str) -> tuple[ParsedAnswer, ParsedAnswer]:
        """The answer as the format part and as the label part read it."""
        answer = self._reader.read(text)
        return answer, answer if self._labels == self._reader else self._labels.read(text)

    def score_now(self, text: str, ground_truth: str, extra_info: Mapping[str, Any]) -> Score:
        """As `score`, where no part waits."""
        assert not self.needs_loop, f"{self.scorer.data_source}: a part waits, use score"
        coroutine = self.score(text, ground_truth, extra_info)
        try:
            coroutine.send(None)
        except StopIteration as done:
            found: Score = done.value
            return found
        raise AssertionError(f"{self.scorer.data_source}: a part waited")

    async def score(self, text: str, ground_truth: str, extra_info: Mapping[str, Any]) -> Score:
        """Score one decoded answer. Raises ValueError for a ground truth that is no label of the task."""
        truth = self.scorer.classes[self.scorer.label_id(ground_truth)]
        formed, answer = self.read(text)
        total = 0.0
        parts: dict[str, float] = {}
        extra: dict[str, Any] = {}
        for part in self.parts:
            if any(parts.get(name) != 1.0 for name in part.when):
                continue
            if part.kind is PartKind.FORMAT:
                value = float(formed.well_formed)
            elif part.kind is PartKind.LABEL:
                value = float(answer.label == truth)
            elif part.kind is PartKind.LENGTH:
                value = self._lengths[part.name].value(extra_info)
            else:
                found = await self._waited(part, text, ground_truth, answer, extra_info)
                if not found.is_ok:
                    return found
                value = found.total
                extra |= {f"{part.name}/{key}": told for key, told in found.extra.items()}
            parts[part.name] = value
            total += part.weight * value
        return Score.ok(total, parts, answer.label, extra)

    async def _waited(
        self, part: RewardPart, text: str, ground_truth: str, answer: ParsedAnswer, extra_info: Mapping[str, Any]
    ) -> Score:
        if part.name in self._rubrics:
            return await self._soft(part, answer)
        function = self._functions[part.name]
        source = self.scorer.data_source
        if function.needs_loop:
            return await function.score_async(
                data_source=source, solution_str=text, ground_truth=ground_truth, extra_info=extra_info
            )
        return function.score(data_source=source, solution_str=text, ground_truth=ground_truth, extra_info=extra_info)

    async def _soft(self, part: RewardPart, answer: ParsedAnswer) -> Score:
        if not answer.extension:
            return Score.ok(0.0)
        shown = (answer.think or "", answer.label or "", answer.extension)
        request = JudgeRequest(self._rubrics[part.name], dict(zip(_FIELDS, shown, strict=True)))
        assert self._judge is not None, f"{part.name} was prepared without a judge"
        try:
            verdict = await self._judge.judge(request)
        except JudgeError as error:
            return dataclasses.replace(failed(error.kind, str(error)), extra={_JUDGE_FAILED: True})
        return Score.ok(verdict.score, extra={**verdict.criteria, CAPPED: verdict.capped})


def _reader(scorer: LabelScorer, parts: Sequence[RewardPart], kind: PartKind, default: LabelScorer) -> LabelScorer:
    """The scorer with the options of the first part of that kind."""
    options = next((part.options for part in parts if part.kind is kind), {})
    rule = options.get("rule", default.answer_format.value)
    try:
        answer_format = AnswerFormat(rule)
    except ValueError:
        raise ValueError(f"unknown answer format {rule!r} of a {kind.value} part: use loose or strict") from None
    if kind is PartKind.FORMAT:
        return dataclasses.replace(scorer, answer_format=answer_format)
    known = {fold(label): label for label in scorer.classes}
    synonyms = {s: known.get(fold(str(label)), str(label)) for s, label in (options.get("synonyms") or {}).items()}
    return dataclasses.replace(
        scorer, answer_format=answer_format, synonyms=synonyms, case=bool(options.get("case", False))
    )


def _rubric(value: Any, where: str) -> Rubric:
    """A rubric as declared in a task file, or as a mapping with its fields in a config."""
    rubric = value if isinstance(value, Rubric) else _rubric_from(value, where)
    if rubric.stock_field not in (None, *_FIELDS):
        raise ValueError(f"{where}.rubric.stock_field={rubric.stock_field!r}: use one of {', '.join(_FIELDS)}")
    return rubric


def _rubric_from(value: Any, where: str) -> Rubric:
    if not isinstance(value, Mapping) or not {"name", "task", "criteria"} <= set(value):
        raise ValueError(f"{where}.rubric={value!r}: give name, task and criteria (key -> meaning)")
    try:
        settings = {**value, "criteria": tuple((str(k), str(v)) for k, v in dict(value["criteria"]).items())}
        return Rubric(**settings | {"stock_phrases": tuple(settings.get("stock_phrases") or ())})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}.rubric: {error}") from error


def _plain_function(custom: CustomFunction) -> RewardFunction:
    return RewardFunction(custom.load(), name=f"{custom.path}:{custom.name}", reward_kwargs=dict(custom.reward_kwargs))
