"""Validation: answers for every row in bounded chunks, one report per data source."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from verl.protocol import Group, Prompt
from verl.utils.report.validation import SourceReport, ValidationRow, classification_report, validation_metrics
from verl.utils.reward_score import known_classes

Answer = Callable[[Sequence[Prompt]], list[Group]]
"""Generates and scores."""


@dataclass(frozen=True)
class ValidationResult:
    """Reports by data source, and the groups they were made from."""

    reports: dict[str, SourceReport]
    groups: list[Group]

    @property
    def metrics(self) -> dict[str, float]:
        return validation_metrics(self.reports)

    @property
    def accuracy(self) -> float:
        """Mean accuracy over data sources; nan where no source has one."""
        found = [r.accuracy for r in self.reports.values() if r.accuracy is not None]
        return float(np.mean(found)) if found else float("nan")

    @property
    def parse_failure(self) -> float:
        """Share of answers, over all sources, that name no class."""
        rated = [(r.classification.parse_failure_rate, r.n) for r in self.reports.values() if r.classification]
        return sum(rate * n for rate, n in rated) / max(1, sum(n for _, n in rated))

    def write(self, path: Path, **extra: object) -> None:
        """The reports as json, with `extra` fields such as the source of the weights."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {**extra, "reports": {name: report.as_dict() for name, report in self.reports.items()}}
        path.write_text(json.dumps(content, indent=2, default=float) + "\n")


def validate(prompts: Sequence[Prompt], answer: Answer, chunk: int | None) -> ValidationResult:
    """Answer and score in chunks of `chunk` prompts (None: all at once), so memory does not grow with the rows."""
    size = chunk or max(1, len(prompts))
    groups: list[Group] = []
    for start in range(0, len(prompts), size):
        groups += answer(prompts[start : start + size])
    rows = [
        ValidationRow(g.prompt.uid, g.prompt.data_source, g.prompt.ground_truth, score)
        for g in groups
        for score in g.scores
    ]
    classes = {p.data_source: names for p in prompts if (names := known_classes(p.data_source)) is not None}
    return ValidationResult(classification_report(rows, classes), groups)
