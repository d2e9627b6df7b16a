"""Supervised answers written by a model: any OpenAI-compatible server that sees the same prompt as the policy.

    python3 -m verl.timeseries.written --data data/ctu_image --output data/ctu_image_written \
        base_url=http://127.0.0.1:8000/v1 model=my-model api_key_env=null

Reads sft_fit.parquet and sft_val.parquet of a data folder and writes both anew, beside the folder's other tables. The
further arguments are options of the judge's client (`JudgeConfig`): server, key, time limits, rates, budget.
docs/sft.md says when this is worth it.

Invariants
- An answer is kept only when the strict format holds and its class is the row's: the server is never told the class.
- With several attempts guesses are kept too. So the first replies are compared with always naming the largest class,
  and a warning is printed, and kept in the card, when they are not better.
- A row without a kept answer keeps its measured one (`--rest measured`) or is left out (`--rest drop`); the column
  `response_by` says which it is.
- Every reply, kept or not, is in the cache file before it is used: a run that was broken off asks nothing twice.
- A failed request is never cached; when some fail in the end, nothing is written and the error says how many.
- A server that is not there is asked a few times, not once for every row.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tenacity
import yaml

from verl.timeseries.card import TABLES
from verl.timeseries.first_replies import Look, compare, warnings
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
CARD = "written_card.json"
LINKED = (*(f"{name}.parquet" for name in TABLES if name not in FILES), "data_card.json")
"""What the output shares with the data folder, so that it is one that every script takes."""
OWN_ENTRIES = frozenset({*(f"{name}.parquet" for name in FILES), *LINKED, CARD})
DEFAULTS = {
    "temperature": 0.7,
    "max_answer_tokens": 1024,
    "timeout_s": 300.0,
    "attempt_timeout_s": 120.0,
    "give_up_after": 3,
}
"""Where a writer needs other values than a judge."""
_AGAIN = (FailureKind.RATE_LIMITED, FailureKind.SERVER_ERROR, FailureKind.TIMEOUT, FailureKind.REFUSED_CONNECTION)
_NOT_THERE = (FailureKind.REFUSED_CONNECTION, FailureKind.AUTH, FailureKind.REJECTED)
"""What a wrong address, key or model name gives."""
_NOT_THERE_AFTER = 3
"""So many of them before any reply, and the server is not asked again; later it has the client's retries."""
_EVERY = 20
"""Rows between two lines of progress."""
_IMAGE_TOKENS = 1500
"""What one picture is expected to cost, before the server says."""


@dataclass(frozen=True)
class Outcome:
    """What became of one row: the kept answer, or None after that many replies that did not do; and the first one."""

    answer: str | None
    replies: int
    first: Look


class Writer:
    """Asks one server within the limits of its config. Lives in one event loop.

    `attempts`: replies that are looked at for one row before it is given up. `rows`: how many there are, for progress.
    """

    def __init__(self, config: JudgeConfig, *, attempts: int, rows: int) -> None:
        self.config, self.attempts, self.rows = config, attempts, rows
        self.requests = 0
        self._done, self._kept, self._failed = 0, 0, 0
        self._replied, self._refusals = False, 0
        self._not_there: JudgeError | None = None
        self._client = ChatClient(config)
        self._store = JudgeStore(config.cache_path, config.run_name)
        self._limiter = RateLimiter(config.max_rpm, config.max_tpm)
        self._breaker = Breaker(config.give_up_after, config.timeout_s)
        self._slots = asyncio.Semaphore(config.max_concurrent)

    async def write(self, row: Mapping[str, Any]) -> Outcome:
        """The first strict answer with the right class. Raises JudgeError when the server cannot be asked."""
        async with self._slots:
            try:
                outcome = await self._write(row)
            except JudgeError:
                self._failed += 1
                raise
            finally:
                self._done += 1
                if self._done % _EVERY == 0 and self._not_there is None:
                    print(f"{self._done} of {self.rows} rows: {self.said()}", flush=True)
        return outcome

    async def _write(self, row: Mapping[str, Any]) -> Outcome:
        messages = chat_messages(row)
        first: Look | None = None
        for attempt in range(self.attempts):
            reply = await self._reply(messages, attempt)
            found = look_at(reply, row)
            first = first or found
            if found.kept:
                self._kept += 1
                return Outcome(reply.strip(), attempt + 1, first)
        assert first is not None, f"{self.attempts} attempts"
        return Outcome(None, self.attempts, first)

    def said(self) -> str:
        """Counts so far, in words."""
        failed = f", {self._failed} failed" if self._failed else ""
        return f"{self._kept} kept{failed}, {self.requests} requests"

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
            retry=tenacity.retry_if_exception(self._is_worth_another),
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

    def _is_worth_another(self, error: BaseException) -> bool:
        return isinstance(error, JudgeError) and error.kind in _AGAIN and self._not_there is None

    async def _request(self, messages: list[dict[str, Any]]) -> str:
        config = self.config
        if self._not_there is not None:
            raise self._not_there
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
            self._note(error)
            raise
        self._replied = True
        if reply.tokens is not None:
            grant.tokens = reply.tokens
            self._store.settle(expected, reply.tokens)
        return reply.text

    def _note(self, error: JudgeError) -> None:
        """Requests under way end by themselves; those that wait are not sent once the server counts as not there."""
        self._refusals = self._refusals + 1 if error.kind in _NOT_THERE else 0
        if not self._replied and self._refusals >= _NOT_THERE_AFTER:
            self._not_there = error

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


