"""One step's answers on their way from scores to mini-batches (pure).

Invariants
- A failed answer, and a group with fewer than two ok scores, is in no mini-batch and in no denominator.
- Weights hold the denominators of the whole mini-batch.
- The first mini-batch of the first epoch has ratio 1 by definition and needs no old log-probs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from verl.algorithms.advantage import Advantages
from verl.algorithms.aggregation import token_weights
from verl.protocol import Group, LogProbs, Score, TrainGroup, TrainSample

LogProbTable = Mapping[int, LogProbs]
"""Log-probs (R,) by sample index."""


@dataclass(frozen=True)
class MiniBatchPlan:
    """The groups (indices into the step) of one optimizer step."""

    members: tuple[int, ...]
    first: bool
    """The policy has not moved yet: old log-probs are those of this forward."""


def sample_index(group: int, answer: int, n: int) -> int:
    """Number of an answer within the step; `n` is the number of answers of a prompt."""
    return group * n + answer


def cut_mini_batches(
    count: int, *, size: int, epochs: int, shuffle: bool, rng: np.random.Generator
) -> list[MiniBatchPlan]:
    """`epochs` passes over `count` groups, `size` groups an optimizer step."""
    plans: list[MiniBatchPlan] = []
    for _ in range(epochs):
        order = rng.permutation(count) if shuffle else np.arange(count)
        for start in range(0, count, size):
            plans.append(MiniBatchPlan(tuple(int(i) for i in order[start : start + size]), first=not plans))
    return plans


def kept_answers(group: Group, advantages: Advantages) -> list[int]:
    return [int(i) for i in np.flatnonzero(advantages.keep)]


def train_groups(
    groups: Sequence[Group],
    advantages: Sequence[Advantages],
    members: Sequence[int],
    *,
    old: LogProbTable,
    ref: LogProbTable,
    loss_agg_mode: str,
    loss_scale_factor: float | None,
    is_weights: LogProbTable = MappingProxyType({}),
    with_sampler: bool = False,
) -> list[TrainGroup]:
    """The kept answers of `members` with everything the loss needs. Tables may be empty (column absent).

    `with_sampler`: the policy has not moved since it was sampled from, so the sampler's log-probs go along, to be
    compared with its own. Later they would tell how far it has moved.
    """
    kept = [(g, kept_answers(groups[g], advantages[g])) for g in members]
    lengths = [len(groups[g].responses[i].token_ids) for g, answers in kept for i in answers]
    weights = iter(token_weights(lengths, loss_agg_mode, loss_scale_factor))
    result = []
    for g, answers in kept:
        group = groups[g]
        samples = []
        for i in answers:
            index = sample_index(g, i, len(group.responses))
            response = group.responses[i]
            samples.append(
                TrainSample(
                    index=index,
                    token_ids=response.token_ids,
                    weights=next(weights),
                    advantage=float(advantages[g].values[i]),
                    old_log_probs=old.get(index),
                    ref_log_probs=ref.get(index),
                    rollout_log_probs=response.log_probs if with_sampler else None,
                    is_weights=is_weights.get(index),
                )
            )
        if samples:
            result.append(TrainGroup(group.prompt, tuple(samples)))
    return result


def sampler_log_probs(groups: Sequence[Group]) -> LogProbTable:
    """The sampler's own log-probs of every answer."""
    return {
        sample_index(g, i, len(group.responses)): response.log_probs
        for g, group in enumerate(groups)
        for i, response in enumerate(group.responses)
    }


def members_of(batch: Sequence[TrainGroup]) -> list[int]:
    """Sample indices of a mini-batch."""
    return [s.index for g in batch for s in g.samples]


def response_tokens(groups: Sequence[TrainGroup]) -> int:
    return sum(len(s.token_ids) for g in groups for s in g.samples)


def permute_scores(groups: Sequence[Group], rng: np.random.Generator) -> list[Group]:
    """The control experiment: the same scores, dealt out at random over all answers of the step."""
    scores = [score for group in groups for score in group.scores]
    dealt = iter([scores[i] for i in rng.permutation(len(scores))])
    return [Group(g.prompt, g.responses, tuple(next(dealt) for _ in g.responses)) for g in groups]


def penalise(groups: Sequence[Group], kl: Mapping[int, float], coefficient: float) -> list[Group]:
    """Subtract `coefficient` times the answer's summed KL estimate from its total. Failed scores stay failed."""
    result = []
    for g, group in enumerate(groups):
        scores = []
        for i, score in enumerate(group.scores):
            index = sample_index(g, i, len(group.scores))
            if score.is_ok and index in kl:
                total = score.total - coefficient * kl[index]
                score = Score.ok(total, score.parts, score.prediction, score.extra)
            scores.append(score)
        result.append(Group(group.prompt, group.responses, tuple(scores)))
    return result
