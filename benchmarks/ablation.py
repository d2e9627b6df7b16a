"""One switch at a time on the shared-prefix pass: what each part of the fast path is worth, losing ones included.

Each switch puts back what the part replaced, or turns an option on. It changes a policy or this process, and undoes
what it did to the process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import verl.models.attention
import verl.models.policy
from verl.models import layers
from verl.models.attention import VarlenSegments
from verl.models.gather import gather_rows
from verl.models.kernels import EAGER
from verl.models.log_probs import TokenStats, policy_logits, response_stats
from verl.models.policy import Policy

Switch = Callable[[Policy], contextlib.AbstractContextManager[None]]


def _as_in_library(model: nn.Module, *kinds: type[nn.Module]) -> None:
    """Give modules of these replaced kinds the library's forward again."""
    library = {new: old for old, new in layers._REPLACED.items()}
    for module in model.modules():
        if type(module) in kinds:
            module.__class__ = library[type(module)]


@contextlib.contextmanager
def _nothing(policy: Policy) -> Iterator[None]:
    yield


@contextlib.contextmanager
def _vision_by_window(policy: Policy) -> Iterator[None]:
    tower = policy.hf.model.visual
    _as_in_library(tower, layers.SegmentAttention, layers.SignedVisionRotaryEmbedding)
    policy.config.vision_config._attn_implementation = "sdpa"
    yield


@contextlib.contextmanager
def _patch_convolution(policy: Policy) -> Iterator[None]:
    del policy.hf.model.visual.patch_embed.forward  # the instance's own; the class has the convolution
    yield


@contextlib.contextmanager
def _library_norms(policy: Policy) -> Iterator[None]:
    _as_in_library(policy, layers.FusedRMSNorm)
    yield


@contextlib.contextmanager
def _library_mlp(policy: Policy) -> Iterator[None]:
    _as_in_library(policy, layers.GatedMLP, layers.GatedVisionMLP)
    yield


@contextlib.contextmanager
def _swapped(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _plain_index(x: Tensor, index: Tensor, copies: Tensor) -> Tensor:
    return x[index]


def _key_gather_by_index(policy: Policy) -> contextlib.AbstractContextManager[None]:
    return _swapped(verl.models.attention, "gather_rows", _plain_index)


def _checkpointed_head(policy: Policy) -> contextlib.AbstractContextManager[None]:
    return _swapped(verl.models.policy, "response_stats", checkpointed_stats)


def checkpointed_stats(
    hidden: Tensor,
    vocabulary: Tensor,
    targets: Tensor,
    *,
    banned: Tensor | None,
    temperature: float,
    chunk: int = 1024,
    **_: Any,
) -> TokenStats:
    """Chunks under activation checkpointing, the gradient by autograd; entropies without one."""

    def one(rows: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        every = policy_logits(rows, vocabulary, banned, temperature).log_softmax(-1)
        with torch.no_grad():
            finite = every if banned is None else every.masked_fill(banned, 0.0)
            entropy = -(every.exp() * finite).sum(-1)
        return every.gather(-1, wanted[:, None])[:, 0], entropy

    parts = [
        checkpoint(one, hidden[start : start + chunk], targets[start : start + chunk], use_reentrant=False)
        for start in range(0, len(targets), chunk)
    ]
    return TokenStats(*(torch.cat(column) for column in zip(*parts, strict=True)))


@contextlib.contextmanager
def _head_on_all_tokens(policy: Policy) -> Iterator[None]:
    """Logits of the prompts and of every answer's last token too, as a plain trainer computes them."""
    module = verl.models.policy
    with _swapped(module, "gather_rows", _rows_and_all), _swapped(module, "response_stats", _stats_of_first):
        yield


def _rows_and_all(x: Tensor, index: Tensor, copies: Tensor) -> Tensor:
    return torch.cat([gather_rows(x, index, copies), x])


def _stats_of_first(hidden: Tensor, vocabulary: Tensor, targets: Tensor, **how: Any) -> TokenStats:
    padded = targets.new_zeros(len(hidden))
    padded[: len(targets)] = targets
    every = response_stats(hidden, vocabulary, padded, **how)
    return TokenStats(*(column[: len(targets)] for column in every))


def _text_attention_by_mask(policy: Policy) -> contextlib.AbstractContextManager[None]:
    """One masked SDPA a group, in place of one varlen call over gathered keys."""
    return _swapped(VarlenSegments, "attend", lambda plan, *args: plan.masked.attend(*args))


def _rotate_by_parts(x: Tensor, cos: Tensor, signed_sin: Tensor, *_: Any) -> Tensor:
    """The library's formula, with what autograd keeps of it."""
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * signed_sin).to(x.dtype)


def _library_rotary(policy: Policy) -> contextlib.AbstractContextManager[None]:
    return _swapped(layers, "rotate", _rotate_by_parts)


@contextlib.contextmanager
def _not_compiled(policy: Policy) -> Iterator[None]:
    policy.use_kernels(EAGER)
    yield


def _liger(*kinds: type[nn.Module]) -> Switch:
    """Liger's kernels in modules of these kinds."""

    @contextlib.contextmanager
    def switch(policy: Policy) -> Iterator[None]:
        with _swapped(layers, "_LIGER", {kind: layers._LIGER[kind] for kind in kinds}):
            layers.use_liger(policy.hf)
        yield

    return switch


@contextlib.contextmanager
def _blocks_compiled(policy: Policy) -> Iterator[None]:
    """torch.compile of every text block in the library's arithmetic, in place of our own kernels."""
    _as_in_library(policy.hf.model.language_model, layers.FusedRMSNorm, layers.GatedMLP)
    torch._dynamo.reset()
    # the number of a layer is no reason to compile it again
    with _library_rotary(policy), torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
        for block in policy.hf.model.language_model.layers:
            block.compile(dynamic=True)
        try:
            yield
        finally:
            torch._dynamo.reset()


SWITCHES: dict[str, Switch] = {
    "base": _nothing,
    "vision_attention_by_window": _vision_by_window,
    "patch_convolution": _patch_convolution,
    "library_norms": _library_norms,
    "library_mlp": _library_mlp,
    "library_rotary": _library_rotary,
    "text_attention_by_mask": _text_attention_by_mask,
    "key_gather_by_index": _key_gather_by_index,
    "head_checkpointed": _checkpointed_head,
    "head_on_all_tokens": _head_on_all_tokens,
    "not_compiled": _not_compiled,
    "liger_norms": _liger(layers.FusedRMSNorm),
    "liger_mlp": _liger(layers.GatedMLP, layers.GatedVisionMLP),
    "blocks_compiled": _blocks_compiled,
}
"""Checkpointing and packing in the same thread are switches too; `train_step.py` turns them."""
