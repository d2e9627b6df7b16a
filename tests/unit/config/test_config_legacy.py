"""Old names and values at their level: alias takes effect, warn warns once, error refuses with the reason."""

from __future__ import annotations

from typing import Any

import pytest
from config_cases import sft, small

from verl.config.legacy import PPO_RULES, SFT_RULES, Level, Rule, find_rule, is_neutral
from verl.config.loader import SCHEMAS, Resolved
from verl.config.schema import free_keys, leaves

TABLES = {"ppo_trainer": PPO_RULES, "sft_trainer": SFT_RULES}
NAMES = list(TABLES)


def run(name: str, *overrides: str) -> Resolved:
    return small(*overrides) if name == "ppo_trainer" else sft(*overrides)


def example_of(pattern: str) -> str:
    """A key that the pattern matches."""
    return pattern.replace("*", "actor" if ".*." in pattern else "some_key")


def overrides_at(name: str, level: Level) -> dict[str, Rule]:
    """One override with a value that is not neutral for each rule of the level."""
    return {
        f"{example_of(pattern)}={18 if is_neutral(17, rule) else 17}": rule
        for pattern, rule in TABLES[name].items()
        if rule.level is level
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_is_reached_and_hides_no_key_of_ours(name: str) -> None:
    keys = dict(leaves(SCHEMAS[name].root))
    for pattern, rule in TABLES[name].items():
        assert find_rule(example_of(pattern), TABLES[name]) == (pattern, rule)
        assert pattern not in keys
        free = any(str(rule.target).startswith(f"{node}.") for node in free_keys(SCHEMAS[name].root))
        assert rule.target is None or "*" in rule.target or rule.target in keys or free
        assert rule.switch is None or TABLES[name][rule.switch].level is Level.ALIAS


@pytest.mark.parametrize("name", [name for name in NAMES if name != "sft_trainer"])
def test_every_refused_name_is_an_error_with_its_reason(name: str) -> None:
    wanted = [f"{override}: {rule.reason}" for override, rule in overrides_at(name, Level.ERROR).items()]
    with pytest.raises(ValueError) as error:
        run(name, *overrides_at(name, Level.ERROR))
    assert str(error.value).splitlines() == wanted and len(wanted) >= 1


@pytest.mark.parametrize("name", NAMES)
def test_every_warned_name_gives_one_warning_with_its_reason(name: str) -> None:
    wanted = [f"{override} has no effect: {rule.reason}" for override, rule in overrides_at(name, Level.WARN).items()]
    assert list(run(name, *overrides_at(name, Level.WARN)).warnings) == wanted and len(wanted) >= 4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", [0, 1])
def test_values_that_ask_for_what_happens_anyway_pass_silently(name: str, which: int) -> None:
    rules = [(pattern, rule) for pattern, rule in TABLES[name].items() if len(rule.neutral) > which]
    texts = ["null" if rule.neutral[which] is None else str(rule.neutral[which]) for _, rule in rules]
    assert rules
    assert run(name, *(f"+{example_of(p)}={t}" for (p, _), t in zip(rules, texts, strict=True))).warnings == ()


def test_nothing_of_sft_is_refused() -> None:
    assert overrides_at("sft_trainer", Level.ERROR) == {}


def test_the_order_of_a_neutral_list_does_not_matter() -> None:
    key = "+actor_rollout_ref.actor.checkpoint.save_contents"
    assert run("ppo_trainer", f"{key}=[hf_model,extra,model,optimizer]").warnings == ()
    with pytest.raises(ValueError, match="save_contents"):
        run("ppo_trainer", f"{key}=[model]")


def test_true_is_not_the_neutral_one() -> None:
    (warning,) = small("data.filter_overlong_prompts_workers=True").warnings
    assert "data.filter_overlong_prompts_workers=True has no effect" in warning


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("trainer.val_generations_to_log_to_wandb=3", "trainer.log_val_generations", 3),
        ("trainer.remove_previous_ckpt_in_save=True", "trainer.max_actor_ckpt_to_keep", 1),
        ("trainer.remove_previous_ckpt_in_save=False", "trainer.max_actor_ckpt_to_keep", None),
        (
            "actor_rollout_ref.actor.optim.lr_scheduler_type=cosine",
            "actor_rollout_ref.actor.optim.warmup_style",
            "cosine",
        ),
        ("actor_rollout_ref.actor.optim.clip_grad=0.5", "actor_rollout_ref.actor.grad_clip", 0.5),
        ("reward.custom_reward_function.path=r.py", "custom_reward_function.path", "r.py"),
        ("reward.custom_reward_function.name=score", "custom_reward_function.name", "score"),
        ("reward.custom_reward_function.reward_kwargs.a=1", "custom_reward_function.reward_kwargs", {"a": 1}),
        ("reward.reward_manager.name=dapo", "reward_model.reward_manager", "dapo"),
        ("actor_rollout_ref.rollout.load_format=dummy_dtensor", "actor_rollout_ref.rollout.load_format", "dummy"),
        ("actor_rollout_ref.rollout.dtype=bf16", "actor_rollout_ref.rollout.dtype", "bfloat16"),
        (
            "actor_rollout_ref.actor.fsdp_config.model_dtype=bfloat16",
            "actor_rollout_ref.actor.fsdp_config.model_dtype",
            "bf16",
        ),
        ("trainer.resume_from_path=False", "trainer.resume_from_path", None),
    ],
)
def test_an_alias_takes_effect_under_its_new_name(override: str, key: str, expected: object) -> None:
    node: Any = small(override).config
    for name in key.split("."):
        node = getattr(node, name)
    assert node == expected


