"""Validation: how well answers name the class, per data source (pure).

An answer that could not be read is wrong in the accuracy and stands in its own column of the confusion matrix.

Invariants
- Nothing of one data source enters another's numbers.
- The confusion matrix has a row per class and a last column "unparsed"; no answer becomes a class it did not name.
- Failed scores are counted and enter no mean, no matrix, no denominator.
- Without a single ok score there is a count of failures and no number that could be taken for a result.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import f1_score, recall_score

from verl.protocol import Score
from verl.utils.report.wilson import wilson_half_width
from verl.utils.reward_score.returns import failure_kind, number
from verl.utils.reward_score.tags import fold

UNPARSED = "unparsed"
_UNPARSED_ID = -1


@dataclass(frozen=True, slots=True)
class ValidationRow:
    """One scored answer. `uid` names the prompt: the N answers of a prompt share it.

    Example: `ValidationRow("val-3", "computer_dataset", "Desktop", Score.ok(1.0, {"label": 1}, "Desktop"))`
    """

    uid: str
    data_source: str
    ground_truth: str
    score: Score


@dataclass(frozen=True)
class Classification:
    """The part of a report that needs labels. C classes."""

    classes: tuple[str, ...]
    macro_f1: float
    """Mean F1 over the classes that occur as truth or as prediction."""
    recall: Mapping[str, float]
    """Of the classes that occur as truth."""
    confusion: NDArray[np.int64]
    """(C, C + 1) counts: rows are true classes, columns predicted ones, the last column is unparsed."""
    parse_failure_rate: float
    """Share of ok answers that name none of the classes."""


@dataclass(frozen=True)
class SourceReport:
    """One data source. Means are None where no answer has an ok score."""

    data_source: str
    n: int
    """Answers with an ok score."""
    n_prompts: int
    """Prompts with at least one of them."""
    answers_per_prompt: int
    """The N of mean@N: the largest number of answers of a prompt, failed ones included."""
    failed: Mapping[str, int]
    """Failed scores by kind."""
    majority_share: float
    """Accuracy of always naming the most frequent class."""
    mean_score: float | None
    accuracy: float | None
    """Mean over ok answers; None also where the reward function tells neither `acc` nor a prediction."""
    standard_error: float | None
    """Half the width of Wilson's interval (z = 1) with n prompts, as the N answers of one are not independent."""
    classification: Classification | None
    """None where no answer could carry a prediction (a function that returns a bare number)."""
    at_n: Mapping[str, float]
    """`score/mean@N`, `acc/mean@N`, with N > 1 `acc/maj@N`, and `<part>/mean@N` of each part: means over prompts."""

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for a json file in the run folder."""
        fields = {k: v for k, v in vars(self).items() if k != "classification"}
        fields |= {"failed": dict(self.failed), "at_n": dict(self.at_n), "classification": None}
        if self.classification is not None:
            c = self.classification
            columns = [*c.classes, UNPARSED]
            fields["classification"] = {
                "macro_f1": c.macro_f1,
                "recall": dict(c.recall),
                "parse_failure_rate": c.parse_failure_rate,
                "confusion": {
                    t: dict(zip(columns, r.tolist(), strict=True)) for t, r in zip(c.classes, c.confusion, strict=True)
                },
            }
        return fields


def classification_report(
    rows: Sequence[ValidationRow], classes: Mapping[str, Sequence[str]] | None = None
) -> dict[str, SourceReport]:
    """One report per data source, in order of first appearance.

    `classes` names the labels of a source in id order; for a source it leaves out they are the sorted ground truths.
    Raises ValueError when a ground truth is not among the named classes.
    """
    by_source: dict[str, list[ValidationRow]] = defaultdict(list)
    for row in rows:
        by_source[row.data_source].append(row)
    return {source: _report(source, own, (classes or {}).get(source)) for source, own in by_source.items()}


def validation_metrics(reports: Mapping[str, SourceReport]) -> dict[str, float]:
    """Flat metrics under verl's names; numbers that do not exist are left out."""
    metrics: dict[str, float | None] = {}
    for source, report in reports.items():
        aux = f"val-aux/{source}"
        metrics[f"val/test_score/{source}"] = report.mean_score
        metrics[f"val/acc/{source}"] = report.accuracy
        metrics |= {f"{aux}/n": float(report.n), f"{aux}/failed": float(sum(report.failed.values()))}
        metrics |= {f"{aux}/failed/{kind}": float(count) for kind, count in report.failed.items()}
        metrics |= {f"{aux}/majority_share": report.majority_share, f"{aux}/acc/standard_error": report.standard_error}
        for name, value in report.at_n.items():
            metrics[f"val-core/{source}/{name}" if name.startswith("acc/mean@") else f"{aux}/{name}"] = value
        if report.classification is not None:
            metrics[f"val/f1_score/{source}"] = report.classification.macro_f1
            metrics[f"{aux}/parse_fail"] = report.classification.parse_failure_rate
            metrics |= {f"{aux}/recall/{name}": value for name, value in report.classification.recall.items()}
    return {name: value for name, value in metrics.items() if value is not None}


