"""Stratified, seeded cuts that stay the same on every machine and numpy version.

Rows are ordered by a hash of (seed, row), so no random generator is involved.

Invariants
- A cut and its rest are disjoint and together hold every row; both are in the order of the rows.
- Each class gets its share of the cut, rounded by largest remainder, so the sizes add up exactly.
- Where rows have groups, no group is on both sides; the sizes are then as near as whole groups allow.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

from verl.timeseries.readers import Archive, Split

if TYPE_CHECKING:
    from verl.timeseries.task import TaskSpec


def _order(seed: int, row: int) -> bytes:
    return hashlib.sha256(f"{seed}:{row}".encode()).digest()


def stratified_cut(labels: Sequence[str], size: int, seed: int) -> tuple[list[int], list[int]]:
    """(cut, rest): row numbers, `size` of them in the cut, with every class in its proportion.

    Raises ValueError when `size` is not between 1 and the number of rows - 1.
    """
    if not 0 < size < len(labels):
        raise ValueError(f"cannot cut {size} of {len(labels)} rows: both parts need at least one row")
    members: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        members.setdefault(label, []).append(row)
    quota = shares({label: len(rows) for label, rows in members.items()}, size)
    ordered = {label: sorted(rows, key=lambda row: _order(seed, row)) for label, rows in members.items()}
    cut = sorted(chain.from_iterable(rows[: quota[label]] for label, rows in ordered.items()))
    rest = sorted(set(range(len(labels))) - set(cut))
    return cut, rest


def grouped_cut(labels: Sequence[str], groups: Sequence[str], size: int, seed: int) -> tuple[list[int], list[int]]:
    """(cut, rest): row numbers, about `size` of them in the cut, whole groups only.

    Groups come in the order of a hash of (seed, name); one joins the cut when it brings the classes nearer to their
    shares. Raises ValueError when `size` is not between 1 and the number of rows - 1, or no group fits.
    """
    assert len(labels) == len(groups), f"{len(labels)} labels, {len(groups)} groups"
    if not 0 < size < len(labels):
        raise ValueError(f"cannot cut {size} of {len(labels)} rows: both parts need at least one row")
    missing = Counter(shares(Counter(labels), size))
    members: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    cut: list[int] = []
    for group in sorted(members, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest()):
        adds = Counter(labels[row] for row in members[group])
        if sum(abs(missing[c] - n) - abs(missing[c]) for c, n in adds.items()) < 0:
            cut += members[group]
            missing.subtract(adds)
    if not cut or len(cut) == len(labels):
        raise ValueError(f"cannot cut {size} of {len(labels)} rows: they come from {len(members)} groups, kept whole")
    return sorted(cut), sorted(set(range(len(labels))) - set(cut))


def last_cut(labels: Sequence[str], size: int) -> tuple[list[int], list[int]]:
    """(cut, rest): row numbers, the last rows of each class in the cut, in its proportion; `size` in all.

    For rows that are windows of one recording a class, in order: drawn at random, nearly every row of the cut would lie
    between two rows of the rest. Raises ValueError when `size` is not between 1 and the number of rows - 1.
    """
    if not 0 < size < len(labels):
        raise ValueError(f"cannot cut {size} of {len(labels)} rows: both parts need at least one row")
    missing = shares(Counter(labels), size)
    cut: list[int] = []
    for row in range(len(labels) - 1, -1, -1):
        if missing[labels[row]]:
            missing[labels[row]] -= 1
            cut.append(row)
    return sorted(cut), sorted(set(range(len(labels))) - set(cut))


def cut_val(
    task: TaskSpec, labels: Sequence[str], groups: Sequence[str] | None, seed: int
) -> tuple[list[int], list[int]]:
    """(val, fit): row numbers of train. `seed` has no effect where the task's val is the last rows of each class."""
    size = round(task.val_fraction * len(labels))
    if task.val_last:
        return last_cut(labels, size)
    return stratified_cut(labels, size, seed) if groups is None else grouped_cut(labels, groups, size, seed)


def cut_split(split: Split, size: int, seed: int) -> tuple[list[int], list[int]]:
    """(cut, rest) by groups where the split has them, else by rows."""
    if split.groups is None:
        return stratified_cut(split.labels, size, seed)
    return grouped_cut(split.labels, split.groups, size, seed)


def shares(counts: Mapping[str, int], size: int) -> dict[str, int]:
    """`size` rows dealt to the classes in proportion to their counts, by largest remainder."""
    total = sum(counts.values())
    exact = {label: size * count / total for label, count in counts.items()}
    quota = {label: int(share) for label, share in exact.items()}
    by_remainder = sorted(counts, key=lambda label: (quota[label] - exact[label], label))
    for label in by_remainder[: size - sum(quota.values())]:
        quota[label] += 1
    return quota


def take(split: Split, rows: Sequence[int]) -> Split:
    """The named rows of a split."""
    groups = None if split.groups is None else tuple(split.groups[row] for row in rows)
    return Split(tuple(split.series[row] for row in rows), tuple(split.labels[row] for row in rows), groups)


def pooled(archive: Archive) -> Split:
    """Train, then test."""
    train, test = archive.train, archive.test
    groups = None if train.groups is None or test.groups is None else train.groups + test.groups
    return Split(train.series + test.series, train.labels + test.labels, groups)


def resplit(archive: Archive, seed: int) -> Archive:
    """Pool train and test and cut them anew, stratified, at the same sizes (with groups: nearly)."""
    pool = pooled(archive)
    test, train = cut_split(pool, len(archive.test), seed)
    return replace(archive, train=take(pool, train), test=take(pool, test))
