"""Optimizer state in host memory between updates (`fsdp_config.optimizer_offload`).

Invariants
- An update sees the state on the parameters' device and gives the same bits as without offloading.
- Between updates every state tensor is an ordinary tensor on the host: checkpoints read and write it where it lies, so
  that they do not depend on the setting.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_HOST = torch.device("cpu")


class OptimizerOffload:
    """Moves the state of `optimizer` around its own `step`; scalars (step counts) stay where they are.

    The same copies are made on a CPU, where they gain nothing: one code path, tested without a GPU.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        optimizer.register_step_pre_hook(lambda *_: self.fetch())
        optimizer.register_step_post_hook(lambda *_: self.park())

    def fetch(self) -> None:
        """Put the state beside the parameters."""
        self._move(lambda parameter: parameter.device)

    def park(self) -> None:
        """Put the state on the host, and give the device's memory back to other processes."""
        self._move(lambda _: _HOST)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # copies to the host run on; whoever reads the state next is the host
            torch.cuda.empty_cache()

    @torch.no_grad()
    def _move(self, target: Callable[[Tensor], torch.device]) -> None:
        for parameter, entries in self.optimizer.state.items():
            for kind, value in entries.items():
                if isinstance(value, Tensor) and value.ndim > 0:
                    # From a GPU, non_blocking gives pinned memory.
                    entries[kind] = value.to(target(parameter), non_blocking=True, copy=True)
