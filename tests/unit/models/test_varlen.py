"""Invariants of the choice of a segment kernel and of the key gather, with kernels written out on the CPU."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from model_fixtures import ODD, SMALL, Maker
from torch import Tensor

from verl.models import attention, varlen
from verl.models.attention import MaskedGroups, VarlenSegments
from verl.models.gather import gather_rows
from verl.packing.layout import pack

CPU = torch.device("cpu")


def kernel(q, k, v, cu_q, cu_k, max_q, max_k, scale, *, causal: bool, shift: int = 0, spoil: float = 0.0) -> Tensor:
    """Segment by segment. `shift` moves the diagonal, `spoil` adds to the gradient of the values."""
    if spoil:
        v = v + spoil * (v - v.detach())
    out = []
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        assert q1 - q0 <= max_q and k1 - k0 <= max_k
        keys, values = (x[k0:k1].float().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1].float(), keys) * scale
        if causal:
            visible = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(k1 - k0 - (q1 - q0) + shift)
            scores = scores.masked_fill(~visible, -torch.inf)
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.cat(out).to(q.dtype)


def test_a_right_kernel_passes_the_probe_and_wrong_ones_say_what_is_wrong() -> None:
    assert varlen.probe(kernel, CPU) is None
    to_the_top_left = varlen.probe(lambda *a, **kw: kernel(*a, **kw, shift=-3), CPU)
    assert to_the_top_left is not None and to_the_top_left.startswith("output is off by")
    spoiled = varlen.probe(lambda *a, **kw: kernel(*a, **kw, spoil=0.5), CPU)
    assert spoiled is not None and spoiled.startswith("dv is off by")
    assert varlen.probe(lambda *_, **__: {}["q"], CPU) == "KeyError: 'q'"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_probe_finds_the_same_when_a_forward_without_gradients_asks_first(mode: type) -> None:
    with mode():
        assert varlen.probe(kernel, CPU) is None
        spoiled = varlen.probe(lambda *a, **kw: kernel(*a, **kw, spoil=0.5), CPU)
    assert spoiled is not None and spoiled.startswith("dv is off by")


def test_the_first_kernel_that_passes_is_taken_and_none_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = varlen.probe

    def missing() -> varlen.VarlenKernel:
        raise ImportError("no such package")

    monkeypatch.setattr(varlen, "probe", lambda found, _: real(found, CPU))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    wrong = lambda *a, **kw: kernel(*a, **kw, shift=-3)  # noqa: E731
    monkeypatch.setattr(varlen, "CANDIDATES", {"a": missing, "b": lambda: wrong, "c": lambda: kernel})
    assert varlen.varlen_kernel.__wrapped__() is kernel
    monkeypatch.setattr(varlen, "CANDIDATES", {"a": missing, "b": lambda: wrong})
    with pytest.raises(RuntimeError, match=r"works on a card.*'a': 'cannot be imported.*'b': 'output is off"):
        varlen.varlen_kernel.__wrapped__()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_cuda_plan_equals_the_masked_plan_in_values_and_gradients(
    dtype: torch.dtype, make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half precision through the kernel and the key gather, in fp32 through masks."""
    monkeypatch.setattr(attention, "varlen_kernel", lambda: kernel)
    groups = [make.group([3, 1, 5], SMALL), make.group([2]), make.group([4, 4], ODD, text=2), make.group([], text=3)]
    batch = pack(groups, image_token_id=make.config.image_token_id, merge_size=2)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, h, batch.tokens, 8, generator=generator).bfloat16() for h in (4, 2, 2)]
    results = []
    for plan, kind in ((VarlenSegments.of(batch, CPU), dtype), (MaskedGroups.of(batch), torch.float32)):
        leaves = [x.to(kind).requires_grad_() for x in inputs]
        out = plan.attend(0, *leaves, 0.3)
        grads = torch.autograd.grad(out.float().square().sum(), leaves)
        results.append([x.float() for x in (out.detach(), *grads)])
    for one, other in zip(*results, strict=True):
        limit = (2e-2 if dtype == torch.bfloat16 else 1e-6) * float(other.abs().max())
        assert float((one - other).abs().max()) <= limit


def test_every_gathered_key_is_a_copy_of_one_flat_token(make: Maker) -> None:
    groups = [make.group([3, 1, 5], SMALL), make.group([2]), make.group([], text=3)]
    batch = pack(groups, image_token_id=make.config.image_token_id, merge_size=2)
    copies, total = batch.key_copies(), len(batch.key_index)
    assert copies.shape == (batch.tokens, 4), "a prompt's key is in its own segment and in those of three answers"
    assert sorted(copies[copies < total].tolist()) == list(range(total))
    for token, places in enumerate(copies):
        assert set(batch.key_index[places[places < total]].tolist()) == {token}


def test_the_key_gather_sums_a_rows_copies_in_fp32() -> None:
    x = torch.zeros(2, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    index = torch.zeros(300, dtype=torch.int64)
    copies = torch.from_numpy(np.stack([np.arange(300), np.full(300, 300)]))
    gather_rows(x, index, copies).sum().backward()
    assert x.grad.flatten().tolist() == [300.0, 0.0], "ones added up in bf16 would stop at 256"
