"""Runs that train adapters (LoRA): what engines and checkpoints get, what the reference is, resuming, SFT."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process import rl_here, sft_here
from peft import PeftModel
from runs import Data, Launcher, Run, begin_at, differences, read_lines, rl_overrides, sft_overrides
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration
from vllm_host import VLLM_SIZE, vllm_path

from verl.models.lora import is_adapter
from verl.models.policy import load_policy
from verl.models.tiny import create_tiny_model, texts_of_parquet
from verl.workers.actor.engine import PackedRunner
from verl.workers.actor.worker import ActorWorker

MODEL = "actor_rollout_ref.model"
LORA = (f"{MODEL}.lora_rank=4", f"{MODEL}.lora_alpha=8")
THREE = (
    *LORA,
    "actor_rollout_ref.actor.use_kl_loss=True",
    "actor_rollout_ref.actor.kl_loss_coef=0.1",
    "actor_rollout_ref.actor.entropy_coeff=0.01",  # so that weights move whatever the scores
    "actor_rollout_ref.actor.optim.lr=1e-2",
    "trainer.total_training_steps=3",
    "trainer.save_freq=1",
)


def weights(folder: Path) -> dict[str, Tensor]:
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return {name: value.detach() for name, value in plain.named_parameters()}


def by_peft(base: Path, adapter: Path) -> dict[str, Tensor]:
    """The base with the adapter merged by peft."""
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(plain, adapter).merge_and_unload()
    return {name: value.detach() for name, value in merged.named_parameters()}


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys() and len(found) > 20
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.fixture(scope="module")
def reference_apart() -> list[float]:
    """By reference pass: the largest distance to the log-probs of the model that the run began with."""
    return []


@pytest.fixture(scope="module")
def run(work: Path, data: Data, start: Path, reference_apart: list[float]) -> Run:
    """Three steps with the hf engine, and with a KL term: the reference is asked in every step."""
    made = ActorWorker.ref_log_probs

    def compared(self: ActorWorker, micro_batches: Sequence[Sequence[Any]]) -> dict[int, Any]:
        found = made(self, micro_batches)
        base = load_policy(start, self.tokenizer, dtype=torch.float32)
        runner = PackedRunner(base, self.patches, torch.device("cpu"), self.engine.runner.temperature)
        wanted = runner.log_probs(micro_batches)
        reference_apart.append(max(float(np.abs(found[i] - wanted[i]).max()) for i in wanted))
        return found

    folder = work / "lora"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ActorWorker, "ref_log_probs", compared)
        return rl_here(rl_overrides(data, start, folder, *THREE), folder).ok()


def test_the_reference_is_the_base_without_a_copy_of_it(run: Run, reference_apart: list[float]) -> None:
    assert len(reference_apart) == 3 and max(reference_apart) < 1e-6
    assert run.extra["workers"]["actor"].reference is None
    assert "reference: the actor without its adapters" in run.out
    assert run.steps[1]["actor/kl_loss"] < 0.5 * run.steps[3]["actor/kl_loss"], "the actor did not leave the reference"


def test_the_engine_holds_the_merged_weights_and_so_does_the_exported_model(run: Run, start: Path) -> None:
    checkpoint = run.checkpoint(3) / "actor"
    wanted = by_peft(start, checkpoint / "lora_adapter")
    engine = dict(run.extra["workers"]["rollout"].engine.policy.hf.named_parameters())
    assert not any(map(is_adapter, engine))
    assert_near({name: value.detach() for name, value in engine.items()}, wanted)
    assert_near(weights(checkpoint / "huggingface"), wanted)


def test_adapters_alone_are_trained_and_stored(run: Run, start: Path) -> None:
    stored: dict[str, Tensor] = {}
    for file in (run.checkpoint(3) / "actor" / "model").glob("*.safetensors"):
        stored |= load_file(file)
    assert stored and all(map(is_adapter, stored))
    before, after = weights(start), weights(run.checkpoint(3) / "actor" / "huggingface")
    adapted = {f"{name.rsplit('.', 1)[0]}.weight" for name in stored}
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {name for name in before if name in adapted}
    table = re.search(r"([\d,]+) of ([\d,]+) parameters trained", run.out)
    assert table is not None
    assert int(table[1].replace(",", "")) == sum(value.numel() for value in stored.values())


def test_a_resumed_run_equals_an_uninterrupted_one_exactly(work: Path, data: Data, start: Path, run: Run) -> None:
    folder = begin_at(work / "lora_resumed", run, 2)
    resumed = rl_here(rl_overrides(data, start, folder, *THREE), folder).ok()
    assert resumed.answers(3) == run.answers(3)
    assert differences(resumed.steps[3], run.steps[3]) == []
    mine, theirs = (r.checkpoint(3) / "actor" / "lora_adapter" / "adapter_model.safetensors" for r in (resumed, run))
    assert mine.read_bytes() == theirs.read_bytes()


def test_a_run_starts_from_an_adapter_and_its_reference_is_the_base(
    work: Path, data: Data, start: Path, run: Run
) -> None:
    folder, adapter = work / "lora_again", run.checkpoint(3) / "actor" / "lora_adapter"
    more = (f"{MODEL}.lora_adapter_path={adapter}", "actor_rollout_ref.actor.use_kl_loss=True", "trainer.save_freq=1")
    again = rl_here(rl_overrides(data, start, folder, *more, "actor_rollout_ref.actor.optim.lr=0"), folder).ok()
    assert again.steps[1]["actor/kl_loss"] > 1e-6, "the adapter was not there, or the reference had it too"
    assert_near(
        weights(again.checkpoint(1) / "actor" / "huggingface"), weights(run.checkpoint(3) / "actor/huggingface")
    )


def test_an_evaluation_scores_the_adapter_it_is_given(work: Path, data: Data, start: Path, run: Run) -> None:
    """The answers are those of the merged model, and not of the base."""
    checkpoint = run.checkpoint(3) / "actor"
    greedy = ("trainer.val_only=True", "actor_rollout_ref.rollout.val_kwargs.do_sample=False")

    def answers(name: str, model: Path, *more: str) -> list[str]:
        folder = work / f"lora_eval_{name}"
        dump = f"trainer.validation_data_dir={folder / 'answers'}"
        done = rl_here(rl_overrides(data, model, folder, *greedy, dump, *more), folder).ok()
        if more:
            assert f"{start} and the adapter {checkpoint / 'lora_adapter'}" in done.out
        (file,) = (folder / "answers").glob("*.jsonl")
        return [answer["text"] for group in read_lines(file) for answer in group["answers"]]

    adapted = answers("adapter", start, f"{MODEL}.lora_adapter_path={checkpoint / 'lora_adapter'}")
    assert adapted == answers("merged", checkpoint / "huggingface")
    assert adapted != answers("base", start)


def test_an_adapter_of_another_rank_is_refused(work: Path, data: Data, start: Path, run: Run) -> None:
    folder, adapter = work / "lora_other", run.checkpoint(3) / "actor" / "lora_adapter"
    more = (f"{MODEL}.lora_adapter_path={adapter}", f"{MODEL}.lora_rank=2")
    failed = rl_here(rl_overrides(data, start, folder, *more), folder)
    assert failed.code == 2 and "has 4: leave lora_rank out, the folder decides" in failed.err


SFT = (
    "model.lora_rank=4",
    "model.target_modules=[q_proj,v_proj]",
    "model.freeze=['*.layers.0.*']",
    "trainer.total_training_steps=2",
    "trainer.save_freq=2",
    "optim.lr=1e-2",
)


@pytest.fixture(scope="module")
def sft(work: Path, data: Data, tiny: Path) -> Run:
    folder = work / "lora_sft"
    return sft_here(sft_overrides(data, tiny, folder, *SFT), folder).ok()


def test_sft_trains_adapters_and_freezes_by_pattern(sft: Run, tiny: Path) -> None:
    before, after = weights(tiny), weights(sft.checkpoint(2) / "actor" / "huggingface")
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed and all(re.search(r"layers\.[1-9].*\.(q|v)_proj\.weight", name) for name in changed)
    assert_near(after, by_peft(tiny, sft.checkpoint(2) / "actor" / "lora_adapter"))


def test_a_resume_path_alone_is_where_supervised_training_goes_on(work: Path, data: Data, tiny: Path, sft: Run) -> None:
    folder = work / "lora_sft_on"
    more = (*SFT, f"trainer.resume_path={sft.checkpoint(2)}", "trainer.total_training_steps=3")
    done = sft_here(sft_overrides(data, tiny, folder, *more), folder).ok()
    assert f"resumed {sft.checkpoint(2)}" in done.out and list(done.steps) == [3]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.lora_alpha=32", "was made with model.lora_alpha=16, this run has 32: set it to 16"),
        ("model.lora_rank=2", "was made with model.lora_rank=4, this run has 2"),
        ("model.lora_rank=0", "holds adapters of rank 4, this run has model.lora_rank=0: set it to 4"),
        ("model.target_modules=[q_proj]", "model.target_modules less exclude_modules name"),
    ],
)
def test_resuming_with_other_adapters_is_refused_by_name(
    work: Path, data: Data, tiny: Path, sft: Run, override: str, message: str
) -> None:
    folder = work / "lora_sft_refused"
    more = (*SFT, f"trainer.resume_path={sft.checkpoint(2)}", "trainer.total_training_steps=3", override)
    done = sft_here(sft_overrides(data, tiny, folder, *more), folder)
    assert done.code == 2 and message in done.err and str(sft.checkpoint(2)) in done.err, done.err


def test_rl_refuses_the_adapters_of_another_scale_too(work: Path, data: Data, start: Path, run: Run) -> None:
    more = (*THREE, f"{MODEL}.lora_alpha=16", "trainer.resume_mode=resume_path")
    folder = work / "lora_rl_refused"
    path = f"trainer.resume_from_path={run.checkpoint(3)}"
    done = rl_here(rl_overrides(data, start, folder, *more, path), folder)
    assert done.code == 2 and "was made with actor_rollout_ref.model.lora_alpha=8, this run has 16" in done.err
    assert not folder.exists(), "refused before anything is written"


def test_vllm_gets_the_merged_weights_and_agrees_with_the_adapted_actor(
    work: Path, data: Data, launcher: Launcher
) -> None:
    """Two ranks, two replicas: what each engine was given last, and the canary's comparison after every transfer."""
    model, folder, synced = work / "lora_vllm_model", work / "lora_vllm", work / "lora_vllm_synced"
    create_tiny_model(model, texts_of_parquet([Path(data.file("sft_fit"))]), size=VLLM_SIZE, seed=0)
    more = ("actor_rollout_ref.rollout.name=vllm", "trainer.n_gpus_per_node=2", "trainer.test_freq=1",
            f"{MODEL}.external_lib=synced_weights")  # fmt: skip
    path = os.pathsep.join([vllm_path(), str(Path(__file__).parent)])
    overrides = rl_overrides(data, model, folder, *THREE, *more)
    run = launcher.run("main_ppo", overrides, folder, PYTHONPATH=path, TIMEMASTER_SYNCED=str(synced)).ok()
    for step in (1, 2, 3):
        assert run.steps[step]["canary/logprob_diff_max"] <= 1e-3
        assert run.steps[step]["training/rollout_probs_diff_max"] <= 1e-3
    assert run.steps[3]["actor/kl_loss"] > 1e-4, "the adapters hardly moved, so nothing worth a look was merged"
    last, base = run.checkpoint(3) / "actor", weights(model)
    wanted = by_peft(model, last / "lora_adapter")
    assert max(float((value - base[name]).abs().max()) for name, value in wanted.items()) > 1e-2
    assert_near(weights(last / "huggingface"), wanted)
    engines = sorted(synced.glob("*.safetensors"))
    assert len(engines) == 2
    for file in engines:
        assert_near(load_file(file), wanted)
