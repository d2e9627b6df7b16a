"""yaml + overrides -> checked, typed config.

The order: old names are rewritten, unknown keys refused, hydra composes, old values are rewritten, types are checked,
then rules across keys, then keys without effect are named.

Invariants
- A key that has no field, or a field without a value, cannot get through.
- Every problem raises ValueError naming the key, its value and what to do; problems of one stage come together.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl.config import legacy
from verl.config.checks import check_ppo, check_sft
from verl.config.evaluation import EvaluationConfig, check_evaluation
from verl.config.generation import GenerationConfig, check_generation
from verl.config.inert import inert_evaluation, inert_generation, inert_ppo, inert_sft
from verl.config.legacy import Level, Rule
from verl.config.overrides import Rewritten, parse, rewrite
from verl.config.ppo import PPOConfig
from verl.config.schema import build, free_keys, leaves
from verl.config.secrets import mask_secrets
from verl.config.sft import SFTConfig

CONFIG_DIR = Path(__file__).resolve().parents[1] / "trainer" / "config"
"""Where the yaml files lie."""
ConfigName = Literal["ppo_trainer", "sft_trainer", "generation", "evaluation"]
AnyConfig = PPOConfig | SFTConfig | GenerationConfig | EvaluationConfig

_LOG = logging.getLogger("verl.config")


@dataclass(frozen=True, slots=True)
class Schema:
    """What belongs to one yaml file."""

    root: type
    rules: Mapping[str, Rule]
    values: Mapping[str, Mapping[Any, Rule]]
    check: Callable[[Any], list[str]]
    inert: Callable[[Any, Mapping[str, str]], list[str]]


SCHEMAS: Mapping[str, Schema] = {
    "ppo_trainer": Schema(PPOConfig, legacy.PPO_RULES, legacy.PPO_VALUES, check_ppo, inert_ppo),
    "sft_trainer": Schema(SFTConfig, legacy.SFT_RULES, legacy.SFT_VALUES, check_sft, inert_sft),
    "generation": Schema(
        GenerationConfig, legacy.GENERATION_RULES, legacy.GENERATION_VALUES, check_generation, inert_generation
    ),
    "evaluation": Schema(EvaluationConfig, legacy.EVALUATION_RULES, {}, check_evaluation, inert_evaluation),
}


@dataclass(frozen=True, slots=True)
class Resolved:
    """A config, the keys the user set, and what the user should know about them."""

    config: Any
    user_set: Mapping[str, str]
    """Key -> the value as written."""
    warnings: tuple[str, ...]


@overload
def load(config_name: Literal["ppo_trainer"], overrides: Sequence[str]) -> PPOConfig: ...
@overload
def load(config_name: Literal["sft_trainer"], overrides: Sequence[str]) -> SFTConfig: ...
@overload
def load(config_name: Literal["generation"], overrides: Sequence[str]) -> GenerationConfig: ...
@overload
def load(config_name: Literal["evaluation"], overrides: Sequence[str]) -> EvaluationConfig: ...
def load(config_name: str, overrides: Sequence[str]) -> AnyConfig:
    """The config of `config_name` with dotted `overrides`; its warnings go to the log, one line each.

    Raises ValueError on any user mistake.
    """
    resolved = resolve(config_name, overrides)
    for warning in resolved.warnings:
        _LOG.warning("%s", warning)
    config: AnyConfig = resolved.config
    return config


def resolve(config_name: str, overrides: Sequence[str]) -> Resolved:
    """As `load`, with the warnings returned. Raises ValueError."""
    schema = schema_of(config_name)
    rewritten = rewrite(
        parse(overrides), keys=dict(leaves(schema.root)), free=free_keys(schema.root), rules=schema.rules
    )
    values = _compose(config_name, rewritten)
    notes = [*rewritten.warnings, *_old_values(values, schema.values)]
    config: Any = build(schema.root, values)
    problems = schema.check(config)
    if problems:
        raise ValueError("\n".join(problems))
    user_set = {key: override.text for key, override in rewritten.overrides.items()}
    return Resolved(config, user_set, tuple(notes + schema.inert(config, user_set)))


def schema_of(config_name: str) -> Schema:
    """Raises ValueError naming the configs there are."""
    if config_name not in SCHEMAS:
        raise ValueError(f"there is no config {config_name!r}; choose one of {', '.join(SCHEMAS)}")
    return SCHEMAS[config_name]


def _compose(config_name: str, rewritten: Rewritten) -> dict[str, Any]:
    """hydra's result as plain values, interpolations resolved."""
    lines = [override.for_hydra for override in rewritten.overrides.values()]
    try:
        with initialize_config_dir(version_base=None, config_dir=str(CONFIG_DIR)):
            composed = compose(config_name, overrides=lines)
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"{config_name} with {lines}: {str(error).strip()}") from error
    assert isinstance(values, dict), f"{config_name}.yaml holds a {type(values).__name__}, not a mapping"
    return {str(key): value for key, value in values.items()}


def _old_values(values: dict[str, Any], rules: Mapping[str, Mapping[Any, Rule]]) -> list[str]:
    """Replace old values in place; returns warnings, raises ValueError for refused ones."""
    notes: list[str] = []
    problems: list[str] = []
    for key in rules:
        *path, name = key.split(".")
        node: Any = values
        for part in path:
            node = node[part]
        rule = legacy.find_value_rule(key, node[name], rules)
        if rule is None:
            continue
        if rule.level is Level.ERROR:
            problems.append(f"{key}={node[name]}: {rule.reason}")
        elif rule.level is Level.WARN:
            notes.append(f"{key}={node[name]} has no effect: {rule.reason}")
        else:
            assert rule.target is not None, f"the rule of {key}={node[name]} is an alias without a target"
            node[name] = None if rule.target == "null" else rule.target
    if problems:
        raise ValueError("\n".join(problems))
    return notes


def to_dict(config: AnyConfig) -> dict[str, Any]:
    """Plain nested mappings and lists, secrets masked: what trackers and files may show."""
    values = mask_secrets(dataclasses.asdict(config))
    assert isinstance(values, dict)
    return values


def to_yaml(config: AnyConfig) -> str:
    """The resolved config as yaml in the file's order, secrets masked."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120)
