"""Invariants of the attention plans: who sees whom, and that the CPU and the CUDA plan are the same function."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from model_fixtures import ODD, SMALL, Maker
from torch import Tensor

from verl.models.attention import MaskedGroups, VarlenSegments, group_mask, plan_for, repeat_kv, segment_attention
from verl.packing.layout import PackedBatch, pack

HEADS, KV_HEADS, DIM = 4, 2, 8


def batch_of(make: Maker) -> PackedBatch:
    groups = [make.group([3, 1, 5], SMALL), make.group([2]), make.group([4, 4], ODD, text=2), make.group([], text=3)]
    return pack(groups, image_token_id=make.config.image_token_id, merge_size=2)


def heads(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, h, tokens, DIM, generator=generator) for h in (HEADS, KV_HEADS, KV_HEADS))


def dot_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """(H, q, d) and (H, k, d) with (q, k) True where visible, written out."""
    return (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf).softmax(-1) @ v


def emulated_varlen(plan: VarlenSegments, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """What the varlen kernel does with the plan's tensors: segment by segment, causal from the bottom right."""
    k, v = repeat_kv(k, HEADS)[0, :, plan.key_index], repeat_kv(v, HEADS)[0, :, plan.key_index]
    out = []
    for (q0, q1), (k0, k1) in zip(pairwise(plan.cu_q.tolist()), pairwise(plan.cu_k.tolist()), strict=True):
        assert q1 - q0 <= plan.max_q and k1 - k0 <= plan.max_k
        visible = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril((k1 - k0) - (q1 - q0))
        out.append(dot_product(q[0, :, q0:q1], k[:, k0:k1], v[:, k0:k1], visible, scale))
    return torch.cat(out, dim=1).transpose(0, 1)[None]


def test_a_group_of_two_answers_has_the_mask_drawn_by_hand() -> None:
    drawn = """
        1 . . . . .
        1 1 . . . .
        1 1 1 . . .
        1 1 1 1 . .
        1 1 . . 1 .
        1 1 . . 1 1"""
    expected = [[cell == "1" for cell in row.split()] for row in drawn.strip().splitlines()]
    assert group_mask([2, 2, 2]).tolist() == expected


@pytest.mark.parametrize("lengths", [[1], [5], [1, 1], [3, 1, 4, 2]], ids=str)
def test_a_token_sees_the_prompt_and_its_own_past_and_nothing_else(lengths: list[int]) -> None:
    mask = group_mask(lengths)
    owner = [segment for segment, length in enumerate(lengths) for _ in range(length)]
    for query in range(len(owner)):
        for key in range(len(owner)):
            visible = key <= query and owner[key] in (0, owner[query])
            assert bool(mask[query, key]) == visible, f"query {query} ({owner[query]}), key {key} ({owner[key]})"


def test_the_plan_for_cuda_and_the_plan_for_the_cpu_are_the_same_function(make: Maker) -> None:
    batch = batch_of(make)
    q, k, v = heads(batch.tokens)
    masked = MaskedGroups.of(batch).attend(0, q, k, v, 0.3)
    varlen = emulated_varlen(VarlenSegments.of(batch, torch.device("cpu")), q, k, v, 0.3)
    assert masked.shape == (1, batch.tokens, HEADS, DIM)
    torch.testing.assert_close(masked, varlen, rtol=0, atol=1e-6)


def test_longest_segments_are_rounded_up_to_the_step(make: Maker) -> None:
    plan = VarlenSegments.of(batch_of(make), torch.device("cpu"))
    for longest, cu in ((plan.max_q, plan.cu_q), (plan.max_k, plan.cu_k)):
        real = int(cu.diff().max())
        assert longest % 128 == 0 and real <= longest < real + 128, f"{longest} for {real}"
    assert plan.cu_q.dtype == plan.cu_k.dtype == torch.int32


def test_gradients_of_a_prompt_are_summed_over_its_answers(make: Maker) -> None:
    batch = pack([make.group([2, 3])], image_token_id=make.config.image_token_id, merge_size=2)
    q, k, v = heads(batch.tokens)
    results = []
    for attend in (
        MaskedGroups.of(batch).attend,
        lambda _, *x: emulated_varlen(VarlenSegments.of(batch, torch.device("cpu")), *x),
    ):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        attend(0, *inputs, 0.3).square().sum().backward()
        results.append([x.grad for x in inputs])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lengths", [[4], [3, 3, 3], [16, 4, 16, 8, 1, 4], list(range(1, 9))], ids=str)
def test_segment_attention_equals_a_loop_over_segments(lengths: list[int]) -> None:
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, sum(lengths), DIM, generator=generator).requires_grad_() for _ in range(3))
    found = segment_attention(q, k, v, bounds, 0, 0.3)
    parts = [
        dot_product(q[0, :, a:b], k[0, :, a:b], v[0, :, a:b], torch.ones(b - a, b - a, dtype=torch.bool), 0.3)
        for a, b in pairwise(bounds.tolist())
    ]
    expected = torch.cat(parts, dim=1).transpose(0, 1)[None]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    weights = torch.randn(expected.shape, generator=generator)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), (q, k, v)),
        torch.autograd.grad((expected * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_repeated_kv_heads_serve_runs_of_query_heads() -> None:
    assert repeat_kv(torch.arange(2).view(2, 1, 1), 6)[:, 0, 0].tolist() == [0, 0, 0, 1, 1, 1]


def test_a_layer_called_without_a_plan_is_an_error(shared_policy) -> None:
    with pytest.raises(AssertionError, match="without an attention plan"):
        shared_policy.hf.model.language_model(input_ids=torch.tensor([[1, 2]]), use_cache=False)


def test_the_cpu_gets_the_masked_plan(make: Maker) -> None:
    assert isinstance(plan_for(batch_of(make), torch.device("cpu")), MaskedGroups)
