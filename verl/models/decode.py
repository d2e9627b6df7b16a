"""Key/value cache for decoding groups: the prompt's keys are stored once and shared by its n answers.

Legend: G groups, n answers each, B = G * n, P longest prompt, t tokens decoded so far.
Plain torch on any device; it is the cache of the hf engine, whose reason to exist is to be exact and simple.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from verl.models.attention import AttentionPlan
from verl.packing.layout import PackedBatch

_GROW = 64  # own keys are allocated this many tokens at a time


class PrefillPlan:
    """Runs the packed plan of prompt-only groups and keeps every layer's keys and values."""

    def __init__(self, inner: AttentionPlan, batch: PackedBatch) -> None:
        self.inner = inner
        self.bounds = list(pairwise(batch.group_bounds.tolist()))
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.layers[layer] = (k[0], v[0])
        return self.inner.attend(layer, q, k, v, scale)


class DecodePlan:
    """Attention of one new token per answer over (prompt ++ own past). The flat sequence is the B answers in order."""

    def __init__(self, prefill: PrefillPlan, n: int) -> None:
        self.n = n
        lengths = [high - low for low, high in prefill.bounds]
        longest = max(lengths)
        device = prefill.layers[0][0].device
        self.prompt_mask = torch.arange(longest, device=device)[None] < torch.tensor(lengths, device=device)[:, None]
        index = torch.stack(
            [(low + torch.arange(longest, device=device)).clamp(max=high - 1) for low, high in prefill.bounds]
        )
        self.prompt = {
            layer: (k[:, index].transpose(0, 1).contiguous(), v[:, index].transpose(0, 1).contiguous())
            for layer, (k, v) in prefill.layers.items()
        }  # each (G, Hkv, P, d)
        self.own: dict[int, tuple[Tensor, Tensor]] = {}  # each (B, Hkv, capacity, d)
        self.length = 0

    def advance(self) -> None:
        """Call before each decoding step: makes room for one more token in every layer."""
        groups = len(self.prompt_mask)
        if self.length % _GROW == 0:
            for layer, (k, _) in self.prompt.items():
                room = k.new_zeros(groups * self.n, k.shape[1], _GROW, k.shape[3])
                old = self.own.get(layer)
                self.own[layer] = (room, room.clone()) if old is None else _grow(old, room)
        self.length += 1

    def keep(self, groups: Tensor) -> None:
        """Drop all groups but these (indices into the present ones)."""
        answers = (groups[:, None] * self.n + torch.arange(self.n, device=groups.device)).flatten()
        self.prompt_mask = self.prompt_mask[groups]
        self.prompt = {layer: (k[groups], v[groups]) for layer, (k, v) in self.prompt.items()}
        self.own = {layer: (k[answers], v[answers]) for layer, (k, v) in self.own.items()}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        prompt_k, prompt_v = self.prompt[layer]
        groups, kv_heads, longest, dim = prompt_k.shape
        batch, repeat = groups * self.n, q.shape[1] // kv_heads
        own_k, own_v = self.own[layer]
        own_k[:, :, self.length - 1] = k[0].transpose(0, 1)
        own_v[:, :, self.length - 1] = v[0].transpose(0, 1)
        own_k, own_v = own_k[:, :, : self.length], own_v[:, :, : self.length]

        q = q[0].transpose(0, 1).reshape(batch, kv_heads, repeat, dim) * scale
        by_group = q.view(groups, self.n, kv_heads, repeat, dim).transpose(1, 2).reshape(groups, kv_heads, -1, dim)
        shared = (by_group @ prompt_k.transpose(-1, -2)).float()  # (G, Hkv, n * repeat, P)
        shared = shared.masked_fill(~self.prompt_mask[:, None, None], float("-inf"))
        shared = shared.view(groups, kv_heads, self.n, repeat, longest).transpose(1, 2)
        own = (q @ own_k.transpose(-1, -2)).float().view(groups, self.n, kv_heads, repeat, -1)
        weights = torch.cat([shared, own], dim=-1).softmax(-1).to(v.dtype)

        of_prompt = weights[..., :longest].transpose(1, 2).reshape(groups, kv_heads, -1, longest) @ prompt_v
        of_prompt = of_prompt.view(groups, kv_heads, self.n, repeat, dim).transpose(1, 2)
        of_own = weights[..., longest:].reshape(batch, kv_heads, repeat, -1) @ own_v
        out = of_prompt.reshape(batch, kv_heads, repeat, dim) + of_own
        return out.reshape(1, batch, kv_heads * repeat, dim)


def _grow(old: tuple[Tensor, Tensor], room: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([old[0], room], dim=2), torch.cat([old[1], room], dim=2)
