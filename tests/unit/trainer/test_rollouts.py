"""Which rank of an engine answers, and that its ranks agree. The group is simulated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from verl.protocol import Prompt, Response, StopReason
from verl.trainer.ppo.workers import Rollouts
from verl.workers.rollout.base import Sampling

SAMPLING = Sampling(
    n=2, temperature=1.0, top_k=-1, top_p=1.0, do_sample=True, max_tokens=4, max_context=64, ignore_eos=False, seed=0
)


class Ranks:
    """Answers with the prompt's own ids; rank `wrong` with others."""

    def __init__(self, size: int, wrong: int | None = None) -> None:
        self.size, self.wrong = size, wrong
        self.asked: list[Sequence[Any]] = []

    def each(self, method: str, arguments: Sequence[Sequence[Any]]) -> list[list[list[Response]]]:
        assert method == "generate"
        self.asked = list(arguments)
        return [
            [[self.answer(p, i, rank) for i in range(2)] for p in prompts]
            for rank, (prompts, *_) in enumerate(arguments)
        ]

    def answer(self, prompt: Prompt, number: int, rank: int) -> Response:
        ids = prompt.token_ids + number + (7 if rank == self.wrong else 0)
        return Response(ids, np.zeros(len(ids), np.float32), StopReason.EOS)


def prompts(count: int) -> list[Prompt]:
    return [
        Prompt(
            uid=str(i),
            row=i,
            data_source="test",
            token_ids=np.array([10 * i], np.int32),
            image_keys=(),
            image_grids=(),
            ground_truth="",
        )
        for i in range(count)
    ]


def test_all_ranks_of_an_engine_get_its_prompts_in_order_and_the_first_alone_the_sink() -> None:
    ranks, sink = Ranks(4), object()
    answers = Rollouts(ranks, 2).generate(prompts(5), SAMPLING, step=3, sink=sink)  # type: ignore[arg-type]
    assert [int(group[0].token_ids[0]) for group in answers] == [0, 10, 20, 30, 40]
    assert [[p.uid for p in own] for own, *_ in ranks.asked] == [["0", "1", "2"]] * 2 + [["3", "4"]] * 2
    assert [given for *_, given, _ in ranks.asked] == [sink, None, sink, None]
    assert [first for *_, first in ranks.asked] == [0, 0, 3, 3]


def test_ranks_of_one_engine_that_disagree_are_named() -> None:
    with pytest.raises(AssertionError, match="rollout ranks 2 and 3 are one engine and answered prompt 0 differently"):
        Rollouts(Ranks(4, wrong=3), 2).generate(prompts(5), SAMPLING, step=3)  # type: ignore[arg-type]
