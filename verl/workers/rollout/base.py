"""What every rollout engine takes and gives: prompts with images in; token ids, sampler log-probs, stop reason out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from verl.protocol import Prompt, Response


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw answers. `top_k` <= 0 and `top_p` >= 1 mean no filter; `do_sample=False` is greedy."""

    n: int
    temperature: float
    top_k: int
    top_p: float
    do_sample: bool
    max_tokens: int
    """Longest answer in tokens; an answer also ends where prompt + answer reach `max_context`."""
    max_context: int
    ignore_eos: bool
    seed: int

    @property
    def greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0.0


OnFinished = Callable[[int, int, Response], None]
"""Called with (place of the prompt, answer index, answer) when an answer has ended; must return soon."""


class RolloutEngine(Protocol):
    """Generates answers and takes new weights.

    New weights arrive between `begin_update` and `end_update`, in as many calls of `update_weights` as the transfer
    has buckets. An engine whose update was broken off must not generate: it raises AssertionError until one is whole.
    """

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, step: int, on_finished: OnFinished | None = None
    ) -> list[list[Response]]:
        """`sampling.n` answers for each prompt, in order. The same (seed, step, uid, answer index) gives the same
        noise, whatever else is in the batch. `on_finished` hears of each answer once, as soon as it has ended."""
        ...

    def begin_update(self) -> None:
        """New weights are about to arrive: all of them, each once."""
        ...

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace weights by their Hugging Face names. The tensors may be overwritten by the caller after the call
        returns. Raises KeyError on a name the model does not have."""
        ...

    def end_update(self) -> None:
        """Every weight has been sent: check it (AssertionError names what is missing), forget what was computed with
        the old ones (prefix and image caches)."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """A whole update in one call."""
        self.begin_update()
        self.update_weights(weights)
        self.end_update()

    def sleep(self, level: int) -> None:
        """Give GPU memory back: 1 keeps the weights on the host, 2 drops them, so that an update must follow. Engines
        that hold none of their own do nothing."""
        ...

    def wake(self, tags: Sequence[str] | None = None) -> None:
        """Take memory again: all, or those parts of `weights` and `kv_cache` that are named, so that new weights can
        arrive before the cache takes its share."""
        ...


def answer_limits(prompts: Sequence[Prompt], sampling: Sampling) -> NDArray[np.int64]:
    """(G,) longest answer to each prompt. Raises ValueError naming a prompt that leaves no room for one."""
    lengths = np.array([len(prompt.token_ids) for prompt in prompts], dtype=np.int64)
    limits = np.minimum(sampling.max_tokens, sampling.max_context - lengths)
    for prompt, limit in zip(prompts, limits, strict=True):
        if limit < 1:
            raise ValueError(f"{prompt.uid}: a prompt of {len(prompt.token_ids)} tokens leaves no room to answer")
    return limits


def sampling_noise(seed: int, step: int, uid: str, answer: int, count: int) -> NDArray[np.float64]:
    """`count` uniforms in [0, 1): the noise of tokens 0..count-1 of one answer, a function of its arguments alone."""
    digest = hashlib.blake2b(f"{seed}/{step}/{uid}/{answer}".encode(), digest_size=16).digest()
    key = np.frombuffer(digest, dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(count)
