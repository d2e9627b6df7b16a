"""Invariants of the train engine: skipped steps, clipping, frozen parts, metrics, log-probs by sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import engine_ranks as ranks
import numpy as np
import pytest
import torch
from model_fixtures import open_policy, patch_source
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer

from verl.models.policy import Policy, load_policy
from verl.packing.columns import columns
from verl.protocol import TrainGroup
from verl.workers.actor.engine import PackedRunner, TrainEngine, filler_group, full_parameters, shard
from verl.workers.actor.objective import PolicyObjective, SFTObjective, merge_metrics
from verl.workers.actor.optim import OptimSpec
from verl.workers.rollout.hf import HFEngine
from verl.workers.runtime import build_mesh

pytestmark = pytest.mark.usefixtures("alone")


def engine(policy: Policy, spec: OptimSpec = ranks.SPEC) -> TrainEngine:
    sharded = shard(policy, build_mesh("cpu", -1), ranks.FP32)
    return TrainEngine(PackedRunner(sharded, patch_source(), torch.device("cpu"), ranks.TEMPERATURE), spec)


def weights(policy: Policy) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in full_parameters(policy)}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def step(run: TrainEngine, groups: Sequence[TrainGroup], objective=ranks.OBJECTIVE) -> dict[str, float]:
    return run.step([list(groups)], objective, ranks.response_tokens(groups))


def with_weight(groups: Sequence[TrainGroup], value: float) -> list[TrainGroup]:
    """The last answer's first token weighs `value`."""
    *others, last = groups
    sample = last.samples[-1]
    bad = sample.weights.copy()
    bad[0] = value
    return [*others, TrainGroup(last.prompt, (*last.samples[:-1], dataclasses.replace(sample, weights=bad)))]


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e38])
def test_a_step_with_a_non_finite_gradient_changes_nothing_and_is_counted(value: float, policy: Policy) -> None:
    run = engine(policy)
    groups = ranks.mini_batch(policy)
    before = weights(policy)
    metrics = step(run, with_weight(groups, value))
    assert metrics["skipped"] == 1.0 and not np.isfinite(metrics["grad_norm"])
    assert (run.skipped, run.steps) == (1, 1)
    assert changed(before, weights(policy)) == set() and not run.optimizer.state
    metrics = step(run, groups)
    assert metrics["skipped"] == 0.0 and np.isfinite(metrics["grad_norm"])
    assert (run.skipped, run.steps) == (1, 2) and changed(before, weights(policy))


def test_a_skipped_step_leaves_no_trace_in_the_next_one(policy: Policy, tiny_folder: Path) -> None:
    disturbed, plain = engine(policy), engine(open_policy(tiny_folder))
    groups = ranks.mini_batch(policy)
    step(disturbed, with_weight(groups, np.inf))
    for run in (disturbed, plain):
        step(run, groups)
    assert changed(weights(disturbed.policy), weights(plain.policy)) == set()


@pytest.mark.parametrize(("clip", "bound"), [(0.1, True), (1e6, False), (0.0, False), (-1.0, False)])
def test_the_norm_is_reported_before_clipping_and_bounded_after(clip: float, bound: bool, policy: Policy) -> None:
    expected = ranks.expected(policy)
    policy.zero_grad(set_to_none=True)
    norm = torch.cat([g.flatten() for g in expected.values()]).double().norm().item()
    run = engine(policy, dataclasses.replace(ranks.SPEC, clip_grad=clip, lr=1.0))
    run.optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)  # its step is the gradient it gets
    before = weights(policy)
    metrics = step(run, ranks.mini_batch(policy))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    moved = torch.cat([(before[n] - v).flatten() for n, v in weights(policy).items()]).double().norm().item()
    assert moved == pytest.approx(clip if bound else norm, rel=1e-4)


def test_a_frozen_vision_tower_is_bit_equal_after_a_step(policy: Policy) -> None:
    run = engine(ranks.frozen(policy), dataclasses.replace(ranks.SPEC, weight_decay=0.5))
    before = weights(policy)
    for _ in range(2):
        step(run, ranks.mini_batch(policy))
    moved = changed(before, weights(policy))
    assert moved == {name for name in before if not name.startswith("model.visual.")}


def test_the_step_reports_and_applies_the_rate_of_the_schedule(policy: Policy) -> None:
    spec = dataclasses.replace(ranks.SPEC, lr=0.01, warmup_steps=1, total_steps=3, style="cosine", min_lr_ratio=0.1)
    run = engine(policy, spec)
    groups = ranks.mini_batch(policy)[1:2]
    rates = [step(run, groups)["lr"] for _ in range(4)]
    assert rates == pytest.approx([0.005, 0.01, 0.0055, 0.001])
    assert all(group["lr"] == rates[-1] for group in run.optimizer.param_groups)


