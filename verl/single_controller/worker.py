"""The process side: every remote call goes through `WorkerShell.call`, so a failure keeps rank, phase and traceback."""

from __future__ import annotations

import faulthandler
import operator
import os
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

DEFAULT_ENV = {
    "TOKENIZERS_PARALLELISM": "true",
    "NCCL_DEBUG": "WARN",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Set in every worker where neither the driver nor the worker's node has a value."""


@dataclass(frozen=True)
class WorkerFailure:
    """Reported instead of a result. Sent as a value: Ray re-wraps exceptions and loses their type."""

    group: str
    rank: int
    phase: str
    error: str
    trace: str
    user_error: bool
    """True for a ValueError that our own code raised: something the user can fix, shown without a traceback."""


class WorkerShell:
    """Holds one worker object in a Ray actor. `factory` runs inside the process, so heavy imports happen there."""

    def __init__(
        self, group: str, rank: int, threads: int, folder: str | None = None, several_nodes: bool = False
    ) -> None:
        """`folder`: where relative paths of the config start, the driver's (None: this process stays where it is)."""
        faulthandler.enable()
        if folder is not None:
            os.chdir(folder)
        for name, value in DEFAULT_ENV.items():
            os.environ.setdefault(name, value)
        if several_nodes:
            _speak_through_rays_interface()
        self.group, self.rank = group, rank
        self.worker: Any = None
        import torch

        torch.set_num_threads(threads)

    def __repr__(self) -> str:
        """Shown by Ray before every line that this process logs."""
        return f"{self.group} rank {self.rank}"

    def address(self) -> tuple[str, int]:
        """Where torch.distributed meets: this node's address and a port on which this process listens from now on."""
        import ray

        from verl.workers.runtime import open_rendezvous

        return open_rendezvous(ray.util.get_node_ip_address())

    def pid(self) -> int:
        return os.getpid()

    def gpu_bytes(self) -> int:
        """Memory of this process's GPU."""
        import torch

        return torch.cuda.mem_get_info()[1]

    def build(self, factory: Any, *args: Any, **kwargs: Any) -> WorkerFailure | None:
        """Make the worker. Returns the failure, if any."""

        def make() -> None:
            self.worker = factory(*args, **kwargs)

        return self._guard("start", make)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the worker, or with a dotted name of a part of it; its result, or a `WorkerFailure`.

        A call that waited for one that failed is not made and returns that failure.
        """
        failed = next((a for a in args if isinstance(a, WorkerFailure)), None)
        if failed is not None:
            return failed
        return self._guard(method, lambda: operator.attrgetter(method)(self.worker)(*args, **kwargs))

    def _guard(self, phase: str, action: Any) -> Any:
        try:
            return action()
        except Exception as error:
            return WorkerFailure(
                group=self.group,
                rank=self.rank,
                phase=phase,
                error=f"{type(error).__name__}: {error}",
                trace=traceback.format_exc(),
                user_error=isinstance(error, ValueError) and _is_ours(error),
            )


def _is_ours(error: BaseException) -> bool:
    """Raised by a file of this package: a library's ValueError is a bug until its traceback says otherwise."""
    file = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(file).is_relative_to(Path(__file__).parents[1])


def _speak_through_rays_interface() -> None:
    """Gloo and NCCL use the interface that Ray uses, unless the user named one.

    Gloo takes the one that the host's name resolves to, which is often the loopback one (127.0.1.1 in /etc/hosts) and
    then unreachable from other nodes. That Ray's is reachable is known: the node has joined through it.
    """
    import ray

    interface = interface_of(ray.util.get_node_ip_address())
    if interface is not None:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, interface)


def interface_of(address: str) -> str | None:
    """Name of the network interface with this address; None when this process sees none."""
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, entries in interfaces if any(entry.address == address for entry in entries)), None)
