"""Invariants of the FLOP counter, against torch's own count of a real forward, and of the MFU metrics."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from model_fixtures import ODD, SMALL, WIDE, Maker, open_policy, patch_source
from torch.utils.flop_counter import FlopCounterMode

from verl.config import load
from verl.models.lora import LoraSpec
from verl.models.policy import Policy, make_inputs
from verl.models.trained import TrainedParts
from verl.packing.layout import pack
from verl.protocol import TrainGroup
from verl.trainer.ppo.mfu import FlopMeter
from verl.trainer.ppo.workers import flop_counter
from verl.utils.flops import PEAK_FLOPS, FlopCounter, causal_pairs, peak_flops
from verl.workers.actor.build import choose_trained


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


def trained_counter(folder: Path, lora: LoraSpec | None, frozen: Sequence[str]) -> tuple[Policy, FlopCounter]:
    policy = open_policy(folder)
    choose_trained(policy.hf, lora, dtype=torch.float32, freeze_vision=False, frozen=frozen)
    return policy, FlopCounter(policy.config, TrainedParts.of(policy.hf))


VISION = ("*.visual.*",)
TEXT_BOTTOM = ("*.language_model.layers.0.*", "*.embed_tokens.*")


@pytest.mark.parametrize(
    ("frozen", "vision", "text"),
    [((), 3, 3 + 3), (VISION, 1, 3 + 3), (VISION + TEXT_BOTTOM, 1, 1 + 3)],
    ids=["all trained", "vision frozen", "first text layer and embedding frozen too"],
)
def test_products_of_a_training_step_are_those_that_torch_counts(
    frozen: tuple[str, ...], vision: int, text: int, tiny_folder: Path, make: Maker
) -> None:
    """But for the gradient of the pixels, which nobody makes, and the logits, which the backward makes again. `vision`
    and `text` are the passes through the attention of the tower and of both text layers."""
    policy, counter = trained_counter(tiny_folder, None, frozen)
    groups, source, config = groups_of(make), patch_source(), policy.config
    batch = pack(groups, image_token_id=config.image_token_id, merge_size=2)
    inputs = make_inputs(batch, source(batch.image_keys), source.dim, torch.device("cpu"))
    with FlopCounterMode(display=False) as counted:
        policy(inputs, temperature=1.0, with_entropy=False).log_probs.sum().backward()
    by_operator = counted.get_flop_counts()["Global"]
    products = by_operator[torch.ops.aten.mm] + by_operator[torch.ops.aten.addmm]
    pixels = 0 if frozen else 2 * batch.computed_patches * 1176 * 64
    logits = 2 * len(batch.targets) * config.text_config.vocab_size * 64
    prompts = [causal_pairs(len(g.prompt.token_ids)) for g in groups]
    answers = [causal_pairs(len(s.token_ids), len(g.prompt.token_ids)) for g in groups for s in g.samples]
    attention = text * 4 * 64 * sum(prompts + answers)
    attention += vision * sum(counter.vision_attention(grid) for grid in batch.image_grids)
    assert counter.training(groups, shared=True) - attention == products + pixels - logits


def test_where_all_is_trained_a_step_is_three_forwards(tiny_folder: Path, make: Maker) -> None:
    policy, counter = trained_counter(tiny_folder, None, ())
    groups = groups_of(make)
    for known in (counter, FlopCounter(policy.config)):
        assert known.training(groups, shared=False) == pytest.approx(3 * known.forward(groups, shared=False))


def test_a_frozen_tower_is_a_forward(tiny_folder: Path, make: Maker) -> None:
    _, counter = trained_counter(tiny_folder, None, VISION)
    group = make.group([4], WIDE)
    pictures, whole = counter.vision(WIDE), counter.forward([group], shared=True)
    assert counter.training([group], shared=True) == pytest.approx(3 * (whole - pictures) + pictures)


def test_under_adapters_a_frozen_matrix_has_two_passes_and_the_adapters_three(tiny_folder: Path, make: Maker) -> None:
    lora = LoraSpec(rank=4, alpha=8, target_modules=("q_proj",))
    policy, counter = trained_counter(tiny_folder, lora, ())
    vocabulary = policy.config.text_config.vocab_size
    # 10 prompt tokens and 5 of an answer: both layers are q, o 64x64, k, v 64x32 and a gated MLP of 128
    group = TrainGroup(make.prompt(text=10), (make.sample(5),))
    matrices = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    products = 2 * 15 * (2 * matrices + 3 * 2 * 4 * (64 + 64)) + 2 * 5 * 2 * vocabulary * 64
    attention = 3 * 2 * 4 * 64 * (10 * 11 // 2 + 5 * 10 + 5 * 6 // 2)
    assert counter.training([group], shared=True) == products + attention
    pictures = make.group([5], WIDE)
    assert counter.vision(WIDE, counter._training) == counter.vision(WIDE), "no gradient reaches the tower"
    assert counter.forward([pictures], shared=True) == FlopCounter(policy.config).forward([pictures], shared=True)


def test_the_counter_of_a_run_sees_replaced_fields_and_what_is_frozen(tiny_folder: Path, make: Maker) -> None:
    w, group = "actor_rollout_ref", make.group([4], WIDE)

    def counter(*overrides: str) -> FlopCounter:
        base = [f"{w}.model.path={tiny_folder}", f"{w}.rollout.n=2", f"{w}.actor.use_dynamic_bsz=True"]
        base.append(f"{w}.rollout.log_prob_use_dynamic_bsz=True")
        return flop_counter(load("ppo_trainer", [*base, *overrides]))

    plain = counter()
    shallow = counter(f"+{w}.model.override_config.num_hidden_layers=1")
    vocabulary = plain.config.text_config.vocab_size * 64
    assert plain.text_parameters - vocabulary == 2 * (shallow.text_parameters - vocabulary)
    full = plain.training([group], shared=True)
    assert full == pytest.approx(3 * plain.forward([group], shared=True))
    for frozen in (f"{w}.actor.freeze_vision_tower=True", f"{w}.actor.freeze=['*.visual.*']"):
        found = counter(frozen).training([group], shared=True)
        assert full - found == pytest.approx(2 * plain.vision(WIDE)), frozen
    adapters = counter(f"{w}.model.lora_rank=4", f"{w}.model.target_modules=[q_proj]")
    assert adapters.trained is not None and adapters.trained.text[0].adapters == 4 * (64 + 64)


def test_a_devices_peak_is_looked_up_by_its_exact_name(caplog: pytest.LogCaptureFixture) -> None:
    assert peak_flops("NVIDIA H200") == 989e12 and peak_flops("NVIDIA H20") == 148e12
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert peak_flops("NVIDIA H2000 Future") is None
    assert "no MFU is reported" in caplog.text and all(peak > 1e14 for peak in PEAK_FLOPS.values())


def test_mfu_is_work_over_time_peak_and_ranks(shared_policy: Policy, make: Maker) -> None:
    counter, groups = FlopCounter(shared_policy.config), groups_of(make)
    meter = FlopMeter(counter, 1e12, 2)
    meter.add("actor", groups)
    meter.add("actor_infer", groups)
    meter.add("actor_infer", groups)
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
    silent.add("actor", groups)
    assert silent.metrics({"update_actor": 0.5}) == {}
