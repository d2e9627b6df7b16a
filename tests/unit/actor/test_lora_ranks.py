"""Adapters under FSDP2: fp32 beside frozen weights of the computing precision, on one rank and on two."""

from __future__ import annotations

from pathlib import Path

import lora_ranks as ranks
import pytest
import torch
from gloo_ranks import on_ranks


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, alone: None) -> Path:
    folder = tmp_path_factory.mktemp("lora_ranks")
    ranks.both(0, 1, str(tiny_folder), str(folder))
    on_ranks(2, ranks.both, str(tiny_folder), str(folder))
    return folder


@pytest.mark.parametrize("half", [False, True])
def test_adapters_alone_are_trained_and_merged_weights_sent(out: Path, half: bool) -> None:
    one, two = (torch.load(out / f"{world}-{half}.pt", weights_only=True) for world in (1, 2))
    assert [one["amiss"], two["amiss"]] == [[], []]
    assert one["after"].keys() == two["after"].keys() and len(one["after"]) > 20
    assert two["metrics"]["grad_norm"] == pytest.approx(one["metrics"]["grad_norm"], rel=2e-2 if half else 1e-4)
    if not half:  # Adam's first step is lr times a sign: rounding turns it where a gradient is nearly 0
        moved = [(two["after"][n] - p).abs().max().item() for n, p in one["after"].items()]
        assert max(moved) < 0.1 * ranks.SPEC.lr
