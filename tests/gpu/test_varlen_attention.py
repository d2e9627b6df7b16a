"""The CUDA plan against the CPU plan on the same packed batch: values and gradients, in fp32 and bf16 arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from verl.models.attention import MaskedGroups, VarlenSegments, segment_attention
from verl.packing.layout import PackedBatch, pack
from verl.protocol import Prompt, TrainGroup, TrainSample

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

HEADS, KV_HEADS, DIM = 16, 2, 128  # the text model of Qwen2.5-VL-3B


def batch_of(shapes: list[tuple[int, list[int]]]) -> PackedBatch:
    groups = []
    for number, (head, lengths) in enumerate(shapes):
        prompt = Prompt(f"p{number}", number, "", np.ones(head, np.int32), (), (), "")
        samples = (TrainSample(i, np.ones(n, np.int32), np.ones(n, np.float32)) for i, n in enumerate(lengths))
        groups.append(TrainGroup(prompt, tuple(samples)))
    return pack(groups, image_token_id=-1, merge_size=2)


def qkv(tokens: int, kv_heads: int, dim: int, heads: int) -> list[torch.Tensor]:
    """Values that bf16 holds exactly, so that both sides start from the same numbers."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, h, tokens, dim, generator=generator).bfloat16() for h in (heads, kv_heads, kv_heads)]


def run(attend, tensors: list[torch.Tensor], device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    inputs = [x.to(device, dtype).requires_grad_() for x in tensors]
    out = attend(*inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    return [x.float().cpu() for x in (out.detach(), *torch.autograd.grad((out * weight).sum(), inputs))]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for name, one, other in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        error, scale = (one - other).abs().max().item(), other.abs().max().item()
        assert error <= 2e-2 * scale, f"{name}: differs by {error:.3g}, largest entry {scale:.3g}"


@pytest.mark.parametrize(
    "shapes",
    [[(2, [3])], [(300, [1, 130, 40]), (7, [5]), (64, [64] * 8)], [(200, [])]],
    ids=["q 2, k 5", "ragged", "prefill"],
)
def test_varlen_segments_equal_masked_groups(shapes) -> None:
    batch = batch_of(shapes)
    tensors = qkv(batch.tokens, KV_HEADS, DIM, HEADS)
    cuda, scale = VarlenSegments.of(batch, torch.device("cuda")), DIM**-0.5
    found = run(lambda *x: cuda.attend(0, *x, scale), tensors, "cuda", torch.bfloat16)
    expected = run(lambda *x: MaskedGroups.of(batch).attend(0, *x, scale), tensors, "cpu", torch.float32)
    assert found[0].shape == (1, batch.tokens, HEADS, DIM)
    assert_close(found, expected)


@pytest.mark.parametrize("lengths", [[64, 16, 64, 32], [168 * 4]], ids=["windows", "whole image"])
def test_vision_segments_on_cuda_equal_those_on_the_cpu(lengths) -> None:
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    tensors = qkv(sum(lengths), 16, 80, 16)  # the vision tower of Qwen2.5-VL: 16 heads of 80
    scale, longest = 80**-0.5, max(lengths)
    found = run(lambda *x: segment_attention(*x, bounds.cuda(), longest, scale), tensors, "cuda", torch.bfloat16)
    expected = run(lambda *x: segment_attention(*x, bounds, longest, scale), tensors, "cpu", torch.float32)
    assert_close(found, expected)
