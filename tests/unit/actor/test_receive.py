"""One rank reads the model, the others receive it: the same weights, and no second whole copy in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import receive_ranks as ranks
import torch
from model_fixtures import TEXTS, on_ranks, open_policy

from verl.models.tiny import TinySize, create_tiny_model

LARGE = TinySize(hidden=512, heads=8, layers=10, mlp=2048, max_vocabulary=300, vision_hidden=64, vision_layers=2)
"""About 150 MB in fp32."""


def built(model: Path, out: Path, *, trained: bool) -> list[dict[str, Any]]:
    out.mkdir()
    on_ranks(2, ranks.build_rank, str(model), str(out), trained)
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("large")
    create_tiny_model(folder / "model", TEXTS, size=LARGE, seed=0)
    return folder / "model", built(folder / "model", folder / "out", trained=True)


def assert_equal(model: Path, found: list[dict[str, Any]]) -> None:
    expected = ranks.tensors(open_policy(model))
    for rank, state in enumerate(found):
        assert state["tensors"].keys() == expected.keys(), f"rank {rank}"
        different = [name for name, value in expected.items() if not torch.equal(state["tensors"][name], value)]
        assert different == [], f"rank {rank}"
    assert "banned" in expected and any(name.endswith("inv_freq") for name in expected)


def test_every_rank_has_the_weights_and_buffers_of_the_folder_bit_for_bit(large: Any) -> None:
    assert_equal(*large)
    assert [state["tied"] for state in large[1]] == [True, True]
    assert large[1][0]["trainable"] == large[1][1]["trainable"]
    assert not any("visual" in name for name in large[1][1]["trainable"])


def test_a_rank_that_receives_never_holds_the_whole_model(large: Any) -> None:
    """Its share is half; the reading rank holds all of it for a moment."""
    model = (large[0] / "model.safetensors").stat().st_size
    reader, receiver = (state["grown"] for state in large[1])
    assert model > 100e6, f"the model has {model / 1e6:.0f} MB"
    assert receiver < 0.85 * model < reader, f"model {model:,}, reader grew by {reader:,}, receiver by {receiver:,}"


def test_a_frozen_reference_is_received_too(tiny_folder: Path, tmp_path: Path) -> None:
    found = built(tiny_folder, tmp_path / "out", trained=False)
    assert_equal(tiny_folder, found)
    assert [state["trainable"] for state in found] == [[], []]


def test_the_leader_of_a_node_is_first(tmp_path: Path) -> None:
    on_ranks(2, ranks.leader_rank, str(tmp_path))
    assert (tmp_path / "order").read_text() == "01"
