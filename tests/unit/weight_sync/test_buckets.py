"""Invariants of weight buckets: nothing lost, nothing changed, no bucket over its size but for one tensor alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from verl.workers.weight_sync.buckets import fill_buckets

shapes = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), max_size=12)


def named(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(f"layer.{i}", torch.randn(shape, generator=generator).to(dtype)) for i, shape in enumerate(shapes)]


@given(shapes, st.integers(1, 300))
@settings(max_examples=80)
def test_packing_and_unpacking_give_back_every_tensor_in_order(shapes, max_bytes) -> None:
    tensors = named(shapes)
    buckets = list(fill_buckets(tensors, dtype=torch.float32, max_bytes=max_bytes))
    found = [pair for bucket in buckets for pair in bucket.tensors()]
    assert [name for name, _ in found] == [name for name, _ in tensors]
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(found, tensors, strict=True))
    for bucket in buckets:
        assert bucket.flat.nbytes <= max_bytes or sum(slot.size > 0 for slot in bucket.slots) == 1, bucket.slots


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_are_those_of_the_transfer_dtype(dtype: torch.dtype) -> None:
    tensors = named([(3, 4), (), (5,)])
    for bucket in fill_buckets(iter(tensors), dtype=dtype, max_bytes=1 << 20):
        for (name, found), (expected_name, expected) in zip(bucket.tensors(), tensors, strict=True):
            assert name == expected_name and torch.equal(found, expected.to(dtype)) and found.dtype == dtype


def test_small_tensors_share_a_bucket_and_a_large_one_has_its_own() -> None:
    tensors = named([(2,), (2,), (100,), (1,)])
    buckets = list(fill_buckets(tensors, dtype=torch.float32, max_bytes=16))
    assert [[slot.name for slot in bucket.slots] for bucket in buckets] == [
        ["layer.0", "layer.1"],
        ["layer.2"],
        ["layer.3"],
    ]


def test_a_bucket_is_a_copy_and_tensors_may_be_transposed_or_trained() -> None:
    weight = torch.arange(6.0).view(2, 3).t().requires_grad_()
    (bucket,) = fill_buckets([("w", weight)], dtype=torch.float32, max_bytes=100)
    expected = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    ((_, found),) = bucket.tensors()
    assert torch.equal(found, expected) and not found.requires_grad
