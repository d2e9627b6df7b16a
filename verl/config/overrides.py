"""Command-line overrides: parse, rewrite old names, refuse unknown ones.

Invariants
- After `rewrite` every key is one of ours (or below a mapping with free names); hydra sees nothing else.
- The last override of a name wins; an old and a new name of one key with different values are an error.
- A warning speaks of a value the user wrote, and each old name is warned about once.
- All problems are reported at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Union, get_args, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override as HydraOverride
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException

from verl.config.legacy import Level, Rule, find_rule, is_neutral, warn


@dataclass(frozen=True, slots=True)
class Override:
    """One `key=value` of the user. Example: `Override("data.seed", 7, "7", "data.seed")`."""

    key: str
    value: Any
    """Parsed."""
    text: str
    """The value as hydra reads it."""
    written: str
    """The key the user wrote, before any alias."""

    @property
    def for_hydra(self) -> str:
        """`++` adds or replaces, so that a leading `+` of old scripts does not matter."""
        return f"++{self.key}={self.text}"


@dataclass(frozen=True, slots=True)
class Rewritten:
    """Overrides that hydra may see, by key, and what to tell the user."""

    overrides: Mapping[str, Override]
    warnings: tuple[str, ...]


def parse(overrides: Iterable[str]) -> list[Override]:
    """Raises ValueError listing all overrides that are not `key=value`."""
    parser = OverridesParser.create()
    parsed: list[Override] = []
    problems: list[str] = []
    for text in overrides:
        try:
            parsed += _parse_one(text, parser)
        except (ValueError, HydraException) as error:
            problems.append(f"cannot read the override {text!r}: {str(error).splitlines()[0]}")
    if problems:
        raise ValueError("\n".join(problems))
    return parsed


def _parse_one(text: str, parser: OverridesParser) -> list[Override]:
    if "=" not in text and not text.startswith("~"):
        raise ValueError("expected key=value")
    override = parser.parse_override(text)
    if override.is_delete():
        raise ValueError("a key cannot be deleted; set it to null")
    if override.is_sweep_override():
        raise ValueError("one run takes one value; a list is written [a,b], and text with a comma needs quotes")
    key = override.key_or_group
    if override.package is not None or "/" in key:
        raise ValueError("there are no config groups; write a dotted key")
    value = override.value()
    if isinstance(value, dict) and value:
        return list(_flatten(key, value, override))
    return [Override(key, _plain(value), text.partition("=")[2] or "''", key)]


def _flatten(key: str, value: Mapping[Any, Any], override: HydraOverride) -> Iterable[Override]:
    for name, inner in value.items():
        path = f"{key}.{name.text if isinstance(name, QuotedString) else name}"
        if isinstance(inner, dict) and inner:
            yield from _flatten(path, inner, override)
        else:
            text = dataclasses.replace(override, _value=inner).get_value_element_as_str()
            yield Override(path, _plain(inner), text, path)


def _plain(value: Any) -> Any:
    if isinstance(value, QuotedString):
        return value.text
    return [_plain(v) for v in value] if isinstance(value, list) else value


def rewrite(
    overrides: Sequence[Override], *, keys: Mapping[str, Any], free: frozenset[str], rules: Mapping[str, Rule]
) -> Rewritten:
    """Apply the table `rules`; `keys` maps our keys to their types, `free` are those with names of the user's choice.

    Raises ValueError listing every unknown, refused or contradictory key.
    """
    done: dict[str, Override] = {}
    warnings: dict[str, str] = {}
    problems: list[str] = []
    # The last of equal names first decides, so that a value overridden later in the line is never judged.
    last = {o.written: o for o in overrides}
    for override in sorted(last.values(), key=overrides.index):
        try:
            final = _resolve(override, keys, free, _switched(override, rules, last), warnings)
        except ValueError as error:
            problems.append(str(error))
            continue
        if final is None:
            continue
        other = done.pop(final.key, None)
        if other is not None and other.value != final.value:
            problems.append(
                f"{other.written}={other.text} and {final.written}={final.text} set the same key, {final.key}; drop one"
            )
        done[final.key] = final
    if problems:
        raise ValueError("\n".join(problems))
    return Rewritten(done, tuple(warnings.values()))


def _switched(override: Override, rules: Mapping[str, Rule], written: Mapping[str, Override]) -> Mapping[str, Rule]:
    """The rules, but one that does nothing for a name whose switch is off."""
    found = find_rule(override.key, rules)
    if found is None or found[1].switch is None:
        return rules
    pattern, rule = found
    switch = written.get(str(rule.switch))
    if switch is None:
        return {**rules, pattern: warn(f"it needs {rule.switch}=True")}
    return rules if switch.value else {**rules, pattern: warn(f"{rule.switch}=False", override.value)}


def _resolve(
    override: Override,
    keys: Mapping[str, Any],
    free: frozenset[str],
    rules: Mapping[str, Rule],
    warnings: dict[str, str],
) -> Override | None:
    """The override under our own name, or None when nothing is left of it."""
    key = override.key
    if key in keys or any(key.startswith(f"{node}.") for node in free):
        return _as_text(override, keys.get(key))
    found = find_rule(key, rules)
    if found is None:
        raise ValueError(_unknown(key, keys))
    pattern, rule = found
    if is_neutral(override.value, rule):
        return None
    if rule.level is Level.ERROR:
        raise ValueError(f"{override.written}={override.text}: {rule.reason}")
    if rule.level is Level.WARN:
        warnings[override.written] = f"{override.written}={override.text} has no effect: {rule.reason}"
        return None
    assert rule.target is not None, f"the rule of {pattern} is an alias without a target"
    target = rule.target.replace("*", key.removeprefix(pattern.partition("*")[0]))
    text: str | None = override.text
    if not isinstance(override.value, list | dict):
        text = rule.values.get(override.value, override.text)
    if text is None:
        return None
    value = override.value if text == override.text else _plain(parse([f"x={text}"])[0].value)
    return _resolve(Override(target, value, text, override.written), keys, free, rules, warnings)


def _as_text(override: Override, hint: Any) -> Override:
    """A number given for a text key (an experiment named 7) is that text."""
    kinds = get_args(hint) if get_origin(hint) is Union or type(None) in get_args(hint) else (hint,)
    if str in kinds and isinstance(override.value, int | float) and not isinstance(override.value, bool):
        return dataclasses.replace(override, value=override.text, text=f"'{override.text}'")
    return override


def _unknown(key: str, keys: Iterable[str]) -> str:
    names = list(keys)
    below = sorted(k for k in names if k.startswith(f"{key}."))
    if below:
        return f"{key} is a section, not a value; set one of its keys, for example {below[0]}"
    close = nearest(key, names)
    return f"unknown key {key}" + (f"; did you mean {' or '.join(close)}?" if close else "")


def nearest(key: str, names: Iterable[str], count: int = 2) -> list[str]:
    """Up to `count` known names like `key`: the same ending first, then by likeness."""
    leaf = key.rpartition(".")[2]

    def likeness(name: str) -> float:
        other = name.rpartition(".")[2]
        whole = SequenceMatcher(None, key, name).ratio()
        last = SequenceMatcher(None, leaf, other).ratio()
        return 2.0 + whole if name.endswith(f".{key}") else (whole + last) / 2 + (0.2 if last == 1.0 else 0.0)

    scored = sorted(((likeness(name), name) for name in names), key=lambda pair: (-pair[0], pair[1]))
    best = scored[0][0] if scored else 0.0
    return [name for score, name in scored[:count] if score > 0.6 and score > best - 0.15]
