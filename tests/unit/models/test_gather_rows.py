"""Invariants of the gather of rows: the gradient of plain indexing, summed in bounded pieces that change nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from verl.models import gather
from verl.models.gather import gather_rows
from verl.packing.layout import copies_of

ROWS, WIDTH, ANSWERS = 200, 16, 32
INDEX = np.concatenate([np.arange(ROWS), np.full(ANSWERS, 7), np.arange(20, 50)])
"""One row with many copies, as the end of a prompt has, some with two, the rest with one."""


def gradient(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 2, WIDTH // 2, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(len(INDEX), 2, WIDTH // 2, generator=generator).to(dtype)
    out = gather_rows(x, torch.from_numpy(INDEX), torch.from_numpy(copies_of(INDEX, ROWS)))
    assert torch.equal(out, x[torch.from_numpy(INDEX)])
    (out * weight).sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("at_once", [1, 5000, 1 << 26], ids=["a row", "some rows", "all rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_is_that_of_indexing_however_many_rows_at_once(
    at_once: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gradient(dtype)
    generator = torch.Generator().manual_seed(0)
    torch.randn(ROWS, 2, WIDTH // 2, generator=generator)
    weight = torch.randn(len(INDEX), 2, WIDTH // 2, generator=generator).to(dtype).double()
    expected = torch.zeros(ROWS, 2, WIDTH // 2, dtype=torch.double).index_add_(0, torch.from_numpy(INDEX), weight)
    monkeypatch.setattr(gather, "_AT_ONCE", at_once)
    found = gradient(dtype)
    assert torch.equal(found, whole), "the piece must not show in the result"
    limit = {"rtol": 1e-2, "atol": 1e-6} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found.double(), expected, **limit)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operator made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


def test_the_backward_holds_no_place_of_every_copy_of_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    with Largest() as all_at_once:
        gradient(torch.float32)
    assert all_at_once.numbers >= ROWS * (ANSWERS + 1) * WIDTH, "this is what would grow with the answers"
    monkeypatch.setattr(gather, "_AT_ONCE", 1000)
    with Largest() as bounded:
        gradient(torch.float32)
    inputs = max(len(INDEX) + 1, ROWS) * WIDTH
    assert bounded.numbers <= max(inputs, ROWS * (ANSWERS + 2)), f"{bounded.numbers} numbers, inputs have {inputs}"
