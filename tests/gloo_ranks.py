"""Ranks of a gloo group as processes, forked from a server that has imported torch and the models once."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(world: int, run: Callable[..., None], *args: Any) -> None:
    """Run `run(rank, world, *args)` on `world` gloo processes of the loopback; an error in one fails the test."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload(["verl.models.tiny", "verl.workers.actor.build"])
    mp.start_processes(_entry, (run, world, port, args), nprocs=world, start_method="forkserver")


def _entry(rank: int, run: Callable[..., None], world: int, port: int, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    # Ranks that disagree on their collectives fail soon instead of waiting for each other.
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        run(rank, world, *args)
    finally:
        dist.destroy_process_group()
