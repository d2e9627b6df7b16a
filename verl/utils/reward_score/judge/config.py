"""Settings of a judge: which server, how long, how much."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeConfig:
    """An OpenAI-compatible chat server and the limits under which it is asked.

    The time one answer can take is at most `2 x queue_timeout_s + timeout_s`, whatever the server does.
    Raises ValueError naming the key for a value that is not legal.
    Example: `JudgeConfig(base_url="http://127.0.0.1:8000/v1", model="my-model", api_key_env=None)`
    """

    base_url: str = "https://api.openai.com/v1"
    model: str = "gpt-4o"
    """The published judge."""
    api_key_env: str | None = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key; None: the server asks for none."""
    temperature: float | None = 0.0
    """None leaves it to the server, for models that refuse the parameter."""
    structured_output: bool = True
    """Ask for a json schema, until the server refuses it; False: never. The reply is read strictly in both cases."""
    max_answer_tokens: int = 256
    """Limit of one verdict, in tokens."""
    max_chars: int = 8000
    """Longer fields are cut to this many characters before the judge sees them; the judge is told."""

    timeout_s: float = 60.0
    """One answer: all attempts and the waits between them, in seconds; waiting for the rates does not count."""
    attempt_timeout_s: float = 30.0
    """One HTTP request, in seconds."""
    queue_timeout_s: float = 600.0
    """Waiting for one of `max_concurrent` slots, and then, over all attempts together, for room under `max_rpm` and
    `max_tpm`, in seconds."""
    max_retries: int = 4
    """Further requests for one answer after the first."""
    backoff_s: float = 1.0
    """Upper end of the first random wait between attempts, in seconds; doubles each time, up to 30."""
    give_up_after: int = 32
    """After so many answers in a row without a working server, answers fail at once for `timeout_s` seconds."""

    max_concurrent: int = 32
    """Requests in flight."""
    max_rpm: int | None = None
    """Requests in any 60 s; None: no limit."""
    max_tpm: int | None = None
    """Tokens in any 60 s, prompt and reply; None: no limit."""

    max_calls: int | None = None
    """Requests the run may spend, retries included; None: no limit."""
    max_total_tokens: int | None = None
    """Tokens the run may spend, prompt and reply; None: no limit. A request under way counts at its upper bound."""
    cache_path: str | None = None
    """sqlite file, on a local disk, of verdicts and spending; None: in memory, forgotten with the process."""
    run_name: str = "default"
    """Whose spending is counted; a resumed run keeps the name, a new name starts at 0."""

    def __post_init__(self) -> None:
        _check_url(self.base_url)
        # The value is not shown: it may be the key itself, pasted into the wrong place.
        if self.api_key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            raise ValueError("judge.api_key_env is no name of an environment variable: export the key, give its name")
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            whole = name not in _SECONDS and name != "temperature"
            legal = isinstance(value, int) if whole else isinstance(value, int | float) and math.isfinite(value)
            if isinstance(value, bool) or not legal or value < least:
                kind = "a whole number" if whole else "a number"
                raise ValueError(f"judge.{name}={value!r}: give {kind} of at least {least:g}")
        if not isinstance(self.structured_output, bool):
            raise ValueError(f"judge.structured_output={self.structured_output!r}: give True or False")
        for name in ("model", "run_name"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"judge.{name}={getattr(self, name)!r}: give a name")

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> JudgeConfig:
        """From a yaml node. Raises ValueError for an unknown key, with the nearest known one."""
        names = [field.name for field in dataclasses.fields(cls)]
        for key in options:
            if key not in names:
                near = difflib.get_close_matches(str(key), names, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(f"unknown judge option {key!r}: {hint}known: {', '.join(names)}")
        return cls(**dict(options))


_SECONDS = ("timeout_s", "attempt_timeout_s", "queue_timeout_s", "backoff_s")
_OPTIONAL = ("temperature", "max_rpm", "max_tpm", "max_calls", "max_total_tokens")
_AT_LEAST: dict[str, float] = {
    "temperature": 0,
    "max_answer_tokens": 1,
    "max_chars": 1,
    "timeout_s": 0.001,
    "attempt_timeout_s": 0.001,
    "queue_timeout_s": 0.001,
    "max_retries": 0,
    "backoff_s": 0,
    "give_up_after": 1,
    "max_concurrent": 1,
    "max_rpm": 1,
    "max_tpm": 1,
    "max_calls": 0,
    "max_total_tokens": 0,
}


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        legal = parts.scheme in ("http", "https") and bool(parts.hostname)
    except (ValueError, AttributeError, TypeError):
        legal = False
    if not legal:
        raise ValueError(f"judge.base_url={url!r}: give an http or https address such as http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query:
        raise ValueError("judge.base_url holds a user, a password or a query: keys come from api_key_env only")
