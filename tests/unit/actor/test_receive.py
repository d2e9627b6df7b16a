"""One rank reads the model, the others receive it: the same weights, and no second whole copy in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import receive_ranks as ranks
import torch
from gloo_ranks import on_ranks
from model_fixtures import TEXTS, open_policy

from verl.models.tiny import TinySize, create_tiny_model

LARGE = TinySize(hidden=512, heads=8, layers=10, mlp=2048, max_vocabulary=300, vision_hidden=64, vision_layers=2)
"""About 150 MB in fp32."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """What two ranks wrote about `model` (large, trained), the tiny model (frozen), and their order."""
    folder = tmp_path_factory.mktemp("received")
    create_tiny_model(folder / "model", TEXTS, size=LARGE, seed=0)
    on_ranks(2, ranks.every_rank, str(folder / "model"), str(tiny_folder), str(folder))
    return folder


def of_ranks(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def assert_equal(model: Path, found: list[dict[str, Any]]) -> None:
    expected = ranks.tensors(open_policy(model))
    for rank, state in enumerate(found):
        assert state["tensors"].keys() == expected.keys(), f"rank {rank}"
        different = [name for name, value in expected.items() if not torch.equal(state["tensors"][name], value)]
        assert different == [], f"rank {rank}"
    assert "banned" in expected and any(name.endswith("inv_freq") for name in expected)


def test_every_rank_has_the_weights_and_buffers_of_the_folder_bit_for_bit(found: Path) -> None:
    states = of_ranks(found / "trained")
    assert_equal(found / "model", states)
    assert [state["tied"] for state in states] == [True, True]
    assert states[0]["trainable"] == states[1]["trainable"]
    assert not any("visual" in name for name in states[1]["trainable"])


def test_a_rank_that_receives_never_holds_the_whole_model(found: Path) -> None:
    """Its share is half; the reading rank holds all of it for a moment."""
    model = (found / "model" / "model.safetensors").stat().st_size
    reader, receiver = (state["grown"] for state in of_ranks(found / "trained"))
    assert model > 100e6, f"the model has {model / 1e6:.0f} MB"
    assert receiver < 0.85 * model < reader, f"model {model:,}, reader grew by {reader:,}, receiver by {receiver:,}"


def test_a_frozen_reference_is_received_too(found: Path, tiny_folder: Path) -> None:
    states = of_ranks(found / "frozen")
    assert_equal(tiny_folder, states)
    assert [state["trainable"] for state in states] == [[], []]


def test_the_leader_of_a_node_is_first(found: Path) -> None:
    assert (found / "order").read_text() == "01"
