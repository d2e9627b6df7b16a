"""Whole runs inside the test's process: the entry point, the loop and the workers, but no Ray and one rank.

A run then costs a second instead of twenty, so every variant of a run gets a test. Ray itself, several ranks and
crashes are tested through real subprocesses.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from runs import Run

from verl.single_controller.group import Call, WorkerGroup, unwrap
from verl.single_controller.worker import WorkerShell
from verl.trainer import main_generation, main_ppo, sft_trainer
from verl.trainer.ppo import cluster
from verl.workers.runtime import open_rendezvous


class InProcessGroup(WorkerGroup):
    """The worker's own shell, called directly."""

    opened: list[InProcessGroup] = []  # noqa: RUF012  (emptied by every run)

    def __init__(self, name: str, *, size: int, threads: int, **_: Any) -> None:
        assert size == 1, f"{name}: {size} ranks need processes of their own"
        self.name, self.size = name, size
        self.shell = WorkerShell(name, 0, 1)
        self.opened.append(self)

    def build(self, factory: Any, per_rank: Sequence[Sequence[Any]]) -> None:
        unwrap(self.shell.build(factory, *per_rank[0]))

    def rendezvous(self) -> tuple[str, int]:
        return open_rendezvous("127.0.0.1")

    def pids(self) -> list[int]:
        return [self.shell.pid()]

    def start(self, method: str, per_rank: Sequence[Sequence[Any]], **kwargs: Any) -> tuple[str, list[Any]]:
        return method, [unwrap(self.shell.call(method, *per_rank[0], **kwargs))]

    def wait(self, started: tuple[str, list[Any]]) -> list[Any]:
        return started[1]

    def submit(self, rank: int, method: str, *args: Any) -> Call:
        return Call(self.name, rank, method, unwrap(self.shell.call(method, *args)))

    def gather(self, calls: Sequence[Call]) -> list[Any]:
        return [call.ref for call in calls]

    def kill(self) -> None:
        if hasattr(self.shell.worker, "close"):
            self.shell.worker.close()


def _without_ray(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cluster, "WorkerGroup", InProcessGroup)
    patch.setattr(cluster, "start_ray", lambda *_, **__: None)
    patch.setattr(cluster, "reserve", lambda *_: None)
    patch.setattr(cluster, "start_reward_pool", lambda *_: None)  # the driver scores
    patch.setattr(faulthandler, "enable", lambda: None)  # pytest has its own


def _captured(call: Any, overrides: Sequence[str], folder: Path) -> Run:
    out, err, threads = io.StringIO(), io.StringIO(), torch.get_num_threads()
    InProcessGroup.opened.clear()
    raised: BaseException | None = None
    with pytest.MonkeyPatch.context() as patch:
        _without_ray(patch)
        patch.setenv("COLUMNS", "120")
        torch.set_num_threads(1)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = call(list(overrides))
        except Exception as error:  # the interpreter would print it and end with 1
            code, raised = 1, error
        finally:
            torch.set_num_threads(threads)
            if dist.is_initialized():
                dist.destroy_process_group()
    workers = {group.name: group.shell.worker for group in InProcessGroup.opened}
    text = err.getvalue() + ("" if raised is None else f"{type(raised).__name__}: {raised}")
    return Run(code, folder, out.getvalue(), text, {"workers": workers, "raised": raised})


def rl_here(overrides: Sequence[str], folder: Path) -> Run:
    """`python3 -m verl.trainer.main_ppo` in this process."""
    return _captured(main_ppo.main, overrides, folder)


def sft_here(overrides: Sequence[str], folder: Path) -> Run:
    """`python3 -m verl.trainer.sft_trainer` in this process."""
    return _captured(sft_trainer.main, overrides, folder)


def generation_here(overrides: Sequence[str], folder: Path) -> Run:
    """`python3 -m verl.trainer.main_generation` in this process."""
    return _captured(main_generation.main, overrides, folder)
