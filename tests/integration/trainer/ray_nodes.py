"""Two Ray nodes on this machine, each with the processes that `ray start` gives it."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from runs import Launcher, Started, kill


@dataclass(frozen=True)
class RayNode:
    """One `ray start --block`."""

    started: Started

    @property
    def raylet(self) -> psutil.Process:
        (found,) = [p for p in self.started.members() if p.name() == "raylet"]
        return found

    def runs(self, pid: int) -> bool:
        """Whether a worker process is this node's."""
        return self.raylet in psutil.Process(pid).parents()

    def kill(self) -> None:
        """Only the raylet: its workers notice by themselves."""
        kill(self.raylet.pid)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


class Nodes:
    """A head and what joins it. All start in a folder that is not the run's, as on a cluster."""

    def __init__(self, launcher: Launcher, folder: Path, stack: contextlib.ExitStack) -> None:
        self._launcher, self._folder, self._stack = launcher, folder, stack
        folder.mkdir()
        # Whether Ray asks for a token depends on the home folder of who runs the tests, unless it is told.
        self._secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
        self.head = self._start("head", "--head", f"--port={free_port()}", "--include-dashboard=false")
        match = self.head.started.until(
            lambda: re.search(r"--address='([^']+)'", self.head.started.text), "the head's address"
        )
        self.address = match[1]

    def join(self) -> RayNode:
        """A second node; returns when it has joined."""
        node = self._start("second", f"--address={self.address}")
        node.started.until(lambda: "Ray runtime started" in node.started.text, "the second node")
        return node

    def _start(self, name: str, *arguments: str) -> RayNode:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=2", "--num-gpus=0"]
        command += ["--object-store-memory=100000000", *arguments]
        env = self._launcher.env | self._secret
        started = Started(command, self._folder / name, env, cwd=self._folder)
        return RayNode(self._stack.enter_context(started))

    @property
    def env(self) -> dict[str, str]:
        """What a run needs to join."""
        return {"RAY_ADDRESS": self.address} | self._secret


@contextlib.contextmanager
def ray_nodes(launcher: Launcher, folder: Path) -> Iterator[Nodes]:
    """A head alone."""
    assert "RAY_ADDRESS" not in os.environ, "the tests would join somebody's cluster"
    with contextlib.ExitStack() as stack:
        yield Nodes(launcher, folder, stack)
