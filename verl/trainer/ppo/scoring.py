"""From answers to groups: decode, score, and keep what a person would look at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl.config import PPOConfig, SFTConfig
from verl.config.judge import RewardJudgeConfig
from verl.protocol import Group, ImageRecord, Prompt, Response, Score
from verl.utils.dataset.image_store import encode_png
from verl.utils.reward_score.custom import CustomFunction
from verl.utils.reward_score.judge import JudgeConfig
from verl.utils.reward_score.returns import number
from verl.utils.tracking import Sample
from verl.workers.reward_manager import RewardItem, RewardManager
from verl.workers.rollout.forward import decode

if TYPE_CHECKING:
    from verl.workers.reward_manager.pool import AnswerSink, RewardPool


def build_reward_manager(config: PPOConfig | SFTConfig) -> RewardManager:
    """The manager that the config asks for. Raises ValueError on a function that cannot be loaded."""
    custom = config.custom_reward_function
    ppo = isinstance(config, PPOConfig)
    return RewardManager(
        config.reward_model.reward_manager if ppo else "naive",
        max_failure_rate=config.reward.max_failure_rate,
        custom=None if custom.path is None else CustomFunction(custom.path, custom.name, custom.reward_kwargs),
        answer_format=config.reward.format,
        timeout_s=config.reward.timeout,
        judge=judge_config(config.reward.judge) if ppo and config.reward.judge.enable else None,
        parts=config.reward.parts if ppo else None,
        max_tokens=config.data.max_response_length,
    )


def check_scorable(manager: RewardManager, files: Sequence[str], prompts: Sequence[Prompt]) -> None:
    """At load: every row can be scored. Raises ValueError naming file, row and what the reward does not know."""
    try:
        manager.check_prompts(prompts)
    except ValueError as error:
        raise ValueError(f"{', '.join(files)} {error}") from error


def judge_config(judge: RewardJudgeConfig) -> JudgeConfig:
    """The judge's own settings. Raises ValueError naming the key of an illegal one."""
    return JudgeConfig(
        base_url=judge.base_url,
        model=judge.model,
        api_key_env=judge.api_key_env,
        temperature=judge.temperature,
        structured_output=judge.structured_output,
        max_answer_tokens=judge.max_answer_tokens,
        max_chars=judge.max_chars,
        timeout_s=judge.timeout_s,
        attempt_timeout_s=judge.attempt_timeout_s,
        queue_timeout_s=judge.queue_timeout_s,
        max_retries=judge.max_retries,
        backoff_s=judge.backoff_s,
        give_up_after=judge.give_up_after,
        max_concurrent=judge.max_concurrent,
        max_rpm=judge.max_rpm,
        max_tpm=judge.max_tpm,
        max_calls=judge.max_calls,
        max_total_tokens=judge.max_total_tokens,
        cache_path=None if judge.cache_path is None else str(Path(judge.cache_path).expanduser().resolve()),
        run_name=judge.run_name,
    )


@dataclass(frozen=True)
class Scoring:
    """The scores of one batch, being made: answers sent to `sink` while others are written are scored at once."""

    scorer: Scorer
    prompts: Sequence[Prompt]
    sink: AnswerSink | None
    """None: everything is scored at the end, in this process."""

    def finish(self, responses: Sequence[Sequence[Response]]) -> list[Group]:
        """One group per prompt, in order; waits for scores that are not there yet.

        Raises RewardFailureRateError when too many answers could not be scored.
        """
        if self.sink is None:
            return self.scorer.score(self.prompts, responses)
        assert self.scorer.pool is not None, "a sink without its pool"
        scores, self.scorer.pool_metrics = self.scorer.pool.collect(self.sink, [len(answers) for answers in responses])
        return _groups(self.prompts, responses, scores)


def _groups(prompts: Sequence[Prompt], responses: Sequence[Sequence[Response]], scores: Sequence[Score]) -> list[Group]:
    in_order = iter(scores)
    return [
        Group(prompt, tuple(answers), tuple(next(in_order) for _ in answers))
        for prompt, answers in zip(prompts, responses, strict=True)
    ]


class Scorer:
    """Decodes answers and scores them; the texts of the last call stay at hand for dumps."""

    def __init__(self, manager: RewardManager, tokenizer: Any, images: Mapping[str, ImageRecord]) -> None:
        """`images` are those of all prompts, by key: what trackers show beside an answer."""
        self.manager = manager
        self.tokenizer = tokenizer
        self.images = images
        self.pool: RewardPool | None = None
        """Where answers are scored; None: in this process."""
        self.pool_metrics: dict[str, float] = {}
        """The pool's own numbers about the last batch."""

    def begin(self, prompts: Sequence[Prompt]) -> Scoring:
        """Get ready for answers to these prompts."""
        return Scoring(self, prompts, None if self.pool is None else self.pool.open(prompts))

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[Response]]) -> list[Group]:
        """One group per prompt, in order."""
        flat = [(p, r) for p, answers in zip(prompts, responses, strict=True) for r in answers]
        texts = self.texts([r for _, r in flat])
        items = [RewardItem(p, text, len(r.token_ids)) for (p, r), text in zip(flat, texts, strict=True)]
        return _groups(prompts, responses, self.manager.score(items))

    def texts(self, responses: Sequence[Response]) -> list[str]:
        return decode(self.tokenizer, responses)

    def write_samples(self, path: Path, groups: Sequence[Group]) -> None:
        """One json line per group: question, image keys, truth, and the answers sorted by reward, failed ones last."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for group in groups:
                file.write(json.dumps(self._record(group), ensure_ascii=False) + "\n")

    def tracker_samples(self, groups: Sequence[Group]) -> list[Sample]:
        """First answers of some groups with the first image of their prompts, for trackers."""
        texts = self.texts([g.responses[0] for g in groups])
        return [
            Sample(
                uid=g.prompt.uid,
                prompt=str(g.prompt.extra_info.get("question", "")),
                answer=text,
                label=g.prompt.ground_truth,
                score=g.scores[0].total if g.scores[0].is_ok else None,
                image=encode_png(self.images[g.prompt.image_keys[0]]) if g.prompt.image_keys else None,
            )
            for g, text in zip(groups, texts, strict=True)
        ]

    def _record(self, group: Group) -> dict[str, Any]:
        texts = self.texts(group.responses)
        answers = [
            {
                "text": text,
                "score": score.total if score.is_ok else None,
                "parts": dict(score.parts),
                "extra": {name: _plain(value) for name, value in score.extra.items()},
                "prediction": score.prediction,
                "failed": score.reason,
                "tokens": len(response.token_ids),
                "stop": response.stop_reason.value,
            }
            for text, response, score in zip(texts, group.responses, group.scores, strict=True)
        ]
        answers.sort(key=lambda a: -a["score"] if a["score"] is not None else float("inf"))
        prompt = group.prompt
        return {
            "uid": prompt.uid,
            "data_source": prompt.data_source,
            "question": prompt.extra_info.get("question"),
            "ground_truth": prompt.ground_truth,
            "image_keys": prompt.image_keys,
            "answers": answers,
        }


def _plain(value: Any) -> float | str:
    """An extra field of a score for json: a number where it is one, otherwise its text."""
    found = number(value)
    return str(value) if found is None else found
