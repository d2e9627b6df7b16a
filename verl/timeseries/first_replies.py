"""Does a model that writes supervised answers see anything? Its first replies against always naming one class.

Kept answers cannot tell: with several attempts a guess is right sooner or later (two classes, four attempts: 15 of 16).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SURE = 0.05
"""Largest probability of so many right replies by naming the largest class with its own frequency."""


@dataclass(frozen=True)
class Look:
    """What one reply to one row was. `right`: its class is the row's, whatever stands around it."""

    truth: str
    right: bool
    strict: bool

    @property
    def kept(self) -> bool:
        return self.right and self.strict


def compare(firsts: Sequence[Look], classes: int) -> dict[str, Any]:
    """Counts and shares (0 to 1) of the first replies to all rows, for the card.

    `p_value`: one-sided binomial probability of as many right replies at the share of the largest class.
    """
    # Late: it takes a second to import.
    from scipy.stats import binomtest

    right, rows = sum(look.right for look in firsts), len(firsts)
    majority = max(Counter(look.truth for look in firsts).values()) / rows
    p_value = float(binomtest(right, rows, max(majority, 1 / classes), alternative="greater").pvalue)
    return {
        "rows": rows,
        "right": right,
        "accuracy": round(right / rows, 4),
        "strict": sum(look.strict for look in firsts),
        "majority": round(majority, 4),
        "chance": round(1 / classes, 4),
        "p_value": float(f"{p_value:.3g}"),
    }


def warnings(found: dict[str, Any], attempts: int) -> list[str]:
    """A sentence when the first replies are not above the largest class's share."""
    if found["p_value"] < SURE:
        return []
    guessed = (
        f"; with {attempts} attempts wrong answers were asked again until a guess was right" if attempts > 1 else ""
    )
    return [
        f"the model may not see the classes: {found['right']} of {found['rows']} first replies are right "
        f"({found['accuracy']:.2f}), always naming the largest class gives {found['majority']:.2f} "
        f"(p {found['p_value']:.2g}){guessed}. What it wrote is then no reason for the class: take a better model, or "
        "the measured answers of the data folder"
    ]
