"""Norm and gated activation of Qwen2.5-VL with fewer passes over memory, and fewer activations kept.

The modules keep their names and parameters; only their forward is another. In fp32 the results are those of the
library up to rounding. Touches transformers internals; run on transformers 5.17.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen


class _GatedSilu(torch.autograd.Function):
    """silu(gate) * up that keeps gate and up alone, not silu(gate) as well: a fifth of a layer's activations."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_up = F.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), d_up


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, all of one shape."""
    return _GatedSilu.apply(gate, up)


class FusedRMSNorm(qwen.Qwen2_5_VLRMSNorm):
    """One kernel on CUDA; the library's forward is seven, and keeps an fp32 copy of its input."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class GatedMLP(qwen.Qwen2MLP):
    """The text layers' MLP."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated_silu(self.gate_proj(x), self.up_proj(x)))


class GatedVisionMLP(qwen.Qwen2_5_VLMLP):
    """The vision blocks' MLP."""

    def forward(self, hidden_state: Tensor) -> Tensor:
        return self.down_proj(gated_silu(self.gate_proj(hidden_state), self.up_proj(hidden_state)))


_REPLACED = {
    qwen.Qwen2_5_VLRMSNorm: FusedRMSNorm,
    qwen.Qwen2MLP: GatedMLP,
    qwen.Qwen2_5_VLMLP: GatedVisionMLP,
}


def fuse_layers(model: nn.Module) -> None:
    """Give every norm and MLP of a Qwen2.5-VL the forwards of this module, in place.

    Raises ValueError for an activation that is not silu.
    """
    for module in model.modules():
        if type(module) in (qwen.Qwen2MLP, qwen.Qwen2_5_VLMLP) and not _is_silu(module.act_fn):
            raise ValueError(f"hidden_act={module.act_fn} is not supported, only silu")
        if type(module) in _REPLACED:
            module.__class__ = _REPLACED[type(module)]


def _is_silu(activation: nn.Module) -> bool:
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"
