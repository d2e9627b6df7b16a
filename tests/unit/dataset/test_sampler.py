"""The order of rows: pure, complete, resumable."""

from __future__ import annotations

import json

import numpy as np
import pytest

from verl.utils.dataset.sampler import Sampler, epoch_order


def test_the_order_is_a_permutation_and_a_pure_function_of_seed_and_epoch() -> None:
    assert sorted(epoch_order(250, seed=1, epoch=0)) == list(range(250))
    assert epoch_order(8, seed=1, epoch=0).tolist() == [2, 4, 7, 5, 0, 6, 3, 1]
    orders = {tuple(epoch_order(50, seed=s, epoch=e)) for s in range(3) for e in range(3)}
    assert len(orders) == 9


def test_an_epoch_visits_each_row_at_most_once_and_drops_the_incomplete_batch() -> None:
    sampler = Sampler(250, seed=1)
    batches = [sampler.next_batch(64) for _ in range(6)]
    assert sampler.batches_per_epoch(64) == 3 and sampler.epoch == 1
    for epoch in (batches[:3], batches[3:]):
        assert len(set(np.concatenate(epoch).tolist())) == 192


def test_without_drop_last_every_row_is_seen_once() -> None:
    sampler = Sampler(10, seed=0, drop_last=False)
    sizes = [len(sampler.next_batch(4)) for _ in range(4)]
    assert sizes == [4, 4, 2, 4] and sampler.batches_per_epoch(4) == 3


@pytest.mark.parametrize("drop_last", [True, False])
def test_a_restored_sampler_continues_as_the_uninterrupted_one(drop_last: bool) -> None:
    whole = Sampler(23, seed=5, drop_last=drop_last)
    expected = [whole.next_batch(4).tolist() for _ in range(20)]
    for stop in range(20):
        first = Sampler(23, seed=5, drop_last=drop_last)
        seen = [first.next_batch(4).tolist() for _ in range(stop)]
        second = Sampler(23, seed=5, drop_last=drop_last)
        second.load_state(json.loads(json.dumps(first.state())))
        seen += [second.next_batch(4).tolist() for _ in range(20 - stop)]
        assert seen == expected, f"stopped after {stop}"


def test_without_shuffle_rows_come_in_order() -> None:
    sampler = Sampler(5, seed=0, shuffle=False)
    assert [sampler.next_batch(2).tolist() for _ in range(3)] == [[0, 1], [2, 3], [0, 1]]


@pytest.mark.parametrize("change", [{"seed": 2}, {"size": 9}])
def test_a_state_of_another_order_is_refused(change: dict[str, int]) -> None:
    sampler = Sampler(10, seed=1)
    with pytest.raises(ValueError, match=next(iter(change))):
        sampler.load_state({**sampler.state(), **change})  # type: ignore[typeddict-item]


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ValueError, match="batch of 11 cannot be drawn from 10 rows"):
        Sampler(10, seed=1).next_batch(11)
