"""Invariants of the FLOP counter, against torch's own count of a real forward, and of the MFU metrics."""

from __future__ import annotations

import logging

import pytest
import torch
from model_fixtures import ODD, SMALL, WIDE, Maker, patch_source
from torch.utils.flop_counter import FlopCounterMode

from verl.models.policy import Policy, make_inputs
from verl.packing.layout import pack
from verl.protocol import TrainGroup
from verl.trainer.ppo.mfu import FlopMeter
from verl.utils.flops import PEAK_FLOPS, FlopCounter, causal_pairs, peak_flops


def groups_of(make: Maker) -> list[TrainGroup]:
    return [make.group([3, 9, 1], WIDE), make.group([6]), make.group([3, 8], SMALL, ODD)]


def test_matrix_products_are_those_that_torch_counts(shared_policy: Policy, make: Maker) -> None:
    groups, source, config = groups_of(make), patch_source(), shared_policy.config
    batch = pack(groups, image_token_id=config.image_token_id, merge_size=2)
    inputs = make_inputs(batch, source(batch.image_keys), source.dim, torch.device("cpu"))
    with FlopCounterMode(display=False) as counted:
        shared_policy(inputs, temperature=1.0, with_entropy=False)
    # a batched product makes the rotary angles, and attention is counted by the visible pairs
    by_operator = counted.get_flop_counts()["Global"]
    products = by_operator[torch.ops.aten.mm] + by_operator[torch.ops.aten.addmm]
    counter = FlopCounter(config)
    prompts = [(len(g.prompt.token_ids), 0) for g in groups]
    answers = [(len(s.token_ids), len(g.prompt.token_ids)) for g in groups for s in g.samples]
    text = sum(counter.text(0, causal_pairs(*lengths), 0) for lengths in (*prompts, *answers))
    vision = sum(counter.vision_attention(grid) for grid in batch.image_grids)
    assert counter.forward(groups, shared=True) - text - vision == products


def test_attention_counts_visible_pairs_in_windows_and_whole_pictures(shared_policy: Policy) -> None:
    counter, vision = FlopCounter(shared_policy.config), shared_policy.config.vision_config
    assert causal_pairs(3) == 6 and causal_pairs(2, before=5) == 13
    assert counter.text(0, 10, 0) == 4 * 64 * 10 * 2
    # 8x16 patches are two windows of 8x8; one of the two blocks attends to the whole picture
    assert vision.depth == 2 and len(vision.fullatt_block_indexes) == 1
    assert counter.vision_attention(WIDE) == 4 * 64 * (128**2 + 2 * 64**2)


def test_a_shared_prompt_counts_once_and_a_logical_one_for_every_answer(shared_policy: Policy, make: Maker) -> None:
    counter, group = FlopCounter(shared_policy.config), make.group([4, 4, 4], WIDE)
    prompt = len(group.prompt.token_ids)
    head = counter.text(prompt, causal_pairs(prompt), 0) + counter.vision(WIDE)
    difference = counter.forward([group], shared=False) - counter.forward([group], shared=True)
    assert difference == pytest.approx(2 * head)


def test_the_rule_of_six_counts_the_text_weights_and_the_head_once(shared_policy: Policy) -> None:
    matrices = [
        p for n, p in shared_policy.hf.model.language_model.named_parameters() if p.ndim == 2 and "embed" not in n
    ]
    expected = sum(p.numel() for p in matrices) + shared_policy.vocabulary.numel()
    assert FlopCounter(shared_policy.config).text_parameters == expected


def test_a_devices_peak_is_looked_up_by_its_exact_name(caplog: pytest.LogCaptureFixture) -> None:
    assert peak_flops("NVIDIA H200") == 989e12 and peak_flops("NVIDIA H20") == 148e12
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert peak_flops("NVIDIA H2000 Future") is None
    assert "no MFU is reported" in caplog.text and all(peak > 1e14 for peak in PEAK_FLOPS.values())


def test_mfu_is_work_over_time_peak_and_ranks(shared_policy: Policy, make: Maker) -> None:
    counter, groups = FlopCounter(shared_policy.config), groups_of(make)
    meter = FlopMeter(counter, 1e12, 2)
    meter.add("actor", groups, passes=3)
    meter.add("actor_infer", groups, passes=1)
    meter.add("actor_infer", groups, passes=1)
    found = meter.metrics({"update_actor": 0.5, "old_log_prob": 0.1, "ref": 0.1})
    logical, computed = (counter.forward(groups, shared=shared) for shared in (False, True))
    assert found == pytest.approx(
        {
            "perf/mfu/actor": 3 * logical / 1e12,
            "perf/mfu/actor_computed": 3 * computed / 1e12,
            "perf/mfu/actor_infer": 2 * logical / 0.4e12,
            "perf/mfu/actor_infer_computed": 2 * computed / 0.4e12,
        }
    )
    assert meter.metrics({"update_actor": 0.5}) == {}, "a step's work counts once"
    silent = FlopMeter(counter, None, 1)
    silent.add("actor", groups, passes=3)
    assert silent.metrics({"update_actor": 0.5}) == {}
