"""Masking of secrets in anything that is written to a file, a terminal or a tracker."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
_SECRET_NAME = re.compile(
    r"(api|access|private)_?key(?!_env$)|secret|passw|token$|credential|authorization", re.IGNORECASE
)
_SECRET_TEXT = re.compile(r"\b(sk-[\w-]{16,}|hf_\w{16,}|gh[pousr]_\w{16,}|AKIA\w{12,})")
_URL_PASSWORD = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
_SHORTEST = 8  # a shorter value of the environment would also mask ordinary words


def _environment_secrets() -> list[str]:
    found = {v for k, v in os.environ.items() if _SECRET_NAME.search(k) and len(v) >= _SHORTEST and not v.isdigit()}
    return sorted(found, key=len, reverse=True)


def mask_text(text: str) -> str:
    """`text` without keys in a known form, passwords in addresses, and values of secret environment variables."""
    for secret in _environment_secrets():
        text = text.replace(secret, MASK)
    return _URL_PASSWORD.sub(MASK, _SECRET_TEXT.sub(MASK, text))


def mask_secrets(value: Any, name: str = "") -> Any:
    """A copy of nested mappings and lists; a text under a secret's name is masked whole. Tuples become lists."""
    if isinstance(value, Mapping):
        return {key: mask_secrets(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [mask_secrets(inner, name) for inner in value]
    if isinstance(value, str):
        return MASK if value and _SECRET_NAME.search(name) else mask_text(value)
    return value
