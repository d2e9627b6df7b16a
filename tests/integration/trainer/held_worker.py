"""Imported by a run's processes through `external_lib`: stops for good at one point of a step or a save.

A test can then kill exactly there, however slow the machine is. `TIMEMASTER_HOLD` is one of

    save            the model's shards are written, the optimizer's are not
    update:N        optimizer step N (from 0) is about to begin
    generate:N      the answers of step N are about to be written

and the process that stopped writes its pid to `TIMEMASTER_HELD`.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from verl.workers.actor import build
from verl.workers.actor.engine import TrainEngine
from verl.workers.rollout.hf import HFEngine

LONGEST = 600.0  # seconds; nobody waits for a test that broke


def hold() -> None:
    mark = Path(os.environ["TIMEMASTER_HELD"])
    aside = mark.with_suffix(f".{os.getpid()}")
    aside.write_text(str(os.getpid()))
    aside.rename(mark)
    time.sleep(LONGEST)
    raise SystemExit("held for too long")


def install(point: str, number: int) -> None:
    save, step, generate = build.save_optimizer, TrainEngine.step, HFEngine.generate

    def held_save(*args: Any, **kwargs: Any) -> None:
        hold()
        save(*args, **kwargs)

    def held_step(self: TrainEngine, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.steps == number:
            hold()
        return step(self, *args, **kwargs)

    def held_generate(self: HFEngine, *args: Any, **kwargs: Any) -> Any:
        if kwargs["step"] == number:
            hold()
        return generate(self, *args, **kwargs)

    if point == "save":
        build.save_optimizer = held_save
    elif point == "update":
        TrainEngine.step = held_step
    elif point == "generate":
        HFEngine.generate = held_generate
    else:
        raise ValueError(f"TIMEMASTER_HOLD={point}: no such point")


if "TIMEMASTER_HOLD" in os.environ:
    name, _, count = os.environ["TIMEMASTER_HOLD"].partition(":")
    install(name, int(count or 0))
