"""A small HTTP server that speaks OpenAI's chat completions over loopback, and misbehaves on demand."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

KEYS = ("specificity", "appropriateness", "relevance", "depth")


@dataclass(frozen=True)
class Seen:
    """One request as it arrived."""

    index: int
    at: float
    """time.monotonic() of the arrival."""
    headers: Mapping[str, str]
    raw: bytes

    @property
    def body(self) -> dict[str, Any]:
        return json.loads(self.raw)

    @property
    def has_schema(self) -> bool:
        return "response_format" in self.body


@dataclass(frozen=True)
class Plan:
    """What the server does with a request."""

    body: str = ""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    hang: bool = False
    drip_s: float | None = None
    """Seconds between single bytes of the body."""
    drop: bool = False
    """Close the connection without a word."""


def completion(content: Any, *, finish_reason: str = "stop", tokens: int = 100) -> str:
    """A chat completion's body."""
    return json.dumps(
        {
            "id": "c",
            "object": "chat.completion",
            "created": 1,
            "model": "stub",
            "choices": [
                {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": content}}
            ],
            "usage": {"prompt_tokens": tokens - 10, "completion_tokens": 10, "total_tokens": tokens},
        }
    )


def verdict(value: float = 0.6, **other: float) -> str:
    """A good verdict, as the text of a reply."""
    return json.dumps(dict.fromkeys(KEYS, value) | other)


def good(value: float = 0.6, delay_s: float = 0.0) -> Plan:
    return Plan(completion(verdict(value)), delay_s=delay_s)


def error(status: int, message: str = "no", code: str | None = None, **headers: str) -> Plan:
    body = json.dumps({"error": {"message": message, "type": "t", "code": code}})
    return Plan(body, status, {name.replace("_", "-"): value for name, value in headers.items()})


class JudgeServer:
    """Serves `plan(seen)` for every request, in a thread of its own, on a port of its own."""

    def __init__(self) -> None:
        self.plan: Callable[[Seen], Plan] = lambda _: good()
        self.seen: list[Seen] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> JudgeServer:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=512), self._loop
        ).result()
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    async def _stop(self) -> None:
        self._server.close()
        connections = asyncio.all_tasks() - {asyncio.current_task()}
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            # Cancelled when the server stops; asyncio would print a task that ends so.
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        assert head[0].startswith("POST /v1/chat/completions "), head[0]
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        raw = await reader.readexactly(int(headers["content-length"]))
        seen = Seen(len(self.seen), time.monotonic(), headers, raw)
        self.seen.append(seen)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._reply(self.plan(seen), reader, writer)
        finally:
            self.in_flight -= 1

    async def _reply(self, plan: Plan, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if plan.drop:
            return False
        if plan.hang:
            await reader.read(1)
            return False
        await asyncio.sleep(plan.delay_s)
        body = plan.body.encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **plan.headers}
        lines = [f"HTTP/1.1 {plan.status} X", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        writer.write("\r\n".join(lines).encode())
        if plan.drip_s is None:
            writer.write(body)
        else:
            for byte in body:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(plan.drip_s)
        await writer.drain()
        return True
