"""Every key of `tests/golden/compat_keys.yaml` stands at its level, and a key that must work is seen to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from compat_effects import ppo_effects
from compat_evidence import uses
from compat_programs import evaluation_effects, generation_effects, sft_effects
from config_cases import RUN_CTU, SMALL

from verl.config.legacy import Level, find_rule
from verl.config.loader import SCHEMAS, Resolved, resolve
from verl.config.schema import leaves

ROOT = Path(__file__).resolve().parents[3]
LIST = yaml.safe_load((ROOT / "tests" / "golden" / "compat_keys.yaml").read_text())
BASE = {
    "ppo_trainer": [*SMALL, "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True"],
    "sft_trainer": [],
    "generation": [],
    "evaluation": [],
}
"""The least that a run needs."""
SHORT = {
    "ppo_trainer": [
        "data.train_batch_size=8",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "data.max_prompt_length=10",
        "data.max_response_length=10",
        "trainer.total_epochs=2",
    ]
}
"""A run so short that its effects are soon known, with answers that fill its budgets."""
EFFECTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "ppo_trainer": ppo_effects,
    "sft_trainer": sft_effects,
    "generation": generation_effects,
    "evaluation": evaluation_effects,
}


def rows(level: str) -> list[Any]:
    """(config name, *row) of every entry of a level."""
    return [pytest.param(name, *row, id=f"{name} {row[0]}={row[1]}") for name, of in LIST.items() for row in of[level]]


def value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return list(config) if isinstance(config, tuple) else config


def text(value: Any) -> str:
    return "null" if value is None else str(value)


@cache
def resolved(name: str, *overrides: str) -> Resolved:
    return resolve(name, list(overrides))


def run(name: str, *overrides: str) -> Resolved:
    return resolved(name, *BASE[name], *overrides)


@cache
def effects(name: str, *overrides: str) -> dict[str, Any]:
    return EFFECTS[name](resolved(name, *overrides).config)


def differing(name: str, key: str, first: str | None, second: str, rest: Sequence[str]) -> list[str]:
    """Phases of the run that differ between two values of `key` (None: its default), with `rest` set in both."""
    common = {o.split("=", 1)[0]: o for o in [*BASE[name], *SHORT.get(name, []), *rest]}
    own = common.pop(key, None)
    before = effects(name, *common.values(), *([f"{key}={first}"] if first else [own] if own else []))
    after = effects(name, *common.values(), f"{key}={second}")
    return [phase for phase in before if before[phase] != after[phase]]


@cache
def all_warnings(name: str) -> tuple[str, ...]:
    return run(name, *(f"+{key}={text(given)}" for key, given in LIST[name]["warn"])).warnings


@pytest.mark.parametrize(("name", "key", "default", "effect"), rows("must"))
def test_a_key_that_must_work_is_ours_and_has_their_default(name: str, key: str, default: Any, effect: str) -> None:
    assert key in dict(leaves(SCHEMAS[name].root))
    least = ["trainer.val_only=True"] if name == "ppo_trainer" and key != "trainer.val_only" else BASE[name]
    found = value(resolved(name, *least).config, key)
    different = isinstance(default, str) and default.startswith("~")
    wanted = yaml.safe_load(default[1:]) if different else default
    assert found == wanted or [wanted] == found, f"{key}: {found!r} here, {wanted!r} listed"


def shown(begin: str) -> list[Any]:
    """The entries whose effect is written in a way that begins so."""
    return [row for row in rows("must") if str(row.values[3]).startswith(begin)]


@pytest.mark.parametrize(("name", "key", "default", "effect"), shown("="))
def test_a_key_that_must_work_changes_what_the_run_does(name: str, key: str, default: Any, effect: str) -> None:
    values, *rest = effect[1:].split(" ")
    first, _, second = values.rpartition("|")
    assert differing(name, key, first or None, second, rest), f"{key}={values} changes nothing"


@pytest.mark.parametrize(("name", "key", "default", "effect"), shown("same "))
def test_values_that_mean_the_same_do_the_same(name: str, key: str, default: Any, effect: str) -> None:
    other = effect.removeprefix("same ").partition(":")[0]
    assert differing(name, key, None, other, []) == []


@pytest.mark.parametrize(("name", "key", "default", "effect"), shown("one "))
def test_another_value_than_the_one_that_can_run_is_named(name: str, key: str, default: Any, effect: str) -> None:
    other = effect.removeprefix("one ").partition(":")[0]
    try:
        said = run(name, f"{key}={other}").warnings
    except ValueError as error:
        said = tuple(str(error).splitlines())
    assert [line for line in said if key.rpartition(".")[2] in line], f"{key}={other} passes without a word"


@pytest.mark.parametrize(("name", "key", "default", "effect"), shown("tests/"))
def test_an_effect_shown_elsewhere_is_shown_there(name: str, key: str, default: Any, effect: str) -> None:
    assert uses(effect, key), f"{effect} does not set {key}"


def test_every_effect_is_shown_in_a_way_that_is_checked() -> None:
    ways = [row.id for begin in ("=", "same ", "one ", "tests/") for row in shown(begin)]
    assert sorted(ways) == sorted(row.id for row in rows("must"))


@pytest.mark.parametrize("name", list(LIST))
def test_the_same_config_does_the_same_so_that_a_difference_means_something(name: str) -> None:
    config = resolved(name, *BASE[name], *SHORT.get(name, [])).config
    assert EFFECTS[name](config) == EFFECTS[name](config)


def test_evidence_must_exist_and_set_the_key() -> None:
    file = "tests/unit/rollout/test_vllm_plan.py"
    assert uses(f"{file}::test_an_engine_that_nobody_sends_weights_reads_them", "trainer.n_gpus_per_node")
    assert not uses(f"{file}::test_a_prompts_room_bounds_the_largest_image", "trainer.n_gpus_per_node")
    for absent in (f"{file}::test_absent", "tests/absent.py::test_a", "verl/config/inert.py::inert_ppo"):
        with pytest.raises(AssertionError, match=r"no such"):
            uses(absent, "trainer.n_gpus_per_node")


@pytest.mark.parametrize(("name", "old", "given", "new"), rows("alias"))
def test_an_old_name_takes_effect_under_its_new_one(name: str, old: str, given: Any, new: str) -> None:
    found = find_rule(old, SCHEMAS[name].rules)
    assert found is not None and found[1].level is Level.ALIAS
    assert value(run(name, f"{old}={text(given)}").config, new) != value(run(name).config, new)


@pytest.mark.parametrize(("name", "key", "given"), rows("warn"))
def test_a_name_without_effect_gives_one_warning(name: str, key: str, given: Any) -> None:
    warnings = [line for line in all_warnings(name) if line.startswith(f"{key}=")]
    assert len(warnings) == 1 and "no effect" in warnings[0], warnings


@pytest.mark.parametrize(("name", "key", "given"), rows("error"))
def test_a_name_that_cannot_work_is_refused_with_its_key(name: str, key: str, given: Any) -> None:
    with pytest.raises(ValueError) as error:
        run(name, f"+{key}={text(given)}")
    assert key in str(error.value)


def test_no_key_is_listed_twice_and_every_key_of_the_original_script_is_listed() -> None:
    for name, of in LIST.items():
        keys = [row[0] for row in of["must"]]
        assert len(keys) == len(set(keys)), f"{name}: {sorted(k for k in keys if keys.count(k) > 1)}"
    listed = {row[0] for row in LIST["ppo_trainer"]["must"]}
    assert [o.split("=")[0] for o in RUN_CTU if o.split("=")[0] not in listed] == []