def check_metric_name(
    name: str, sources: Mapping[str, Sequence[str] | None], answers: int, also: Sequence[str]
) -> None:
    """Raises ValueError when no validation can give a metric `name`, with close ones and all that are known.

    `sources` are the data sources with their classes (None: of the rows), `answers` those of a prompt, `also` names
    that the caller adds. Parts of a reward and classes of a source that declares none are not known before answers
    are scored: such a name passes here.
    """
    known = list(also)
    for source, classes in sources.items():
        aux = f"val-aux/{source}"
        known += [f"val/{kind}/{source}" for kind in ("acc", "test_score", "f1_score")]
        known += [f"val-core/{source}/acc/mean@{answers}", f"{aux}/score/mean@{answers}", f"{aux}/parse_fail"]
        known += [f"{aux}/acc/maj@{answers}"] if answers > 1 else []
        known += [f"{aux}/recall/{label}" for label in classes or ()]
        known += [f"{aux}/{kind}" for kind in ("n", "failed", "majority_share", "acc/standard_error")]
        of_part = name.startswith(f"{aux}/") and name.endswith(f"/mean@{answers}")
        of_label = classes is None and name.startswith(f"{aux}/recall/")
        if of_part or of_label or name.startswith(f"{aux}/failed/"):
            return
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"validation gives no metric {name}{hint}; it gives {', '.join(known)}")


def _report(source: str, rows: Sequence[ValidationRow], classes: Sequence[str] | None) -> SourceReport:
    names = tuple(classes) if classes is not None else tuple(sorted({row.ground_truth.strip() for row in rows}))
    ids = {fold(name): i for i, name in enumerate(names)}
    for row in rows:
        if fold(row.ground_truth) not in ids:
            raise ValueError(f"{source}, {row.uid}: ground truth {row.ground_truth!r} is none of {', '.join(names)}")
    ok = [row for row in rows if row.score.is_ok]
    prompts = _by_prompt(ok)
    accuracies = {id(row): _accuracy(row) for row in ok}
    known = [a for a in accuracies.values() if a is not None]
    accuracy = float(np.mean(known)) if known else None
    per_prompt = max(Counter(row.uid for row in rows).values())
    truths = Counter(ids[fold(row.ground_truth)] for row in rows)
    return SourceReport(
        data_source=source,
        n=len(ok),
        n_prompts=len(prompts),
        answers_per_prompt=per_prompt,
        failed=dict(Counter(failure_kind(row.score).value for row in rows if not row.score.is_ok)),
        majority_share=max(truths.values()) / len(rows),
        mean_score=float(np.mean([row.score.total for row in ok])) if ok else None,
        accuracy=accuracy,
        standard_error=_standard_error(accuracy, len(prompts)),
        classification=_classification(ok, names, ids) if any(_names_label(row.score) for row in ok) else None,
        at_n=_at_n(prompts, accuracies, per_prompt),
    )


