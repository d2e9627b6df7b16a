"""Invariants of the corrections for another sampler: weights, rejection, normalisation, metrics, the plain loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from verl.algorithms.policy_loss import reinforce_loss
from verl.algorithms.rollout_correction import correct, is_on
from verl.config.ppo import RolloutCorrectionConfig


def config(**values) -> RolloutCorrectionConfig:
    defaults = {
        "rollout_is": "token",
        "rollout_is_threshold": 2.0,
        "rollout_is_batch_normalize": False,
        "rollout_rs": None,
        "rollout_rs_threshold": None,
        "bypass_mode": False,
        "loss_type": "ppo_clip",
    }
    return RolloutCorrectionConfig(**(defaults | values))


SAMPLER = {0: np.array([-1.0, -2.0], np.float32), 1: np.array([-1.0, -1.0, -3.0], np.float32)}
RATIOS = {0: [0.5, 3.0], 1: [1.0, 1.5, 0.1]}
POLICY = {i: SAMPLER[i] + np.log(np.array(r, np.float32)) for i, r in RATIOS.items()}


def weights(minis=((0, 1),), policy=POLICY, **values) -> dict[int, list[float]]:
    made = correct(minis, policy, SAMPLER, config(**values)).weights
    assert all(w.dtype == np.float32 for w in made.values())
    return {i: w.tolist() for i, w in made.items()}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("normalize", [False, True])
def test_equal_distributions_weigh_exactly_one(level: str, normalize: bool) -> None:
    found = weights(policy=SAMPLER, rollout_is=level, rollout_is_batch_normalize=normalize)
    assert found == {0: [1.0, 1.0], 1: [1.0, 1.0, 1.0]}


def test_token_weights_are_ratios_truncated_at_the_threshold() -> None:
    found = weights()
    assert found[0] == pytest.approx([0.5, 2.0]) and found[1] == pytest.approx([1.0, 1.5, 0.1])


def test_sequence_weights_are_products_over_the_answer() -> None:
    found = weights(rollout_is="sequence")
    assert found[0] == pytest.approx([1.5] * 2) and found[1] == pytest.approx([0.15] * 3)


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("token", {0: [1, 0], 1: [1, 1, 0]}),
        ("sequence", {0: [1, 1], 1: [0, 0, 0]}),
        ("geometric", {0: [1, 1], 1: [1, 1, 1]}),
    ],
)
def test_what_leaves_the_band_is_rejected(level: str, expected: dict[int, list[int]]) -> None:
    assert weights(rollout_is=None, rollout_rs=level, rollout_rs_threshold=2.5) == expected


def test_normalised_weights_have_mean_one_in_every_mini_batch() -> None:
    found = weights(minis=((0,), (1,)), rollout_is_batch_normalize=True)
    assert [np.mean(w) for w in found.values()] == pytest.approx([1.0, 1.0])
    both = weights(rollout_is_batch_normalize=True)
    assert np.mean(both[0] + both[1]) == pytest.approx(1.0) and both[0][1] / both[0][0] == pytest.approx(4.0)


def test_metrics_have_verls_names_and_the_values_of_the_formulas() -> None:
    found = correct([(0, 1)], POLICY, SAMPLER, config(rollout_rs="token", rollout_rs_threshold=5.0)).metrics
    kept = np.array([0.5, 2.0, 1.0, 1.5, 0.0])
    assert found == pytest.approx(
        {
            "rollout_corr/rollout_is_mean": kept.mean(),
            "rollout_corr/rollout_is_std": kept.std(),
            "rollout_corr/rollout_is_min": 0.0,
            "rollout_corr/rollout_is_max": 2.0,
            "rollout_corr/rollout_is_eff_sample_size": kept.sum() ** 2 / (np.square(kept).sum() * 5),
            "rollout_corr/rollout_is_ratio_fraction_high": 0.2,
            "rollout_corr/rollout_rs_masked_fraction": 0.2,
            "rollout_corr/rollout_rs_seq_masked_fraction": 0.5,
        },
        rel=1e-5,
    )
    assert correct([], {}, {}, config()).metrics == {}


def test_an_endless_ratio_stays_finite() -> None:
    policy = {i: x + 1e4 for i, x in SAMPLER.items()}
    assert weights(policy=policy)[0] == [2.0, 2.0]
    assert weights(policy={i: x - 1e4 for i, x in SAMPLER.items()})[0] == pytest.approx([0.0, 0.0], abs=1e-8)


def test_weights_are_made_only_where_the_loss_does_not_correct_itself() -> None:
    assert is_on(config()) and is_on(config(rollout_is=None, rollout_rs="token"))
    assert not is_on(config(rollout_is=None)) and not is_on(config(bypass_mode=True))


def test_reinforce_is_the_policy_gradient_weighted_by_the_truncated_ratio() -> None:
    log_probs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    old = log_probs.detach() - torch.log(torch.tensor([0.5, 3.0, 1.0]))
    advantages = torch.tensor([1.0, -2.0, 3.0])
    clips = {"clip_low": 0.2, "clip_high": 0.2, "clip_dual": 3.0}
    for bound, weight in ((None, [1.0, 1.0, 1.0]), (2.0, [0.5, 2.0, 1.0])):
        found = reinforce_loss(log_probs, old, advantages, **clips, bound=bound)
        (gradient,) = torch.autograd.grad(found.loss.sum(), log_probs)
        torch.testing.assert_close(gradient, -advantages * torch.tensor(weight))
        assert found.clipped.tolist() == [0.0, float(bound is not None), 0.0]
