"""An LLM judge: one answer in, one `Verdict` out, or a JudgeError that says why not.

One `LLMJudge` lives in one event loop and holds all limits; other tasks, threads or processes call it
(`verl.utils.reward_score.judge.shared`).

Invariants
- A failure is an exception of a kind, never a number, and is never cached.
- A call ends within `2 x queue_timeout_s + timeout_s`, whatever the server does: it queues for a slot, and before each
  request for the rates, which stops the clock of `timeout_s`.
- The breaker hears of requests that were sent, never of our own queues and limits.
- Spending never passes its limit while a server bills at most one token a character.
- An answer costs at most 2 x (`max_retries` + 1) requests (twice only while it is not yet known whether the server
  takes a json schema), and none when its verdict is known or being asked for.
- A refused key, an empty account or a wrong model name ends the asking: later calls fail at once with the same message.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import tenacity

from verl.utils.reward_score.judge.client import ChatClient, Reply
from verl.utils.reward_score.judge.config import JudgeConfig
from verl.utils.reward_score.judge.errors import JudgeError
from verl.utils.reward_score.judge.limits import Breaker, Grant, RateLimiter
from verl.utils.reward_score.judge.rubric import JudgeRequest, build_messages, cache_key, response_format, shown_text
from verl.utils.reward_score.judge.store import JudgeStore
from verl.utils.reward_score.judge.verdict import parse_verdict
from verl.utils.reward_score.returns import FailureKind

logger = logging.getLogger(__name__)

_AGAIN = (
    FailureKind.RATE_LIMITED,
    FailureKind.SERVER_ERROR,
    FailureKind.TIMEOUT,
    FailureKind.REFUSED_CONNECTION,
)
_AGAIN_ONCE = (FailureKind.MALFORMED, FailureKind.OUT_OF_RANGE)
_UNBILLED = (
    FailureKind.RATE_LIMITED,
    FailureKind.SERVER_ERROR,
    FailureKind.REFUSED_CONNECTION,
    FailureKind.AUTH,
    FailureKind.BUDGET,
    FailureKind.REJECTED,
)
_LONGEST_BACKOFF_S = 30.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Example: `Verdict({"depth": 0.6, "relevance": 0.8}, score=0.4, capped=True)`."""

    criteria: Mapping[str, float]
    """Each in [0, 1]."""
    score: float
    """Mean of the criteria, at most the rubric's cap where a stock phrase occurs."""
    capped: bool


class Judge(Protocol):
    """What a reward function needs of a judge, wherever it runs."""

    async def judge(self, request: JudgeRequest) -> Verdict:
        """Raises JudgeError when there is no verdict."""


@dataclass(slots=True)
class _Ask:
    """One answer on its way: its messages are made anew for every request, with a new delimiter."""

    request: JudgeRequest
    shown: str
    clock: asyncio.Timeout
    """Of `timeout_s`."""
    queue_left_s: float
    """How much longer it may wait for the rates, over all its requests."""
    was_sent: bool = False
    outcome: FailureKind | None = None
    """Of the last request that was sent; None: it was answered."""

    def left_s(self) -> float:
        """Seconds until the clock runs out."""
        when = self.clock.when()
        assert when is not None, "the clock is stopped"
        return when - asyncio.get_running_loop().time()


