"""Invariants of `verl.timeseries.split`."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from verl.timeseries.readers import Archive, Split
from verl.timeseries.split import grouped_cut, last_cut, resplit, stratified_cut

LABELS = ["a"] * 50 + ["b"] * 30 + ["c"] * 7


@pytest.mark.parametrize("size", [3, 10, 17, 44, 86])
def test_cut_and_rest_are_disjoint_complete_and_of_the_asked_size(size: int) -> None:
    cut, rest = stratified_cut(LABELS, size, seed=1)
    assert len(cut) == size and sorted(cut + rest) == list(range(len(LABELS)))
    assert cut == sorted(cut) and rest == sorted(rest)


@pytest.mark.parametrize("size", [10, 17, 44])
def test_each_class_is_within_one_row_of_its_share(size: int) -> None:
    cut, _ = stratified_cut(LABELS, size, seed=3)
    for label, found in Counter(LABELS[row] for row in cut).items():
        assert abs(found - size * LABELS.count(label) / len(LABELS)) < 1


def test_the_seed_decides_the_cut() -> None:
    assert stratified_cut(LABELS, 20, 1) == stratified_cut(LABELS, 20, 1)
    assert stratified_cut(LABELS, 20, 1) != stratified_cut(LABELS, 20, 2)


def test_the_cut_does_not_depend_on_library_versions() -> None:
    assert stratified_cut(["a"] * 6 + ["b"] * 6, 4, seed=1)[0] == GOLDEN


GOLDEN = [4, 5, 7, 11]


@pytest.mark.parametrize("size", [0, 87, 100])
def test_an_empty_part_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"cannot cut {size} of 87 rows"):
        stratified_cut(LABELS, size, seed=1)


def test_a_new_split_keeps_the_sizes_the_class_counts_and_every_series() -> None:
    series = tuple(np.full((1, 2), float(i)) for i in range(40))
    labels = tuple("ab"[i % 2] for i in range(40))
    archive = Archive(Split(series[:24], labels[:24]), Split(series[24:], labels[24:]), {})
    new = resplit(archive, seed=5)
    assert (len(new.train), len(new.test)) == (24, 16)
    assert Counter(new.train.labels) == {"a": 12, "b": 12}
    assert sorted(float(s[0, 0]) for s in new.train.series + new.test.series) == [float(i) for i in range(40)]
    assert [s[0, 0] for s in new.train.series] != [s[0, 0] for s in archive.train.series]


def grouped_rows(sizes: list[int], labels: str) -> tuple[list[str], list[str]]:
    """Labels and groups of rows; group n has `sizes[n]` rows of one label, in turn."""
    groups = [f"g{n}" for n, size in enumerate(sizes) for _ in range(size)]
    return [labels[int(g[1:]) % len(labels)] for g in groups], groups


@pytest.mark.parametrize("seed", range(5))
def test_a_cut_by_groups_divides_none_and_is_near_the_shares(seed: int) -> None:
    labels, groups = grouped_rows([1 + n % 5 for n in range(90)], "abc")
    cut, rest = grouped_cut(labels, groups, 60, seed)
    assert sorted(cut + rest) == list(range(len(labels)))
    assert not {groups[row] for row in cut} & {groups[row] for row in rest}
    for label in "abc":
        found = sum(labels[row] == label for row in cut)
        assert abs(found - 60 * labels.count(label) / len(labels)) <= 3, label


def test_groups_that_hold_every_class_are_cut_too() -> None:
    labels, groups = list("abc") * 40, [f"person {i // 12}" for i in range(120)]
    cut, _ = grouped_cut(labels, groups, 24, seed=1)
    assert len(cut) == 24 and len({groups[row] for row in cut}) == 2


@pytest.mark.parametrize("size", [3, 10, 44, 86])
def test_a_cut_of_the_last_rows_is_behind_the_rest_of_its_class_and_has_its_share(size: int) -> None:
    labels = [LABELS[row * 10 % len(LABELS)] for row in range(len(LABELS))]
    cut, rest = last_cut(labels, size)
    assert len(cut) == size and sorted(cut + rest) == list(range(len(labels)))
    for label in set(labels):
        ours = [row for row in cut if labels[row] == label]
        assert max((row for row in rest if labels[row] == label), default=-1) < min(ours, default=len(labels))
        assert abs(len(ours) - size * labels.count(label) / len(labels)) < 1


@pytest.mark.parametrize("size", [0, 87])
def test_an_empty_part_of_the_last_rows_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"cannot cut {size} of 87 rows"):
        last_cut(LABELS, size)


def test_a_single_group_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match="come from 1 groups, kept whole"):
        grouped_cut(["a", "b"] * 10, ["one"] * 20, 4, seed=1)