def look_at(reply: str, row: Mapping[str, Any]) -> Look:
    """Strict format? Right class? Raises ValueError when the row's data source has no classes."""
    declare_from_row(row["data_source"], row["extra_info"])
    truth = row["reward_model"]["ground_truth"]
    found = get_scorer(row["data_source"], AnswerFormat.STRICT).read(reply)
    # A reply in another format still shows whether the model sees the class.
    named = found if found.well_formed else get_scorer(row["data_source"], AnswerFormat.LOOSE).read(reply)
    return Look(truth, right=named.label == truth, strict=found.well_formed)


async def write_rows(rows: Sequence[Mapping[str, Any]], config: JudgeConfig, *, attempts: int) -> list[Outcome]:
    """One outcome a row, in order. Raises ValueError, after all rows were tried, when requests failed."""
    writer = Writer(config, attempts=attempts, rows=len(rows))
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
            f"{len(failed)} of {len(rows)} rows could not be written after {writer.requests} requests "
            f"({failed[0].kind.value}: {failed[0]}); run the same command again: replies that came are in the cache"
        )
    print(f"all {len(rows)} rows: {writer.said()}", flush=True)
    return [outcome for outcome in found if isinstance(outcome, Outcome)]


def write_folder(data: Path, output: Path, config: JudgeConfig, *, attempts: int, rest: str) -> dict[str, Any]:
    """Write a whole data folder and the card, which is returned. Raises ValueError; then `output` is as it was."""
    _check_output(data, output)
    config = replace(config, cache_path=config.cache_path or str(output.parent / f".{output.name}.replies.sqlite"))
    card: dict[str, Any] = {"data": data.name, "model": config.model, "attempts": attempts, "rest": rest, "rows": {}}
    outcomes: list[Outcome] = []
    with replacing(output, own=OWN_ENTRIES) as folder:
        for name in FILES:
            found, classes, written = _write_file(data / f"{name}.parquet", folder, config, attempts, rest)
            kept, replies = sum(o.answer is not None for o in found), sum(o.replies for o in found)
            card["rows"][name] = {"asked": len(found), "kept": kept, "replies": replies, "written": written}
            outcomes += found
        for name in LINKED:
            if (data / name).is_file():
                _link(data / name, folder / name)
        card["first_replies"] = compare([outcome.first for outcome in outcomes], classes)
        card["warnings"] = warnings(card["first_replies"], attempts)
        (folder / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return card


def _check_output(data: Path, output: Path) -> None:
    if output.resolve() == data.resolve():
        raise ValueError(f"--output {output} is the data folder itself: name another, such as {data}_written")
    if output.is_dir() and any(output.iterdir()) and not (output / CARD).is_file():
        raise ValueError(f"--output {output}: holds no {CARD}, so this program did not write it: name another folder")
    if (output / CARD).is_file():
        card = json.loads((output / CARD).read_text(encoding="utf-8"))
        if card["data"] != data.name:
            raise ValueError(
                f"--output {output}: holds the written answers of {card['data']}, not of {data.name}: "
                "name another folder, or delete it"
            )


def _write_file(
    path: Path, folder: Path, config: JudgeConfig, attempts: int, rest: str
) -> tuple[list[Outcome], int, int]:
    """Outcomes of the file's rows, number of classes, rows written to the file of the same name in `folder`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise ValueError(f"{path}: no such file; run the data step (python3 -m verl.timeseries.build) first")
    table = pq.read_table(path)
    rows = table.to_pylist()
    if not rows:
        raise ValueError(f"{path}: holds no row; run the data step with more rows")
    print(f"{path}: {len(rows)} rows, up to {attempts} replies each", flush=True)
    outcomes = asyncio.run(write_rows(rows, config, attempts=attempts))
    kept = [o.answer is not None for o in outcomes]
    answers = [o.answer or row["response"] for o, row in zip(outcomes, rows, strict=True)]
    place = table.column_names.index("response")
    table = table.set_column(place, "response", pa.array(answers, pa.string()))
    table = table.append_column("response_by", pa.array(["model" if k else "measured" for k in kept]))
    if rest == "drop":
        table = table.filter(pa.array(kept))
    if not table.num_rows:
        raise ValueError(f"{path.stem}: no answer of {config.model} was strict and right, so no row is left")
    pq.write_table(table, folder / path.name, row_group_size=100, compression="snappy")
    classes = get_scorer(rows[0]["data_source"], AnswerFormat.STRICT).classes
    return outcomes, len(classes), table.num_rows


def _link(source: Path, target: Path) -> None:
    """No second copy where the disk allows it: the data step replaces files and never writes into them."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


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
    first = card["first_replies"]
    print(
        f"first replies: {first['accuracy']:.3f} right, majority {first['majority']:.3f}, chance {first['chance']:.3f}"
    )
    for warning in card["warnings"]:
        print(f"warning: {warning}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
