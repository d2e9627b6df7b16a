"""Stratified, seeded cuts that stay the same on every machine and numpy version.

Rows are ordered by a hash of (seed, row), so no random generator is involved.

Invariants
- A cut and its rest are disjoint and together hold every row; both are in the order of the rows.
- Each class gets its share of the cut, rounded by largest remainder, so the sizes add up exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain

from verl.timeseries.readers import Archive, Split


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
    return Split(tuple(split.series[row] for row in rows), tuple(split.labels[row] for row in rows))


def resplit(archive: Archive, seed: int) -> Archive:
    """Pool train and test and cut them anew, stratified, at the same sizes."""
    pool = Split(archive.train.series + archive.test.series, archive.train.labels + archive.test.labels)
    test, train = stratified_cut(pool.labels, len(archive.test), seed)
    return replace(archive, train=take(pool, train), test=take(pool, test))
