"""Invariants of the yaml files, the dataclasses, and what lies between them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import yaml
from config_cases import ppo, sft, small

from verl.config.cli import help_text, overrides_from
from verl.config.loader import CONFIG_DIR, SCHEMAS, load, to_dict, to_yaml
from verl.config.schema import build, docs, flatten, free_keys, hints, leaves

NAMES = sorted(SCHEMAS)


def raw(name: str) -> dict[str, Any]:
    values = yaml.safe_load((CONFIG_DIR / f"{name}.yaml").read_text())
    assert isinstance(values, dict)
    return values


@pytest.mark.parametrize("name", NAMES)
def test_yaml_and_dataclasses_have_the_same_keys(name: str) -> None:
    root = SCHEMAS[name].root
    in_yaml, in_fields = set(flatten(raw(name), free_keys(root))), {key for key, _ in leaves(root)}
    assert in_yaml - in_fields == set(), "keys of the yaml without a field"
    assert in_fields - in_yaml == set(), "fields without a value in the yaml"


@pytest.mark.parametrize("name", NAMES)
def test_no_field_has_a_default_and_every_node_is_frozen(name: str) -> None:
    nodes = [SCHEMAS[name].root]
    for node in nodes:
        for field in dataclasses.fields(node):
            assert field.default is dataclasses.MISSING, f"{node.__name__}.{field.name} has a default"
            assert field.default_factory is dataclasses.MISSING, f"{node.__name__}.{field.name} has a default"
        assert node.__dataclass_params__.frozen, f"{node.__name__} is not frozen"
        nodes += [hint for hint in hints(node).values() if dataclasses.is_dataclass(hint)]
    assert len(nodes) > 3


@pytest.mark.parametrize("name", NAMES)
def test_every_key_has_help(name: str) -> None:
    assert [key for key, text in docs(SCHEMAS[name].root) if not text] == []


@pytest.mark.parametrize("name", NAMES)
def test_help_names_every_key(name: str) -> None:
    text = help_text(name, width=200)
    assert [key for key, _ in leaves(SCHEMAS[name].root) if key not in text] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_and_an_extra_key_are_errors(name: str) -> None:
    values = raw(name)
    key = next(iter(values["data"]))
    del values["data"][key]
    values["data"]["promt_kay"] = 1
    with pytest.raises(ValueError) as error:
        build(SCHEMAS[name].root, values)
    assert "data.promt_kay: no such key" in str(error.value) and f"data.{key}: missing" in str(error.value)


def test_resolved_yaml_builds_the_same_config() -> None:
    for config in (ppo().config, sft().config):
        again = build(type(config), yaml.safe_load(to_yaml(config)))
        assert again == config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.train_batch_size=abc", "data.train_batch_size=abc (str): expected a whole number"),
        ("data.train_batch_size=64.0", "data.train_batch_size=64.0 (float): expected a whole number"),
        ("data.train_batch_size=True", "data.train_batch_size=True (bool): expected a whole number"),
        ("trainer.val_only=1", "trainer.val_only=1 (int): expected True or False"),
        ("trainer.val_only=", "trainer.val_only= (str): expected True or False"),
        (
            "actor_rollout_ref.actor.optim.lr=fast",
            "actor_rollout_ref.actor.optim.lr=fast (str): expected a finite number",
        ),
        ("actor_rollout_ref.actor.optim.lr=nan", "actor_rollout_ref.actor.optim.lr=nan (float): expected a finite"),
        ("actor_rollout_ref.actor.optim.betas=[0.9]", "expected a list of 2 numbers"),
        ("data.test_files=None", "write null"),
        ("data.truncation=eror", "did you mean error?"),
        ("trainer.logger=[console,wandbb]", "did you mean wandb?"),
        ("trainer.project_name=null", "trainer.project_name=None (NoneType): expected text"),
    ],
)
def test_a_wrong_type_names_key_value_and_expected_type(override: str, expected: str) -> None:
    with pytest.raises(ValueError) as error:
        small(override)
    assert expected in str(error.value)


def test_wrong_types_are_reported_together() -> None:
    with pytest.raises(ValueError) as error:
        small("data.seed=x", "trainer.save_freq=y", "trainer.nnodes=z")
    keys = [line.split("=")[0] for line in str(error.value).splitlines()]
    assert keys == ["data.seed", "trainer.nnodes", "trainer.save_freq"]


def test_int_becomes_float_and_one_path_becomes_a_list() -> None:
    config = small("actor_rollout_ref.actor.grad_clip=2", "data.train_files=a.parquet").config
    assert type(config.actor_rollout_ref.actor.grad_clip) is float and config.data.train_files == ("a.parquet",)


def test_config_imports_no_torch_and_no_ray() -> None:
    code = "import sys, verl.config, verl.config.cli; print({'torch','ray','transformers','vllm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_config_survives_pickling() -> None:
    import pickle

    config = ppo("custom_reward_function.reward_kwargs.alpha=1").config
    assert pickle.loads(pickle.dumps(config)) == config


def test_secrets_are_masked_in_the_dump_and_kept_in_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "very-secret-value")
    config = small(
        "custom_reward_function.path=r.py",
        "custom_reward_function.reward_kwargs.judge_api_key=abcdef",
        "custom_reward_function.reward_kwargs.url=https://me:pw@host/x",
        "custom_reward_function.reward_kwargs.header=${oc.env:OPENAI_API_KEY}",
    ).config
    text = to_yaml(config)
    assert config.custom_reward_function.reward_kwargs["header"] == "very-secret-value"
    assert "abcdef" not in text and "me:pw" not in text and "very-secret-value" not in text
    shown = to_dict(config)
    assert (
        shown["data"]["image_key"] == "images"
        and shown["actor_rollout_ref"]["actor"]["ppo_max_token_len_per_gpu"] == 16384
    )


def test_an_unknown_config_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="choose one of ppo_trainer, sft_trainer"):
        load("ppo", [])  # type: ignore[call-overload]


def test_command_line_takes_hydras_flags_and_refuses_others(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--config-path=config", "--config-name=ppo_trainer.yaml", "data.seed=3"]
    assert overrides_from("ppo_trainer", argv) == ["data.seed=3"]
    with pytest.raises(ValueError, match="key=value"):
        overrides_from("ppo_trainer", ["--config-name=mine"])
    with pytest.raises(ValueError, match="unknown option --lr"):
        overrides_from("ppo_trainer", ["--lr=3"])
    assert overrides_from("sft_trainer", ["--help"]) is None and "data.train_files" in capsys.readouterr().out
