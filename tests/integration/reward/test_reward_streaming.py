"""The rollout worker's hf engine, the forwarder and the pool together: answers are scored while others are written."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import model_fixtures
import numpy as np
import pytest
import ray

from verl.config import load
from verl.protocol import Prompt
from verl.utils.reward_score.custom import CustomFunction
from verl.workers.reward_manager import RewardItem, RewardManager
from verl.workers.reward_manager.pool import RewardPool
from verl.workers.rollout.base import Sampling
from verl.workers.rollout.forward import decode
from verl.workers.rollout.hf import HFEngine
from verl.workers.rollout.worker import Place, RolloutWorker

TELL = """
def compute_score(solution_str, ground_truth, extra_info):
    return {"score": int(ground_truth) + len(solution_str) / 1e6, "tokens": extra_info["response_tokens"]}
"""


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> RolloutWorker:
    folder = model_fixtures.write_tiny(tmp_path_factory.mktemp("model") / "tiny")
    overrides = [
        "data.train_files=none.parquet",
        "data.val_files=none.parquet",
        f"actor_rollout_ref.model.path={folder}",
        "actor_rollout_ref.rollout.name=hf",
        "actor_rollout_ref.rollout.hf_batch_size=8",
        "trainer.device=cpu",
        "trainer.val_only=True",
        "trainer.n_gpus_per_node=1",
    ]
    return RolloutWorker(load("ppo_trainer", overrides), [], Place(), False)


def test_answers_of_the_hf_engine_are_scored_before_the_others_are_written(
    worker: RolloutWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tell.py").write_text(TELL)
    manager = RewardManager(max_failure_rate=0, custom=CustomFunction(str(tmp_path / "tell.py")), timeout_s=60.0)
    pool = RewardPool(manager, workers=2, timeout=300)
    pool.ready(120)
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 256, 6 + i).astype(np.int32) for i in range(4)]
    prompts = [Prompt(f"p{i}", i, "mine", token_ids, (), (), str(i), {}) for i, token_ids in enumerate(ids)]
    sampling = Sampling(
        n=4,
        temperature=1.0,
        top_k=-1,
        top_p=1.0,
        do_sample=True,
        max_tokens=30,
        max_context=512,
        ignore_eos=False,
        seed=3,
    )
    sink = pool.open([Prompt("other", 9, "mine", ids[0], (), (), "9", {}), *prompts])
    worker.engine.stop_ids = worker.engine.stop_ids.new_tensor(range(40))  # type: ignore[attr-defined]
    scored_at: list[int] = []
    logits = HFEngine._logits

    def waits(engine: HFEngine, *arguments: Any) -> Any:
        # At the 12th token of each chunk the engine stands still until the pool has scored what has ended so far.
        waits.calls += 1  # type: ignore[attr-defined]
        if waits.calls == 12:  # type: ignore[attr-defined]
            end = time.monotonic() + 120
            while (done := ray.get(pool._hub.progress.remote(sink.ticket))) == 0 and time.monotonic() < end:
                time.sleep(0.02)
            scored_at.append(done)
        return logits(engine, *arguments)

    waits.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(HFEngine, "_logits", waits)
    responses = worker.generate(prompts, sampling, 1, sink, 1)
    assert scored_at and 0 < scored_at[0] < 16, f"{scored_at} answers scored when the 12th token was drawn"
    # The sink belongs to a batch in which another worker serves the first prompt.
    sink.send([(0, 0, "elsewhere", 7)])  # type: ignore[list-item]
    scores, metrics = pool.collect(sink, [1, 4, 4, 4, 4])
    pool.close()
    texts = [decode(worker.tokenizer, answers) for answers in responses]
    expected = manager.score(
        [
            RewardItem(prompt, text, len(response.token_ids))
            for prompt, answers, said in zip(prompts, responses, texts, strict=True)
            for response, text in zip(answers, said, strict=True)
        ]
    )
    assert scores[1:] == expected and len({score.total for score in expected}) > 8
    assert [s.extra["tokens"] for s in scores[1:]] == [len(r.token_ids) for answers in responses for r in answers]
    assert scores[0].extra["tokens"] == 7
    assert metrics["reward/pool/before_end_share"] > 0
