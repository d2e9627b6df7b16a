"""What may stand in engine_kwargs.vllm: an argument has one place."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from verl.config import load
from verl.config.engine_kwargs import OWN_KEY, RESERVED, given_cache
from verl.config.nodes import RolloutConfig
from verl.config.schema import leaves

Name = Literal["ppo_trainer", "generation"]
NODES: dict[Name, str] = {"ppo_trainer": "actor_rollout_ref.rollout", "generation": "rollout"}
FIXED: dict[Name, list[str]] = {"ppo_trainer": ["trainer.val_only=True"], "generation": []}


def loaded(name: Name, argument: str, *more: str) -> Any:
    node = NODES[name]
    return load(name, [*FIXED[name], f"{node}.name=vllm", f"+{node}.engine_kwargs.vllm.{argument}", *more])


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_what_answers_mean_is_not_the_users_to_set(name: str) -> None:
    with pytest.raises(ValueError, match=f"engine_kwargs.vllm.{name}=1 is set by the program: remove it"):
        loaded("ppo_trainer", f"{name}=1")


@pytest.mark.parametrize("config", list(NODES))
@pytest.mark.parametrize("name", sorted(OWN_KEY))
def test_an_argument_with_a_key_is_set_by_that_key_alone(config: Name, name: str) -> None:
    node = NODES[config]
    with pytest.raises(ValueError) as error:
        loaded(config, f"{name}=1")
    expected = f"{node}.engine_kwargs.vllm.{name}=1 has a key of its own: set {node}.{OWN_KEY[name]} instead"
    assert str(error.value) == expected


def test_the_named_keys_exist() -> None:
    assert set(OWN_KEY.values()) <= {key for key, _ in leaves(RolloutConfig)}


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "2g", "True"])
def test_the_size_of_the_cache_is_a_number_of_bytes(value: str) -> None:
    with pytest.raises(ValueError, match=f"kv_cache_memory_bytes={value} must be a whole number of bytes above 0"):
        loaded("ppo_trainer", f"kv_cache_memory_bytes={value}")


def test_other_arguments_pass_and_hf_looks_at_none() -> None:
    node = NODES["ppo_trainer"]
    assert given_cache(loaded("ppo_trainer", "block_size=32").actor_rollout_ref.rollout) is None
    assert given_cache(loaded("ppo_trainer", "kv_cache_memory_bytes=4096").actor_rollout_ref.rollout) == 4096
    assert given_cache(loaded("ppo_trainer", "kv_cache_memory_bytes=null").actor_rollout_ref.rollout) is None
    loaded("ppo_trainer", "seed=1", f"{node}.name=hf")