def _by_prompt(rows: Sequence[ValidationRow]) -> list[list[ValidationRow]]:
    prompts: dict[str, list[ValidationRow]] = defaultdict(list)
    for row in rows:
        prompts[row.uid].append(row)
    return list(prompts.values())


def _names_label(score: Score) -> bool:
    """The reward function tells predictions; None then means that the answer was unreadable."""
    return score.prediction is not None or "label" in score.parts or "pred" in score.extra


def _accuracy(row: ValidationRow) -> float | None:
    told = number(row.score.extra.get("acc"))
    if told is not None and math.isfinite(told):
        return told
    if not _names_label(row.score):
        return None
    return float(row.score.prediction is not None and fold(row.score.prediction) == fold(row.ground_truth))


def _standard_error(accuracy: float | None, prompts: int) -> float | None:
    if accuracy is None or not 0 <= accuracy <= 1:
        return None
    return wilson_half_width(accuracy, prompts)


def _classification(rows: Sequence[ValidationRow], names: tuple[str, ...], ids: Mapping[str, int]) -> Classification:
    truth = np.array([ids[fold(row.ground_truth)] for row in rows])
    predictions = (row.score.prediction for row in rows)
    pred = np.array([_UNPARSED_ID if p is None else ids.get(fold(p), _UNPARSED_ID) for p in predictions])
    confusion = np.zeros((len(names), len(names) + 1), dtype=np.int64)
    # The id -1 of an unreadable answer indexes the last column.
    np.add.at(confusion, (truth, pred), 1)
    occurring = sorted((set(truth.tolist()) | set(pred.tolist())) - {_UNPARSED_ID})
    present = sorted(set(truth.tolist()))
    recall = recall_score(truth, pred, labels=present, average=None, zero_division=0)
    return Classification(
        classes=names,
        macro_f1=float(f1_score(truth, pred, labels=occurring, average="macro", zero_division=0)),
        recall={names[i]: float(r) for i, r in zip(present, recall, strict=True)},
        confusion=confusion,
        parse_failure_rate=float(np.mean(pred == _UNPARSED_ID)),
    )


def _at_n(
    prompts: Sequence[Sequence[ValidationRow]], accuracies: Mapping[int, float | None], per_prompt: int
) -> dict[str, float]:
    scores = [float(np.mean([row.score.total for row in prompt])) for prompt in prompts]
    told = [[a for row in prompt if (a := accuracies[id(row)]) is not None] for prompt in prompts]
    found = _parts_at_n(prompts, per_prompt)
    found |= {f"score/mean@{per_prompt}": scores, f"acc/mean@{per_prompt}": [float(np.mean(a)) for a in told if a]}
    if per_prompt > 1:
        votes = [vote for prompt in prompts if (vote := _majority_vote(prompt)) is not None]
        found[f"acc/maj@{per_prompt}"] = votes
    return {name: float(np.mean(values)) for name, values in found.items() if values}


def _parts_at_n(prompts: Sequence[Sequence[ValidationRow]], per_prompt: int) -> dict[str, list[float]]:
    """Each part's mean over the answers of a prompt that have it, prompt by prompt."""
    found: dict[str, list[float]] = defaultdict(list)
    for prompt in prompts:
        for name in {name: None for row in prompt for name in row.score.parts}:
            values = [row.score.parts[name] for row in prompt if name in row.score.parts]
            found[f"{name}/mean@{per_prompt}"].append(float(np.mean(values)))
    return dict(found)


def _majority_vote(prompt: Sequence[ValidationRow]) -> float | None:
    """Whether the most frequent prediction is right (on a tie, the one that came first); None without predictions."""
    if not any(_names_label(row.score) for row in prompt):
        return None
    votes = Counter(fold(row.score.prediction) for row in prompt if row.score.prediction is not None)
    return float(bool(votes) and votes.most_common(1)[0][0] == fold(prompt[0].ground_truth))
