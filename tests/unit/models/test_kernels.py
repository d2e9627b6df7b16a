"""Invariants of the pointwise kernels that hold without a GPU."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from verl.models.kernels import EAGER, Kernels, compiled_kernels

ARGUMENTS = {
    "gated_silu": lambda: (torch.randn(5, 8), torch.randn(5, 8)),
    "gated_silu_grads": lambda: tuple(torch.randn(3, 5, 8).unbind()),
    "rotate": lambda: tuple(torch.randn(3, 5, 8).unbind()),
    "rotate_grad": lambda: tuple(torch.randn(3, 5, 8).unbind()),
    "token_stats": lambda: (torch.randn(5, 9), torch.arange(5), torch.arange(9) > 6, 0.7, True),
    "logit_grads": lambda: (torch.randn(5, 9), torch.arange(5), torch.arange(9) > 6, 0.7, *torch.randn(4, 5).unbind()),
}


@pytest.mark.parametrize("name", [field.name for field in fields(Kernels) if field.name != "rows"])
def test_every_kernel_is_one_graph(name: str) -> None:
    """What torch.compile needs to make it one pass: no break, no dependence on the size."""
    kernel = getattr(EAGER, name)
    captured = torch.compile(kernel, backend="eager", dynamic=True, fullgraph=True)
    arguments = ARGUMENTS[name]()
    torch.testing.assert_close(captured(*arguments), kernel(*arguments))


def test_a_half_precision_rotation_by_fp32_angles_is_made_in_fp32() -> None:
    x, cos, sin = torch.randn(7, 8).bfloat16(), torch.randn(7, 8), torch.randn(7, 8)
    found = EAGER.rotate(x, cos, sin)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, EAGER.rotate(x.float(), cos, sin).bfloat16())


@pytest.mark.skipif(torch.cuda.is_available(), reason="states what happens without CUDA")
def test_compiling_without_cuda_is_refused() -> None:
    with pytest.raises(ValueError, match=r"use_torch_compile=True needs a CUDA device: set it to False"):
        compiled_kernels()
