"""vLLM itself on CPU, with real plots: the contract of the wrapper, and the same greedy answers as the hf engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import vllm_contract
from model_fixtures import open_policy, write_tiny
from runs import Data
from transformers import AutoTokenizer
from vllm_contract import GREEDY, OFTEN, EngineContract, Weights, hf_engine, ids, weights_of
from vllm_host import VLLM_SIZE, Host, vllm_path

from verl.models.policy import Policy
from verl.models.tiny import texts_of_parquet
from verl.protocol import Prompt
from verl.utils.dataset.images import ImageSpec
from verl.utils.dataset.patches import PatchSource, open_patches
from verl.utils.dataset.rl_dataset import DatasetOptions, RLDataset, load_rl_dataset


@pytest.fixture(scope="module")
def folder(work: Path, data: Data) -> Path:
    return write_tiny(work / "vllm", size=VLLM_SIZE, texts=texts_of_parquet([Path(data.file("sft_fit"))]))


@pytest.fixture(scope="module")
def rows(folder: Path, data: Data) -> RLDataset:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return load_rl_dataset([data.file("val")], tokenizer, ImageSpec.from_pretrained(folder), DatasetOptions())


@pytest.fixture(scope="module")
def prompts(rows: RLDataset) -> list[Prompt]:
    """Real plots of four rows, one prompt with two of them, and text alone."""
    one, two = rows[0], rows[1]
    both = dataclasses.replace(
        one,
        uid="both",
        token_ids=np.concatenate([one.token_ids, two.token_ids]),
        image_keys=one.image_keys + two.image_keys,
        image_grids=one.image_grids + two.image_grids,
    )
    text = dataclasses.replace(one, uid="text", token_ids=one.token_ids[-20:], image_keys=(), image_grids=())
    return [*rows[:4], both, text]


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    return open_policy(folder)


@pytest.fixture(scope="module")
def patches(folder: Path, rows: RLDataset) -> PatchSource:
    assert rows.images is not None
    return open_patches([rows.images.path], ImageSpec.from_pretrained(folder))


@pytest.fixture(scope="module")
def other(work: Path, data: Data) -> Weights:
    texts = texts_of_parquet([Path(data.file("sft_fit"))])
    return weights_of(write_tiny(work / "vllm_other", seed=1, size=VLLM_SIZE, texts=texts))


@pytest.fixture(scope="module")
def host(folder: Path, rows: RLDataset) -> Iterator[Host]:
    assert rows.images is not None
    with Host(folder, device="cpu", path=vllm_path(), stores=[rows.images.path], stop_ids=OFTEN) as started:
        yield started


class TestVLLMOnCPU(EngineContract):
    """fp32 on both sides."""

    max_difference = 1e-4
    mean_difference = 1e-5

    def test_greedy_answers_to_real_plots_equal_the_hf_engines(
        self, host: Host, prompts: list[Prompt], policy: Policy, patches: PatchSource
    ) -> None:
        for sampling in (GREEDY, dataclasses.replace(GREEDY, ignore_eos=False)):
            found, _ = host.generate(prompts, sampling, 0)
            expected = hf_engine(policy, patches).generate(prompts, sampling, step=0)
            assert ids(found) == ids(expected)
            assert [r.stop_reason for g in found for r in g] == [r.stop_reason for g in expected for r in g]
            self.assert_near([g[0].log_probs for g in found], [g[0].log_probs for g in expected], "greedy")

    def test_answers_do_not_depend_on_the_batch(self, host: Host, prompts: list[Prompt]) -> None:
        together = ids(host.generate(prompts, vllm_contract.SAMPLING, 3)[0])
        alone = [ids(host.generate([prompt], vllm_contract.SAMPLING, 3)[0])[0] for prompt in prompts[::-1]]
        assert alone[::-1] == together
