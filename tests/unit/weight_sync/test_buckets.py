"""Invariants of the transfer plan, and of what is checked before and after a transfer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl.workers.weight_sync.buckets import ALIGNMENT, TransferPlan, check_shapes, checksum, plan_transfer

Shapes = dict[str, tuple[int, ...]]
shapes = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=12).map(
    lambda found: {f"layer.{i}": shape for i, shape in enumerate(found)}
)
PLAIN: Shapes = {"embed": (10, 4), "norm": (4,), "head": (3, 4)}


def plan(of: Shapes, max_bytes: int, dtype: torch.dtype = torch.bfloat16) -> TransferPlan:
    return plan_transfer(of.items(), dtype=dtype, max_bytes=max_bytes)


@given(shapes, st.integers(1, 3000), st.sampled_from([torch.bfloat16, torch.float32]))
@settings(max_examples=100)
def test_every_tensor_lies_in_one_bucket_in_order_and_none_overlap(of: Shapes, max_bytes: int, dtype) -> None:
    found = plan(of, max_bytes, dtype)
    slots = [slot for bucket in found.buckets for slot in bucket.slots]
    assert [(slot.name, slot.shape) for slot in slots] == list(of.items()) and found.shapes() == of
    assert found.nbytes == sum(torch.Size(shape).numel() for shape in of.values()) * dtype.itemsize
    for bucket in found.buckets:
        ends = [slot.offset + slot.size for slot in bucket.slots]
        assert all(end <= after.offset for end, after in zip(ends, bucket.slots[1:], strict=False)), bucket
        assert ends[-1] <= bucket.size <= found.largest
        assert all(n % ALIGNMENT == 0 for n in (bucket.size, *(slot.offset for slot in bucket.slots)))
        alone = sum(slot.size > 0 for slot in bucket.slots) <= 1
        assert bucket.size * dtype.itemsize <= max_bytes or alone, f"{bucket} exceeds {max_bytes} bytes"


@given(shapes, st.integers(1, 3000))
@settings(max_examples=50)
def test_what_is_written_to_a_buckets_slots_is_read_as_named_tensors(of: Shapes, max_bytes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in of.items()}
    read = {}
    for bucket in plan(of, max_bytes).buckets:
        flat = torch.full((bucket.size,), torch.nan, dtype=torch.bfloat16)
        for slot in bucket.slots:
            slot.of(flat).copy_(values[slot.name].reshape(-1))
        read |= dict(bucket.tensors(flat))
    assert read.keys() == values.keys()
    for name, value in values.items():
        assert read[name].shape == value.shape and torch.equal(read[name], value), name


def test_a_large_tensor_has_a_bucket_of_its_own() -> None:
    of = {"a": (128,), "b": (128,), "large": (1000,), "c": (1,)}
    assert [str(bucket) for bucket in plan(of, 512).buckets] == ["a ... b", "large", "c"]


@pytest.mark.parametrize(("names", "message"), [((), "without weights"), (("w", "v", "w"), "weight w appears twice")])
def test_a_plan_of_no_or_doubled_weights_is_refused(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_transfer([(name, (2,)) for name in names], dtype=torch.float32, max_bytes=100)


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (PLAIN | {"lm_head.weight": (10, 4)}, "1 weights of the actor are not in the rollout's model, e.g. ['lm_head"),
        ({"embed": (10, 4), "norm": (4,)}, "1 weights of the rollout's model are not in the actor's, e.g. ['head']"),
        (PLAIN | {"norm": (5,)}, "norm is (5,) in the actor and (4,) in the rollout"),
    ],
)
def test_weights_that_do_not_fit_are_named(sent: Shapes, message: str) -> None:
    check_shapes(PLAIN, PLAIN)
    with pytest.raises(ValueError) as error:
        check_shapes(sent, PLAIN)
    assert message in str(error.value) and "actor_rollout_ref.model.path" in str(error.value)


@given(st.integers(1, 4), st.data())
def test_a_checksum_changes_with_any_bit_and_with_the_order_of_words(rows: int, data: st.DataObject) -> None:
    flat = torch.randn(rows * ALIGNMENT, generator=torch.Generator().manual_seed(rows)).bfloat16()
    before = checksum(flat)
    assert before == checksum(flat.clone())
    place = data.draw(st.integers(0, len(flat) - 1))
    bits = flat.view(torch.int16).clone()
    bits[place] ^= 1 << data.draw(st.integers(0, 14))
    assert checksum(bits.view(torch.bfloat16)) != before, place
    moved = flat.view(torch.int32).clone()
    moved[[0, 1]] = moved[[1, 0]]
    assert checksum(moved.view(torch.bfloat16)) != before
