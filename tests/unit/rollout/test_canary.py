"""Invariants of the canary's verdict, and that its plain forward is the policy's distribution."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from model_fixtures import SMALL, WIDE, Maker, open_policy, patch_source, write_tiny

from verl.models.policy import make_inputs
from verl.packing.layout import pack
from verl.protocol import TrainGroup
from verl.workers.rollout.canary import CPU_WORST, Apart, CanaryError, judge, plain_log_probs

YARDSTICK = Apart(worst=0.1, mean=0.01)


def test_distance_is_the_worst_and_the_mean_of_the_absolute_differences() -> None:
    found = Apart.of(np.array([-1, -2, -3], np.float32), np.array([-1.5, -2, -2.75], np.float32))
    assert (found.worst, found.mean) == (0.5, 0.25)
    with pytest.raises(AssertionError, match="0 and 0 log-probs"):
        Apart.of(np.zeros(0, np.float32), np.zeros(0, np.float32))


def test_in_fp32_a_distance_above_the_bound_is_refused_with_its_value() -> None:
    assert judge(Apart(CPU_WORST, 1e-5), None, "at the start") is None
    with pytest.raises(CanaryError, match=r"canary at the start: .*worst 0\.0011.*at most 0\.001"):
        judge(Apart(1.1e-3, 1e-5), None, "at the start")


def test_in_bf16_twice_the_yardstick_warns_and_four_times_is_refused() -> None:
    assert judge(Apart(9.0, 0.0199), YARDSTICK, "at step 3") is None
    warning = judge(Apart(0.1, 0.03), YARDSTICK, "at step 3")
    assert warning is not None and "3.0 times" in warning and "at step 3" in warning
    with pytest.raises(CanaryError, match=r"4\.1 times, more than 4 times is refused"):
        judge(Apart(0.1, 0.041), YARDSTICK, "at step 3")


@pytest.mark.parametrize("yardstick", [None, YARDSTICK])
def test_a_distance_that_is_not_a_number_is_refused(yardstick: Apart | None) -> None:
    with pytest.raises(CanaryError, match="nan"):
        judge(Apart(float("nan"), float("nan")), yardstick, "at the start")


def test_the_plain_forward_gives_the_packed_forwards_log_probs(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "tiny")
    policy, patches = open_policy(folder), patch_source()
    group = Maker(policy.config).group([12], WIDE, SMALL)
    sample = dataclasses.replace(group.samples[0], index=0)
    batch = pack([TrainGroup(group.prompt, (sample,))], image_token_id=policy.config.image_token_id, merge_size=2)
    inputs = make_inputs(batch, patches(batch.image_keys), patches.dim, torch.device("cpu"))
    with torch.no_grad():
        expected = policy(inputs, temperature=0.7).log_probs.numpy()
    banned = policy.banned.nonzero().flatten().tolist()
    found = plain_log_probs(
        folder,
        group.prompt,
        sample.token_ids,
        patches,
        banned=banned,
        temperature=0.7,
        dtype=torch.float32,
        device="cpu",
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
