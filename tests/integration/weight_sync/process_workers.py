"""Workers of the transfer tests, built inside Ray processes, which get this module by value."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from simulated import Actor, Recording, Rollout, parameters, shapes

COUNT, MATRIX = 12, 4 << 10
"""Twelve matrices, each in a bucket of its own."""


class Sleepy(Recording):
    """Takes its time over every matrix, and tells by a file when it is at the fifth."""

    def __init__(self, seconds: float, mark: str) -> None:
        super().__init__(self.wait)
        self.seconds, self.mark = seconds, Path(mark)

    def wait(self, name: str) -> None:
        if name == "layer.4.weight":
            self.mark.touch()
        time.sleep(self.seconds)


def build_actor(fill: float) -> Actor:
    of = {name: value.fill_(fill + number) for number, (name, value) in enumerate(parameters(COUNT).items())}
    return Actor(of, max_bytes=MATRIX)


class SlowActor(Actor):
    """Hangs while it fills the fifth bucket, after telling so by a file."""

    def __init__(self, mark: str) -> None:
        super().__init__(parameters(COUNT), max_bytes=MATRIX)
        sent = self.weights.send

        def send(index: int, *rest: Any) -> Any:
            if index == 4:
                Path(mark).touch()
                time.sleep(600)
            return sent(index, *rest)

        self.weights.send = send  # type: ignore[method-assign]


class Receiver(Rollout):
    def __init__(self, seconds: float, mark: str) -> None:
        super().__init__(Sleepy(seconds, mark), shapes(parameters(COUNT)))

    def seen(self) -> list[dict[str, tuple[float, float]]]:
        """Least and largest value of every matrix of every update."""
        return [
            {name: (float(value.min()), float(value.max())) for name, value in update.items()}
            for update in self.engine.updates
        ]
