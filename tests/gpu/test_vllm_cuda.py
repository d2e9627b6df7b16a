"""The contract of the vLLM wrapper on a GPU, in bf16: `tests/vllm_contract.py` with other bounds, and sleep."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from model_fixtures import ODD, SMALL, WIDE, WINDOW, Maker, patch_source, write_tiny
from transformers import AutoTokenizer
from vllm_contract import GREEDY, OFTEN, EngineContract, Weights, ids, weights_held, weights_of
from vllm_host import VLLM_SIZE, Host

from verl.models.policy import Policy, load_policy
from verl.protocol import Prompt
from verl.utils.dataset.patches import PatchSource

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("vllm", reason="needs requirements/gpu.txt", exc_type=ImportError)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("vllm") / "tiny", size=VLLM_SIZE)


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    return load_policy(folder, AutoTokenizer.from_pretrained(folder), dtype=torch.bfloat16).to("cuda")


@pytest.fixture(scope="module")
def patches() -> PatchSource:
    return patch_source()


@pytest.fixture(scope="module")
def prompts(policy: Policy) -> list[Prompt]:
    make = Maker(policy.config)
    grids = [(WIDE,), (), (SMALL, ODD), (SMALL,), (), (WINDOW,)]
    return [make.prompt(*g, text=3 + 2 * i) for i, g in enumerate(grids)]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return weights_of(write_tiny(tmp_path_factory.mktemp("vllm") / "other", seed=1, size=VLLM_SIZE))


@pytest.fixture(scope="module")
def host(folder: Path) -> Iterator[Host]:
    rollout = "actor_rollout_ref.rollout"
    small = (f"{rollout}.gpu_memory_utilization=0.2", f"{rollout}.enforce_eager=False", f"{rollout}.max_num_seqs=64")
    with Host(folder, device="cuda", path=None, stop_ids=OFTEN, overrides=small) as started:
        yield started


class TestVLLMOnCUDA(EngineContract):
    """bf16 on both sides: two kernels may round a logit of this sharp model apart."""

    max_difference = 1.0
    mean_difference = 0.05

    def test_after_a_deep_sleep_and_an_update_the_answers_are_those_of_before(
        self, host: Host, prompts: list[Prompt], policy: Policy
    ) -> None:
        mine = weights_held(policy)
        before = ids(host.generate(prompts, GREEDY, 0)[0])
        host.sleep(2)
        host.wake(["weights"])
        host.update([mine], False)
        host.wake(["kv_cache"])
        host.finish_update()
        assert ids(host.generate(prompts, GREEDY, 0)[0]) == before
