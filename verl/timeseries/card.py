"""The data card: what a data folder holds, where it comes from, and what a reader of results must know.

Invariants
- It is a function of archive, task and arguments: no clock, no absolute path.
- Counts are of the rows as written.
- A series, group or stretch of a series that two parts share is counted, and is a warning besides.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from verl.timeseries.readers import Archive, Series, Split
from verl.timeseries.split import take
from verl.timeseries.task import TaskSpec

Digest = bytes
TABLES = ("train", "test", "fit", "val", "sft_fit", "sft_val")
APART = (("train", "test"), ("fit", "val"))
"""Parts that should share nothing."""


@dataclass(frozen=True)
class Overlaps:
    """What was found twice."""

    duplicates: Mapping[str, int]
    """Part, or `a_and_b` -> rows that repeat a series of the part, or rows of a whose series is in b."""
    other_label: int
    """Series that stand in the archive with different labels."""
    groups: Mapping[str, int]
    """`a_and_b` -> groups (records, people, runs) in both."""
    stretches: Mapping[str, int]
    """`a_and_b` -> windows of a that share their first or last stretch with a window of b."""

    def warnings(self, kind: str) -> list[str]:
        """A sentence for each thing that would flatter a result."""
        found = []
        for name, count in self.duplicates.items():
            if count and "_and_" in name:
                found.append(f"{_spoken(name)}: {count} rows of the first have their exact series in the second")
            elif count:
                found.append(f"{name}: {count} rows repeat the series of another row")
        if self.other_label:
            found.append(f"{self.other_label} series occur with more than one label")
        for name, count in self.groups.items():
            if count:
                found.append(f"{_spoken(name)}: {count} times a {kind} is in both")
        for name, count in self.stretches.items():
            if count:
                found.append(f"{_spoken(name)}: {count} windows of the first overlap with windows of the second")
        return found


def _spoken(name: str) -> str:
    return name.replace("_and_", " and ")


def parts_of(archive: Archive, rows: Mapping[str, Sequence[int]]) -> dict[str, Split]:
    """The rows of train, test, fit and val."""
    return {
        name: take(archive.test if name == "test" else archive.train, rows[name])
        for name in ("train", "test", "fit", "val")
    }


def find_overlaps(parts: Mapping[str, Split], *, overlap: float) -> Overlaps:
    """Compare the parts; `overlap` is the share of a window that its neighbour repeats (0: do not look)."""
    digests = {name: [_digest(series) for series in part.series] for name, part in parts.items()}
    duplicates = {name: len(digests[name]) - len(set(digests[name])) for name in ("train", "test")}
    groups, stretches = {}, {}
    for a, b in APART:
        name = f"{a}_and_{b}"
        others = set(digests[b])
        duplicates[name] = sum(digest in others for digest in digests[a])
        groups[name] = len(set(parts[a].groups or ()) & set(parts[b].groups or ()))
        if overlap:
            there = {end for series in parts[b].series for end in _ends(series, overlap)}
            stretches[name] = sum(not there.isdisjoint(_ends(series, overlap)) for series in parts[a].series)
    labels: dict[Digest, set[str]] = {}
    for name in ("train", "test"):
        for digest, label in zip(digests[name], parts[name].labels, strict=True):
            labels.setdefault(digest, set()).add(label)
    return Overlaps(duplicates, sum(len(of) > 1 for of in labels.values()), groups, stretches)


def _digest(series: Series) -> Digest:
    return hashlib.sha256(repr(series.shape).encode() + series.tobytes()).digest()


def _ends(series: Series, overlap: float) -> tuple[Digest, Digest]:
    size = round(overlap * series.shape[1])
    return _digest(series[:, :size]), _digest(series[:, series.shape[1] - size :])


def make_card(
    task: TaskSpec,
    archive: Archive,
    rows: Mapping[str, Sequence[int]],
    *,
    arguments: Mapping[str, Any],
) -> dict[str, Any]:
    """`data_card.json`. `rows` holds the archive rows of each table; `arguments` stand at the end as they are."""
    parts = parts_of(archive, rows)
    labels = {name: parts[name.removeprefix("sft_")].labels for name in TABLES}
    counts = {name: Counter(of) for name, of in labels.items()}
    overlaps = find_overlaps(parts, overlap=task.overlap)
    known = task.download.sha256 if task.download else {}
    return {
        "task": task.name,
        "data_source": task.data_source,
        "classes": list(task.classes),
        "rows": {name: len(of) for name, of in labels.items()},
        "rows_per_class": {name: {c: counts[name][c] for c in task.classes} for name in TABLES},
        "majority_share": {name: round(max(counts[name].values()) / len(labels[name]), 4) for name in TABLES},
        "channels": task.channels,
        "points": sorted({series.shape[1] for part in ("train", "test") for series in parts[part].series}),
        "val_cut": "the last rows of each class in train" if task.val_last else f"drawn by {archive.group_kind}",
        "group_kind": archive.group_kind,
        "groups": {name: len(set(part.groups or range(len(part)))) for name, part in parts.items()},
        "groups_shared": dict(overlaps.groups),
        "duplicate_rows": dict(overlaps.duplicates),
        "series_with_other_label": overlaps.other_label,
        "overlapping_windows": dict(overlaps.stretches),
        "series_in_train_and_test": overlaps.duplicates["train_and_test"],
        "source": task.download.url if task.download else "",
        "source_sha256": dict(archive.digests),
        "source_as_published": {name: known[name] == sha for name, sha in archive.digests.items() if name in known},
        "warnings": [*task.warnings, *archive.notes, *overlaps.warnings(archive.group_kind)],
        "licence": task.licence,
        "citation": task.citation,
        **arguments,
    }


def looks(task: TaskSpec, modality: str, length: int | None) -> dict[str, Any]:
    """What the model is shown, in the card."""
    if modality == "numeric":
        numeric = asdict(task.numeric)
        return {"modality": modality, "numeric": {**numeric, "readings_a_number": _block(task, length)}}
    return {
        "modality": modality,
        "canvas": [task.plot.width, task.plot.height],
        "vision_tokens": task.plot.vision_tokens,
        "style": asdict(task.plot),
    }


def _block(task: TaskSpec, length: int | None) -> int | None:
    return None if length is None else task.numeric.block(length)