class LLMJudge:
    """Asks an OpenAI-compatible server under the limits of its config.

    `window_s` is the minute of the rate limits. Raises ValueError when the cache file cannot be used.
    """

    def __init__(self, config: JudgeConfig, *, window_s: float = 60.0) -> None:
        self.config = config
        self._store = JudgeStore(config.cache_path, config.run_name)
        self._client = ChatClient(config)
        self._slots = asyncio.Semaphore(config.max_concurrent)
        self._limiter = RateLimiter(config.max_rpm, config.max_tpm, window_s=window_s)
        self._breaker = Breaker(config.give_up_after, config.timeout_s)
        self._flights: dict[str, asyncio.Task[dict[str, float] | JudgeError]] = {}
        self._counts: Counter[str] = Counter()
        self._final: JudgeError | None = None
        self._takes_schema: bool | None = None if config.structured_output else False
        self._worked = False

    def open(self) -> None:
        """Import the client's library and read the key. Raises JudgeError (auth) for a missing or broken key."""
        self._client.open()

    async def judge(self, request: JudgeRequest) -> Verdict:
        """The verdict, from the cache where it is known. Raises JudgeError."""
        shown = shown_text(request, self.config.max_chars)
        config = self.config
        key = cache_key(
            request.rubric,
            shown,
            model=config.model,
            temperature=config.temperature,
            max_answer_tokens=config.max_answer_tokens,
        )
        criteria = self._cached(key, request.rubric.keys)
        if criteria is None:
            criteria = await self._fly(key, request, shown)
        score, capped = request.rubric.score(criteria, request.fields)
        return Verdict(criteria, score, capped)

    def metrics(self) -> dict[str, float]:
        """`judge/...`: answers from cache, shared and asked for, requests, failures by kind, and what the run spent."""
        spent = self._store.spent()
        counts = {f"judge/{name}": float(value) for name, value in self._counts.items()}
        return counts | {"judge/spent/calls": float(spent.calls), "judge/spent/tokens": float(spent.tokens)}

    async def close(self) -> None:
        """Cancel what is under way and close connections and file."""
        for flight in list(self._flights.values()):
            flight.cancel()
        await asyncio.gather(*self._flights.values(), return_exceptions=True)
        await self._client.close()
        self._store.close()

    def _cached(self, key: str, keys: tuple[str, ...]) -> dict[str, float] | None:
        stored = self._store.get(key)
        if stored is None:
            return None
        self._counts["cached"] += 1
        return parse_verdict(stored, keys)

    async def _fly(self, key: str, request: JudgeRequest, shown: str) -> dict[str, float]:
        """Ask once for all callers that want the same verdict now; a caller that gives up ends it for nobody else."""
        flight = self._flights.get(key)
        if flight is None:
            flight = asyncio.create_task(self._answer(key, request, shown))
            self._flights[key] = flight
            flight.add_done_callback(lambda _: self._flights.pop(key, None))
        else:
            self._counts["shared"] += 1
        found = await asyncio.shield(flight)
        if isinstance(found, JudgeError):
            raise JudgeError(found.kind, str(found), status=found.status)
        return found

    async def _answer(self, key: str, request: JudgeRequest, shown: str) -> dict[str, float] | JudgeError:
        try:
            criteria = await self._queue_and_ask(request, shown)
        except JudgeError as error:
            if not self._counts[f"failed/{error.kind.value}"]:
                logger.warning("judge: %s: %s (later failures of this kind are only counted)", error.kind.value, error)
            self._counts[f"failed/{error.kind.value}"] += 1
            return error
        self._store.put(key, json.dumps(criteria), self.config.model)
        self._counts["asked"] += 1
        return criteria

    async def _queue_and_ask(self, request: JudgeRequest, shown: str) -> dict[str, float]:
        self._check_open()
        try:
            # Before any grant, so that no time passes between a grant and its request.
            self._client.open()
        except JudgeError as error:
            self._final = error
            raise
        limit = self.config.queue_timeout_s
        try:
            async with asyncio.timeout(limit):
                await self._slots.acquire()
        except TimeoutError:
            raise JudgeError(FailureKind.TIMEOUT, f"no free slot in {limit:g} s (judge.max_concurrent)") from None
        try:
            self._check_open()
            return await self._ask_in_time(request, shown)
        finally:
            self._slots.release()

    async def _ask_in_time(self, request: JudgeRequest, shown: str) -> dict[str, float]:
        limit, clock = self.config.timeout_s, asyncio.timeout(self.config.timeout_s)
        ask = _Ask(request, shown, clock, self.config.queue_timeout_s)
        try:
            async with clock:
                criteria = await self._ask_with_retries(ask)
        except TimeoutError:
            raise JudgeError(FailureKind.TIMEOUT, f"no verdict in {limit:g} s (judge.timeout_s)") from None
        except JudgeError as error:
            if self._is_final(error):
                self._final = error
            raise
        finally:
            if ask.was_sent:
                self._breaker.record(ask.outcome)
        self._worked = True
        return criteria

    async def _ask_with_retries(self, ask: _Ask) -> dict[str, float]:
        config = self.config
        backoff = tenacity.wait_random_exponential(multiplier=config.backoff_s, max=_LONGEST_BACKOFF_S)

        def wait_s(state: tenacity.RetryCallState) -> float:
            asked = getattr(state.outcome.exception() if state.outcome else None, "retry_after_s", None)
            return backoff(state) + (asked or 0.0)

        def again(state: tenacity.RetryCallState) -> bool:
            error = state.outcome.exception() if state.outcome else None
            if not isinstance(error, JudgeError):
                return False
            return error.kind in _AGAIN or (error.kind in _AGAIN_ONCE and state.attempt_number == 1)

        def is_last(state: tenacity.RetryCallState) -> bool:
            return state.attempt_number > config.max_retries or state.upcoming_sleep >= ask.left_s()

        retrying = tenacity.AsyncRetrying(
            retry=again,
            wait=wait_s,
            stop=is_last,
            reraise=True,
        )
        return await retrying(self._attempt, ask)

    async def _attempt(self, ask: _Ask) -> dict[str, float]:
        keys = ask.request.rubric.keys
        if self._takes_schema is False:
            return parse_verdict((await self._request(ask, None)).text, keys)
        try:
            reply = await self._request(ask, response_format(ask.request.rubric))
        except JudgeError as error:
            if self._takes_schema or error.status not in (400, 422):
                raise
            # If the request is refused without the schema too, the schema was not the reason.
            reply = await self._request(ask, None)
            if self._takes_schema is None:
                logger.warning("judge: %s takes no json schema; its replies are read strictly", self.config.base_url)
            self._takes_schema = False
        else:
            self._takes_schema = True
        return parse_verdict(reply.text, keys)

    async def _request(self, ask: _Ask, schema: Mapping[str, Any] | None) -> Reply:
        config = self.config
        messages = build_messages(ask.request.rubric, ask.shown)
        sent = json.dumps([messages, schema])
        # Escaped, no character is more than one token to a byte-level tokenizer, and the JSON around the texts is
        # longer than what a chat template adds.
        most = len(sent) + config.max_answer_tokens
        # The rates take what is to be expected: a minute that turns out too full costs a wait, not money.
        grant = await self._grant(ask, len(sent) // 3 + config.max_answer_tokens)
        if not self._store.reserve(most, max_calls=config.max_calls, max_tokens=config.max_total_tokens):
            raise self._over_budget()
        self._counts["requests"] += 1
        # What stays if the clock runs out meanwhile.
        ask.was_sent, ask.outcome = True, FailureKind.TIMEOUT
        try:
            reply = await self._client.ask(messages, schema)
        except JudgeError as error:
            ask.outcome = error.kind
            if error.kind in _UNBILLED:
                self._store.settle(most, 0)
            if error.retry_after_s is not None:
                self._limiter.pause(error.retry_after_s)
            raise
        ask.outcome = None
        if reply.tokens is not None:
            grant.tokens = reply.tokens
            self._store.settle(most, reply.tokens)
        return reply

    async def _grant(self, ask: _Ask, tokens: int) -> Grant:
        """Wait for the rates with the answer's clock stopped. Raises JudgeError."""
        loop = asyncio.get_running_loop()
        begin, left_s = loop.time(), ask.left_s()
        ask.clock.reschedule(None)
        try:
            async with asyncio.timeout(ask.queue_left_s):
                grant = await self._limiter.acquire(tokens, ask.queue_left_s)
        except TimeoutError:
            message = f"judge.max_rpm and max_tpm left no room in {self.config.queue_timeout_s:g} s"
            raise JudgeError(FailureKind.RATE_LIMITED, message) from None
        finally:
            ask.queue_left_s -= loop.time() - begin
            ask.clock.reschedule(loop.time() + left_s)
        self._check_open()
        return grant

    def _check_open(self) -> None:
        """Raises JudgeError when asking is pointless: a final error, a server that is down, nothing left to spend."""
        if self._final is not None:
            raise JudgeError(self._final.kind, str(self._final), status=self._final.status)
        self._breaker.check()
        config, spent = self.config, self._store.spent()
        calls_left = config.max_calls is None or spent.calls < config.max_calls
        tokens_left = config.max_total_tokens is None or spent.tokens < config.max_total_tokens
        if not (calls_left and tokens_left):
            raise self._over_budget()

    def _over_budget(self) -> JudgeError:
        config = self.config
        return JudgeError(
            FailureKind.BUDGET,
            f"the run {config.run_name!r} may spend max_calls={config.max_calls} and max_total_tokens="
            f"{config.max_total_tokens}, and has: raise judge.max_calls or judge.max_total_tokens",
        )

    def _is_final(self, error: JudgeError) -> bool:
        """403 and 404 may be about one answer (moderation, routing), but not before anything has worked."""
        if error.kind is FailureKind.AUTH:
            return error.status != 403 or not self._worked
        if error.kind is FailureKind.BUDGET:
            return error.status == 429
        return error.status == 404 and not self._worked
