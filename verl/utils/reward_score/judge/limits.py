"""Limits on asking: requests and tokens a minute, and a breaker for a server that is down (no I/O).

Invariants
- In any window of `window_s` seconds at most `max_rpm` requests and `max_tpm` tokens are granted. One request that is
  larger than `max_tpm` is granted alone.
- Grants come in the order of asking.
- While the server asked for a pause nobody is granted anything.
- An open breaker lets nothing through; after its pause one failure opens it again.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from verl.utils.reward_score.judge.errors import JudgeError
from verl.utils.reward_score.returns import FailureKind

Clock = Callable[[], float]


@dataclass(slots=True)
class Grant:
    """One granted request; `tokens` may be corrected once the true number is known."""

    at: float
    tokens: int


class RateLimiter:
    """A sliding window over requests and tokens together.

    A leaky bucket (aiolimiter) lets up to twice its rate through in one window, and knows no joint limit, no later
    correction of the tokens, and no pause.
    """

    def __init__(
        self, max_rpm: int | None, max_tpm: int | None, *, window_s: float = 60.0, clock: Clock = time.monotonic
    ) -> None:
        self._max_rpm, self._max_tpm = max_rpm, max_tpm
        self._window_s, self._clock = window_s, clock
        self._log: deque[Grant] = deque()
        self._turn = asyncio.Lock()
        self._paused_until = 0.0

    def pause(self, seconds: float) -> None:
        """Grant nothing for so long: the server said so."""
        self._paused_until = max(self._paused_until, self._clock() + seconds)

    async def acquire(self, tokens: int, max_wait_s: float) -> Grant:
        """Wait for a grant. Raises JudgeError (rate_limited) when the server's pause is longer than `max_wait_s`."""
        async with self._turn:
            while (wait := self.wait_s(tokens)) > 0:
                if self._paused_until - self._clock() > max_wait_s:
                    raise JudgeError(FailureKind.RATE_LIMITED, f"the judge asks for a pause above {max_wait_s:g} s")
                await asyncio.sleep(wait)
            grant = Grant(self._clock(), tokens)
            if self._max_rpm is not None or self._max_tpm is not None:
                self._log.append(grant)
            return grant

    def wait_s(self, tokens: int) -> float:
        """Seconds until a request of that size could be granted; at most 0 when it can be now."""
        now = self._clock()
        while self._log and self._log[0].at + self._window_s <= now:
            self._log.popleft()
        free_at = self._paused_until
        if self._max_rpm is not None and len(self._log) >= self._max_rpm:
            free_at = max(free_at, self._log[-self._max_rpm].at + self._window_s)
        if self._max_tpm is not None:
            used = sum(grant.tokens for grant in self._log)
            for grant in self._log:
                if used + tokens <= self._max_tpm:
                    break
                used -= grant.tokens
                free_at = max(free_at, grant.at + self._window_s)
        return free_at - now


_DOWN = (
    FailureKind.TIMEOUT,
    FailureKind.SERVER_ERROR,
    FailureKind.REFUSED_CONNECTION,
    FailureKind.RATE_LIMITED,
)


class Breaker:
    """Stops asking a server that failed `threshold` answers in a row, for `pause_s` seconds."""

    def __init__(self, threshold: int, pause_s: float, *, clock: Clock = time.monotonic) -> None:
        self._threshold, self._pause_s, self._clock = threshold, pause_s, clock
        self._failures = 0
        self._open_until = 0.0
        self._kind = FailureKind.OTHER

    def check(self) -> None:
        """Raises JudgeError of the last failure's kind while open."""
        if self._clock() < self._open_until:
            raise JudgeError(
                self._kind,
                f"{self._threshold} answers in a row failed like this; the judge is not asked for {self._pause_s:g} s",
            )

    def record(self, kind: FailureKind | None) -> None:
        """Count the outcome of an answer that was asked for; None: a verdict."""
        if kind not in _DOWN:
            self._failures = 0
            return
        self._failures += 1
        if self._failures >= self._threshold:
            self._kind = kind
            self._open_until = self._clock() + self._pause_s
            self._failures = self._threshold - 1
