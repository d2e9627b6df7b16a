"""One adapter: any reward function, any return value -> `verl.protocol.Score`.

Call shapes: keywords `data_source, solution_str, ground_truth, extra_info` (those that the function names) plus its
`reward_kwargs`, sync or async; or the fork's `compute_score(predict_str, ground_truth)`.

Invariants
- The signature is read once, at start; a function that cannot be called is refused there, naming its parameters.
- None, NaN, infinity, an exception or a time-out is a failed score, never a number.
- A failed score's reason starts with its `FailureKind`.
- A plain call that was late because another one of its process kept the interpreter fails as STARVED, not TIMEOUT.
- One call's failure touches no other call; its traceback is logged once per place and type. A `ScoringError` has
  no traceback to show: its kind and message are the reason.
- The caller's `extra_info` cannot be changed by the function.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import enum
import inspect
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from verl.protocol import Score
from verl.utils.reward_score.returns import FailureKind, ScoringError, failed, is_fork_tuple, to_score

logger = logging.getLogger(__name__)

_STANDARD = ("data_source", "solution_str", "ground_truth", "extra_info")
_TEXT = ("solution_str", "predict_str")
_PLURAL = {"solution_strs", "data_sources", "ground_truths"}
_BUSY_SHARE = 0.05
"""Of a call's limit: the processor time by which another call can be the cause of its lateness. Small, as on a busy
machine the whole process gets little of its core; a call that waits uses next to nothing."""


class CallMode(enum.Enum):
    """How a function runs."""

    SYNC = "sync"
    """A plain function: called where the caller is, or in a thread when it has a time limit."""
    ASYNC = "async"
    """A coroutine function: many calls wait at once."""


@dataclass(frozen=True, slots=True)
class CallPlan:
    """What the one look at a signature found: the standard arguments to pass by keyword, and the mode."""

    arguments: tuple[str, ...]
    mode: CallMode


def inspect_function(function: Callable[..., Any], reward_kwargs: Mapping[str, Any], name: str) -> CallPlan:
    """Decide how to call a reward function.

    Raises ValueError, naming the parameters found, when there is none for the answer's text, when one is required that
    nobody fills, or when a key of `reward_kwargs` is not accepted or is a standard argument.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise ValueError(f"reward function {name}: its signature cannot be read ({error}); wrap it in a def") from error
    found = f"found ({', '.join(map(str, parameters.values()))})"
    plural = sorted(_PLURAL & set(parameters))
    if plural:
        raise ValueError(f"reward function {name} scores a whole batch ({plural}): write it for one answer; {found}")
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    passed = _standard_arguments(named, takes_any)
    if not set(passed) & set(_TEXT):
        raise ValueError(f"reward function {name} has no parameter solution_str (or predict_str); {found}")
    taken = sorted(set(reward_kwargs) & {*_STANDARD, *_TEXT})
    if taken:
        raise ValueError(f"reward_kwargs of {name} hold {taken}, which the trainer fills itself: rename them")
    surplus = sorted(set(reward_kwargs) - named)
    if surplus and not takes_any:
        raise ValueError(f"reward_kwargs {surplus} are no parameters of reward function {name}; {found}")
    missing = _unfilled(parameters.values(), {*passed, *reward_kwargs})
    if missing:
        raise ValueError(
            f"reward function {name} requires {missing}, which nobody fills by keyword: "
            f"use {', '.join(_STANDARD)}, or pass them in reward_kwargs; {found}"
        )
    return CallPlan(passed, CallMode.ASYNC if _is_async(function) else CallMode.SYNC)


def _standard_arguments(named: set[str], takes_any: bool) -> tuple[str, ...]:
    """Of the standard arguments those that the function names; with `**kwargs` all of them."""
    if not takes_any:
        return tuple(a for a in (*_STANDARD, "predict_str") if a in named)
    text = "predict_str" if "predict_str" in named else "solution_str"
    return tuple(a for a in (*_STANDARD, "predict_str") if a in named or a not in _TEXT or a == text)


