"""Invariants of the shared-prefix layout, by hand and over random groups."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl.packing.columns import columns
from verl.packing.layout import PackedBatch, pack
from verl.packing.positions import mrope_positions
from verl.protocol import Prompt, TrainGroup, TrainSample

IMAGE = 99


def prompt(uid: str, text: int, images: int = 0, first: int = 0) -> Prompt:
    ids = [first + i for i in range(text)]
    for _ in range(images):
        ids += [IMAGE, IMAGE, 1]
    keys = tuple(f"{uid}-{i}" for i in range(images))
    return Prompt(uid, 0, "test", np.array(ids, np.int32), keys, ((1, 2, 4),) * images, "A")


def group(head: Prompt, *answers: list[int], **columns_of: float) -> TrainGroup:
    samples = []
    for index, ids in enumerate(answers):
        full = {name: np.full(len(ids), value + index, np.float32) for name, value in columns_of.items()}
        samples.append(TrainSample(index, np.array(ids, np.int32), np.ones(len(ids), np.float32), float(index), **full))
    return TrainGroup(head, tuple(samples))


def packed(*groups: TrainGroup) -> PackedBatch:
    return pack(groups, image_token_id=IMAGE, merge_size=2)


groups_of_any_shape = st.lists(
    st.builds(
        lambda text, images, lengths: group(prompt("p", text, images), *([7] * n for n in lengths)),
        st.integers(1, 5),
        st.integers(0, 2),
        st.lists(st.integers(1, 6), max_size=4),
    ),
    min_size=1,
    max_size=4,
)


def test_a_group_of_two_answers_lies_as_drawn_in_the_docstring() -> None:
    batch = packed(group(prompt("p", 2, first=10), [20, 21], [30]))
    assert batch.token_ids.tolist() == [10, 11, 20, 21, 30]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2]] * 3
    assert batch.cu_seqlens_q.tolist() == [0, 2, 4, 5] and batch.cu_seqlens_k.tolist() == [0, 2, 6, 9]
    assert batch.key_index.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4]
    assert batch.predict_index.tolist() == [1, 2, 1] and batch.targets.tolist() == [20, 21, 30]
    assert batch.answer_bounds.tolist() == [0, 2, 3] and batch.group_bounds.tolist() == [0, 5]


@given(groups_of_any_shape)
@settings(max_examples=60)
def test_the_keys_of_an_answer_are_its_own_prompt_and_itself(groups: list[TrainGroup]) -> None:
    batch = packed(*groups)
    segments = list(zip(pairwise(batch.cu_seqlens_q.tolist()), pairwise(batch.cu_seqlens_k.tolist()), strict=True))
    assert len(segments) == sum(1 + len(g.samples) for g in groups)
    number = 0
    for g in groups:
        (low, high), keys = segments[number]
        own = list(range(low, high))
        assert batch.key_index[slice(*keys)].tolist() == own and len(own) == len(g.prompt.token_ids)
        for _ in g.samples:
            number += 1
            (low, high), keys = segments[number]
            assert batch.key_index[slice(*keys)].tolist() == own + list(range(low, high))
        number += 1


@given(groups_of_any_shape)
@settings(max_examples=60)
def test_every_response_token_is_predicted_by_the_token_before_it_in_its_own_row(groups: list[TrainGroup]) -> None:
    batch = packed(*groups)
    bounds = list(pairwise(batch.answer_bounds.tolist()))
    answers = [(g, s) for g in groups for s in g.samples]
    assert len(bounds) == len(answers)
    for (g, s), (low, high) in zip(answers, bounds, strict=True):
        assert batch.targets[low:high].tolist() == s.token_ids.tolist()
        before = batch.token_ids[batch.predict_index[low:high]].tolist()
        assert before == [int(g.prompt.token_ids[-1]), *s.token_ids.tolist()[:-1]]
        _, first = mrope_positions(g.prompt.token_ids, g.prompt.image_grids, IMAGE, 2)
        at = batch.positions[:, batch.predict_index[low:high]]
        assert np.all(at[:, 1:] == first + np.arange(high - low - 1))
        assert at[0, 0] == first - 1 or g.prompt.image_grids


@given(groups_of_any_shape)
@settings(max_examples=60)
def test_image_places_follow_the_order_of_keys_and_grids(groups: list[TrainGroup]) -> None:
    batch = packed(*groups)
    assert batch.image_keys == tuple(k for g in groups for k in g.prompt.image_keys)
    assert batch.image_index.tolist() == np.flatnonzero(batch.token_ids == IMAGE).tolist()
    assert batch.computed_patches == 8 * len(batch.image_keys)
    assert batch.tokens == len(batch.token_ids) == batch.group_bounds[-1] == batch.positions.shape[1]


def test_answers_start_after_the_largest_position_on_all_axes() -> None:
    head = Prompt("p", 0, "test", np.array([1, *[IMAGE] * 15], np.int32), ("k",), ((1, 6, 10),), "A")
    batch = packed(group(head, [5, 6], [7]))
    assert batch.positions[:, 16:].tolist() == [[6, 7, 6]] * 3


def test_a_prefill_has_prompts_only() -> None:
    batch = packed(TrainGroup(prompt("a", 3), ()), TrainGroup(prompt("b", 2, 1), ()))
    assert batch.targets.size == batch.predict_index.size == 0 and batch.answer_bounds.tolist() == [0]
    assert batch.group_bounds.tolist() == [0, 3, 8]


@pytest.mark.parametrize("groups", [[], [group(prompt("p", 2), [])]])
def test_nothing_to_pack_is_refused(groups: list[TrainGroup]) -> None:
    with pytest.raises(AssertionError, match=r"empty|without tokens"):
        packed(*groups)


def test_columns_follow_the_order_of_the_packed_targets() -> None:
    groups = [
        group(prompt("a", 2), [1, 2], [3], old_log_probs=-1.0, ref_log_probs=-10.0),
        group(prompt("b", 2), [4], old_log_probs=-5.0, ref_log_probs=-50.0),
    ]
    found = columns(groups)
    assert packed(*groups).targets.tolist() == [1, 2, 3, 4]
    assert found.advantages.tolist() == [0, 0, 1, 0] and found.weights.tolist() == [1, 1, 1, 1]
    assert found.old_log_probs.tolist() == [-1, -1, 0, -5] and found.ref_log_probs.tolist() == [-10, -10, -9, -50]
    assert found.rollout_log_probs is None and found.weights.dtype == found.old_log_probs.dtype == np.float32


def test_a_column_that_only_some_answers_have_is_refused() -> None:
    groups = [group(prompt("a", 2), [1], old_log_probs=-1.0), group(prompt("b", 2), [2])]
    with pytest.raises(AssertionError, match="1 of 2 samples"):
        columns(groups)
