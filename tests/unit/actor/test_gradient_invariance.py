"""Invariant: any cut into micro-batches, over any number of ranks, gives the same gradient for every parameter."""

from __future__ import annotations

from pathlib import Path

import engine_ranks as ranks
import pytest
import torch
from gloo_ranks import on_ranks
from model_fixtures import assert_gradients_close, open_policy
from torch import Tensor

from verl.workers.actor.objective import merge_metrics

TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def expected(tiny_folder: Path) -> dict[str, Tensor]:
    return ranks.expected(open_policy(tiny_folder))


def without_tower(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: grad for name, grad in found.items() if not name.startswith("model.visual.")}


def check(folder: Path, world: int, expected: dict[str, Tensor], variant: str = "plain") -> None:
    by_rank = [torch.load(folder / f"{variant}-{rank}.pt") for rank in range(world)]
    metrics = {name: merge_metrics([found[name][1] for found in by_rank]) for name in by_rank[0]}
    first = next(iter(metrics))
    for name, (found, _) in by_rank[0].items():
        try:
            assert_gradients_close(found, without_tower(expected) if variant == "frozen" else expected, TOLERANCE)
        except AssertionError as error:
            raise AssertionError(f"{name}, {world} ranks, {variant}: {error}") from None
        assert metrics[name] == pytest.approx(metrics[first], rel=1e-4, abs=1e-6), name


def test_the_expected_gradient_reaches_every_parameter(expected: dict[str, Tensor]) -> None:
    dead = [name for name, grad in expected.items() if grad.abs().max() < 1e-5]
    # Adding one vector to every key changes no softmax: key biases have no gradient by construction.
    assert all(name.endswith("k_proj.bias") for name in dead), dead


VARIANTS = ("plain", "frozen", "checkpointed", "gathered")
"""gathered: weights stay gathered between micro-batches, which are packed ahead in a thread."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_invariant_2_every_cut_gives_the_same_gradient_on_one_rank(
    variant: str, alone: None, tiny_folder: Path, tmp_path: Path, expected: dict[str, Tensor], monkeypatch
) -> None:
    monkeypatch.setattr("verl.models.policy.response_stats", ranks.response_stats)  # undone after the test
    ranks.run_cuts(0, 1, str(tiny_folder), str(tmp_path), list(ranks.CUTS), -1, variant)
    check(tmp_path, 1, expected, variant)


def test_invariant_2_every_cut_gives_the_same_gradient_on_two_ranks(
    tiny_folder: Path, tmp_path: Path, expected: dict[str, Tensor]
) -> None:
    on_ranks(2, run_all_variants, str(tiny_folder), str(tmp_path))
    for variant in VARIANTS:
        check(tmp_path, 2, expected, variant)


def run_all_variants(rank: int, world: int, model: str, out: str) -> None:
    for variant in VARIANTS:
        ranks.run_cuts(rank, world, model, out, list(ranks.CUTS), -1, variant)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "fsdp_size"), [(3, -1), (4, 2)], ids=["3 ranks", "2 replicas of 2 ranks"])
def test_every_cut_gives_the_same_gradient_on(
    world: int, fsdp_size: int, tiny_folder: Path, tmp_path: Path, expected: dict[str, Tensor]
) -> None:
    on_ranks(world, ranks.run_cuts, str(tiny_folder), str(tmp_path), list(ranks.CUTS), fsdp_size, "plain")
    check(tmp_path, world, expected)
