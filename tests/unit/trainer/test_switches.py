"""From a config to a placement and a memory plan, and back to a config that workers can read."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
from test_memory_plan import SIZES, THREE_B

from verl.config import PPOConfig, load
from verl.config.checks import check_ppo
from verl.trainer.ppo.memory import GIB, KEYS, Switches
from verl.trainer.ppo.placement import plan_placement
from verl.trainer.ppo.switches import (
    LargestPrompt,
    decide,
    demand_of,
    fixed_switches,
    largest_micro_batch,
    with_switches,
    without_plan,
)

W = "actor_rollout_ref"
CTU = [
    "data.train_batch_size=64",
    "data.max_prompt_length=450",
    "data.max_response_length=256",
    f"{W}.rollout.name=vllm",
    f"{W}.rollout.n=5",
    f"{W}.rollout.gpu_memory_utilization=0.15",
    f"{W}.rollout.free_cache_engine=False",
    f"{W}.actor.ppo_mini_batch_size=32",
    f"{W}.actor.use_dynamic_bsz=True",
    f"{W}.actor.ppo_max_token_len_per_gpu=7600",
    f"{W}.actor.use_kl_loss=True",
    "trainer.n_gpus_per_node=1",
]
AUTO = [f"{key}=auto" for name, key in KEYS.items() if name != "sleep"]
PLOT = LargestPrompt(450, 672)


@functools.cache
def config(*overrides: str) -> PPOConfig:
    return load("ppo_trainer", [*CTU, *overrides])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config.json of the 3B shape in the layout of the published file."""
    path = tmp_path_factory.mktemp("shape")
    (path / "config.json").write_text(json.dumps(THREE_B | {"model_type": "qwen2_5_vl"}))
    return path


def decided(folder: Path, *overrides: str, gib: float = 139.8) -> Switches:
    found, plan = decide(config(*overrides), folder, PLOT, device=int(gib * GIB))
    assert fixed_switches(found).keys() >= plan.switches.__annotations__.keys() - {"sleep"}, "an `auto` is left"
    for name, key in KEYS.items():
        node: Any = found
        for part in key.split("."):
            node = getattr(node, part)
        assert node is getattr(plan.switches, name), key
    return plan.switches


def test_the_demand_of_ctu_3b_is_read_from_its_config(folder: Path) -> None:
    demand = demand_of(config(), folder, PLOT, device=GIB)
    assert (demand.master, demand.compute, demand.reduce, demand.shards) == (4, 2, 4, 1)
    assert (demand.reference, demand.engine, demand.sequences, demand.context) == (True, "vllm", 320, 706)
    assert demand.sizes.parameters == 3_754_622_976 and demand.bucket == 512 << 20
    assert (demand.utilization, demand.given_cache) == (0.15, None)
    cache = f"+{W}.rollout.engine_kwargs.vllm.kv_cache_memory_bytes=4096"
    assert demand_of(config(cache), folder, PLOT, device=GIB).given_cache == 4096
    assert demand_of(config(f"{W}.actor.use_kl_loss=False"), folder, PLOT, device=1).reference is False


def test_the_largest_micro_batch_weighs_patches_as_the_model_does(folder: Path) -> None:
    deep = demand_of(config(), folder, PLOT, device=GIB)
    shallow = demand_of(config(f"+{W}.model.override_config.num_hidden_layers=18"), folder, PLOT, device=GIB)
    assert SIZES.patch_weight == pytest.approx(0.241, abs=1e-3) and shallow.sizes.patch_weight == 0.25
    for demand in (deep, shallow):
        assert demand.tokens + demand.sizes.patch_weight * demand.patches == pytest.approx(7600)


def test_the_demand_of_adapters_counts_them(folder: Path) -> None:
    lora = (f"{W}.model.lora_rank=8", f"{W}.model.target_modules=[q_proj]")
    assert demand_of(config(*lora), folder, PLOT, device=1).adapters == 36 * 8 * (2048 + 2048)
    assert not decided(folder, *AUTO, *lora).reference_offload


def test_the_demand_of_frozen_patterns_counts_what_is_left_to_train(folder: Path) -> None:
    def trained(*overrides: str) -> int | None:
        return demand_of(config(*overrides), folder, PLOT, device=1).trained

    lora = (f"{W}.model.lora_rank=8", f"{W}.model.target_modules=[q_proj]")
    assert trained() is trained(*lora) is None
    assert trained(*lora, f"{W}.actor.freeze=['*.layers.0.*','*.layers.1.*']") == 34 * 8 * (2048 + 2048)
    assert trained(f"{W}.actor.freeze=['*.visual.*','*.language_model.layers.*']") == 151936 * 2048 + 2048
    with pytest.raises(ValueError, match=r"freeze=\*\.layer\.0\.\*: fits no parameter"):
        trained(f"{W}.actor.freeze=['*.layer.0.*']")


def test_auto_keeps_everything_on_the_card_where_it_fits_and_gives_up_the_cheapest_where_not(folder: Path) -> None:
    assert decided(folder, *AUTO) == Switches()
    small = decided(folder, *AUTO, f"{W}.rollout.gpu_memory_utilization=0.3", gib=79.1)
    assert small.sleep and small.optimizer_offload and not small.param_offload
    assert decided(folder, *AUTO, f"{W}.model.enable_gradient_checkpointing=True").checkpointing


