"""Every key of `tests/golden/compat_keys.yaml` stands at its level, and a key that must work is seen to."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from compat_effects import ppo_effects, sft_effects
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
SIZES = [
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=8",
]


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
    config = resolved(name, *overrides).config
    return ppo_effects(config) if name == "ppo_trainer" else sft_effects(config)


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


SEEN = [row for row in rows("must") if str(row.values[3]).startswith("=")]


@pytest.mark.parametrize(("name", "key", "default", "effect"), SEEN)
def test_a_key_that_must_work_changes_what_the_run_does(name: str, key: str, default: Any, effect: str) -> None:
    probe, _, rest = effect[1:].partition(" ") if not effect.startswith("={") else (effect[1:], "", "")
    overrides = {o.split("=", 1)[0]: o for o in [*BASE[name], *rest.split()]}
    micro = "micro_batch_size" in key
    if micro:
        overrides |= {o.split("=", 1)[0]: o for o in SIZES if o.split("=", 1)[0] != key}
        overrides.pop(key.removesuffix("_per_gpu") + "_per_gpu", None)
    without = [f"{key}=8"] if micro else [o for k, o in overrides.items() if k == key]
    overrides.pop(key, None)
    before = effects(name, *overrides.values(), *without)
    after = effects(name, *overrides.values(), f"{key}={probe}")
    assert [part for part in before if before[part] != after[part]], f"{key}={probe} changes nothing"


@pytest.mark.parametrize(
    ("name", "key", "default", "effect"), [row for row in rows("must") if str(row.values[3]).startswith("in ")]
)
def test_an_effect_shown_elsewhere_is_shown_there(name: str, key: str, default: Any, effect: str) -> None:
    file = ROOT / effect.removeprefix("in ")
    assert file.is_file(), f"{key}: {file} does not exist"
    assert key.rpartition(".")[2] in file.read_text(), f"{key} does not occur in {effect}"


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
