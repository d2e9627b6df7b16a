"""Supervised answers written by a model: any OpenAI-compatible server that sees the same prompt as the policy.

    python3 -m verl.timeseries.written --data data/ctu_image --output data/ctu_image_written \
        base_url=http://127.0.0.1:8000/v1 model=my-model api_key_env=null

Reads sft_fit.parquet and sft_val.parquet of a data folder and writes both anew. The further arguments are options of
the judge's client (`JudgeConfig`): server, key, time limits, rates, budget.

Invariants
- An answer is kept only when the strict format holds and its class is the row's: the server is never told the class.
- A row without a kept answer keeps its measured one (`--rest measured`) or is left out (`--rest drop`); the column
  `response_by` says which it is.
- Every reply, kept or not, is in the cache file before it is used: a run that was broken off asks nothing twice.
- A failed request is never cached; when some fail in the end, nothing is written and the error says how many.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tenacity
import yaml

from verl.timeseries.folder import replacing
from verl.timeseries.task import IMAGE
from verl.utils.reward_score import AnswerFormat, declare_from_row, get_scorer
from verl.utils.reward_score.judge.client import ChatClient
from verl.utils.reward_score.judge.config import JudgeConfig
from verl.utils.reward_score.judge.errors import JudgeError
from verl.utils.reward_score.judge.limits import Breaker, RateLimiter
from verl.utils.reward_score.judge.store import JudgeStore
from verl.utils.reward_score.returns import FailureKind

FILES = ("sft_fit", "sft_val")
OWN_ENTRIES = frozenset({*(f"{name}.parquet" for name in FILES), "written_card.json"})
DEFAULTS = {"temperature": 0.7, "max_answer_tokens": 1024, "timeout_s": 300.0, "attempt_timeout_s": 120.0}
"""Where a writer needs other values than a judge."""
_AGAIN = (FailureKind.RATE_LIMITED, FailureKind.SERVER_ERROR, FailureKind.TIMEOUT, FailureKind.REFUSED_CONNECTION)
_IMAGE_TOKENS = 1500
"""What one picture is expected to cost, before the server says."""


@dataclass(frozen=True)
class Outcome:
    """What became of one row: the kept answer, or None after that many replies that did not do."""

    answer: str | None
    replies: int


class Writer:
    """Asks one server within the limits of its config. Lives in one event loop.

    `attempts`: replies that are looked at for one row before it is given up.
    """

    def __init__(self, config: JudgeConfig, *, attempts: int) -> None:
        self.config, self.attempts = config, attempts
        self.requests = 0
        self._client = ChatClient(config)
        self._store = JudgeStore(config.cache_path, config.run_name)
        self._limiter = RateLimiter(config.max_rpm, config.max_tpm)
        self._breaker = Breaker(config.give_up_after, config.timeout_s)
        self._slots = asyncio.Semaphore(config.max_concurrent)

    async def write(self, row: Mapping[str, Any]) -> Outcome:
        """The first strict answer with the right class. Raises JudgeError when the server cannot be asked."""
        messages = chat_messages(row)
        async with self._slots:
            for attempt in range(self.attempts):
                reply = await self._reply(messages, attempt)
                if is_kept(reply, row):
                    return Outcome(reply.strip(), attempt + 1)
        return Outcome(None, self.attempts)

    async def _reply(self, messages: list[dict[str, Any]], attempt: int) -> str:
        config = self.config
        key = json.dumps([config.model, config.temperature, config.max_answer_tokens, attempt, messages])
        digest = hashlib.sha256(f"written {key}".encode()).hexdigest()
        stored = self._store.get(digest)
        if stored is None:
            try:
                stored = await self._ask(messages)
            except JudgeError as error:
                # No text, or one that was cut off: a reply that does not do, not a server that does not work.
                if error.kind is not FailureKind.MALFORMED:
                    raise
                stored = ""
            self._store.put(digest, stored, config.model)
        return stored

    async def _ask(self, messages: list[dict[str, Any]]) -> str:
        config = self.config
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(lambda e: isinstance(e, JudgeError) and e.kind in _AGAIN),
            wait=tenacity.wait_random_exponential(multiplier=config.backoff_s, max=30.0),
            stop=tenacity.stop_after_attempt(config.max_retries + 1),
            reraise=True,
        )
        self._breaker.check()
        try:
            text: str = await retrying(self._request, messages)
        except JudgeError as error:
            self._breaker.record(error.kind)
            raise
        self._breaker.record(None)
        return text

    async def _request(self, messages: list[dict[str, Any]]) -> str:
        config = self.config
        expected = _IMAGE_TOKENS + config.max_answer_tokens
        grant = await self._limiter.acquire(expected, config.timeout_s)
        if not self._store.reserve(expected, max_calls=config.max_calls, max_tokens=config.max_total_tokens):
            raise JudgeError(
                FailureKind.BUDGET,
                f"max_calls={config.max_calls} and max_total_tokens={config.max_total_tokens} are spent: raise them, "
                "or give another run_name; what was written so far is in the cache",
            )
        self.requests += 1
        try:
            reply = await self._client.ask(messages, None)
        except JudgeError as error:
            if error.retry_after_s is not None:
                self._limiter.pause(error.retry_after_s)
            raise
        if reply.tokens is not None:
            grant.tokens = reply.tokens
            self._store.settle(expected, reply.tokens)
        return reply.text

    async def close(self) -> None:
        await self._client.close()
        self._store.close()


def chat_messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The row's prompt as chat messages, its picture as a data URL in the place of `<image>`."""
    images = [image["bytes"] for image in row.get("images") or []]
    messages = []
    for turn in row["prompt"]:
        text: str = turn["content"]
        if IMAGE not in text:
            messages.append({"role": turn["role"], "content": text})
            continue
        url = f"data:image/png;base64,{base64.b64encode(images.pop(0)).decode()}"
        parts = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": text.replace(IMAGE, "", 1).strip()},
        ]
        messages.append({"role": turn["role"], "content": parts})
    return messages


