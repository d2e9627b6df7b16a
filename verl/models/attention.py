"""How the layers of `verl.models.layers` attend.

The text layers get an `AttentionPlan` (a keyword that travels through the layers, so activation checkpointing captures
it), the vision tower the bounds of its segments. Half precision on CUDA uses the kernel of `verl.models.varlen`; fp32,
for which there is none, and the CPU use SDPA with one explicit mask per group, because SDPA's own `is_causal` aligns a
short query to the start of a longer key.

`IMPLEMENTATION` is the name under which transformers knows this. It contains `flash`, so that the library makes no mask
and passes the longest segment on (`is_flash_attention_requested` in transformers 5.17).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from verl.models.gather import gather_rows
from verl.models.transfer import to_device
from verl.models.varlen import varlen_kernel
from verl.packing.layout import PackedBatch

IMPLEMENTATION = "timemaster_packed_flash"

_VARLEN_DTYPES = (torch.bfloat16, torch.float16)
_ROUND_MAX_LENGTH = 128  # max_q and max_k are rounded up, or every new length would compile a new kernel


class AttentionPlan(Protocol):
    """How one forward pass attends. `q` (1, Hq, T, d), `k` and `v` (1, Hkv, T, d); returns (1, T, Hq, d)."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor: ...


def repeat_kv(x: Tensor, heads: int) -> Tensor:
    """(.., Hkv, T, d) -> (.., heads, T, d): each KV head serves a run of query heads."""
    return x if x.shape[-3] == heads else x.repeat_interleave(heads // x.shape[-3], dim=-3)


@dataclass(frozen=True)
class MaskedGroups:
    """Plan of a packed batch for the CPU and for fp32: one boolean mask per group, True where a query may look."""

    lengths: tuple[int, ...]
    masks: tuple[Tensor, ...]

    @classmethod
    def of(cls, batch: PackedBatch, device: torch.device | str = "cpu") -> MaskedGroups:
        starts, ends = batch.cu_seqlens_q[:-1].tolist(), batch.cu_seqlens_q[1:].tolist()
        bounds = tuple(itertools.pairwise(batch.group_bounds.tolist()))
        cache: dict[tuple[int, ...], Tensor] = {}
        masks, segment = [], 0
        for low, high in bounds:
            lengths = []
            while segment < len(starts) and ends[segment] <= high:
                lengths.append(ends[segment] - starts[segment])
                segment += 1
            key = tuple(lengths)
            if key not in cache:
                cache[key] = group_mask(lengths).to(device)
            masks.append(cache[key])
            assert sum(lengths) == high - low, f"group of {high - low} tokens has segments {lengths}"
        return cls(tuple(high - low for low, high in bounds), tuple(masks))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        k, v = repeat_kv(k, q.shape[1]), repeat_kv(v, q.shape[1])
        # split, not slices: the backward of a slice fills a whole zero tensor per group
        groups = zip(*(x.split(self.lengths, dim=2) for x in (q, k, v)), self.masks, strict=True)
        parts = [F.scaled_dot_product_attention(*qkv, attn_mask=mask, scale=scale) for *qkv, mask in groups]
        return torch.cat(parts, dim=2).transpose(1, 2)


def group_mask(lengths: list[int]) -> Tensor:
    """(T, T) mask of `prompt | answer_1 | ..`: causal inside a segment, and every answer sees the whole prompt."""
    total = sum(lengths)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    same = segment[:, None] == segment[None, :]
    causal = torch.ones(total, total, dtype=torch.bool).tril()
    return causal & (same | (segment[None, :] == 0))


@dataclass(frozen=True)
class VarlenSegments:
    """CUDA plan of a packed batch: one varlen call, keys and values gathered by index."""

    batch: PackedBatch
    cu_q: Tensor
    cu_k: Tensor
    key_index: Tensor
    key_copies: Tensor
    max_q: int
    max_k: int

    @classmethod
    def of(cls, batch: PackedBatch, device: torch.device) -> VarlenSegments:
        bounds = (batch.cu_seqlens_q, batch.cu_seqlens_k)
        cu_q, cu_k, index, copies = to_device([*bounds, batch.key_index, batch.key_copies()], device)
        return cls(batch, cu_q.int(), cu_k.int(), index, copies, *map(_longest, bounds))

    @cached_property
    def masked(self) -> MaskedGroups:
        """The same attention for fp32."""
        return MaskedGroups.of(self.batch, self.cu_q.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if q.dtype not in _VARLEN_DTYPES:
            return self.masked.attend(layer, q, k, v, scale)
        k, v = (gather_rows(x[0].transpose(0, 1), self.key_index, self.key_copies) for x in (k, v))
        q = q[0].transpose(0, 1).contiguous()
        return varlen_kernel()(q, k, v, self.cu_q, self.cu_k, self.max_q, self.max_k, scale, causal=True)[None]


def _longest(bounds: NDArray[np.int64]) -> int:
    step = _ROUND_MAX_LENGTH
    return -(-int(np.diff(bounds).max()) // step) * step


def plan_for(batch: PackedBatch, device: torch.device) -> AttentionPlan:
    """The training (and prefill) plan of a packed batch on a device."""
    return MaskedGroups.of(batch) if device.type == "cpu" else VarlenSegments.of(batch, device)


def segment_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int, scale: float) -> Tensor:
    """Full attention inside each segment. q, k, v (1, H, T, d) -> (1, T, H, d).

    On CPU and in fp32 the segments of one length are one batched call: a picture has few window sizes, many windows.
    """
    if q.device.type != "cpu" and q.dtype in _VARLEN_DTYPES:
        flat = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
        return varlen_kernel()(*flat, cu_seqlens, cu_seqlens, max_length, max_length, scale, causal=False)[None]
    lengths = cu_seqlens.diff()
    if len(lengths.unique()) == 1:
        heads = (x[0].unflatten(1, (len(lengths), -1)).transpose(0, 1) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads, scale=scale).transpose(1, 2).flatten(0, 1)[None]
    out = q.new_empty(q.shape[2], q.shape[1], q.shape[3])
    for length in lengths.unique().tolist():
        starts = cu_seqlens[:-1][lengths == length].long()
        index = starts[:, None] + torch.arange(length, device=starts.device)
        heads = (x[0][:, index].transpose(0, 1) for x in (q, k, v))  # (segments, H, length, d)
        result = F.scaled_dot_product_attention(*heads, scale=scale)
        out = out.index_put((index.reshape(-1),), result.transpose(1, 2).reshape(-1, q.shape[1], q.shape[3]))
    return out[None]


def _no_dispatch(module: nn.Module, *_: Any, **__: Any) -> None:
    raise AssertionError(f"{type(module).__name__} was not replaced by a layer of verl.models.layers")


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _no_dispatch)
