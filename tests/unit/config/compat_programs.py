"""As `compat_effects.py`, for supervised training, generation and evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from compat_effects import dataset, of_build, of_engine, of_images, of_rewards, of_tokenizer, of_workers, schedule_of
from compat_recorder import Calls, quiet, run_folder

from verl.config import EvaluationConfig, GenerationConfig, PPOConfig, SFTConfig
from verl.protocol import Score
from verl.trainer import main_eval, main_generation
from verl.trainer.sft_trainer import SFTTrainer
from verl.utils.dataset.rl_dataset import SFTDataset, SFTExample


def sft_effects(config: SFTConfig) -> dict[str, Any]:
    """Read the data, build the engines, train to the end, validate and save."""
    calls = Calls()
    with quiet(), run_folder(calls) as folder, _one_rank(calls), of_build(calls):
        run = SFTTrainer(config)
        run.run_dir = folder
        run.scorer = MagicMock(write_samples=calls.to("write_samples"), tracker_samples=calls.to("tracker_samples", []))
        run.scorer.score = lambda prompts, responses: []
        run.engine = MagicMock(step=calls.to("step", {"loss": 0.0, "grad_norm": 1.0, "lr": 1.0, "skipped": 0.0}))
        run.fit()
    calls.made.append(("schedule", schedule_of(calls)))
    return {"run": calls.made}


@contextlib.contextmanager
def _one_rank(calls: Calls) -> Iterator[None]:
    manager = MagicMock(find=calls.to("find", lambda *_: None), saving=calls.to("saving"))
    tracker = MagicMock(log=MagicMock(), log_samples=calls.to("log_samples"))

    def examples(*_: Any) -> SFTDataset:
        of = tuple(SFTExample(p, np.arange(3 + p.row % 4, dtype=np.int32)) for p in dataset())
        return SFTDataset(of, None, 0, "digest")

    silent = ("seed_draws", "import_external", "open_tokenizer", "check_scorable", "open_patches", "load_policy")
    rank = calls.replacing(
        "verl.trainer.sft_trainer",
        *(*silent, "HFEngine", "stop_ids"),
        resolve_device="cuda",
        memory_metrics={},
        start_process_group_from_env=(0, 1),
        check_model_folder=Path("model"),
        node_leader_first=contextlib.nullcontext(),
        load_sft_dataset=examples,
        load_rl_dataset=dataset,
        CheckpointManager=lambda *_, **__: manager,
        Tracker=lambda *_, **__: tracker,
        run_identity={},
        save_engine={},
        full_parameters={},
        parameter_table="table",
        all_gather_objects=lambda value: [value],
        to_dict={},
        to_yaml="",
    )
    sizes = calls.replacing("verl.models.sizes.ModelSizes", from_folder=MagicMock(patch_weight=0.24))
    with rank, sizes, of_images(calls), of_rewards(calls), calls.replacing("torch.distributed", "barrier"):
        yield


def generation_effects(config: GenerationConfig) -> dict[str, Any]:
    """Read the prompts, ask for the engines, answer in batches, write; then start the engines that were asked for."""
    calls, started = Calls(), Calls()
    asked: list[PPOConfig] = []

    def start(engine: PPOConfig, *_: Any, **__: Any) -> Any:
        asked.append(engine)
        workers = MagicMock()
        workers.rollouts.generate = calls.to("generate", lambda part, *_, **__: part)
        return workers

    program = calls.replacing("verl.trainer.main_generation", "write_responses", _writable=lambda path: path)
    with (
        quiet(),
        program,
        of_images(calls),
        of_tokenizer(calls),
        calls.replacing("verl.models.policy", check_model_folder=Path("model")),
        calls.replacing("verl.trainer.ppo.cluster", start_workers=start),
        calls.replacing("verl.utils.dataset.rl_dataset", load_rl_dataset=dataset),
        calls.replacing("verl.workers.rollout.forward", decode=["text"]),
    ):
        main_generation.generate(config)
    with quiet():
        of_workers(asked[0], started)
        of_engine(asked[0], started, waits_for_weights=False)
    return {"run": calls.made, "engines": started.made}


def evaluation_effects(config: EvaluationConfig) -> dict[str, Any]:
    """Score one of two files that have a second column of every kind."""
    calls = Calls()
    manager = MagicMock(score=calls.to("score", lambda items: [Score.ok(len(i.text) / 10) for i in items]))
    scorer = calls.replacing("verl.trainer.main_eval", RewardManager=lambda *_, **__: manager)
    with quiet(), run_folder(calls) as folder, contextlib.chdir(folder), scorer:
        for name in ("answers", "other"):
            columns: dict[str, Any] = {}
            for number, suffix in enumerate(("", "2")):
                columns |= {
                    f"prompt{suffix}": [f"question {number}"],
                    f"responses{suffix}": [[f"{name} {number}"]],
                    f"data_source{suffix}": [f"source {number}"],
                    f"reward_model{suffix}": [{"ground_truth": f"label {number}"}],
                }
            path = Path("data/ctu_image") / f"{name}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table(columns), path)
        main_eval.evaluate(config)
    return {"run": calls.made}
