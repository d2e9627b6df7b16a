"""Invariants of the forwarder: every answer once, under the batch's numbers, without making the engine wait."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from model_fixtures import SMALL, Maker

from verl.models.policy import Policy
from verl.protocol import Response, StopReason
from verl.utils.dataset.patches import StoredPatches
from verl.workers.reward_manager.dispatch import Answer
from verl.workers.rollout.base import Sampling
from verl.workers.rollout.forward import Forwarder
from verl.workers.rollout.hf import HFEngine

SAMPLING = Sampling(
    n=3,
    temperature=1.0,
    top_k=-1,
    top_p=1.0,
    do_sample=True,
    max_tokens=40,
    max_context=512,
    ignore_eos=False,
    seed=7,
)


class Digits:
    """Decodes ids as their numbers."""

    def batch_decode(self, ids: Sequence[Sequence[int]], *, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return [" ".join(map(str, each)) for each in ids]


class Kept:
    """A sink that keeps what it gets; `gate` holds it up."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.gate = threading.Event()
        self.gate.set()

    def send(self, answers: Sequence[Answer]) -> None:
        assert self.gate.wait(30)
        self.answers += answers


def response(*ids: int) -> Response:
    return Response(np.array(ids, np.int32), np.zeros(len(ids), np.float32), StopReason.EOS)


def test_reported_and_unreported_answers_arrive_once_each_numbered_from_the_shares_first_prompt() -> None:
    sink, answers = Kept(), [[response(1), response(2, 2)], [response(3), response(4)]]
    with Forwarder(sink, Digits(), first=10) as forward:
        forward(1, 0, answers[1][0])
        forward(0, 1, answers[0][1])
        forward.rest(answers)
    assert sorted(sink.answers) == [(10, 0, "1", 1), (10, 1, "2 2", 2), (11, 0, "3", 1), (11, 1, "4", 1)]


def test_the_engine_does_not_wait_for_a_slow_sink_and_what_waited_travels_together() -> None:
    sink = Kept()
    sink.gate.clear()
    with Forwarder(sink, Digits(), first=0) as forward:
        for number in range(500):
            forward(number, 0, response(number))
        assert not sink.answers, "reporting came back while the sink was held up"
        sink.gate.set()
    assert [answer.prompt for answer in sink.answers] == list(range(500))


def test_an_error_of_the_sink_reaches_the_caller_at_the_end() -> None:
    class Broken:
        def send(self, answers: Sequence[Answer]) -> None:
            raise ConnectionError("the hub is gone")

    with pytest.raises(ConnectionError, match="the hub is gone"), Forwarder(Broken(), Digits(), first=0) as forward:
        forward(0, 0, response(1))


def test_the_hf_engine_reports_each_answer_once_as_it_ends_over_all_chunks(
    make: Maker, shared_policy: Policy, patches: StoredPatches
) -> None:
    prompts = [make.prompt(*((SMALL,) if i % 2 else ()), text=4 + i) for i in range(5)]
    # Two prompts a chunk; about one id in seven ends an answer.
    engine = HFEngine(shared_policy, patches, stop_ids=range(40), batch_size=6)
    heard: list[tuple[int, int, Any]] = []
    found = engine.generate(prompts, SAMPLING, step=1, on_finished=lambda *told: heard.append(told))
    told = {(prompt, answer): each for prompt, answer, each in heard}
    assert len(heard) == len(told) == 5 * SAMPLING.n
    for (prompt, answer), each in told.items():
        assert each.token_ids.tolist() == found[prompt][answer].token_ids.tolist()
        assert each.log_probs.tolist() == found[prompt][answer].log_probs.tolist()
        assert each.stop_reason is found[prompt][answer].stop_reason
    for chunk in ((0, 1), (2, 3), (4,)):
        lengths = [len(each.token_ids) for prompt, _, each in heard if prompt in chunk]
        assert lengths == sorted(lengths) and len(set(lengths)) > 1, f"chunk {chunk}: {lengths}"
    silent = engine.generate(prompts, dataclasses.replace(SAMPLING), step=1)
    assert [[r.token_ids.tolist() for r in g] for g in silent] == [[r.token_ids.tolist() for r in g] for g in found]
