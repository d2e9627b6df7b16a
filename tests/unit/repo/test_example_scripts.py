"""What the example scripts choose by themselves: batch sizes, weights to start from, the format rule, checkpoints."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from example_scripts import arguments_of, checkout, overrides_of, start

from verl.config import batch_plan, load

FIT_ROWS = {"emg": 122, "har": 1914, "ecg": 3707, "ctu": 200, "tee": 56, "rcw": 8747}
"""Rows of fit.parquet that the published archives give (rcw: 80 % of its 10,934)."""

TRAIN_ROWS = {"emg": 163, "har": 2400, "ecg": 4640, "ctu": 250, "tee": 70, "rcw": 10934}

TASKS = (*FIT_ROWS, "own")
WITHOUT_JUDGE = {"JUDGE": "False", "NAME": "pumps"}


def rl_script(task: str) -> str:
    return f"example/grpo_trainer/run_{task}.sh"


def value(overrides: list[str], key: str) -> str:
    """The last one wins."""
    return [o.partition("=")[2] for o in overrides if o.startswith(f"{key}=")][-1]


def write_checkpoint(root: Path, task: str, modality: str = "image", step: int = 7) -> str:
    """What tells that SFT ran there; the folder that GRPO is to start from."""
    run = root / "checkpoints" / f"TimeMaster_{task.upper()}" / f"sft_{modality}"
    run.mkdir(parents=True)
    (run / "latest_checkpointed_iteration.txt").write_text(str(step))
    return f"checkpoints/{run.parent.name}/{run.name}/global_step_{step}/actor/huggingface"


@pytest.mark.parametrize("paper", [False, True], ids=["own split", "published split"])
@pytest.mark.parametrize("task", FIT_ROWS)
def test_the_batch_of_a_script_fits_the_rows_of_its_task(task: str, paper: bool, tmp_path: Path) -> None:
    rows = (TRAIN_ROWS if paper else FIT_ROWS)[task]
    pq.write_table(pa.table({"prompt": ["?"] * rows}), tmp_path / f"{'train' if paper else 'fit'}.parquet")
    settings = WITHOUT_JUDGE | {"MODEL_PATH": "somewhere", "PAPER": str(paper), "N_GPUS": "8", "DATA": str(tmp_path)}
    config = load("ppo_trainer", overrides_of(rl_script(task), tmp_path / "bin", **settings))
    plan = batch_plan(config, rows)
    assert plan.optimizer_steps_per_step == 2 and plan.steps_per_epoch >= 1
    assert plan.prompts_per_step == min(rows, 64)


@pytest.mark.parametrize(
    ("rows", "ranks", "batch", "mini"),
    [(500, 2, 64, 32), (63, 2, 62, 31), (14, 8, 14, 14), (1, 1, 1, 1)],
)
def test_a_data_set_of_ones_own_chooses_the_batch_by_its_rows(
    rows: int, ranks: int, batch: int, mini: int, tmp_path: Path
) -> None:
    pq.write_table(pa.table({"prompt": ["?"] * rows}), tmp_path / "fit.parquet")
    settings = {"NAME": "pumps", "MODEL_PATH": "somewhere", "DATA": str(tmp_path), "N_GPUS": str(ranks)}
    done = start(rl_script("own"), tmp_path / "bin", **settings)
    assert f"{batch} prompts a step, {mini} an update" in done.stdout
    config = load("ppo_trainer", arguments_of(tmp_path / "bin"))
    assert (config.data.train_batch_size, config.actor_rollout_ref.actor.ppo_mini_batch_size) == (batch, mini)
    assert batch_plan(config, rows).steps_per_epoch >= 1


@pytest.mark.parametrize("task", TASKS)
def test_grpo_starts_from_the_last_checkpoint_of_the_sft_script(task: str, tmp_path: Path) -> None:
    root = checkout(tmp_path / "clone")
    done = start(rl_script(task), tmp_path / "bin", root=root, **WITHOUT_JUDGE)
    assert done.returncode == 2 and f"run example/sft/run_{task}_sft.sh first" in done.stderr
    weights = write_checkpoint(root, "pumps" if task == "own" else task)
    found = overrides_of(rl_script(task), tmp_path / "bin", root=root, **WITHOUT_JUDGE)
    assert value(found, "actor_rollout_ref.model.path") == weights


def test_ctu_prefers_the_published_checkpoint_for_plots_alone_and_says_so(tmp_path: Path) -> None:
    root = checkout(tmp_path / "clone")
    own = {modality: write_checkpoint(root, "ctu", modality) for modality in ("image", "numeric")}
    published = "./checkpoints/TimeMaster-SFT-Qwen2.5-VL-3B-CTU"
    chosen = {"image": own["image"], "numeric": own["numeric"]}
    for exists in (False, True):
        if exists:
            (root / published).mkdir()
            chosen["image"] = published
        for modality, weights in chosen.items():
            done = start(rl_script("ctu"), tmp_path / "bin", root=root, MODALITY=modality)
            assert done.returncode == 0 and f"run_ctu.sh: weights of {weights}\n" in done.stdout
    evaluated = overrides_of(rl_script("ctu"), tmp_path / "bin", root=root, EVAL="True")
    assert value(evaluated, "actor_rollout_ref.model.path") == published


def test_eval_never_guesses_whose_weights_to_score(tmp_path: Path) -> None:
    root = checkout(tmp_path / "clone")
    for task in ("ctu", "tee"):
        write_checkpoint(root, task)
        done = start(rl_script(task), tmp_path / "bin", root=root, EVAL="True", **WITHOUT_JUDGE)
        assert done.returncode == 2 and "EVAL=True scores the weights of MODEL_PATH" in done.stderr


def test_emg_without_a_judge_says_what_to_set(tmp_path: Path) -> None:
    def run(*extra: str, **settings: str) -> tuple[int, str]:
        done = start(rl_script("emg"), tmp_path / "bin", *extra, **settings)
        return done.returncode, done.stderr

    code, said = run(MODEL_PATH="somewhere")
    assert code == 2 and all(name in said for name in ("OPENAI_API_KEY", "JUDGE_URL", "JUDGE_MODEL", "JUDGE=False"))
    assert run(MODEL_PATH="somewhere", JUDGE_KEY_ENV="MY_KEY")[0] == 2
    assert run("reward.judge.max_calls=5", MODEL_PATH="somewhere")[0] == 2
    root = checkout(tmp_path / "clone")
    done = start(rl_script("emg"), tmp_path / "bin", root=root)
    assert "run_emg_sft.sh" in done.stderr and "judge" not in done.stderr, "the model is asked for first"
    for settings in (
        {"JUDGE": "False"},
        {"OPENAI_API_KEY": "sk"},
        {"JUDGE_KEY_ENV": "null"},
        {"JUDGE_KEY_ENV": "MY_KEY", "MY_KEY": "sk"},
        {"RAY_ADDRESS": "10.0.0.1:6379"},
    ):
        assert run(MODEL_PATH="somewhere", **settings) == (0, "")
    assert run("reward.judge.enable=False", MODEL_PATH="somewhere") == (0, "")


@pytest.mark.parametrize("task", TASKS)
def test_both_stages_and_eval_count_answers_by_one_rule(task: str, tmp_path: Path) -> None:
    """Reports before and after GRPO compare. The published protocol keeps the published rule."""
    settings = WITHOUT_JUDGE | {"MODEL_PATH": "somewhere", "DATA": str(tmp_path)}
    sft = overrides_of(f"example/sft/run_{task}_sft.sh", tmp_path / "bin", **settings)
    rl = [overrides_of(rl_script(task), tmp_path / "bin", **settings, EVAL=eval_) for eval_ in ("False", "True")]
    assert [value(found, "reward.format") for found in (sft, *rl)] == ["strict"] * 3
    paper = overrides_of(rl_script(task), tmp_path / "bin", **settings, PAPER="True", EVAL="True")
    assert value(paper, "reward.format") == "loose"


@pytest.mark.parametrize("task", TASKS)
def test_sft_keeps_only_the_checkpoint_that_grpo_starts_from(task: str, tmp_path: Path) -> None:
    settings = {"MODEL_PATH": "somewhere", "NAME": "pumps"}
    found = overrides_of(f"example/sft/run_{task}_sft.sh", tmp_path / "bin", **settings)
    assert value(found, "trainer.max_actor_ckpt_to_keep") == "1"


def test_emg_passes_the_judge_only_where_there_is_one(tmp_path: Path) -> None:
    """The run would warn of settings without effect that nobody made."""
    with_judge = {"MODEL_PATH": "somewhere", "JUDGE_KEY_ENV": "null", "JUDGE_URL": "http://here/v1"}
    found = overrides_of(rl_script("emg"), tmp_path / "bin", **with_judge)
    assert value(found, "reward.judge.enable") == "True" and value(found, "reward.judge.base_url") == "http://here/v1"
    without = overrides_of(rl_script("emg"), tmp_path / "bin", **with_judge, JUDGE="False")
    assert [o for o in without if o.startswith("reward.judge.")] == []
