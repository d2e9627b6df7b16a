"""From a plain mapping to the typed dataclasses, and back to key names and help texts.

Invariants
- The key set of the mapping equals the fields: a missing or extra key is an error.
- No value is converted except int -> float, and one string -> a tuple of strings. A bool is no int.
- All wrong values are reported at once, each with its key, value and expected type.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Literal, TypeVar, Union

Node = TypeVar("Node")


@cache
def hints(node: type) -> dict[str, Any]:
    """Field name -> resolved annotation."""
    resolved = typing.get_type_hints(node)
    return {field.name: resolved[field.name] for field in dataclasses.fields(node)}


def leaves(node: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and annotation of every value in the tree."""
    for name, hint in hints(node).items():
        key = f"{prefix}{name}"
        if dataclasses.is_dataclass(hint):
            yield from leaves(typing.cast(type, hint), f"{key}.")
        else:
            yield key, hint


@cache
def field_docs(node: type) -> dict[str, str]:
    """Field name -> the text under it, inherited fields included."""
    docs: dict[str, str] = {}
    for cls in reversed(node.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
        for statement, below in zip(body, [*body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                docs[statement.target.id] = _constant(below)
    return docs


def _constant(statement: ast.stmt | None) -> str:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return " ".join(str(statement.value.value).split())
    return ""


def docs(node: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and help of every value in the tree."""
    for name, hint in hints(node).items():
        if dataclasses.is_dataclass(hint):
            yield from docs(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field_docs(node)[name]


def describe(hint: Any) -> str:
    """A type in the words of an error message."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(str(a) for a in args) if len(args) < 3 else f"one of {', '.join(map(str, args))}"
    if origin in (Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if origin is tuple:
        if args[-1] is Ellipsis:
            return f"a list, each {describe(args[0])}"
        return f"a list of {len(args)} numbers"
    if _is_mapping(origin):
        return "a mapping"
    names = {int: "a whole number", float: "a finite number", bool: "True or False", str: "text", type(None): "null"}
    return names.get(hint, str(hint))


class _Mismatch(Exception):
    """The value does not fit the annotation."""


def convert(value: Any, hint: Any) -> Any:
    """`value` as the annotated type. Raises `_Mismatch`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if any(value == a and type(value) is type(a) for a in args):
            return value
    elif origin in (Union, types.UnionType):
        for arg in args if value != "None" or type(None) not in args else ():
            try:
                return convert(value, arg)
            except _Mismatch:
                continue
    elif origin is tuple:
        return _to_tuple(value, args)
    elif _is_mapping(origin):
        if isinstance(value, Mapping):
            return dict(value)
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif type(value) is hint:
        return value
    raise _Mismatch


def _to_tuple(value: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    several = args[-1] is Ellipsis
    if several and isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple) or (not several and len(value) != len(args)):
        raise _Mismatch
    kinds = [args[0]] * len(value) if several else list(args)
    return tuple(convert(v, kind) for v, kind in zip(value, kinds, strict=True))


def build(node: type[Node], values: Mapping[str, Any]) -> Node:
    """The typed tree. Raises ValueError listing every key that is missing, extra or of the wrong type."""
    problems: list[str] = []
    result = _build(node, values, "", problems)
    if problems:
        raise ValueError("\n".join(problems))
    return typing.cast(Node, result)


def _build(node: type, values: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    expected = hints(node)
    problems += [f"{prefix}{name}: no such key" for name in values if name not in expected]
    fields: dict[str, Any] = {}
    for name, hint in expected.items():
        key = f"{prefix}{name}"
        if name not in values:
            problems.append(f"{key}: missing (expected {describe(hint)})")
        elif dataclasses.is_dataclass(hint):
            if isinstance(values[name], Mapping):
                fields[name] = _build(typing.cast(type, hint), values[name], f"{key}.", problems)
            else:
                problems.append(f"{key}={values[name]!r}: expected a section with keys below it")
        else:
            try:
                fields[name] = convert(values[name], hint)
            except _Mismatch:
                problems.append(_wrong_type(key, values[name], hint))
    return None if problems else node(**fields)


def _wrong_type(key: str, value: Any, hint: Any) -> str:
    shown = value if isinstance(value, str) else repr(value)
    message = f"{key}={shown} ({type(value).__name__}): expected {describe(hint)}"
    if value == "None" and type(None) in typing.get_args(hint):
        message += "; write null"
    choices = _choices(hint)
    wrong = [str(v) for v in (value if isinstance(value, list) else [value]) if str(v) not in choices]
    close = difflib.get_close_matches(wrong[0], choices, n=1) if wrong else []
    return message + (f"; did you mean {close[0]}?" if close else "")


def _choices(hint: Any) -> list[str]:
    """The words of all closed sets in the annotation."""
    if typing.get_origin(hint) is Literal:
        return [str(choice) for choice in typing.get_args(hint)]
    return [word for arg in typing.get_args(hint) for word in _choices(arg)]


def flatten(values: Mapping[str, Any], stop: frozenset[str], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> dotted keys; mappings at the keys in `stop` stay whole."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in stop:
            flat |= flatten(value, stop, f"{key}.")
        else:
            flat[key] = value
    return flat


def free_keys(node: type) -> frozenset[str]:
    """Keys whose value is a mapping with names of the user's choice."""
    return frozenset(key for key, hint in leaves(node) if _is_mapping(typing.get_origin(hint)))


def _is_mapping(origin: Any) -> bool:
    return inspect.isclass(origin) and issubclass(origin, Mapping)
