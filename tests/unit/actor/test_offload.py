"""Optimizer state on the host between updates: the same bits, and checkpoints that do not know the setting."""

from __future__ import annotations

from pathlib import Path

import engine_ranks as ranks
import numpy as np
import pytest
import torch
from model_fixtures import open_policy, patch_source
from test_engine import changed, step, weights, with_weight

from verl.utils.checkpoint.manager import Checkpoint
from verl.utils.checkpoint.sharded import optimizer_state
from verl.workers.actor.build import load_engine, save_engine
from verl.workers.actor.engine import PackedRunner, TrainEngine, shard
from verl.workers.runtime import build_mesh

pytestmark = pytest.mark.usefixtures("alone")


def engine(folder: Path, *, offload: bool) -> TrainEngine:
    sharded = shard(open_policy(folder), build_mesh("cpu", -1), ranks.FP32)
    runner = PackedRunner(sharded, patch_source(), torch.device("cpu"), ranks.TEMPERATURE)
    return TrainEngine(runner, ranks.SPEC, offload_optimizer=offload)


def save(run: TrainEngine, folder: Path, source: Path) -> tuple[Checkpoint, dict[str, int]]:
    checkpoint = Checkpoint(run.steps, folder)
    return checkpoint, save_engine(run, checkpoint, source=source, dtype=torch.float32)


def test_offloading_changes_no_bit_of_weights_state_or_metrics(tiny_folder: Path) -> None:
    runs = [engine(tiny_folder, offload=offload) for offload in (False, True)]
    groups = ranks.mini_batch(runs[0].policy)
    seen = [[step(run, g) for g in (groups, with_weight(groups, np.inf), groups[:2], groups)] for run in runs]
    assert [m["skipped"] for m in seen[0]] == [0.0, 1.0, 0.0, 0.0]
    assert repr(seen[1]) == repr(seen[0])  # a skipped step's norm is nan, which equals nothing
    plain, offloaded = runs
    assert changed(weights(plain.policy), weights(offloaded.policy)) == set()
    states = [optimizer_state(run.policy.hf, run.optimizer) for run in runs]
    assert changed(*states) == set() and len(states[0]) > 0


def test_the_update_works_on_copies_beside_the_parameters_and_the_host_holds_them_afterwards(tiny_folder: Path) -> None:
    run = engine(tiny_folder, offload=True)
    groups = ranks.mini_batch(run.policy)
    step(run, groups)
    parked = {name: id(v) for name, v in optimizer_state(run.policy.hf, run.optimizer).items() if v.ndim}
    fetched: dict[str, int] = {}

    def look(*_: object) -> None:
        fetched.update({n: id(v) for n, v in optimizer_state(run.policy.hf, run.optimizer).items() if v.ndim})

    run.optimizer.register_step_pre_hook(look)
    step(run, groups)
    after = optimizer_state(run.policy.hf, run.optimizer)
    assert fetched.keys() == parked.keys() and parked
    still = [name for name in parked if fetched[name] == parked[name] or fetched[name] == id(after[name])]
    assert still == [], "these were updated where they lay"
    assert {value.device.type for value in after.values()} == {"cpu"}


@pytest.mark.parametrize("first", [False, True])
def test_a_checkpoint_crosses_over_to_the_other_setting_exactly(first: bool, tiny_folder: Path, tmp_path: Path) -> None:
    whole, one, other = (engine(tiny_folder, offload=offload) for offload in (first, first, not first))
    groups = ranks.mini_batch(whole.policy)
    for run in (whole, one):
        step(run, groups)
    checkpoint, clock = save(one, tmp_path, tiny_folder)
    load_engine(other, checkpoint, clock)
    for run in (whole, other):
        step(run, groups[1:])
    assert changed(weights(whole.policy), weights(other.policy)) == set()
    assert (other.steps, other.skipped) == (2, 0)
