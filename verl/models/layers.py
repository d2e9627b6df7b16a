"""Norm, rotation, attention and gated activation of Qwen2.5-VL with fewer passes over memory and fewer kernels.

The modules keep their names and parameters; only their forward is another. In fp32 the results are those of the
library up to rounding. Touches transformers internals; run on transformers 5.17.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

from verl.models.attention import AttentionPlan, segment_attention
from verl.models.kernels import EAGER, Kernels


class _GatedSilu(torch.autograd.Function):
    """silu(gate) * up that keeps gate and up alone, not silu(gate) as well: a fifth of a layer's activations."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kernels = kernels
        return kernels.gated_silu(gate.detach(), up.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        return (*ctx.kernels.gated_silu_grads(grad, gate.detach(), up.detach()), None)


def gated_silu(gate: Tensor, up: Tensor, kernels: Kernels = EAGER) -> Tensor:
    """silu(gate) * up, all of one shape (.., F)."""
    return _GatedSilu.apply(gate.flatten(0, -2), up.flatten(0, -2), kernels).view(gate.shape)


class _Rotate(torch.autograd.Function):
    """x cos + rotate_half(x) sin, of which nothing is kept but the angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, signed_sin: Tensor, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(cos, signed_sin)
        ctx.kernels = kernels
        return kernels.rotate(x.detach(), cos, signed_sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.kernels.rotate_grad(grad, *ctx.saved_tensors), None, None, None


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor, kernels: Kernels = EAGER) -> Tensor:
    """Rotary embedding of x (rows, heads, d) by angles (rows, 1, d), in their precision. See `signed` for the sine."""
    return _Rotate.apply(x, cos, signed_sin, kernels)


def signed(sin: Tensor) -> Tensor:
    """The sine (.., d) of the library with its first half negated: rotate_half is then a plain roll."""
    half = sin.shape[-1] // 2
    return torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)


class SignedRotaryEmbedding(qwen.Qwen2_5_VLRotaryEmbedding):
    """Cosine and `signed` sine of the text positions, made once for all layers."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = super().forward(x, position_ids)
        return cos, signed(sin)


class SignedVisionRotaryEmbedding(qwen.Qwen2_5_VLVisionRotaryEmbedding):
    """The same of the patches' rows and columns."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = super().forward(x, position_ids)
        return cos, signed(sin)


class PackedAttention(qwen.Qwen2_5_VLAttention):
    """Attention of the text layers by an `AttentionPlan` (see `verl.models.attention`)."""

    kernels = EAGER

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None = None,
        position_ids: Tensor | None = None,
        past_key_values: None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        plan: AttentionPlan | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        assert plan is not None, f"{type(self).__name__} was called without an attention plan"
        assert position_embeddings is not None and past_key_values is None
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        angles = [x.flatten(0, 1)[:, None] for x in position_embeddings]
        q, k, v = (project(hidden_states).view(heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (rotate(x.flatten(0, 1), *angles, self.kernels).view(x.shape) for x in (q, k))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = plan.attend(self.layer_idx, q, k, v, self.scaling)
        return self.o_proj(out.reshape(hidden_states.shape)), None


class SegmentAttention(qwen.Qwen2_5_VLVisionAttention):
    """Attention of the vision tower inside segments; queries and keys are rotated together, in fp32."""

    kernels = EAGER

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        max_seqlen: int | None = None,
        **_: Any,
    ) -> Tensor:
        assert position_embeddings is not None
        assert max_seqlen is not None or cu_seqlens.device.type == "cpu", "the plan must state its longest segment"
        qkv = self.qkv(hidden_states).view(len(hidden_states), 3 * self.num_heads, -1)
        angles = [x[:, None].float() for x in position_embeddings]
        qk, v = qkv.split([2 * self.num_heads, self.num_heads], dim=1)
        q, k = rotate(qk, *angles, self.kernels).chunk(2, dim=1)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = segment_attention(q, k, v, cu_seqlens, max_seqlen or 0, self.scaling)
        return self.proj(out.reshape(hidden_states.shape))


class FusedRMSNorm(qwen.Qwen2_5_VLRMSNorm):
    """One kernel on CUDA; the library's forward is seven, and keeps an fp32 copy of its input."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class GatedMLP(qwen.Qwen2MLP):
    """The text layers' MLP."""

    kernels = EAGER

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated_silu(self.gate_proj(x), self.up_proj(x), self.kernels))


class GatedVisionMLP(qwen.Qwen2_5_VLMLP):
    """The vision blocks' MLP."""

    kernels = EAGER

    def forward(self, hidden_state: Tensor) -> Tensor:
        return self.down_proj(gated_silu(self.gate_proj(hidden_state), self.up_proj(hidden_state), self.kernels))


_REPLACED = {
    qwen.Qwen2_5_VLRMSNorm: FusedRMSNorm,
    qwen.Qwen2MLP: GatedMLP,
    qwen.Qwen2_5_VLMLP: GatedVisionMLP,
    qwen.Qwen2_5_VLRotaryEmbedding: SignedRotaryEmbedding,
    qwen.Qwen2_5_VLVisionRotaryEmbedding: SignedVisionRotaryEmbedding,
    qwen.Qwen2_5_VLAttention: PackedAttention,
    qwen.Qwen2_5_VLVisionAttention: SegmentAttention,
}


class LigerRMSNorm(FusedRMSNorm):
    """Liger's Triton kernel (`model.use_liger`)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        # llama: the library's order of rounding; not in place: the gradient belongs to others too
        return LigerRMSNormFunction.apply(hidden_states, self.weight, self.variance_epsilon, 0.0, "llama", False)


def _liger_gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


class LigerMLP(GatedMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(_liger_gated_silu(self.gate_proj(x), self.up_proj(x)))


class LigerVisionMLP(GatedVisionMLP):
    def forward(self, hidden_state: Tensor) -> Tensor:
        return self.down_proj(_liger_gated_silu(self.gate_proj(hidden_state), self.up_proj(hidden_state)))


def use_kernels(model: nn.Module, kernels: Kernels) -> None:
    """Let every module that `fuse_layers` has replaced run these pointwise kernels."""
    for module in model.modules():
        if hasattr(type(module), "kernels"):
            module.kernels = kernels


_LIGER = {FusedRMSNorm: LigerRMSNorm, GatedMLP: LigerMLP, GatedVisionMLP: LigerVisionMLP}


def use_liger(model: nn.Module) -> None:
    """Replace norms and gated activations of a fused model by Liger's kernels (read at liger-kernel 0.8.5), in place.

    Raises ValueError without CUDA or without the package.
    """
    if not torch.cuda.is_available():
        raise ValueError("model.use_liger=True needs a CUDA device: set it to False")
    if importlib.util.find_spec("liger_kernel") is None:
        raise ValueError("model.use_liger=True needs the package liger-kernel: install it, or set use_liger=False")
    for module in model.modules():
        if type(module) in _LIGER:
            module.__class__ = _LIGER[type(module)]


def fuse_layers(model: nn.Module) -> None:
    """Give every norm, attention and MLP of a Qwen2.5-VL the forwards of this module, in place.

    Raises ValueError for an activation that is not silu.
    """
    for module in model.modules():
        if type(module) in (qwen.Qwen2MLP, qwen.Qwen2_5_VLMLP) and not _is_silu(module.act_fn):
            raise ValueError(f"hidden_act={module.act_fn} is not supported, only silu")
        if type(module) in _REPLACED:
            module.__class__ = _REPLACED[type(module)]


def _is_silu(activation: nn.Module) -> bool:
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"
