"""The driver's side of the canary: one real prompt through engine, actor and plain model.

Bounds and verdict: `verl/workers/rollout/canary.py`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from verl.protocol import LogProbs, Prompt, Response, TrainGroup, TrainSample
from verl.trainer.ppo.workers import Actors, Rollouts
from verl.workers.rollout.base import Sampling
from verl.workers.rollout.canary import TOKENS, Apart, judge

log = logging.getLogger(__name__)


class Canary:
    """Checks that every engine and the actor mean the same distribution; `sampling` is that of training."""

    def __init__(
        self, actors: Actors, rollouts: Rollouts, prompts: Sequence[Prompt], sampling: Sampling, *, device: str
    ) -> None:
        self.actors, self.rollouts, self.device = actors, rollouts, device
        self.prompt = next((p for p in prompts if p.image_keys), prompts[0])
        # Without the filters: the actor's distribution has none.
        self.sampling = dataclasses.replace(
            sampling, n=1, max_tokens=min(TOKENS, sampling.max_tokens), ignore_eos=True, top_k=-1, top_p=1.0
        )
        self._yardstick: Apart | None = None

    def start(self, folder: Path, *, adapted: bool = False) -> str:
        """The first check, right after the first transfer. Returns what to print. Raises CanaryError.

        `folder` holds the weights as a plain model; `adapted` says that the run's adapters are not in them. Every
        engine is compared with the actor; the plain model reads the first one's answer, on the CPU where the GPU is
        full, and the line says where.
        """
        answers = self._answers()
        actors = [self._actor(answer) for answer in answers]
        engine, actor = answers[0].log_probs, actors[0]
        plain, where = self._plain(folder, answers[0], "fp32")
        places = [f"plain fp32 on {where}"]
        if self.device == "cuda":
            rounded, where = self._plain(folder, answers[0], "bf16")
            places.append(f"plain bf16 on {where}")
            self._yardstick = Apart.of(rounded, plain)
        lines = [f"engine to actor {self._judge(answers, actors, 'at the start')}"]
        if not adapted:
            lines.append(f"engine to plain fp32 {Apart.of(engine, plain)}")
            lines.append(f"actor to plain fp32 {Apart.of(actor, plain)}")
        if self._yardstick is not None:
            lines.append(f"plain bf16 to plain fp32 {self._yardstick}")
        what = f"{self.prompt.uid}, {len(self.prompt.image_keys)} plot(s), {len(engine)} tokens"
        return f"canary ({what}, {len(answers)} engine(s), {', '.join(places)}): {'; '.join(lines)}"

    def check(self, step: int) -> dict[str, float]:
        """After a later transfer; metrics. Raises CanaryError."""
        answers = self._answers()
        worst = self._judge(answers, [self._actor(answer) for answer in answers], f"at step {step}")
        return {"canary/logprob_diff_max": worst.worst, "canary/logprob_diff_mean": worst.mean}

    def _answers(self) -> list[Response]:
        """One answer of every engine."""
        parts = self.rollouts.generate([self.prompt] * self.rollouts.engines, self.sampling, step=0)
        return [answers[0] for answers in parts]

    def _actor(self, answer: Response) -> LogProbs:
        sample = TrainSample(0, answer.token_ids, np.ones(len(answer.token_ids), np.float32))
        return self.actors.log_probs([TrainGroup(self.prompt, (sample,))], reference=False)[0]

    def _plain(self, folder: Path, answer: Response, dtype: str) -> tuple[LogProbs, str]:
        temperature = self.sampling.temperature
        return self.rollouts.plain_log_probs(
            folder, self.prompt, answer.token_ids, dtype=dtype, temperature=temperature
        )

    def _judge(self, answers: Sequence[Response], actors: Sequence[LogProbs], when: str) -> Apart:
        """The largest distances of all engines' answers to the actor's log-probs of the same tokens."""
        found = [Apart.of(answer.log_probs, actor) for answer, actor in zip(answers, actors, strict=True)]
        for engine, apart in enumerate(found):
            warning = judge(apart, self._yardstick, f"{when}, engine {engine}")
            if warning is not None:
                log.warning("%s", warning)
        return Apart.worst_of(found)