def test_the_first_adamw_step_moves_every_weight_by_the_rate(policy: Policy) -> None:
    run = engine(policy, dataclasses.replace(ranks.SPEC, lr=1e-3, weight_decay=0.0, clip_grad=0.0))
    before = weights(policy)
    step(run, ranks.mini_batch(policy))
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    moved = (weights(policy)[name] - before[name]).abs()
    assert moved.median().item() == pytest.approx(1e-3, rel=1e-2)


def hand_made_metrics(run: TrainEngine, groups: Sequence[TrainGroup], objective: PolicyObjective) -> dict[str, float]:
    """Straight from the formulas, in numpy, over the whole mini-batch at once."""
    found = run.runner.log_probs([[g] for g in groups])
    log_probs = np.concatenate([found[s.index] for g in groups for s in g.samples]).astype(np.float64)
    data = columns(groups)
    ratio = np.exp(log_probs - data.old_log_probs)
    plain = -data.advantages * ratio
    clipped = -data.advantages * ratio.clip(1 - objective.clip_low, 1 + objective.clip_high)
    loss, bound = np.maximum(plain, clipped), -objective.clip_dual * data.advantages
    lower = (data.advantages < 0) & (loss > bound)
    to_ref = data.ref_log_probs - log_probs
    return {
        "pg_loss": (data.weights * np.where(lower, bound, loss)).sum(),
        "pg_clipfrac": (clipped > plain).mean(),
        "pg_clipfrac_lower": lower.mean(),
        "ppo_kl": (data.old_log_probs - log_probs).mean(),
        "kl_loss": (data.weights * (np.exp(to_ref) - 1 - to_ref).clip(-10, 10)).sum(),
    }


@pytest.mark.parametrize("cut", ["1 micro-batch", "sub-groups that repeat the prompt", "everything on the last rank"])
def test_metrics_equal_means_made_by_hand_over_all_micro_batches(cut: str, policy: Policy) -> None:
    run = engine(policy)
    groups = ranks.mini_batch(policy)
    expected = hand_made_metrics(run, groups, ranks.OBJECTIVE)
    assert expected["pg_clipfrac"] > 0 and expected["pg_clipfrac_lower"] > 0, expected
    micro_batches = ranks.CUTS[cut](groups, 1)[0]
    found = run.step([*micro_batches, []], ranks.OBJECTIVE, ranks.response_tokens(groups))
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert found["entropy"] == pytest.approx(np.log(294), rel=0.1)  # a random model over 299 - 5 ids
    assert set(ranks.OBJECTIVE.metric_names) <= set(found)


def test_a_rank_without_data_reports_zeros_and_takes_the_step(policy: Policy) -> None:
    run = engine(policy)
    metrics = run.step([[], []], ranks.OBJECTIVE, 10)
    assert {name: metrics[name] for name in ranks.OBJECTIVE.metric_names} == dict.fromkeys(
        ranks.OBJECTIVE.metric_names, 0.0
    )
    assert metrics["grad_norm"] == 0.0 and metrics["skipped"] == 0.0


def without_old(groups: Sequence[TrainGroup]) -> list[TrainGroup]:
    return [TrainGroup(g.prompt, tuple(dataclasses.replace(s, old_log_probs=None) for s in g.samples)) for g in groups]


def test_without_old_log_probs_the_ratio_is_one_and_the_sampler_is_compared(policy: Policy) -> None:
    run = engine(policy)
    groups = without_old(ranks.mini_batch(policy))
    data = columns(groups)
    now = run.runner.log_probs([groups])
    log_probs = np.concatenate([now[s.index] for g in groups for s in g.samples])
    found = run.step([groups[:2], groups[2:], []], ranks.OBJECTIVE, ranks.response_tokens(groups))
    assert found["ppo_kl"] == found["pg_clipfrac"] == 0.0
    assert found["pg_loss"] == pytest.approx(-(data.weights * data.advantages).sum(), rel=1e-4)
    difference = np.abs(np.exp(log_probs) - np.exp(data.rollout_log_probs))
    assert found["rollout_probs_diff_max"] == pytest.approx(difference.max(), rel=1e-4)
    assert found["rollout_probs_diff_sum"] / found["rollout_tokens"] == pytest.approx(difference.mean(), rel=1e-4)
    assert found["rollout_tokens"] == len(log_probs)
    assert found["rollout_kl_sum"] == pytest.approx((data.rollout_log_probs - log_probs).sum(), rel=1e-3)


def test_the_sft_loss_is_the_weighted_negative_log_likelihood(policy: Policy) -> None:
    run = engine(policy)
    groups = ranks.mini_batch(policy)
    now = run.runner.log_probs([groups])
    log_probs = np.concatenate([now[s.index] for g in groups for s in g.samples])
    found = step(run, groups, SFTObjective())
    assert found["loss"] == pytest.approx(-(columns(groups).weights * log_probs).sum(), rel=1e-5)


