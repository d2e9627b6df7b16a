"""DAPO's soft punishment of answers that come near the longest one (pure).

Invariants
- A length part is from -1 to 0, whatever the score beside it.
- A failed score stays what it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from verl.protocol import Score
from verl.utils.reward_score.parts import PartKind, RewardPart, kind_of, merge_parts
from verl.utils.reward_score.returns import FailureKind, failed

RESPONSE_TOKENS = "response_tokens"
"""Key of `extra_info` that holds the answer's length in tokens."""


def overlong(tokens: int, *, max_tokens: int, buffer: int) -> float:
    """0 up to `max_tokens - buffer` tokens, then falling to -1 at `max_tokens` (DAPO, arXiv 2503.14476, eq. 13)."""
    return max(-1.0, min(0.0, (max_tokens - buffer - tokens) / buffer))


@dataclass(frozen=True, slots=True)
class LengthRule:
    """The limits of one length part, in tokens."""

    name: str
    weight: float
    max_tokens: int
    buffer: int

    @classmethod
    def of(cls, part: RewardPart, max_tokens: int | None) -> LengthRule:
        """`max_tokens` is the default of the part's own. Raises ValueError naming the key."""
        where = f"reward.parts.{part.name}"
        limit, buffer = part.options.get("max_tokens", max_tokens), part.options.get("buffer")
        if limit is None:
            raise ValueError(f"{where} needs max_tokens, the length at which the punishment is full")
        if not isinstance(limit, int) or not isinstance(buffer, int) or not 0 < buffer <= limit:
            raise ValueError(f"{where}: buffer={buffer} must lie between 1 and max_tokens={limit}")
        return cls(part.name, part.weight, limit, buffer)

    def value(self, extra_info: Mapping[str, Any]) -> float:
        """From -1 to 0. Raises ValueError where nobody counted the answer's tokens."""
        if RESPONSE_TOKENS not in extra_info:
            raise ValueError(
                f"reward.parts.{self.name} needs the answer's length: give extra_info[{RESPONSE_TOKENS!r}]"
            )
        return overlong(extra_info[RESPONSE_TOKENS], max_tokens=self.max_tokens, buffer=self.buffer)


def length_rules(parts: Mapping[str, Any], max_tokens: int | None) -> list[LengthRule]:
    """Of the settings of parts, by name, those of kind length. Raises ValueError naming the key of what cannot be."""
    chosen = {name: settings for name, settings in parts.items() if kind_of(name, settings) == PartKind.LENGTH.value}
    return [LengthRule.of(part, max_tokens) for part in merge_parts((), chosen)] if chosen else []


def add_lengths(score: Score, rules: Sequence[LengthRule], tokens: int | None) -> Score:
    """The score with the length parts added to its total and its parts; `tokens` is the answer's length."""
    if not (rules and score.is_ok):
        return score
    try:
        values = {rule.name: rule.value({} if tokens is None else {RESPONSE_TOKENS: tokens}) for rule in rules}
    except ValueError as error:
        return failed(FailureKind.EXCEPTION, str(error))
    total = score.total + sum(rule.weight * values[rule.name] for rule in rules)
    return Score.ok(total, {**score.parts, **values}, score.prediction, score.extra)
