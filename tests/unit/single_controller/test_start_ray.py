"""Which cluster a run joins, and what `ray_kwargs.ray_init` and the environment become. Ray itself does not start."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from verl.config import load
from verl.single_controller.cluster import ClusterError, start_ray

RUN = ["trainer.val_only=True"]
PRESET = {"TOKENIZERS_PARALLELISM", "NCCL_DEBUG", "HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY"}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of `ray.init`, once it was called."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **arguments: found.update(arguments))
    for name in ("RAY_ADDRESS", *PRESET):
        monkeypatch.delenv(name, raising=False)
    return found


def begin(*overrides: str) -> None:
    config = load("ppo_trainer", [*RUN, *overrides])
    start_ray(config.ray_kwargs.ray_init, nodes=config.trainer.nnodes)


def test_one_node_starts_a_ray_of_its_own_and_takes_what_the_user_sets(asked: dict[str, Any]) -> None:
    begin()
    assert asked["address"] == "local" and asked["num_cpus"] >= 4 and asked["include_dashboard"] is False
    assert set(asked["runtime_env"]["env_vars"]) == PRESET
    begin("ray_kwargs.ray_init.num_cpus=7", "ray_kwargs.ray_init._temp_dir=/t", "ray_kwargs.ray_init.num_gpus=0")
    assert (asked["num_cpus"], asked["_temp_dir"], asked["num_gpus"]) == (7, "/t", 0)


def test_the_old_name_of_num_cpus_works(asked: dict[str, Any]) -> None:
    begin("+ray_init.num_cpus=9")
    assert asked["num_cpus"] == 9


@pytest.mark.parametrize(
    ("overrides", "variable", "address"),
    [
        (["ray_kwargs.ray_init.address=10.0.0.1:6379"], None, "10.0.0.1:6379"),
        (["ray_kwargs.ray_init.address=10.0.0.1:6379"], "10.9.9.9:1", "10.0.0.1:6379"),
        ([], "10.9.9.9:1", "10.9.9.9:1"),
        (["trainer.nnodes=2"], None, "auto"),
        (["ray_kwargs.ray_init.address=local"], "10.9.9.9:1", "local"),
    ],
)
def test_the_key_comes_before_the_variable_and_several_nodes_join_the_cluster_of_this_machine(
    asked: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    variable: str | None,
    address: str,
) -> None:
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    begin(*overrides)
    assert asked["address"] == address
    # Ray refuses sizes of a cluster that is there already.
    assert ("num_cpus" in asked) is (address == "local")


def test_variables_of_the_driver_go_to_a_cluster_but_presets_do_not_replace_those_of_its_nodes(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.9.9.9:1")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    begin("+ray_kwargs.ray_init.runtime_env.env_vars.NCCL_IB_DISABLE=1")
    assert asked["runtime_env"]["env_vars"] == {"NCCL_DEBUG": "INFO", "NCCL_IB_DISABLE": "1"}


@pytest.mark.parametrize("name", ["num_cpus=8", "num_gpus=1", "object_store_memory=100", "_temp_dir=/t"])
def test_sizes_of_a_cluster_that_runs_already_are_refused_at_start(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.9.9.9:1")
    with pytest.raises(ValueError, match=rf"ray_kwargs\.ray_init\.{name} .*give it to `ray start`"):
        load("ppo_trainer", [*RUN, f"ray_kwargs.ray_init.{name}"])


def test_an_empty_address_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert load("ppo_trainer", [*RUN, "ray_kwargs.ray_init.num_cpus=8"]).ray_kwargs.ray_init.num_cpus == 8


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+ray_kwargs.ray_init.local_mode=True", "every rank is a process of its own"),
        ("+ray_kwargs.ray_init.runtime_env.pip=[torch]", "the code and packages of their node"),
        ("+ray_kwargs.ray_init.num_cpu=3", "num_cpus"),
        ("trainer.ray_wait_timeout=0", "must be greater than 0"),
    ],
)
def test_what_ray_must_not_be_asked_is_refused_with_the_reason(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load("ppo_trainer", [*RUN, override])


def test_several_nodes_on_a_ray_of_this_run_alone_are_refused() -> None:
    with pytest.raises(ValueError, match=r"is one machine, but trainer\.nnodes=2"):
        load("ppo_trainer", [*RUN, "trainer.nnodes=2", "ray_kwargs.ray_init.address=local"])


def test_no_cluster_is_an_error_that_says_how_to_start_one(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ClusterError, match=r"no Ray cluster at 'auto': run `ray start` on every node.*nobody answers"):
        begin("trainer.nnodes=2")
