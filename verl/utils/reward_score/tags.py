"""Reading an answer: `<think>..</think><class>LABEL</class>`, for some tasks then `<extension>..</extension>`.

Two rules, chosen by `AnswerFormat`:
- loose, the published one (TimeMaster, `reward_score/ctu.py`): a legal label inside a `<class>` tag, first match wins;
- strict, the paper's (arXiv 2506.13705): every tag once, in order, not empty, only white space outside.

Invariants
- A label that is returned is one of the task's own labels, as the task spells it.
- Outer blanks of a label do not matter, nor does its letter case unless asked for; nothing else is forgiven.
- Strict well-formed implies that every tag occurs once, whatever its letter case.
- An end-of-turn token left at the end of the text changes nothing.
- Time is linear in the length of the text, also for hostile ones.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# ASCII: without it IGNORECASE lets a long s (U+017F) pass for the s of the tag.
_CLASS = re.compile(r"<class>([^<]*)</class>", re.IGNORECASE | re.ASCII)
_END_TOKENS = ("<|im_end|>", "<|endoftext|>")


class AnswerFormat(enum.Enum):
    """Which answers count as well formed."""

    LOOSE = "loose"
    """A legal label stands in a `<class>` tag; everything else is ignored."""
    STRICT = "strict"
    """All tags of the task once, in order, not empty, and nothing around them."""


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """What was read from one answer.

    Example: `ParsedAnswer(well_formed=True, label="Desktop", think="flat at night", extension=None)`
    """

    well_formed: bool
    """The chosen rule holds. Under the strict rule this says nothing about the label's legality."""
    label: str | None
    """The label as the task spells it; None when the answer could not be read."""
    think: str | None
    extension: str | None
    fault: str | None = None
    """Why it is not well formed."""


def label_table(
    labels: Sequence[str], synonyms: Mapping[str, str] | None = None, *, case: bool = False
) -> dict[str, str]:
    """Folded label or synonym -> label, in order. `case`: letter case matters.

    Raises ValueError when there are no labels, two cannot be told apart, one is empty or holds a `<`, or a synonym
    stands for no label.
    """
    table: dict[str, str] = {}
    for label in labels:
        _add_label(table, label, label, case)
    for synonym, label in (synonyms or {}).items():
        if label not in labels:
            raise ValueError(f"synonym {synonym!r} stands for {label!r}, which is no label: {', '.join(labels)}")
        _add_label(table, synonym, label, case)
    if not table:
        raise ValueError("a task needs at least one label")
    return table


def _add_label(table: dict[str, str], text: str, label: str, case: bool) -> None:
    key = fold(text, case=case)
    if not key or "<" in text:
        raise ValueError(f"label {text!r} is empty or holds a '<', so no answer could state it: rename it")
    if key in table:
        differ = "blanks" if case else "case or blanks"
        raise ValueError(f"labels {table[key]!r} and {text!r} differ only in {differ}: rename one")
    table[key] = label


def fold(label: str, *, case: bool = False) -> str:
    """The form in which labels are compared: no outer blanks and, unless `case` matters, no case."""
    return label.strip() if case else label.strip().casefold()


def parse_answer(
    text: str, table: Mapping[str, str], rule: AnswerFormat, *, extension: bool = False, case: bool = False
) -> ParsedAnswer:
    """Read one decoded answer (`skip_special_tokens=True`).

    `table` comes from `label_table`, with the same `case`; `extension`: the task asks for an `<extension>`.
    """
    text = _without_end_tokens(text)
    if rule is AnswerFormat.STRICT:
        return _parse_strict(text, table, extension, case)
    found = (table.get(fold(match[1], case=case)) for match in _CLASS.finditer(text))
    label = next((known for known in found if known is not None), None)
    fault = None if label is not None else "no legal label in a <class> tag"
    return ParsedAnswer(label is not None, label, _first_body(text, "think"), _first_body(text, "extension"), fault)


def _parse_strict(text: str, table: Mapping[str, str], extension: bool, case: bool) -> ParsedAnswer:
    bodies: list[str] = []
    lowered = text.lower()
    rest = text.strip()
    for tag in ("think", "class", *(("extension",) if extension else ())):
        opening, closing = f"<{tag}>", f"</{tag}>"
        body, closed, after = rest.removeprefix(opening).partition(closing)
        counts = lowered.count(opening), lowered.count(closing)
        if counts != (1, 1):
            return _malformed(f"{counts[0]} {opening} and {counts[1]} {closing}, expected one each")
        if not rest.startswith(opening) or not closed:
            return _malformed(f"{opening} is out of order, or text stands before it")
        if not body.strip():
            return _malformed(f"{opening} is empty")
        bodies.append(body.strip())
        rest = after.strip()
    if rest:
        return _malformed(f"text after the last tag: {rest[:20]!r}")
    return ParsedAnswer(True, table.get(fold(bodies[1], case=case)), bodies[0], bodies[2] if extension else None)


def _malformed(fault: str) -> ParsedAnswer:
    return ParsedAnswer(False, None, None, None, fault)


def _first_body(text: str, tag: str) -> str | None:
    _, opened, after = text.partition(f"<{tag}>")
    body, closed, _ = after.partition(f"</{tag}>")
    return (body.strip() or None) if opened and closed else None


def _without_end_tokens(text: str) -> str:
    """Callers skip special tokens when decoding; stored responses of other programs may still end with one."""
    end = len(text)
    while end > 0:
        if text[end - 1].isspace():
            end -= 1
        elif text.endswith(_END_TOKENS, 0, end):
            end = text.rindex("<|", 0, end)
        else:
            break
    return text[:end]
