"""What the driver learns about the actor's model when its workers are built."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import MagicMock

from verl.config import load
from verl.models.sizes import ModelSizes
from verl.trainer.ppo.workers import Actors

W = "actor_rollout_ref"


def test_plans_weigh_patches_and_flops_as_the_model_with_its_replaced_fields_does(tiny_folder: Path) -> None:
    fields = {"intermediate_size": 8192}
    config = load(
        "ppo_trainer",
        [
            f"{W}.model.path={tiny_folder}",
            f"+{W}.model.override_config.intermediate_size={fields['intermediate_size']}",
            f"{W}.rollout.n=2",
            f"{W}.actor.use_dynamic_bsz=True",
            f"{W}.rollout.log_prob_use_dynamic_bsz=True",
        ],
    )
    group = MagicMock(size=1)
    group.all.return_value = [None]
    actors = Actors(group, config)
    actors.build(config, MagicMock(ranks=1), [], 1)
    expected = ModelSizes.from_folder(tiny_folder, fields).patch_weight
    assert actors.patch_weight == expected < ModelSizes.from_folder(tiny_folder).patch_weight
    assert actors.meter is not None
    assert actors.meter.counter.config.text_config.intermediate_size == 8192
