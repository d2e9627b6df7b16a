"""Sends finished answers on for scoring while the engine decodes.

Invariants
- Every answer is sent once, also those that the engine did not report before it returned.
- Decoding never waits for the sender: a thread of its own turns ids into text and hands batches over.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from typing import Any, Protocol

from verl.protocol import Response
from verl.workers.reward_manager.dispatch import Answer


class Sink(Protocol):
    """Takes finished answers. Sending does not wait."""

    def send(self, answers: Sequence[Answer]) -> None: ...


class Forwarder:
    """Forwards the answers of one `generate` call; `first` is the number of its first prompt in the batch.

    Example: `with Forwarder(sink, tokenizer, first=0) as forward: engine.generate(..., on_finished=forward)`
    """

    def __init__(self, sink: Sink, tokenizer: Any, *, first: int) -> None:
        self._sink, self._tokenizer, self._first = sink, tokenizer, first
        self._queue: queue.SimpleQueue[tuple[int, int, Response] | None] = queue.SimpleQueue()
        self._told: set[tuple[int, int]] = set()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="reward-forward", daemon=True)

    def __call__(self, prompt: int, answer: int, response: Response) -> None:
        self._told.add((prompt, answer))
        self._queue.put((prompt, answer, response))

    def rest(self, responses: Sequence[Sequence[Response]]) -> None:
        """Send what the engine did not report."""
        for prompt, answers in enumerate(responses):
            for answer, response in enumerate(answers):
                if (prompt, answer) not in self._told:
                    self(prompt, answer, response)

    def __enter__(self) -> Forwarder:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            more = True
            while more:
                batch = [self._queue.get()]
                while not self._queue.empty():
                    batch.append(self._queue.get())
                more = None not in batch
                self._send([item for item in batch if item is not None])
        except BaseException as error:
            self._error = error

    def _send(self, finished: Sequence[tuple[int, int, Response]]) -> None:
        if finished:
            texts = decode(self._tokenizer, [response for _, _, response in finished])
            self._sink.send(
                [
                    Answer(self._first + prompt, answer, text, len(response.token_ids))
                    for (prompt, answer, response), text in zip(finished, texts, strict=True)
                ]
            )


def decode(tokenizer: Any, responses: Sequence[Response]) -> list[str]:
    """Answers as text, without special tokens: what every reward function reads."""
    if not responses:
        return []
    texts: list[str] = tokenizer.batch_decode([r.token_ids.tolist() for r in responses], skip_special_tokens=True)
    return texts
