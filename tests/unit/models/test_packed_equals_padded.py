"""Invariant: the packed forward with a shared prompt equals a plain padded forward, values and gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_fixtures import (
    ODD,
    SMALL,
    WIDE,
    WINDOW,
    Maker,
    assert_gradients_close,
    gradients,
    image_patches,
    open_policy,
)
from padded_reference import PaddedReference

from verl.models.log_probs import TokenStats
from verl.models.policy import Policy, make_inputs
from verl.packing.layout import PackedBatch, pack
from verl.protocol import TrainGroup
from verl.utils.dataset.patches import StoredPatches

TEMPERATURE = 0.7

BATCHES: dict[str, Callable[[Maker], list[TrainGroup]]] = {
    "one answer, text": lambda m: [m.group([4])],
    "one answer, image": lambda m: [m.group([4], WIDE)],
    "unequal answers, text": lambda m: [m.group([1, 9, 2, 30])],
    "unequal answers, image": lambda m: [m.group([12, 1, 5], SMALL)],
    "eight answers, image": lambda m: [m.group([3, 1, 7, 2, 5, 4, 1, 6], WIDE)],
    "two images in a prompt": lambda m: [m.group([3, 5], SMALL, ODD)],
    "images of all sizes": lambda m: [m.group([2, 3], grid) for grid in (WIDE, SMALL, ODD, WINDOW)],
    "text beside images": lambda m: [m.group([5, 9, 1], WIDE), m.group([4]), m.group([3, 3, 7], ODD, SMALL)],
    "no images at all": lambda m: [m.group([n] * n, text=3 + n) for n in range(1, 9)],
}


@pytest.fixture(scope="module")
def judge(tiny_folder: Path, shared_policy: Policy) -> PaddedReference:
    return PaddedReference(tiny_folder, shared_policy.banned.nonzero()[:, 0].tolist())


def packed(policy: Policy, groups: list[TrainGroup]) -> PackedBatch:
    return pack(groups, image_token_id=policy.config.image_token_id, merge_size=2)


def run_packed(policy: Policy, batch: PackedBatch, source: StoredPatches) -> TokenStats:
    inputs = make_inputs(batch, source(batch.image_keys), source.dim, torch.device("cpu"))
    return policy(inputs, temperature=TEMPERATURE, entropy_grad=True)


@pytest.mark.parametrize("name", BATCHES)
def test_invariant_1_log_probs_entropies_and_every_gradient_equal_the_padded_forward(
    name: str, policy: Policy, judge: PaddedReference, make: Maker, patches: StoredPatches
) -> None:
    groups = BATCHES[name](make)
    stats = run_packed(policy, packed(policy, groups), patches)
    log_probs, entropies = judge(groups, image_patches(patches), TEMPERATURE)
    torch.testing.assert_close(stats.log_probs, log_probs, rtol=0, atol=1e-5)
    torch.testing.assert_close(stats.entropy, entropies, rtol=0, atol=1e-5)

    # Different coefficients for every token, so that tokens cannot be confused.
    of_log_prob, of_entropy = torch.rand(2, len(log_probs), generator=torch.Generator().manual_seed(1)) / len(log_probs)
    (of_log_prob @ stats.log_probs + of_entropy @ stats.entropy).backward()
    judge.model.zero_grad(set_to_none=True)
    (of_log_prob @ log_probs + of_entropy @ entropies).backward()
    found, expected = gradients(policy), gradients(judge.model)
    if not any(g.prompt.image_keys for g in groups):  # the dummy image gives the tower zeros where the judge has none
        tower = {n: g for n, g in found.items() if n.startswith("model.visual.")}
        assert tower and all(not g.any() for g in tower.values())
        found = {n: g for n, g in found.items() if n not in tower}
    assert_gradients_close(found, expected, 1e-5)


def test_gradient_checkpointing_runs_every_block_twice_and_changes_nothing(
    tiny_folder: Path, policy: Policy, make: Maker, patches: StoredPatches
) -> None:
    batch = packed(policy, BATCHES["text beside images"](make))
    calls = {}
    for name, model in {"plain": policy, "checkpointed": open_policy(tiny_folder, checkpointing=True)}.items():
        counts = calls[name] = [0]
        blocks = [*model.hf.model.visual.blocks, *model.hf.model.language_model.layers]
        for block in blocks:
            block.mlp.register_forward_pre_hook(lambda *_, counts=counts: counts.__setitem__(0, counts[0] + 1))
        run_packed(model, batch, patches).log_probs.sum().backward()
        calls[name] = counts[0] / len(blocks), gradients(model)
    assert (calls["plain"][0], calls["checkpointed"][0]) == (1, 2)
    assert_gradients_close(calls["checkpointed"][1], calls["plain"][1], 1e-6)


@pytest.mark.parametrize("broken", ["positions", "sibling", "prompt"])
def test_the_comparison_notices_a_wrong(
    broken: str, policy: Policy, judge: PaddedReference, make: Maker, patches: StoredPatches
) -> None:
    groups = BATCHES["unequal answers, image"](make)
    batch = packed(policy, groups)
    if broken == "positions":  # answers at the running index instead of the largest prompt position + 1
        shift = len(groups[0].prompt.token_ids) - batch.positions[:, len(groups[0].prompt.token_ids)].max()
        positions = batch.positions.copy()
        positions[:, len(groups[0].prompt.token_ids) :] += shift
        batch = dataclasses.replace(batch, positions=positions)
    inputs = make_inputs(batch, patches(batch.image_keys), patches.dim, torch.device("cpu"))
    mask = inputs.plan.masks[0]
    if broken == "sibling":
        mask[:] = torch.ones_like(mask).tril()
    elif broken == "prompt":
        mask[-2, 0] = False
    found = policy(inputs, temperature=TEMPERATURE).log_probs
    expected, _ = judge(groups, image_patches(patches), TEMPERATURE)
    assert (found - expected).abs().max() > 1e-4
