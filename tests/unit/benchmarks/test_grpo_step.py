"""Rows of a run that is there: medians without the warm-up, the worst canary, and memory held more at the end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
WARM, FIRST, SECOND = (
    {
        "timing_s/step": seconds,
        "timing_s/gen": seconds / 2,
        "prompt_length/mean": 30.0,
        "response_length/mean": 10.0,
        "canary/logprob_diff_mean": apart,
        "perf/cpu_memory_resident_gb": held,
    }
    for seconds, apart, held in ((9.0, 0.5, 3.0), (2.0, 0.02, 4.0), (4.0, 0.01, 4.25))
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    config = {
        "data": {"train_batch_size": 8},
        "actor_rollout_ref": {
            "hybrid_engine": True,
            "rollout": {"n": 5, "name": "vllm", "nnodes": 1, "n_gpus_per_node": 2},
        },
        "trainer": {"nnodes": 1, "n_gpus_per_node": 2},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [WARM, {"val-core/acc": 1.0}, FIRST, SECOND]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_rows_of_a_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "grpo_step.py")])
    import grpo_step

    measured = grpo_step.steps_of(run)[1:]
    assert measured == [FIRST, SECOND], "a line of a validation is no step"
    shape = grpo_step.Shape.of_run(run, "two GPUs", measured)
    found = {row.row: row for row in grpo_step.result_rows(shape, measured)}
    assert found["step_s"].value == 3.0
    assert found["step_tokens_per_s_per_gpu"].value == 40 * (30 + 10) / 3.0 / 2
    assert found["generate_tokens_per_s"].value == 40 * 10 / 1.5
    assert found["rest_s"].value == 1.5
    assert found["canary_logprob_diff_mean"].value == 0.02
    assert found["host_growth_gib"].value == 0.25
    assert "gpu_growth_gib" not in found, "what was not logged has no row"
    assert all(row.workload == "two GPUs" and row.samples == 40 for row in found.values())


def test_gpus_of_a_rollout_apart_count(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import grpo_step

    config = yaml.safe_load((run / "config.yaml").read_text())
    config["actor_rollout_ref"]["hybrid_engine"] = False
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    shape = grpo_step.Shape.of_run(run, "apart", [FIRST, SECOND])
    assert (shape.gpus, shape.mode) == (4, "2 ranks, vllm on 2 GPUs of its own")
