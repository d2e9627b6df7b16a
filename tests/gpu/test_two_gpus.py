"""Whole runs on two GPUs, with vLLM and a tiny model: two engines, one engine over both, actor and rollout apart.

By hand, on a machine with two GPUs: `python3 -m pytest -m gpu tests/gpu/test_two_gpus.py -v --durations=0`.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from vllm_host import VLLM_SIZE

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration" / "trainer"))

from runs import Data, Launcher, rl_overrides

from verl.models.tiny import create_tiny_model, texts_of_parquet
from verl.timeseries import build

if torch.cuda.device_count() < 2:
    pytest.skip(f"needs two CUDA devices, has {torch.cuda.device_count()}", allow_module_level=True)
pytest.importorskip("vllm", reason="needs requirements/gpu.txt", exc_type=ImportError)

ROLLOUT = "actor_rollout_ref.rollout"
COMMON = (
    f"{ROLLOUT}.name=vllm",
    f"{ROLLOUT}.gpu_memory_utilization=0.2",
    f"{ROLLOUT}.max_num_seqs=64",
    # told, not measured: the three may run side by side
    f"+{ROLLOUT}.engine_kwargs.vllm.kv_cache_memory_bytes={2 << 30}",
    "actor_rollout_ref.actor.entropy_coeff=0.5",  # so that weights move whatever the scores
    "actor_rollout_ref.actor.fsdp_config.reshard_after_forward=True",
    "trainer.device=cuda",
    "trainer.total_training_steps=4",
    "trainer.test_freq=1",
)
PLACEMENTS = {
    "two engines": ("trainer.n_gpus_per_node=2", f"{ROLLOUT}.free_cache_engine=True"),
    "one engine over both": (
        "trainer.n_gpus_per_node=2",
        f"{ROLLOUT}.tensor_model_parallel_size=2",
        f"{ROLLOUT}.free_cache_engine=True",
    ),
    "apart": (
        "trainer.n_gpus_per_node=1",
        "actor_rollout_ref.hybrid_engine=False",
        f"{ROLLOUT}.nnodes=1",
        f"{ROLLOUT}.n_gpus_per_node=1",
    ),
}
REFUSED = 4.0
"""Of the plain model's own bf16 error: the bound of `verl/workers/rollout/canary.py`."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("two_gpus") / "basic_motions"
    assert build.main(["task=basic_motions", f"output={folder}"]) in (None, 0)
    return Data(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, data: Data) -> Path:
    folder = tmp_path_factory.mktemp("two_gpus") / "tiny"
    create_tiny_model(folder, texts_of_parquet([Path(data.file("sft_fit"))]), size=VLLM_SIZE, seed=0)
    return folder


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with tempfile.TemporaryDirectory(prefix="tm", ignore_cleanup_errors=True) as folder:
        yield Launcher(Path(folder))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_four_steps_and_the_canary_after_every_transfer(
    placement: str, tmp_path: Path, data: Data, model: Path, launcher: Launcher
) -> None:
    folder = tmp_path / "run"
    overrides = rl_overrides(data, model, folder, *COMMON, *PLACEMENTS[placement])
    run = launcher.run("main_ppo", overrides, folder).ok()
    line = next(line for line in run.out.splitlines() if line.startswith("canary ("))
    means = {name.strip(): float(mean) for name, mean in re.findall(r"([\w ]+?) worst \S+, mean ([^;\s]+)", line)}
    bound = REFUSED * means["plain bf16 to plain fp32"]
    assert means["engine to actor"] <= bound, line
    assert sorted(run.steps) == [1, 2, 3, 4]
    for step, row in run.steps.items():
        assert row["canary/logprob_diff_mean"] <= bound, (step, row["canary/logprob_diff_mean"], line)
        assert row["actor/grad_norm"] > 0, step
        assert row["weight_sync/checked"] == 1.0, "both ends of the transfer summed the same bits"
    print(f"\n{placement}: {line}")
