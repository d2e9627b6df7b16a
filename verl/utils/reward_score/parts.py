"""A reward as a list of named parts: what a task file or `reward.parts` declares (pure, no scoring).

Invariants
- Names are unique; a condition names an earlier part of the same reward.
- Overrides change the named parts and keep the order; new parts come last, in the order given, or `before` another.
- The published reward is `0.1 * format + 0.9 * label`.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class PartKind(enum.Enum):
    """What a part measures."""

    FORMAT = "format"
    """1 when the answer is well formed. Option: rule (loose or strict)."""
    LABEL = "label"
    """1 when the class is right. Options: rule, synonyms (further spelling -> label), case (letter case matters)."""
    SOFT = "soft"
    """A judge's verdict on the `<extension>`, from 0 to 1. Option: rubric."""
    LENGTH = "length"
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), from -1 to 0. Options: max_tokens, buffer."""
    CUSTOM = "custom"
    """The number that a function returns. Options: path, function, reward_kwargs."""


_OPTIONS = {
    PartKind.FORMAT: ("rule",),
    PartKind.LABEL: ("rule", "synonyms", "case"),
    PartKind.SOFT: ("rubric",),
    PartKind.LENGTH: ("max_tokens", "buffer"),
    PartKind.CUSTOM: ("path", "function", "reward_kwargs"),
}
_COMMON = ("kind", "weight", "when", "before")


@dataclass(frozen=True, kw_only=True)
class RewardPart:
    """One part. Example: `RewardPart(name="soft", kind=PartKind.SOFT, weight=0.5, when=("label", "format"))`.

    Raises ValueError for an unknown option or a weight that is not finite.
    """

    name: str
    kind: PartKind
    weight: float = 1.0
    when: tuple[str, ...] = ()
    """Names of earlier parts that must be 1; otherwise this part is left out, and costs nothing."""
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        where = f"reward.parts.{self.name}"
        if isinstance(self.weight, bool) or not isinstance(self.weight, int | float) or not math.isfinite(self.weight):
            raise ValueError(f"{where}.weight={self.weight!r}: give a finite number")
        known = (*_COMMON, *_OPTIONS[self.kind])
        for option in self.options:
            if option not in _OPTIONS[self.kind]:
                near = difflib.get_close_matches(str(option), known, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(f"unknown key {where}.{option}: {hint}known for {self.kind.value}: {', '.join(known)}")


PUBLISHED = (
    RewardPart(name="format", kind=PartKind.FORMAT, weight=0.1),
    RewardPart(name="label", kind=PartKind.LABEL, weight=0.9),
)
"""TimeMaster's released reward."""


def merge_parts(declared: Sequence[RewardPart], overrides: Mapping[str, Any]) -> tuple[RewardPart, ...]:
    """The declared parts with `overrides` (name -> settings, or None to drop the part).

    A new part needs `kind`, unless its name is one; `before` moves a part in front of the one it names. Raises
    ValueError naming the key of anything that cannot be.
    """
    merged: dict[str, RewardPart] = {part.name: part for part in declared}
    for name, settings in overrides.items():
        if settings is None:
            if merged.pop(name, None) is None:
                raise ValueError(f"reward.parts.{name}=null: there is no such part; parts: {', '.join(merged)}")
            continue
        if not isinstance(settings, Mapping):
            raise ValueError(f"reward.parts.{name}={settings!r}: give settings such as reward.parts.{name}.weight=0.5")
        merged[name] = _changed(merged.get(name), str(name), settings)
        if settings.get("before") is not None:
            merged = _moved(merged, name, settings["before"])
    check_parts(tuple(merged.values()))
    return tuple(merged.values())


def kind_of(name: str, settings: Any) -> Any:
    """The kind that settings of a new part name: their own, or the part's name."""
    return settings.get("kind", name) if isinstance(settings, Mapping) else None


def _moved(parts: Mapping[str, RewardPart], name: str, before: Any) -> dict[str, RewardPart]:
    others = [other for other in parts if other != name]
    if before not in others:
        raise ValueError(f"reward.parts.{name}.before={before}: there is no such part; parts: {', '.join(others)}")
    at = others.index(before)
    return {other: parts[other] for other in (*others[:at], name, *others[at:])}


def _changed(part: RewardPart | None, name: str, settings: Mapping[str, Any]) -> RewardPart:
    options = {key: value for key, value in settings.items() if key not in _COMMON}
    common: dict[str, Any] = {key: settings[key] for key in ("weight",) if key in settings}
    if "when" in settings:
        when = settings["when"]
        names = [when] if isinstance(when, str) else [] if when is None else when
        if not isinstance(names, Sequence) or not all(isinstance(other, str) for other in names):
            raise ValueError(f"reward.parts.{name}.when={when!r}: give the name of a part, or a list of names")
        common["when"] = tuple(names)
    if part is not None:
        if settings.get("kind", part.kind.value) != part.kind.value:
            raise ValueError(f"reward.parts.{name}.kind={settings['kind']}: the task declares it as {part.kind.value}")
        return dataclasses.replace(part, options={**part.options, **options}, **common)
    kind = kind_of(name, settings)
    kinds = [known.value for known in PartKind]
    if kind not in kinds:
        raise ValueError(f"reward.parts.{name}.kind={kind!r}: use one of {', '.join(kinds)}")
    return RewardPart(name=name, kind=PartKind(kind), options=options, **common)


def check_parts(parts: Sequence[RewardPart]) -> None:
    """Raises ValueError when there is no part, a name repeats, or a condition names no earlier part."""
    seen: list[str] = []
    for part in parts:
        if part.name in seen or part.name == "total":
            raise ValueError(f"reward.parts.{part.name}: the name is taken")
        for name in part.when:
            if name not in seen:
                raise ValueError(
                    f"reward.parts.{part.name}.when={name}: no earlier part has this name ({', '.join(seen) or 'none'})"
                )
        seen.append(part.name)
    if not parts:
        raise ValueError("reward.parts: a reward needs at least one part")
