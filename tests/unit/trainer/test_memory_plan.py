"""Invariants of the memory plan, and the measured peaks it is calibrated with."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest

from verl.models.sizes import FUSED, LIBRARY, ModelSizes
from verl.trainer.ppo.memory import (
    GIB,
    KEYS,
    MARGIN,
    WORKSPACE,
    Demand,
    Switches,
    engine_cache,
    estimate,
    plan_memory,
    wanted_cache,
)

THREE_B: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "intermediate_size": 11008,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "vision_config": {
        "hidden_size": 1280,
        "depth": 32,
        "intermediate_size": 3420,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_chans": 3,
        "out_hidden_size": 2048,
    },
}
SIZES = ModelSizes.from_config(THREE_B)
GROUP = (450 + 5 * 256, 672)
"""Tokens and patches of a group of CTU-3B."""


def ctu(groups: int = 4, **changes: Any) -> Demand:
    """CTU-3B on one H200."""
    plain = Demand(
        sizes=SIZES,
        shards=1,
        frozen_vision=False,
        master=4,
        compute=2,
        reduce=4,
        tokens=groups * GROUP[0],
        patches=groups * GROUP[1],
        reference=True,
        engine="vllm",
        utilization=0.15,
        tensor_parallel=1,
        sequences=320,
        context=706,
        bucket=512 << 20,
        device=int(139.8 * GIB),
    )
    return dataclasses.replace(plain, **changes)


ALL = [field.name for field in dataclasses.fields(Switches)]
NOTHING_FIXED: dict[str, bool] = {}
AWAKE = dict.fromkeys(ALL, False)


def test_a_patch_weighs_what_its_tower_has_beside_the_text_layers() -> None:
    """Hand-counted: 0.67e9 beside 2.77e9 at the 3B and 6.53e9 at the 7B; a toy's tower outweighs its text."""
    seven_b = THREE_B | {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
        "vision_config": THREE_B["vision_config"] | {"out_hidden_size": 3584},
    }
    toy = THREE_B | {"num_hidden_layers": 1}
    weights = [ModelSizes.from_config(config).patch_weight for config in (THREE_B, seven_b, toy)]
    assert weights == pytest.approx([0.241, 0.1037, 0.25], abs=5e-4)


def test_parameters_are_those_of_the_published_model_and_of_its_halves() -> None:
    assert (SIZES.parameters, SIZES.vision.parameters) == (3_754_622_976, 668_684_288)
    assert SIZES.text.kv_bytes == 36_864


def test_adapters_cost_their_own_masters_and_averages_and_there_is_no_reference() -> None:
    count = 60_000_000
    whole, adapted = (estimate(ctu(adapters=n), Switches()).parts for n in (0, count))
    total = SIZES.parameters
    assert adapted["weights"] == 2 * total + 4 * count and whole["weights"] == 4 * total
    assert adapted["optimizer"] == 8 * count and adapted["gradients"] == 4 * count
    assert adapted["reference"] == 0 and whole["reference"] == 2 * total
    assert adapted["activations"] == whole["activations"]


def test_what_patterns_freeze_has_no_gradients_and_no_averages() -> None:
    found = estimate(ctu(trained=1_000_000), Switches()).parts
    assert found["optimizer"] == 8_000_000 and found["gradients"] == 4_000_000
    assert found["weights"] == 4 * SIZES.parameters and found["reference"] == 2 * SIZES.parameters


def test_the_plan_says_that_adapters_need_no_reference() -> None:
    assert "adapters alone are trained (5,000)" in plan_memory(ctu(adapters=5000), {}).table()
    assert "adapters" not in plan_memory(ctu(), {}).table()


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_as_the_library_makes_them(tiny_folder: Path, tied: bool) -> None:
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    from verl.models.policy import parameter_shapes

    shapes = parameter_shapes(tiny_folder)
    counted = ModelSizes.from_folder(tiny_folder)
    assert counted.parameters == sum(_product(shape) for shape in shapes.values())
    vision = sum(_product(shape) for name, shape in shapes.items() if ".visual." in f".{name}")
    assert counted.vision.parameters == vision
    if not tied:
        import torch

        config = AutoConfig.from_pretrained(tiny_folder)
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
        with torch.device("meta"):
            loose = Qwen2_5_VLForConditionalGeneration(config)
        assert ModelSizes.from_config(config.to_dict()).parameters == sum(p.numel() for p in loose.parameters())


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


@pytest.mark.parametrize(("groups", "measured"), [(4, 54.0), (8, 90.0)])
def test_the_measured_peaks_of_ctu_3b_without_checkpointing_are_met(groups: int, measured: float) -> None:
    """1x H200, library layers, bf16 weights and gradients, no optimizer: 54 GiB with 4 groups, 90 with 8."""
    kept = SIZES.activation_bytes(groups * GROUP[0], groups * GROUP[1], kind=LIBRARY, checkpointing=False)
    total = (2 * 2 * SIZES.parameters + kept + WORKSPACE) / GIB
    assert abs(total / measured - 1) < 0.02, f"{total:.1f} GiB estimated, {measured} measured"


def test_a_group_of_ctu_3b_keeps_about_ten_gib_in_the_librarys_layers_and_less_in_ours() -> None:
    library, fused, checkpointed = (
        SIZES.activation_bytes(*GROUP, kind=kind, checkpointing=on) / GIB
        for kind, on in ((LIBRARY, False), (FUSED, False), (FUSED, True))
    )
    assert 8 < library < 10.5, library
    assert 0.6 * library < fused < 0.8 * library, (fused, library)
    assert checkpointed < 0.1 * fused, (checkpointed, fused)