def test_log_probs_do_not_depend_on_the_cut_and_the_filler_has_none(policy: Policy) -> None:
    run = engine(policy)
    groups = ranks.mini_batch(policy)
    expected = run.runner.log_probs([groups])
    assert sorted(expected) == [s.index for g in groups for s in g.samples]
    for cut in ranks.CUTS.values():
        found = run.runner.log_probs([*cut(groups, 1)[0], []])
        assert found.keys() == expected.keys()
        for index, values in expected.items():
            assert values.dtype == np.float32
            np.testing.assert_allclose(found[index], values, rtol=0, atol=1e-5)


def test_a_sharded_bf16_forward_is_bit_equal_to_the_samplers(tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    plain = load_policy(tiny_folder, tokenizer, dtype=torch.bfloat16)
    half = dataclasses.replace(ranks.FP32, param_dtype=torch.bfloat16)
    sharded = shard(open_policy(tiny_folder), build_mesh("cpu", -1), half)
    groups = ranks.mini_batch(plain)
    one, other = (
        PackedRunner(policy, patch_source(), torch.device("cpu"), ranks.TEMPERATURE).log_probs([groups])
        for policy in (plain, sharded)
    )
    assert {i: v.tolist() for i, v in one.items()} == {i: v.tolist() for i, v in other.items()}
    run = TrainEngine(PackedRunner(sharded, patch_source(), torch.device("cpu"), ranks.TEMPERATURE), ranks.SPEC)
    assert step(run, groups)["skipped"] == 0.0
    assert all(p.dtype == torch.float32 for p in sharded.parameters()), "master weights stay fp32"


def test_log_probs_leave_no_gathered_weights_behind(policy: Policy) -> None:
    """Else a checkpoint or a sync right after would read the copy in the computing precision."""
    spec = dataclasses.replace(ranks.FP32, reshard_after_forward=False)
    sharded = shard(policy, build_mesh("cpu", -1), spec)
    PackedRunner(sharded, patch_source(), torch.device("cpu"), ranks.TEMPERATURE).log_probs([ranks.mini_batch(policy)])
    whole = [name for name, p in sharded.named_parameters() if not isinstance(p, DTensor)]
    assert whole == []


def test_packing_ahead_gives_the_same_micro_batches_in_order(policy: Policy) -> None:
    runner = PackedRunner(policy, patch_source(), torch.device("cpu"), ranks.TEMPERATURE)
    plan = [[g] for g in ranks.mini_batch(policy)] + [[]]
    plain = list(runner.micro_batches(plan, trained=True))
    runner.pack_ahead = True
    ahead = list(runner.micro_batches(plan, trained=True))
    assert [m.groups for m in ahead] == [m.groups for m in plain] and len(ahead) == 5
    for one, other in zip(ahead, plain, strict=True):
        assert torch.equal(one.inputs.token_ids, other.inputs.token_ids)
        assert torch.equal(one.columns.weights, other.columns.weights)


def test_the_filler_weighs_nothing_and_draws_an_allowed_id(policy: Policy) -> None:
    run = engine(policy)
    (filler,) = run.runner.filled([])
    token = int(filler.samples[0].token_ids[0])
    assert not policy.banned[token] and not filler.samples[0].weights.any() and filler.samples[0].index < 0
    assert filler_group(token).prompt.image_keys == ()


def test_gathered_weights_have_library_names_and_reach_the_sampler_bit_for_bit(
    policy: Policy, tiny_folder: Path
) -> None:
    run = engine(policy)
    step(run, ranks.mini_batch(policy))
    names = [name for name, _ in full_parameters(run.policy)]
    other = open_policy(tiny_folder)
    assert names == [name for name, _ in other.hf.named_parameters()] and "lm_head.weight" not in names
    assert changed(weights(run.policy), weights(other))
    sampler = HFEngine(other, patch_source(), stop_ids=[0], batch_size=1)
    sent = list(full_parameters(run.policy))
    with pytest.raises(AssertionError, match="did not arrive"):
        sampler.load_weights(sent[:3])
    sampler.load_weights(sent)
    assert changed(weights(run.policy), weights(other)) == set()


def test_metrics_merge_by_sum_and_maxima_by_maximum() -> None:
    parts = [{"a": 1.0, "b_max": 3.0}, {"a": 2.0, "b_max": 1.0, "c": 5.0}, {}]
    assert merge_metrics(parts) == {"a": 3.0, "b_max": 3.0, "c": 5.0}


def test_importance_weights_scale_the_policy_loss_and_not_the_kl_term(policy: Policy) -> None:
    groups = ranks.mini_batch(policy)[1:2]
    half = {
        s.index: dataclasses.replace(s, is_weights=np.full(len(s.token_ids), 0.5, np.float32))
        for g in groups
        for s in g.samples
    }
    halved = [TrainGroup(g.prompt, tuple(half[s.index] for s in g.samples)) for g in groups]
    run = engine(policy, dataclasses.replace(ranks.SPEC, lr=0.0))
    plain, weighted = (step(run, g) for g in (groups, halved))
    assert weighted["pg_loss"] == pytest.approx(0.5 * plain["pg_loss"], rel=1e-5)
    assert weighted["kl_loss"] == pytest.approx(plain["kl_loss"], rel=1e-6)
