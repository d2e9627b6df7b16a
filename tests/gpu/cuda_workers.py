"""Both ends of a transfer on CUDA, built inside Ray processes, which get this module by value."""

from __future__ import annotations

import torch
from simulated import Actor, Recording, Rollout, parameters, shapes
from torch import Tensor

COUNT = 40
"""Matrices of 2 KiB in bf16."""


class CudaActor(Actor):
    """fp32 weights on the GPU, sent in bf16."""

    def __init__(self, max_bytes: int) -> None:
        device = torch.device("cuda")
        self.own = {name: value.to(device) for name, value in parameters(COUNT).items()}
        super().__init__(self.own, max_bytes=max_bytes, dtype=torch.bfloat16, device=device)

    def double(self) -> None:
        for value in self.own.values():
            value.mul_(2.0)


class CudaRollout(Rollout):
    """Keeps what it is given; `busy` cycles of the GPU pass before each copy, so that copies lie in the queue."""

    def __init__(self, busy: int) -> None:
        engine = Recording(lambda name: torch.cuda._sleep(busy) if busy else None)
        super().__init__(engine, shapes(parameters(COUNT)), torch.device("cuda"))

    def seen(self) -> list[dict[str, Tensor]]:
        return [{name: value.float().cpu() for name, value in update.items()} for update in self.engine.updates]
