"""Invariant: compiled kernels give what the eager ones give, in fp32 and in bf16, whatever the shape."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from verl.models.kernels import EAGER, compiled_kernels
from verl.models.log_probs import response_stats

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 37, 256])
def test_pointwise_chains(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(rows)
    made = compiled_kernels()
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    grad, gate, up = (draw(rows, 96, dtype=dtype) for _ in range(3))
    heads, cos, sin = draw(rows, 4, 32, dtype=dtype), draw(rows, 1, 32), draw(rows, 1, 32)
    for name, arguments in {
        "gated_silu": (gate, up),
        "gated_silu_grads": (grad, gate, up),
        "rotate": (heads, cos, sin),
        "rotate_grad": (heads, cos, sin),
    }.items():
        found, wanted = getattr(made, name)(*arguments), getattr(EAGER, name)(*arguments)
        torch.testing.assert_close(found, wanted, **tolerance)


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_entropies_and_gradients(entropy_grad: bool, temperature: float) -> None:
    torch.manual_seed(1)
    banned = torch.zeros(500, dtype=torch.bool, device="cuda").index_fill(
        0, torch.tensor([3, 499], device="cuda"), True
    )
    results = []
    for kernels, chunk in ((EAGER, 64), (compiled_kernels(), 50)):
        torch.manual_seed(2)
        hidden, vocabulary = draw(111, 32).requires_grad_(), draw(500, 32).requires_grad_()
        targets = torch.randint(4, 499, (111,), device="cuda")
        stats = response_stats(
            hidden,
            vocabulary,
            targets,
            banned=banned,
            temperature=temperature,
            entropy_grad=entropy_grad,
            kernels=kernels,
            chunk=chunk,
        )
        loss = (stats.log_probs * torch.linspace(0, 1, 111, device="cuda")).sum()
        (loss + stats.entropy.sum() if entropy_grad else loss).backward()
        results.append((*stats, hidden.grad, vocabulary.grad))
    for found, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