def test_old_and_new_name_with_different_values_are_an_error_and_with_equal_values_fine() -> None:
    with pytest.raises(ValueError, match=r"reward\.custom_reward_function\.path=b\.py set the same key"):
        small("custom_reward_function.path=a.py", "reward.custom_reward_function.path=b.py")
    both = small("custom_reward_function.path=a.py", "reward.custom_reward_function.path=a.py")
    assert both.config.custom_reward_function.path == "a.py"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.adv_estimator=gae", "algorithm.adv_estimator=grpo"),
        ("algorithm.adv_estimator=remax", "not implemented yet"),
        ("actor_rollout_ref.actor.strategy=megatron", "fsdp2"),
        ("actor_rollout_ref.rollout.name=sglang", "vllm or hf"),
        ("reward_model.enable=True", "custom_reward_function.path"),
        ("reward_model.reward_manager=mine", "expected one of naive"),
        ("actor_rollout_ref.model.use_fused_kernels=True", "not implemented yet"),
        ("actor_rollout_ref.model.lora_rank=-1", "lora_rank=-1 must be 0 (no adapters) or at least 1"),
        ("trainer.resume_from_path=True", "resume_mode=resume_path"),
        ("actor_rollout_ref.model.path=hdfs://x/y", "copy it to a local folder"),
        ("data.train_files=[hdfs://x/y.parquet]", "HDFS is not supported"),
    ],
)
def test_a_refused_value_names_the_reason(override: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        small(override)
    assert message in str(error.value) and override.partition("=")[0] in str(error.value)


OVERLONG = (
    "reward_model.overlong_buffer",
    "reward_model.reward_kwargs.overlong_buffer_cfg",
    "reward.reward_kwargs.overlong_buffer_cfg",
)


def overlong(group: str, enable: bool | None, *more: str) -> list[str]:
    """The lines of a script of verl."""
    switch = [] if enable is None else [f"+{group}.enable={enable}"]
    return [*switch, f"+{group}.len=64", f"+{group}.penalty_factor=0.5", f"+{group}.log=False", *more]


@pytest.mark.parametrize("group", OVERLONG)
def test_dapos_overlong_buffer_is_the_length_part(group: str) -> None:
    found = small(*overlong(group, True))
    assert found.config.reward.parts == {"length": {"kind": "length", "buffer": 64, "weight": 0.5}}
    assert found.warnings == small().warnings
    mapping = small(f"+{group}={{enable: True, len: 64, penalty_factor: 0.5, log: True}}")
    assert mapping.config.reward.parts == found.config.reward.parts


@pytest.mark.parametrize("group", OVERLONG)
def test_an_overlong_buffer_that_is_off_changes_nothing_and_one_that_nobody_enabled_says_so(group: str) -> None:
    off, forgotten = small(*overlong(group, False)), small(*overlong(group, None))
    assert off.config == small().config and off.warnings == small().warnings
    assert forgotten.config == small().config
    assert [line for line in forgotten.warnings if line not in small().warnings] == [
        f"{group}.len=64 has no effect: it needs {group}.enable=True",
        f"{group}.penalty_factor=0.5 has no effect: it needs {group}.enable=True",
    ]


@pytest.mark.parametrize("node", ["reward_model", "reward"])
def test_max_resp_len_is_the_length_of_the_full_punishment(node: str) -> None:
    group, limit = f"{node}.reward_kwargs.overlong_buffer_cfg", f"+{node}.reward_kwargs.max_resp_len=100"
    assert small(*overlong(group, True, limit)).config.reward.parts["length"]["max_tokens"] == 100
    assert small(*overlong(group, False, limit)).config == small().config
    with pytest.raises(ValueError, match=rf"{node}\.reward_kwargs\.more=1: not implemented yet"):
        small(f"+{node}.reward_kwargs.more=1")


def test_two_names_of_the_overlong_buffer_with_different_values_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"set the same key, reward\.parts\.length\.buffer; drop one"):
        small(*overlong(OVERLONG[0], True), "reward.parts.length.buffer=32")


def test_beside_a_custom_function_only_length_parts_have_an_effect() -> None:
    settings = [*overlong(OVERLONG[0], True), "reward.parts.label.weight=2", "reward.parts.format=null"]
    lines = [w for w in small("custom_reward_function.path=r.py", *settings).warnings if "reward.parts" in w]
    assert [line.partition("=")[0] for line in lines] == ["reward.parts.label.weight", "reward.parts.format"]
    assert all("to which only length parts are added" in line for line in lines)


def test_a_section_of_old_keys_may_come_as_a_mapping() -> None:
    warnings = small("critic={optim: {lr: 1e-5}, ppo_epochs: 1}").warnings
    assert len(warnings) == 2 and all("no critic" in w for w in warnings)


def test_an_old_key_is_warned_about_once() -> None:
    assert len(small("critic.grad_clip=1", "critic.grad_clip=2").warnings) == 1


def test_sft_micro_batch_size_is_the_size_per_gpu() -> None:
    assert sft("data.micro_batch_size=2").config.data.micro_batch_size_per_gpu == 2
    assert sft("data.micro_batch_size=null").config.data.micro_batch_size_per_gpu == 4