def is_kept(reply: str, row: Mapping[str, Any]) -> bool:
    """Strict format, right class. Raises ValueError when the row's data source has no classes."""
    declare_from_row(row["data_source"], row["extra_info"])
    scorer = get_scorer(row["data_source"], AnswerFormat.STRICT)
    found = scorer.read(reply)
    return found.well_formed and found.label == row["reward_model"]["ground_truth"]


async def write_rows(rows: Sequence[Mapping[str, Any]], config: JudgeConfig, *, attempts: int) -> list[Outcome]:
    """One outcome a row, in order. Raises ValueError, after all rows were tried, when requests failed."""
    writer = Writer(config, attempts=attempts)
    try:
        found = await asyncio.gather(*(writer.write(row) for row in rows), return_exceptions=True)
    finally:
        await writer.close()
    failed = [error for error in found if isinstance(error, JudgeError)]
    others = [error for error in found if isinstance(error, BaseException) and not isinstance(error, JudgeError)]
    if others:
        raise others[0]
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(rows)} rows could not be written ({failed[0].kind.value}: {failed[0]}); run the "
            "same command again: replies that came are in the cache"
        )
    print(f"{writer.requests} requests, {sum(o.answer is not None for o in found if isinstance(o, Outcome))} kept")
    return [outcome for outcome in found if isinstance(outcome, Outcome)]


def write_folder(data: Path, output: Path, config: JudgeConfig, *, attempts: int, rest: str) -> dict[str, Any]:
    """Write both files and the card, which is returned. Raises ValueError; then `output` is as it was."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    config = replace(config, cache_path=config.cache_path or str(output.parent / f".{output.name}.replies.sqlite"))
    card: dict[str, Any] = {"data": data.name, "model": config.model, "attempts": attempts, "rest": rest, "rows": {}}
    with replacing(output, own=OWN_ENTRIES) as folder:
        for name in FILES:
            path = data / f"{name}.parquet"
            if not path.is_file():
                raise ValueError(f"{path}: no such file; run the data step (python3 -m verl.timeseries.build) first")
            table = pq.read_table(path)
            rows = table.to_pylist()
            outcomes = asyncio.run(write_rows(rows, config, attempts=attempts))
            kept = [o.answer is not None for o in outcomes]
            answers = [o.answer or row["response"] for o, row in zip(outcomes, rows, strict=True)]
            place = table.column_names.index("response")
            table = table.set_column(place, "response", pa.array(answers, pa.string()))
            table = table.append_column("response_by", pa.array(["model" if k else "measured" for k in kept]))
            if rest == "drop":
                table = table.filter(pa.array(kept))
            if not table.num_rows:
                raise ValueError(f"{name}: no answer of {config.model} was strict and right, so no row is left")
            pq.write_table(table, folder / path.name, row_group_size=100, compression="snappy")
            replies = sum(o.replies for o in outcomes)
            card["rows"][name] = {"asked": len(rows), "kept": sum(kept), "replies": replies, "written": table.num_rows}
        (folder / "written_card.json").write_text(json.dumps(card, indent=2) + "\n")
    return card


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 for a mistake of the user or a server that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder that the data step wrote")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--attempts", type=int, default=4, help="replies that are looked at for one row")
    parser.add_argument("--rest", choices=("measured", "drop"), default="measured", help="rows without a kept answer")
    parser.add_argument("options", nargs="*", metavar="key=value", help="options of the client, such as model=NAME")
    args = parser.parse_args(arguments)
    try:
        if args.attempts < 1:
            raise ValueError(f"--attempts {args.attempts}: at least 1")
        pairs = [option.partition("=") for option in args.options]
        if wrong := [key for key, equals, _ in pairs if not equals]:
            raise ValueError(f"argument {wrong[0]!r} is not key=value")
        options = {**DEFAULTS, **{key: yaml.safe_load(value) for key, _, value in pairs}}
        config = JudgeConfig.from_mapping(options)
        card = write_folder(args.data, args.output, config, attempts=args.attempts, rest=args.rest)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, counts in card["rows"].items():
        print(f"{args.output}/{name}.parquet: {counts['kept']} of {counts['asked']} answers are the model's")
    return 0


if __name__ == "__main__":
    sys.exit(main())
