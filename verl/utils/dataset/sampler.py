"""The order in which rows are seen: a pure function of (seed, epoch), with a position that is a line of json.

Invariants
- An epoch visits each row once (each row but the last incomplete batch with `drop_last`).
- A sampler restored from its state continues with the rows an uninterrupted one would have given.
- The order depends on nothing but seed, epoch and the number of rows, on every machine and numpy version.
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np
from numpy.typing import NDArray


class SamplerState(TypedDict):
    """Position after the last batch: `cursor` rows of `epoch` are used up. `size` is the number of rows."""

    seed: int
    epoch: int
    cursor: int
    size: int


def epoch_order(size: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Permutation of `range(size)`. Sorts raw generator bits: numpy keeps those stable over versions, shuffles not."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(size)
    return np.argsort(bits, kind="stable")


class Sampler:
    """Hands out row indices, epoch after epoch, without end."""

    def __init__(self, size: int, *, seed: int, shuffle: bool = True, drop_last: bool = True) -> None:
        """Raises ValueError when there is no row, or the seed is negative."""
        if size < 1 or seed < 0:
            raise ValueError(f"a sampler needs at least one row and a seed >= 0, got {size} rows and data.seed={seed}")
        self.size = size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self._epoch = 0
        self._cursor = 0

    @property
    def epoch(self) -> int:
        """The epoch of the last batch, from 0."""
        return self._epoch

    def next_batch(self, count: int) -> NDArray[np.int64]:
        """The next `count` row indices. At the end of an epoch the rest is skipped (`drop_last`) or given alone.

        Raises ValueError when `count` is not positive, or exceeds the rows with `drop_last`.
        """
        if count < 1 or (self.drop_last and count > self.size):
            raise ValueError(f"a batch of {count} cannot be drawn from {self.size} rows; lower data.train_batch_size")
        left = self.size - self._cursor
        if left == 0 or (self.drop_last and left < count):
            self._epoch += 1
            self._cursor = 0
        order = epoch_order(self.size, seed=self.seed, epoch=self._epoch) if self.shuffle else np.arange(self.size)
        batch = order[self._cursor : self._cursor + count]
        self._cursor += len(batch)
        return batch

    def batches_per_epoch(self, count: int) -> int:
        """Batches of `count` rows in one epoch."""
        return self.size // count if self.drop_last else -(-self.size // count)

    def state(self) -> SamplerState:
        return {"seed": self.seed, "epoch": self._epoch, "cursor": self._cursor, "size": self.size}

    def load_state(self, state: SamplerState) -> None:
        """Continue from `state`. Raises ValueError when seed or number of rows differ: the order would be another."""
        for name, mine in (("seed", self.seed), ("size", self.size)):
            if state[name] != mine:  # type: ignore[literal-required]
                raise ValueError(
                    f"the checkpoint's data order has {name}={state[name]}, this run {name}={mine}; "  # type: ignore[literal-required]
                    "use the same data files and data.seed, or start anew with trainer.resume_mode=disable"
                )
        if not (0 <= state["cursor"] <= self.size and state["epoch"] >= 0):
            raise ValueError(f"the checkpoint's data position is out of range: {state}")
        self._epoch, self._cursor = state["epoch"], state["cursor"]
