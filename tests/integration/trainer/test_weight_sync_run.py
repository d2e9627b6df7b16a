"""What a run does with its weights: every step ends with the actor's weights in the engine, and says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from in_process import rl_here
from runs import Data, Run, rl_overrides
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer

from verl.models.policy import load_policy


@pytest.fixture(scope="module")
def run(work: Path, data: Data, tiny: Path) -> Run:
    folder = work / "weights"
    bucket = "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=1"
    two = ("trainer.total_training_steps=2", "trainer.test_freq=2", "actor_rollout_ref.actor.use_kl_loss=False")
    # Advantages of random scores: without a difference within a group nothing would be learned and nothing move.
    noise = "actor_rollout_ref.actor.entropy_coeff=0.5"
    return rl_here(rl_overrides(data, tiny, folder, *two, noise, bucket), folder).ok()


def test_after_a_step_the_engine_holds_the_actors_weights_bit_for_bit(run: Run) -> None:
    workers = run.extra["workers"]
    actor, rollout = workers["actor"].engine.policy.hf, workers["rollout"].engine.policy.hf
    held = dict(rollout.named_parameters())
    for name, parameter in actor.named_parameters():
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        assert torch.equal(full, held[name]), name
    assert len(held) == sum(1 for _ in actor.named_parameters())


def test_the_weights_moved_and_the_bytes_of_each_transfer_are_logged(run: Run, tiny: Path) -> None:
    held = dict(run.extra["workers"]["rollout"].engine.policy.hf.named_parameters())
    before = dict(load_policy(tiny, AutoTokenizer.from_pretrained(tiny), dtype=torch.float32).hf.named_parameters())
    assert sum(value.nbytes for value in held.values()) > 1 << 20, "one bucket would hold the model"
    same = [n for n, v in before.items() if torch.equal(v, held[n])]
    assert len(same) < len(held) / 4, f"{len(same)} of {len(held)} weights never moved, e.g. {same[:3]}"
    steps = [run.steps[1], run.steps[2]]
    assert [row["weight_sync/bytes"] for row in steps] == [sum(v.nbytes for v in held.values())] * 2
    assert [row["weight_sync/checked"] for row in steps] == [0.0, 1.0], "only before the validation of step 2"