def _unfilled(parameters: Iterable[inspect.Parameter], filled: set[str]) -> list[str]:
    required = (p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
    return [p.name for p in required if p.kind is p.POSITIONAL_ONLY or p.name not in filled]


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


class RewardFunction:
    """A reward function behind one face.

    `timeout_s` limits one call: a coroutine is cancelled, a plain function is left to its (daemon) thread.
    `warn` takes what a person should read: tracebacks, and advice about a return value.
    `copy_extra=False` is for functions of our own, which leave `extra_info` alone.
    Raises ValueError as `inspect_function` does.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        reward_kwargs: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
        warn: Callable[[str], None] = logger.warning,
        copy_extra: bool = True,
    ) -> None:
        if timeout_s is not None and timeout_s <= 0:
            raise ValueError(f"the time limit of a reward call is {timeout_s} s: give a positive number or null")
        self.name = name or str(getattr(function, "__qualname__", repr(function)))
        self.timeout_s = timeout_s
        self._function = function
        self._kwargs = dict(reward_kwargs or {})
        self._plan = inspect_function(function, self._kwargs, self.name)
        self._warn, self._copy_extra = warn, copy_extra
        self._logged: set[object] = set()

    @property
    def is_async(self) -> bool:
        """The function is a coroutine function."""
        return self._plan.mode is CallMode.ASYNC

    @property
    def needs_loop(self) -> bool:
        """Calls must go through `score_async`: the function is a coroutine, or has a time limit."""
        return self._plan.mode is CallMode.ASYNC or self.timeout_s is not None

    def score(
        self,
        *,
        data_source: str,
        solution_str: str,
        ground_truth: str,
        extra_info: Mapping[str, Any] | None = None,
        classes: Sequence[str] | None = None,
    ) -> Score:
        """Call here and now.

        `solution_str` is decoded without special tokens; `classes` (in id order) turn predicted ids into labels.
        """
        assert not self.needs_loop, (
            f"{self.name} is {self._plan.mode.value} with limit {self.timeout_s}: use score_async"
        )
        try:
            value = self._function(**self._arguments(data_source, solution_str, ground_truth, extra_info))
        except (Exception, SystemExit) as error:
            return self._exception(error)
        return self._to_score(value, ground_truth, classes)

    async def score_async(
        self,
        *,
        data_source: str,
        solution_str: str,
        ground_truth: str,
        extra_info: Mapping[str, Any] | None = None,
        classes: Sequence[str] | None = None,
    ) -> Score:
        """As `score`, within the time limit, without blocking the event loop."""
        call: _PlainCall | None = None
        try:
            async with asyncio.timeout(self.timeout_s) as limit:
                arguments = self._arguments(data_source, solution_str, ground_truth, extra_info)
                if self._plan.mode is CallMode.ASYNC:
                    value = await self._function(**arguments)
                else:
                    call = _PlainCall(lambda: self._function(**arguments))
                    value = await call.result()
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return self._exception(error)
        except (Exception, SystemExit) as error:
            if isinstance(error, TimeoutError) and limit.expired() and self.timeout_s is not None:
                starved = call is not None and call.was_starved(_BUSY_SHARE * self.timeout_s)
                return failed(
                    FailureKind.STARVED if starved else FailureKind.TIMEOUT,
                    f"{self.name} took more than {self.timeout_s:g} s (reward.timeout)"
                    + (" beside a call that kept the interpreter" if starved else ""),
                )
            return self._exception(error)
        return self._to_score(value, ground_truth, classes)

    def _arguments(
        self, data_source: str, text: str, ground_truth: str, extra_info: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        known: dict[str, Any] = {
            "data_source": data_source,
            "ground_truth": ground_truth,
            "solution_str": text,
            "predict_str": text,
        }
        if "extra_info" in self._plan.arguments:
            extra = dict(extra_info or {})
            known["extra_info"] = copy.deepcopy(extra) if self._copy_extra else extra
        return {a: known[a] for a in self._plan.arguments} | self._kwargs

    def _to_score(self, value: Any, ground_truth: str, classes: Sequence[str] | None) -> Score:
        if inspect.iscoroutine(value):
            value.close()
            return failed(FailureKind.BAD_RETURN, f"{self.name} returned a coroutine: declare it with async def")
        if isinstance(value, tuple | list) and value and not is_fork_tuple(value):
            self._warn_once(
                (type(value), len(value)),
                f"reward function {self.name} returned a {type(value).__name__} of {len(value)}: "
                "the first entry is the reward, the rest is ignored (return a dict to log more)",
            )
        return to_score(value, ground_truth=ground_truth, classes=classes)

    def _exception(self, error: BaseException) -> Score:
        if isinstance(error, ScoringError):
            return failed(error.kind, str(error))
        frames = traceback.extract_tb(error.__traceback__)
        place = (frames[-1].filename, frames[-1].lineno) if frames else ("", 0)
        text = "".join(traceback.format_exception(error))
        self._warn_once(
            (type(error), *place), f"reward function {self.name} failed (logged once for this place):\n{text}"
        )
        return failed(FailureKind.EXCEPTION, f"{type(error).__name__}: {error}")

    def _warn_once(self, key: object, message: str) -> None:
        if key not in self._logged:
            self._logged.add(key)
            self._warn(message)


class _PlainCall:
    """A plain call in a thread of its own: a hung thread of an executor would keep the program from ending."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[Any] = self._loop.create_future()
        self._thread = threading.Thread(target=self._work, name="reward-call", daemon=True)
        self.is_left_behind = False
        self._clock: int | None = None
        self._spent: float | None = None

    async def result(self) -> Any:
        """What the call returns or raises. Cancelled, it leaves the thread behind."""
        _running.add(self)
        self._thread.start()
        try:
            return await self._future
        except asyncio.CancelledError:
            self.is_left_behind = True
            raise

    def was_starved(self, least_s: float) -> bool:
        """Whether another call still runs that used more processor time than this one, and more than `least_s` seconds.

        False where the system keeps no clock per thread.
        """
        most = max((call.spent() for call in tuple(_running) if call is not self), default=0.0)
        return most > max(self.spent(), least_s)

    def spent(self) -> float:
        """Seconds of processor time that the call has used."""
        if self._spent is None and self._clock is not None:
            # The clock of a thread that ended meanwhile is an error; its last word is in `_spent` by then.
            with contextlib.suppress(OSError):
                return time.clock_gettime(self._clock)
        return self._spent or 0.0

    def _work(self) -> None:
        if hasattr(time, "pthread_getcpuclockid"):
            self._clock = time.pthread_getcpuclockid(threading.get_ident())
        value, caught = None, None
        try:
            value = self._call()
        except BaseException as error:
            # A future refuses StopIteration, and a SystemExit would end the event loop.
            caught = error if isinstance(error, Exception) and not isinstance(error, StopIteration) else _wrapped(error)
        self._spent = time.thread_time()
        _running.discard(self)
        # A call that outlived its limit may end after the loop has closed.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._settle, value, caught)

    def _settle(self, value: Any, error: BaseException | None) -> None:
        if self._future.done():
            return
        if error is None:
            self._future.set_result(value)
        else:
            self._future.set_exception(error)


_running: set[_PlainCall] = set()


def calls_left_behind() -> int:
    """Plain calls of this process that outlived their time limit and still run."""
    return sum(call.is_left_behind for call in tuple(_running))


def _wrapped(error: BaseException) -> RuntimeError:
    wrapped = RuntimeError(f"{type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped.with_traceback(error.__traceback__)
