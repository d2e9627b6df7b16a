"""What the engine asks of vLLM's core and what it makes of the core's raw outputs; the core itself is played."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from verl.protocol import Prompt, StopReason
from verl.workers.rollout.base import Sampling
from verl.workers.rollout.vllm_engine import VLLMEngine

EOS = 9
SAMPLING = Sampling(
    n=2, temperature=1.0, top_k=-1, top_p=1.0, do_sample=True, max_tokens=3, max_context=20, ignore_eos=False, seed=1
)
PROMPTS = [Prompt(f"row-{i}", i, "played", np.array([1, 2], np.int32), (), (), "A") for i in range(2)]


def output(name: str, token: int, reason: str | None) -> Any:
    logprobs = SimpleNamespace(logprob_token_ids=np.array([[token]]), logprobs=np.array([[-0.5]], np.float32))
    return SimpleNamespace(request_id=name, new_token_ids=[token], new_logprobs=logprobs, finish_reason=reason)


class Core:
    """Gives every request the tokens of `script`: (token, finish reason) a step."""

    def __init__(self, script: list[tuple[int, str | None]]) -> None:
        self.script, self.names, self.aborted = script, [], []
        self.running: dict[str, int] = {}
        self.engine_core = SimpleNamespace(scheduler=SimpleNamespace(get_num_unfinished_requests=self.unfinished))

    def unfinished(self) -> int:
        return len(self.running)

    def add_request(self, request: Any) -> None:
        self.names.append(request.request_id)
        self.running[request.request_id] = 0

    def abort_requests(self, names: list[str]) -> None:
        self.aborted += names
        self.running.clear()

    def get_output(self) -> Any:
        made = []
        for name, at in list(self.running.items()):
            token, reason = self.script[at]
            made.append(output(name, token, reason))
            self.running[name] = at + 1
            if reason is not None:
                del self.running[name]
        return SimpleNamespace(outputs=made, scheduler_stats=None)


def engine_on(core: Core) -> VLLMEngine:
    engine = VLLMEngine.__new__(VLLMEngine)
    engine._missing, engine._calls, engine._ban = set(), 0, {}
    engine.model = SimpleNamespace(stop_ids=(EOS,))  # type: ignore[assignment]

    def request(name: str, *_: object) -> Any:
        return SimpleNamespace(request_id=name)

    engine.engine = SimpleNamespace(
        engine_core=core,
        input_processor=SimpleNamespace(process_inputs=request),
        get_supported_tasks=lambda: ("generate",),
        logger_manager=None,
    )
    engine._vllm = SimpleNamespace(text_input=list, sampling=dict)  # type: ignore[assignment]
    return engine


def test_tokens_log_probs_and_reasons_are_gathered_step_by_step() -> None:
    reports: list[tuple[int, int]] = []
    engine = engine_on(Core([(4, None), (5, None), (EOS, "stop")]))
    found = engine.generate(PROMPTS, SAMPLING, step=0, on_finished=lambda p, a, _: reports.append((p, a)))
    for answer in (answer for answers in found for answer in answers):
        assert answer.token_ids.tolist() == [4, 5, EOS] and answer.log_probs.tolist() == [-0.5] * 3
        assert answer.stop_reason is StopReason.EOS
    assert sorted(reports) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_no_request_bears_the_name_of_an_earlier_one_whose_last_step_may_be_under_way() -> None:
    core = Core([(EOS, "stop")])
    engine = engine_on(core)
    engine.generate(PROMPTS, SAMPLING, step=0)
    engine.generate(PROMPTS, SAMPLING, step=0)
    assert len(core.names) == 8 == len(set(core.names))


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_answer_that_vllm_gave_up_is_an_error_and_the_others_are_withdrawn(reason: str) -> None:
    core = Core([(4, None), (5, reason)])
    with pytest.raises(RuntimeError, match=f"answer 0 of prompt 0 of the call with '{reason}' after 2 tokens"):
        engine_on(core).generate(PROMPTS, SAMPLING, step=0)
    assert set(core.aborted) == set(core.names)


def test_lost_requests_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core([(4, None)])
    lose: Callable[[Any], None] = lambda request: core.names.append(request.request_id)  # noqa: E731
    monkeypatch.setattr(core, "add_request", lose)
    with pytest.raises(AssertionError, match="vLLM has lost requests"):
        engine_on(core).generate(PROMPTS, SAMPLING, step=0)
