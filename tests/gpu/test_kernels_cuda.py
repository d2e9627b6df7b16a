"""Invariant: compiled kernels give what the eager ones give, in fp32 and in bf16, whatever the shape; Liger's layers
what the library's do."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig

from verl.models.kernels import EAGER, compiled_kernels
from verl.models.layers import fuse_layers, use_liger
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


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="needs the package liger-kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["norm", "mlp", "vision_mlp"])
def test_liger_layers_give_the_values_and_gradients_of_the_librarys(name: str, dtype: torch.dtype) -> None:
    """In fp32 up to rounding. In bf16 each is held against the library in fp32 on the same rounded numbers, which
    Liger's may miss by twice what the library's own bf16 does."""
    torch.manual_seed(3)
    plain = library_layer(name).to("cuda", dtype)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(draw(*parameter.shape, dtype=dtype) * 0.2)
    fused = copy.deepcopy(plain)
    fuse_layers(fused)
    use_liger(fused)
    assert type(fused).__name__.startswith("Liger")
    x, weight = draw(2, 37, 96, dtype=dtype), draw(2, 37, 96, dtype=dtype)
    exact, found, library = (
        values_and_gradients(module, x, weight) for module in (copy.deepcopy(plain).float(), fused, plain)
    )
    assert exact.keys() == found.keys()
    for key, wanted in exact.items():
        miss, usual = ((y[key] - wanted).abs().max().item() for y in (found, library))
        limit = max(2 * usual, 1e-5 * wanted.abs().max().item())
        assert miss <= limit, f"{key}: off by {miss:.3g}, the library by {usual:.3g}"


def library_layer(name: str) -> nn.Module:
    if name == "norm":
        return qwen.Qwen2_5_VLRMSNorm(96)
    if name == "mlp":
        return qwen.Qwen2MLP(Qwen2_5_VLTextConfig(hidden_size=96, intermediate_size=160))
    return qwen.Qwen2_5_VLMLP(Qwen2_5_VLVisionConfig(hidden_size=96, intermediate_size=160), bias=True)


def values_and_gradients(module: nn.Module, x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Of sum(weight * module(x)), in fp32, by name."""
    dtype = next(module.parameters()).dtype
    x = x.to(dtype, copy=True).requires_grad_()
    out = module(x)
    (out * weight.to(dtype)).sum().backward()
    found = {name: p.grad for name, p in module.named_parameters()} | {"values": out.detach(), "input": x.grad}
    return {name: value.float() for name, value in found.items()}
