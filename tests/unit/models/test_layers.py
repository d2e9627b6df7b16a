"""Invariants of the replaced norms and MLPs: the library's results, fewer activations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig

from verl.models import layers
from verl.models.layers import FusedRMSNorm, GatedMLP, GatedVisionMLP, fuse_layers, gated_silu, rotate, signed
from verl.models.policy import Policy


def library_modules() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    norm = qwen.Qwen2_5_VLRMSNorm(16)
    norm.weight.data.uniform_(0.5, 2)
    return {
        "norm": norm,
        "text": qwen.Qwen2MLP(Qwen2_5_VLTextConfig(hidden_size=16, intermediate_size=24)),
        "vision": qwen.Qwen2_5_VLMLP(Qwen2_5_VLVisionConfig(hidden_size=16, intermediate_size=24), bias=True),
    }


def values_and_gradients(module: nn.Module) -> list[Tensor]:
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out = module(x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])]


@pytest.mark.parametrize("name", ["norm", "text", "vision"])
def test_values_and_gradients_are_the_librarys(name: str) -> None:
    module = library_modules()[name]
    expected = values_and_gradients(module)
    fuse_layers(module)
    assert type(module) in (FusedRMSNorm, GatedMLP, GatedVisionMLP)
    for found, want in zip(values_and_gradients(module), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_every_layer_of_a_policy_that_has_a_replacement_is_replaced(shared_policy: Policy) -> None:
    kinds = {type(m) for m in shared_policy.hf.modules()}
    assert kinds >= set(layers._REPLACED.values()) and not kinds & set(layers._REPLACED)


def test_the_rotation_is_the_librarys_and_its_gradient_is_right() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64)
    angles = torch.cat([torch.randn(3, 1, 4, generator=generator, dtype=torch.float64)] * 2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    torch.testing.assert_close(rotate(x, cos, signed(sin)), x * cos + qwen.rotate_half(x) * sin)
    assert torch.autograd.gradcheck(lambda y: rotate(y, cos, signed(sin)), x.requires_grad_())


def test_the_gated_activation_keeps_its_two_inputs_and_nothing_else() -> None:
    gate, up = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.data_ptr()), x)[1], lambda x: x):
        gated_silu(gate, up)
    assert sorted(kept) == sorted([gate.data_ptr(), up.data_ptr()])
    assert torch.autograd.gradcheck(
        gated_silu, (gate.double().detach().requires_grad_(), up.double().detach().requires_grad_())
    )


def test_another_activation_is_refused() -> None:
    module = library_modules()["text"]
    module.act_fn = nn.GELU()
    with pytest.raises(ValueError, match="only silu"):
        fuse_layers(module)


@pytest.mark.skipif(torch.cuda.is_available(), reason="states what happens without CUDA")
def test_liger_without_cuda_is_refused(shared_policy: Policy) -> None:
    with pytest.raises(ValueError, match="needs a CUDA device"):
        layers.use_liger(shared_policy.hf)