def test_a_wish_to_stay_awake_is_granted_where_memory_allows_and_sleeping_is_not_forced(folder: Path) -> None:
    assert not decided(folder, *AUTO).sleep
    assert decided(folder, *AUTO, f"{W}.rollout.gpu_memory_utilization=0.6").sleep
    assert decided(folder, *AUTO, f"{W}.rollout.free_cache_engine=True").sleep


def test_an_engine_that_has_nothing_to_drop_is_never_told_to_sleep(folder: Path) -> None:
    assert not decided(folder, *AUTO, f"{W}.rollout.name=hf", f"{W}.rollout.free_cache_engine=True").sleep
    split = [f"{W}.hybrid_engine=False", f"{W}.rollout.nnodes=1", f"{W}.rollout.free_cache_engine=True"]
    assert not decided(folder, *AUTO, *split).sleep


def test_without_a_gpu_nothing_is_planned() -> None:
    found = without_plan(config(*AUTO, f"{W}.rollout.free_cache_engine=True"))
    assert fixed_switches(found) == {
        "reshard_after_forward": True,
        "reference_offload": False,
        "optimizer_offload": False,
        "checkpointing": False,
        "param_offload": False,
    }
    asked = without_plan(config(f"{W}.model.enable_gradient_checkpointing=True"))
    assert asked.actor_rollout_ref.model.enable_gradient_checkpointing is True


def test_switches_written_to_a_config_are_read_back() -> None:
    every = Switches(**{field.name: True for field in dataclasses.fields(Switches)})
    assert fixed_switches(with_switches(config(), every)) == dataclasses.asdict(every)


def test_the_largest_micro_batch_is_bounded_by_the_budget_and_by_the_mini_batch() -> None:
    tokens, patches = largest_micro_batch(config(), PLOT, 0.24)
    assert tokens + 0.24 * patches == pytest.approx(7600) and patches > 4 * 672
    few = config(f"{W}.actor.ppo_max_token_len_per_gpu=100000")
    assert largest_micro_batch(few, PLOT, 0.24)[1] == 32 * 672
    assert largest_micro_batch(few, PLOT, 0.24)[0] == 32 * (450 + 5 * 256)
    assert largest_micro_batch(config("trainer.val_only=True"), PLOT, 0.24) == (0.0, 0.0)


def test_colocated_workers_share_a_gpu_and_split_ones_have_their_own() -> None:
    together = plan_placement(config("trainer.n_gpus_per_node=4", "trainer.nnodes=2"), "cuda")
    assert (together.gpus, together.gpu_share, together.colocated) == (8, 0.5, True)
    assert together.actors == together.rollouts and together.rollouts.ranks == 8
    split = [f"{W}.hybrid_engine=False", f"{W}.rollout.nnodes=1", f"{W}.rollout.n_gpus_per_node=2"]
    apart = plan_placement(config("trainer.n_gpus_per_node=4", *split), "cuda")
    assert (apart.actors.ranks, apart.rollouts.ranks, apart.gpus, apart.gpu_share) == (4, 2, 6, 1.0)
    assert not apart.colocated and "4 actor ranks and 2 rollout ranks" in apart.describe()
    assert plan_placement(config(), "cpu").gpu_share == 0.0


def test_split_placement_is_refused_on_a_cpu() -> None:
    split = [f"{W}.hybrid_engine=False", f"{W}.rollout.nnodes=1"]
    with pytest.raises(ValueError, match=r"set actor_rollout_ref\.hybrid_engine=True"):
        plan_placement(config(*split), "cpu")
    assert plan_placement(config(*split), "cpu", as_on_gpus=True).gpus == 2
    with pytest.raises(ValueError, match="hybrid_engine=False puts actor and rollout on GPUs"):
        config(*split, "trainer.device=cpu")


def test_an_engine_over_two_ranks_is_refused_on_a_cpu() -> None:
    two = config("trainer.n_gpus_per_node=2", f"{W}.rollout.tensor_model_parallel_size=2")
    with pytest.raises(ValueError, match=r"tensor_model_parallel_size=2 cuts the model over GPUs.*set it to 1"):
        plan_placement(two, "cpu")
    assert plan_placement(two, "cpu", as_on_gpus=True).gpus == plan_placement(two, "cuda").gpus == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "rollout.nnodes=0 must be at least 1"),
        ([f"{W}.rollout.nnodes=1", f"{W}.rollout.n_gpus_per_node=0"], "rollout.n_gpus_per_node=0 must be"),
        (
            [f"{W}.rollout.nnodes=1", f"{W}.rollout.n_gpus_per_node=3", f"{W}.rollout.tensor_model_parallel_size=2"],
            "tensor_model_parallel_size=2 does not divide actor_rollout_ref.rollout.n_gpus_per_node=3",
        ),
    ],
)
def test_a_split_run_must_size_its_rollout(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        config(f"{W}.hybrid_engine=False", *overrides)
    assert message in str(error.value)


def test_the_plain_config_passes_its_checks() -> None:
    assert check_ppo(config(*AUTO)) == []
