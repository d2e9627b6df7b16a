"""Invariants of reading overrides: last wins, old names are rewritten, unknown ones refused."""

from __future__ import annotations

from typing import Any

import pytest
from config_cases import RUN_CTU, ppo, sft, small

from verl.config.loader import to_dict
from verl.config.overrides import nearest, parse


def value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize("override", RUN_CTU)
def test_every_key_of_run_ctu_takes_the_value_of_the_script(override: str) -> None:
    key, _, _text = override.partition("=")
    (parsed,) = parse([override])
    got = value(ppo().config, key)
    wanted = parsed.value
    if isinstance(got, tuple):
        got, wanted = list(got), [wanted] if isinstance(wanted, str) else wanted
    assert got == wanted and not (isinstance(wanted, bool) ^ isinstance(got, bool))


def test_run_ctu_warns_only_of_the_reward_kl_and_of_the_test_split() -> None:
    warnings = ppo().warnings
    assert warnings[0] == "algorithm.kl_ctrl.kl_coef=0.001 has no effect: KL is a loss term here"
    assert len(warnings) == 2 and "looks like a test split" in warnings[1]


def test_the_last_override_wins() -> None:
    assert ppo("data.train_batch_size=32").config.data.train_batch_size == 32


def test_an_overridden_mistake_is_not_judged() -> None:
    assert ppo("algorithm.adv_estimator=gae", "algorithm.adv_estimator=grpo").config.algorithm.adv_estimator == "grpo"


@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_a_plus_before_a_known_key_is_dropped(sign: str) -> None:
    assert ppo(f"{sign}data.seed=7").config.data.seed == 7


@pytest.mark.parametrize("text", ["[console,wandb]", "['console','wandb']", '["console", "wandb"]'])
def test_lists_parse_with_and_without_quotes(text: str) -> None:
    assert ppo(f"trainer.logger={text}").config.trainer.logger == ("console", "wandb")


def test_a_mapping_sets_the_keys_below_a_section() -> None:
    sampling = ppo("actor_rollout_ref.rollout.val_kwargs={temperature: 0.1, top_k: 3}").config.actor_rollout_ref.rollout
    assert (sampling.val_kwargs.temperature, sampling.val_kwargs.top_k, sampling.val_kwargs.do_sample) == (0.1, 3, True)


def test_interpolation_and_environment_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", "/big/disk")
    config = ppo("trainer.default_local_dir=${oc.env:OUT}/${trainer.experiment_name}", "trainer.seed=9").config
    assert config.trainer.default_local_dir == "/big/disk/qwen2.5_vl_3b_grpo_sft_rl"
    assert (config.data.seed, config.actor_rollout_ref.rollout.seed) == (9, 9)
    nested = ppo("trainer={default_local_dir: '${oc.env:OUT}/x'}").config
    assert nested.trainer.default_local_dir == "/big/disk/x"


def test_following_keys_follow() -> None:
    config = ppo("data.max_response_length=77", "actor_rollout_ref.actor.use_dynamic_bsz=True").config
    workers = config.actor_rollout_ref
    assert workers.rollout.response_length == 77 and workers.ref.log_prob_use_dynamic_bsz
    assert workers.rollout.log_prob_use_dynamic_bsz


@pytest.mark.parametrize("name", ["007", "1e5", "12", "'12'"])
def test_a_number_for_a_name_is_taken_as_written(name: str) -> None:
    assert ppo(f"trainer.experiment_name={name}").config.trainer.experiment_name == name.strip("'")


def test_free_mappings_take_any_key() -> None:
    config = ppo(
        "custom_reward_function.path=r.py",
        "custom_reward_function.reward_kwargs.alpha=0.5",
        "+custom_reward_function.reward_kwargs={beta: [1,2], deep: {x: y}}",
        "actor_rollout_ref.model.override_config.attention_dropout=0.0",
    ).config
    assert config.custom_reward_function.reward_kwargs == {"alpha": 0.5, "beta": [1, 2], "deep": {"x": "y"}}
    assert to_dict(config)["actor_rollout_ref"]["model"]["override_config"] == {"attention_dropout": 0.0}


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("data.train_batchsize=64", "data.train_batch_size"),
        ("rollout.n=5", "actor_rollout_ref.rollout.n"),
        ("lr=1e-6", "actor_rollout_ref.actor.optim.lr"),
        ("+actor_rollout_ref.rollout.temprature=1", "actor_rollout_ref.rollout.temperature"),
        ("trainer.n_gpus=4", "trainer.n_gpus_per_node"),
        ("actor_rollout_ref.actor.kl_loss_coeff=1", "actor_rollout_ref.actor.kl_loss_coef"),
    ],
)
def test_an_unknown_key_is_an_error_with_the_nearest_name(override: str, suggestion: str) -> None:
    with pytest.raises(ValueError, match=f"unknown key .*did you mean .*{suggestion}") as error:
        ppo(override)
    assert override.lstrip("+").partition("=")[0] in str(error.value)


def test_a_name_like_nothing_gets_no_suggestion() -> None:
    assert nearest("zzzz.qqqq", ["data.seed", "trainer.seed"]) == []
    with pytest.raises(ValueError) as error:
        ppo("zzzz.qqqq=1")
    assert str(error.value) == "unknown key zzzz.qqqq"


def test_unknown_keys_are_reported_together() -> None:
    with pytest.raises(ValueError) as error:
        ppo("data.sead=1", "trainer.lgger=console")
    assert "data.sead" in str(error.value) and "trainer.lgger" in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.seed", "expected key=value"),
        ("~data.seed", "cannot be deleted"),
        ("~data.seed=1", "cannot be deleted"),
        ("data.seed=1,2", "one run takes one value"),
        ("data.train_files=a.parquet,b.parquet", "a list is written"),
        ("db/mysql=x", "no config groups"),
        ("data.train_files=[a", "cannot read the override 'data.train_files=[a'"),
        ("data=x", "data is a section"),
        ("data=null", "data is a section"),
    ],
)
def test_what_is_no_override_is_refused_with_the_reason(override: str, message: str) -> None:
    with pytest.raises(ValueError, match="(?s)" + message.replace("[", r"\[")):
        ppo(override)


def test_sft_defaults_load_without_overrides_and_without_warnings() -> None:
    resolved = sft()
    assert resolved.warnings == () and resolved.config.trainer.test_freq == "after_each_epoch"


def test_defaults_never_warn() -> None:
    warnings = small().warnings
    assert warnings == ()