def test_the_parts_of_ctu_3b_are_those_of_the_design() -> None:
    """fp32 weights 14 GiB, Adam 28, gradients 14, bf16 copies 7, reference 7."""
    parts = estimate(ctu(), Switches()).parts
    found = {name: round(parts[name] / GIB) for name in ("weights", "optimizer", "gradients", "reference")}
    assert found == {"weights": 14, "optimizer": 28, "gradients": 14, "reference": 7}
    assert round(parts["gathered weights"] / GIB) == 7
    assert round(wanted_cache(ctu()) / GIB) == 8 and 10 < engine_cache(ctu()) / GIB < 13


@pytest.mark.parametrize("engine", ["vllm", "hf", "none"])
@pytest.mark.parametrize("shards", [1, 2, 8])
def test_no_switch_and_no_further_rank_ever_raises_the_peak(engine: str, shards: int) -> None:
    for values in itertools.product([False, True], repeat=len(ALL)):
        switches = Switches(**dict(zip(ALL, values, strict=True)))
        demand = ctu(engine=engine, shards=shards)
        before = estimate(demand, switches).peak
        assert estimate(dataclasses.replace(demand, shards=2 * shards), switches).peak <= before
        for name in ALL:
            after = estimate(demand, dataclasses.replace(switches, **{name: True})).peak
            assert after <= before, f"{name} raises the peak of {switches}"


def test_more_tokens_never_need_less() -> None:
    peaks = [estimate(ctu(groups), Switches()).peak for groups in (1, 2, 4, 8, 16)]
    assert peaks == sorted(peaks)


def test_what_fits_leaves_every_switch_off_and_the_engine_awake() -> None:
    """4 groups beside the optimizer on one H200: the row of 4.6 s in performance.md."""
    plan = plan_memory(ctu(4), NOTHING_FIXED)
    assert plan.switches == Switches() and plan.estimate.peak < ctu().device, plan.table()
    assert set(plan.reasons) == set(ALL) and all("off" in reason for reason in plan.reasons.values())


def test_the_cheapest_switches_that_suffice_are_turned_on() -> None:
    asleep = plan_memory(ctu(8), NOTHING_FIXED).switches
    assert asleep.sleep and not asleep.checkpointing and not asleep.param_offload
    large = plan_memory(ctu(32), NOTHING_FIXED).switches
    assert large.checkpointing and not large.param_offload


def test_no_single_switch_of_a_plan_could_be_left_off() -> None:
    for groups, share in itertools.product((4, 8, 12, 16, 32), (0.15, 0.4, 0.6)):
        demand = ctu(groups, utilization=share)
        plan = plan_memory(demand, NOTHING_FIXED)
        for name in ALL:
            if getattr(plan.switches, name):
                without = estimate(demand, dataclasses.replace(plan.switches, **{name: False}))
                assert without.peak > MARGIN * demand.device, f"{name} was needless, {groups} groups: {plan.table()}"
                assert f"{without.peak / GIB:.1f} GiB" in plan.reasons[name]


def test_a_fixed_switch_is_never_changed() -> None:
    for name, value in itertools.product(ALL, (False, True)):
        try:
            plan = plan_memory(ctu(12, utilization=0.5), {name: value})
        except ValueError:
            continue
        assert getattr(plan.switches, name) is value and name not in plan.reasons


@pytest.mark.parametrize(
    ("demand", "fixed", "keys"),
    [
        (ctu(16), AWAKE, [KEYS["checkpointing"], "ppo_micro_batch_size_per_gpu", "update"]),
        (ctu(4, utilization=0.95), AWAKE | {"sleep": True}, ["gpu_memory_utilization", "generate"]),
        (ctu(4, device=24 * GIB, utilization=0.5), NOTHING_FIXED, ["use more GPUs"]),
        (ctu(4, utilization=0.05), NOTHING_FIXED, ["gpu_memory_utilization=0.05", "raise it"]),
        (ctu(4, given_cache=1 << 20), NOTHING_FIXED, ["vllm.kv_cache_memory_bytes=1048576", "706 tokens", "raise it"]),
        (ctu(4, given_cache=120 * GIB), AWAKE | {"sleep": True}, ["lower", "vllm.kv_cache_memory_bytes", "generate"]),
    ],
)
def test_what_cannot_fit_is_refused_and_names_the_keys(demand: Demand, fixed: dict[str, bool], keys: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        plan_memory(demand, fixed)
    for key in keys:
        assert key in str(error.value), str(error.value)


def test_a_given_cache_takes_the_place_of_the_share() -> None:
    """The share may then say anything: vLLM does not look at it."""
    peaks = [estimate(ctu(given_cache=4 * GIB, utilization=u), Switches()).phases["generate"] for u in (0.05, 0.9)]
    assert peaks[0] == peaks[1] < estimate(ctu(utilization=0.9), Switches()).phases["generate"]
    more = estimate(ctu(given_cache=9 * GIB), Switches()).phases["generate"]
    assert more - peaks[0] == 5 * GIB
    assert "vLLM's cache: 4.0," in plan_memory(ctu(given_cache=4 * GIB, utilization=0.05), NOTHING_FIXED).table()


def test_an_engine_that_sleeps_drops_weights_and_cache_only_while_the_actor_computes() -> None:
    awake, asleep = (estimate(ctu(utilization=0.6), Switches(sleep=on)).phases for on in (False, True))
    assert awake["update"] - asleep["update"] > 70 * GIB and awake["generate"] == asleep["generate"]


def test_the_table_names_every_part_the_peaks_and_the_decisions() -> None:
    plan = plan_memory(ctu(8), NOTHING_FIXED)
    text = plan.table()
    for word in (*(n for n, size in plan.estimate.parts.items() if size), *plan.estimate.phases, *KEYS.values()):
        assert word in text, word
