"""One HTTP request to a chat server, and what its failure means. Nothing here retries.

Run with openai 3.54. The library is imported, and the key read, at the first request.

Invariants
- A reply is text and token counts; every failure is a JudgeError of one kind.
- The key is in the Authorization header and nowhere else: in no message, log line or attribute of ours.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from verl.utils.reward_score.judge.config import JudgeConfig
from verl.utils.reward_score.judge.errors import JudgeError
from verl.utils.reward_score.returns import FailureKind

if TYPE_CHECKING:
    import openai


@dataclass(frozen=True, slots=True)
class Reply:
    """What the server said. `tokens` is prompt + reply, None when the server does not tell."""

    text: str
    tokens: int | None


class ChatClient:
    """Asks one server. Bound to the event loop of its first request."""

    def __init__(self, config: JudgeConfig) -> None:
        self._config = config
        self._client: openai.AsyncOpenAI | None = None

    def open(self) -> None:
        """Import the library and read the key, once; takes about a second. Raises JudgeError (auth) without a key."""
        if self._client is None:
            import openai

            key = self._read_key()
            client = openai.AsyncOpenAI(
                api_key=key, base_url=self._config.base_url, max_retries=0, timeout=self._config.attempt_timeout_s
            )
            _ = client.chat.completions.with_raw_response  # imported on first use
            self._client = client

    async def ask(self, messages: Sequence[Mapping[str, Any]], response_format: Mapping[str, Any] | None) -> Reply:
        """One request, within `attempt_timeout_s`. Raises JudgeError."""
        self.open()
        import openai

        client = self._client
        assert client is not None

        config = self._config
        optional: dict[str, Any] = {} if config.temperature is None else {"temperature": config.temperature}
        if response_format is not None:
            optional["response_format"] = response_format
        try:
            # The library's own limit is per read: a server that drips would never reach it.
            async with asyncio.timeout(config.attempt_timeout_s):
                response = await client.chat.completions.with_raw_response.create(
                    model=config.model,
                    messages=list(messages),  # type: ignore[arg-type]
                    max_completion_tokens=config.max_answer_tokens,
                    **optional,
                )
                body = response.text
        except (TimeoutError, openai.APITimeoutError):
            raise JudgeError(
                FailureKind.TIMEOUT, f"no reply from {config.base_url} in {config.attempt_timeout_s:g} s"
            ) from None
        except openai.APIStatusError as error:
            raise self._status_error(error) from None
        except openai.APIError as error:
            cause = type(error.__cause__).__name__ if error.__cause__ else type(error).__name__
            raise JudgeError(
                FailureKind.REFUSED_CONNECTION,
                f"{config.base_url} cannot be reached ({cause}): check judge.base_url and that the server runs",
            ) from None
        return _read_reply(body)

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.close()

    def _read_key(self) -> str:
        name = self._config.api_key_env
        if name is None:
            return "none"
        key = os.environ.get(name, "").strip()
        if not key:
            raise JudgeError(
                FailureKind.AUTH,
                f"the environment variable {name} (judge.api_key_env) is not set on {socket.gethostname()}: export the "
                "judge's key there, before `ray start` if RAY_ADDRESS names the cluster, or set judge.api_key_env=null "
                "for a server without keys",
            )
        if not (key.isascii() and key.isprintable()):
            raise JudgeError(
                FailureKind.AUTH,
                f"the key in {name} on {socket.gethostname()} holds characters that no key has: export it again",
            )
        return key

    def _status_error(self, error: openai.APIStatusError) -> JudgeError:
        status, url, name = error.status_code, self._config.base_url, self._config.api_key_env
        wait = _retry_after_s(error.response.headers)
        if status in (401, 403):
            key = "the missing key (judge.api_key_env is null)" if name is None else f"the key in {name}"
            return JudgeError(FailureKind.AUTH, f"{url} refused {key} (HTTP {status})", status=status)
        if status == 429 and error.code == "insufficient_quota":
            return JudgeError(FailureKind.BUDGET, f"{url}: the quota of the account is used up", status=status)
        if status == 429:
            return JudgeError(FailureKind.RATE_LIMITED, f"{url} answered 429", status=status, retry_after_s=wait)
        if status >= 500 or status in (408, 409):
            kind = FailureKind.SERVER_ERROR
            return JudgeError(kind, f"{url} answered {status}", status=status, retry_after_s=wait)
        said = self._without_key(str(error.message))[:300]
        return JudgeError(FailureKind.REJECTED, f"{url} refused the request ({status}): {said}", status=status)

    def _without_key(self, text: str) -> str:
        key = os.environ.get(self._config.api_key_env or "", "").strip()
        return text.replace(key, "***") if key else text


def _read_reply(body: str) -> Reply:
    """The text of the first choice. Raises JudgeError (malformed)."""
    try:
        found = json.loads(body)
        choice = found["choices"][0]
        text = choice["message"]["content"]
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        raise JudgeError(FailureKind.MALFORMED, "the judge's server sent no chat completion") from None
    if choice.get("finish_reason") == "length":
        raise JudgeError(
            FailureKind.MALFORMED, "the judge's reply was cut by its token limit: raise judge.max_answer_tokens"
        )
    if not isinstance(text, str):
        raise JudgeError(FailureKind.MALFORMED, "the judge's reply holds no text (a refusal?)")
    usage = found.get("usage")
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    known = isinstance(tokens, int) and not isinstance(tokens, bool) and tokens >= 0
    return Reply(text, tokens if known else None)


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds from `retry-after-ms` or `retry-after` (a number or an http date); None when absent or not readable."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * unit
        except (KeyError, ValueError):
            continue
        return seconds if math.isfinite(seconds) and seconds >= 0 else None
    try:
        at = email.utils.parsedate_to_datetime(headers["retry-after"])
        return max(0.0, at.timestamp() - time.time())
    except (KeyError, ValueError, TypeError, OverflowError):
        return None
