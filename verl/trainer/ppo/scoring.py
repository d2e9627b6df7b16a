"""From answers to groups: decode, score, and keep what a person would look at."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verl.config import PPOConfig, SFTConfig
from verl.protocol import Group, Prompt, Response
from verl.utils.reward_score.custom import CustomFunction
from verl.utils.tracking import Sample
from verl.workers.reward_manager import RewardManager


def build_reward_manager(config: PPOConfig | SFTConfig) -> RewardManager:
    """The manager that the config asks for. Raises ValueError on a function that cannot be loaded."""
    custom = config.custom_reward_function
    name = config.reward_model.reward_manager if isinstance(config, PPOConfig) else "naive"
    return RewardManager(
        name,
        max_failure_rate=config.reward.max_failure_rate,
        custom=None if custom.path is None else CustomFunction(custom.path, custom.name, custom.reward_kwargs),
        answer_format=config.reward.format,
        timeout_s=config.reward.timeout,
    )


class Scorer:
    """Decodes answers and scores them; the texts of the last call stay at hand for dumps."""

    def __init__(self, manager: RewardManager, tokenizer: Any) -> None:
        self.manager = manager
        self.tokenizer = tokenizer

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[Response]]) -> list[Group]:
        """One group per prompt, in order."""
        texts = self.texts([r for answers in responses for r in answers])
        owners = [p for p, answers in zip(prompts, responses, strict=True) for _ in answers]
        scores = iter(self.manager.score(list(zip(owners, texts, strict=True))))
        return [
            Group(prompt, tuple(answers), tuple(next(scores) for _ in answers))
            for prompt, answers in zip(prompts, responses, strict=True)
        ]

    def texts(self, responses: Sequence[Response]) -> list[str]:
        if not responses:
            return []
        return self.tokenizer.batch_decode([r.token_ids.tolist() for r in responses], skip_special_tokens=True)

    def write_samples(self, path: Path, groups: Sequence[Group]) -> None:
        """One json line per group: prompt, image keys, truth, and the answers sorted by reward, failed ones last."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            for group in groups:
                file.write(json.dumps(self._record(group), ensure_ascii=False) + "\n")

    def tracker_samples(self, groups: Sequence[Group]) -> list[Sample]:
        """First answers of some groups, for trackers."""
        texts = self.texts([g.responses[0] for g in groups])
        return [
            Sample(
                uid=g.prompt.uid,
                prompt=str(g.prompt.extra_info.get("question", "")),
                answer=text,
                label=g.prompt.ground_truth,
                score=g.scores[0].total if g.scores[0].is_ok else None,
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
            "ground_truth": prompt.ground_truth,
            "image_keys": prompt.image_keys,
            "answers": answers,
        }
