"""Transfers between Ray processes on a CPU: the calls, the mapped memory and the broadcast are those of a GPU run."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import process_workers
import pytest
from process_workers import COUNT, Receiver, SlowActor, build_actor

from verl.single_controller.cluster import Resources, reserve
from verl.single_controller.group import WorkerError, WorkerGroup
from verl.workers.weight_sync.sync import WeightSync

pytestmark = pytest.mark.usefixtures("cluster")


class Started:
    """Worker groups that end with the test."""

    def __init__(self) -> None:
        self.bundles = reserve(Resources(1, 1, "cpu"), 60)
        self.groups: list[WorkerGroup] = []

    def __call__(self, name: str, factory: Any, arguments: Sequence[Any]) -> WorkerGroup:
        group = WorkerGroup(name, bundles=self.bundles, size=1, gpus=0, threads=1, timeout=120)
        self.groups.append(group)
        group.build(factory, [arguments])
        return group


@pytest.fixture(scope="module")
def start() -> Iterator[Started]:
    started = Started()
    yield started
    for group in started.groups:
        group.kill()


@pytest.fixture(scope="module")
def actor(start: Started) -> WorkerGroup:
    return start("actor", build_actor, [10.0])


def kill_at(mark: Path, group: WorkerGroup) -> threading.Thread:
    """Kill rank 0 of a group once `mark` exists."""
    pid = group.pids()[0]

    def wait() -> None:
        while not mark.exists():
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_weights_arrive_over_mapped_memory_and_by_broadcast_however_slow_the_reader(
    start: Started, actor: WorkerGroup, tmp_path: Path
) -> None:
    rollout = start("rollout", Receiver, [0.01, str(tmp_path / "mark")])
    for transport in ("mapped", "broadcast"):
        sync = WeightSync(actor, rollout, transport)
        for _ in range(2):
            synced = sync(with_checksum=True)
            assert synced.nbytes == COUNT * process_workers.MATRIX
    expected = {f"layer.{i}.weight": (10.0 + i, 10.0 + i) for i in range(COUNT)}
    (seen,) = rollout.all("seen")
    assert seen == [expected] * 4


def test_a_rollout_that_dies_in_the_middle_is_named(start: Started, actor: WorkerGroup, tmp_path: Path) -> None:
    rollout = start("rollout", Receiver, [0.05, str(tmp_path / "mark")])
    sync = WeightSync(actor, rollout, "mapped")
    killed = kill_at(tmp_path / "mark", rollout)
    with pytest.raises(WorkerError, match=r"^rollout rank 0 died during 'weights.take'"):
        sync(with_checksum=False)
    killed.join()
    assert actor.pids(), "the actor lives on"


def test_an_actor_that_dies_in_the_middle_is_named(start: Started, tmp_path: Path) -> None:
    dying = start("actor", SlowActor, [str(tmp_path / "mark")])
    rollout = start("rollout", Receiver, [0.0, str(tmp_path / "other")])
    sync = WeightSync(dying, rollout, "mapped")
    killed = kill_at(tmp_path / "mark", dying)
    with pytest.raises(WorkerError, match=r"^actor rank 0 died during 'weights.send'"):
        sync(with_checksum=False)
    killed.join()
