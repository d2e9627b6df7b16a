"""EMG from the data step to the test report: `run_emg.sh` with the three-part reward and a judge served here.

On made-up recordings one step; on the published ones, marked slow, three steps from `emg.sh` on.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from emgdb_fixture import write_emgdb
from in_process import sft_here
from runs import SIZE, Data, Launcher, Run, read_lines, sft_overrides

from verl.models.tiny import create_tiny_model, texts_of_parquet
from verl.timeseries import build, get_task, tasks

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "judge"))
from judge_server import JudgeServer, Plan, Seen, completion, good, verdict

KEY = "sk-of-the-emg-test"
STOCK = "Refer to specialist."
PLANS = ("Sample soleus next.", STOCK)


@pytest.fixture(scope="module")
def made_up(work: Path) -> Data:
    """24 windows of 300 samples through the data step: 13 fit, 5 val and 6 test rows."""
    samples = {"emg_healthy": 6 * 300, "emg_myopathy": 9 * 300 + 50, "emg_neuropathy": 9 * 300}
    damaged = {"emg_neuropathy": {41: b"0.01025 5.0,0000"}}
    write_emgdb(work / "emgdb", samples, damaged)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tasks._TASKS, "emg", dataclasses.replace(get_task("emg"), length=300, rows=(18, 6)))
        small = ["style.width=252", "style.height=112"]
        assert build.main(["task=emg", f"source={work / 'emgdb'}", f"output={work / 'emg'}", *small]) in (None, 0)
    return Data(work / "emg")


@pytest.fixture(scope="module")
def published(work: Path, archives: Path, launcher: Launcher) -> Data:
    """The published recordings, as a user makes the folder."""
    folder = work / "emg_real"
    arguments = ["--source", str(archives / "physionet_emgdb"), f"output={folder}"]
    launcher.script("example/data_preprocess/emg.sh", arguments, folder).ok()
    return Data(folder)


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer() as found:
        found.plan = judge
        yield found


def judge(seen: Seen) -> Plan:
    """0.6 in all; depth 0.2 unless the answer says Neuropathy, so that a step holds several values."""
    shown = seen.body["messages"][1]["content"]
    return good(0.6) if '"class": "Neuropathy"' in shown else Plan(completion(verdict(0.6, depth=0.2)))


def taught(data: Data, folder: Path) -> Path:
    """A tiny model that has learned the form of an answer: mostly well formed, the class a guess, short suggestions."""
    for name in ("sft_fit", "sft_val"):
        table = pq.read_table(data.file(name))
        rows = table.to_pylist()
        for number, row in enumerate(rows):
            truth, plan = row["reward_model"]["ground_truth"], PLANS[number % len(PLANS)]
            row["response"] = f"<think>Large spikes.</think><class>{truth}</class><extension>{plan}</extension>"
        folder.mkdir(exist_ok=True)
        pq.write_table(
            pa.Table.from_pylist(rows[:: max(1, len(rows) // 24)], schema=table.schema), folder / f"{name}.parquet"
        )
    size = dataclasses.replace(SIZE, context=1024, max_vocabulary=700)
    short = Data(folder)
    create_tiny_model(folder / "tiny", texts_of_parquet([Path(short.file("sft_fit"))]), size=size, seed=0)
    lengths = ["data.max_length=1024", "data.max_prompt_length=900", "data.max_response_length=48"]
    stop = [
        "trainer.total_epochs=160",
        "trainer.stop_parse_failure=0.05",
        "trainer.test_freq=16",
        "trainer.save_freq=16",
    ]
    run = sft_here(sft_overrides(short, folder / "tiny", folder / "sft", *lengths, *stop), folder / "sft").ok()
    last = (run.folder / "latest_checkpointed_iteration.txt").read_text()
    return run.checkpoint(int(last)) / "actor" / "huggingface"


def train(data: Data, model: Path, folder: Path, server: JudgeServer, launcher: Launcher, steps: int) -> Run:
    """`run_emg.sh` as a user starts it, made small by overrides."""
    small = [
        "data.train_batch_size=4",
        "data.max_response_length=48",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.rollout.temperature=0.4",
        "reward.num_workers=2",
        "trainer.val_before_train=False",
        f"trainer.total_training_steps={steps}",
        f"trainer.test_freq={steps}",
        "trainer.logger=[console]",
        f"trainer.default_local_dir={folder}",
        f"trainer.rollout_data_dir={folder}/rollouts",
        f"trainer.validation_data_dir={folder}/validations",
    ]
    environment = {
        "MODEL_PATH": str(model),
        "DATA": str(data.folder),
        "N_GPUS": "1",
        "JUDGE_URL": server.url,
        "JUDGE_MODEL": "stub",
        "JUDGE_KEY_ENV": "EMG_TEST_KEY",
        "EMG_TEST_KEY": KEY,
    }
    return launcher.script("example/grpo_trainer/run_emg.sh", small, folder, **environment).ok()


def answers_of(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [answer for group in groups for answer in group["answers"]]


def check_parts(answer: dict[str, Any]) -> None:
    parts = answer["parts"]
    assert answer["failed"] is None, answer
    assert ("soft" in parts) == (parts["format"] == parts["label"] == 1.0), answer
    total = 0.1 * parts["format"] + 0.9 * parts["label"] + 0.5 * parts.get("soft", 0.0)
    assert answer["score"] == pytest.approx(total), answer
    if "soft/depth" in answer["extra"]:
        mean = 0.6 if answer["extra"]["soft/depth"] == 0.6 else (3 * 0.6 + 0.2) / 4
        assert parts["soft"] == pytest.approx(min(0.4, mean) if answer["extra"]["soft/capped"] else mean), answer
        extension = answer["text"].partition("<extension>")[2].partition("</extension>")[0]
        letters = "".join(filter(str.isalnum, extension.lower()))
        assert bool(answer["extra"]["soft/capped"]) == ("refertospecialist" in letters), answer


def check_run(run: Run, server: JudgeServer, steps: int) -> None:
    assert sorted(run.steps) == list(range(1, steps + 1))
    trained = [answers_of(run.answers(step)) for step in range(1, steps + 1)]
    validated = [answers_of(read_lines(path)) for path in sorted((run.folder / "validations").glob("*.jsonl"))]
    everything = [answer for group in (*trained, *validated) for answer in group]
    for answer in everything:
        check_parts(answer)
    for step, answers in enumerate(trained, start=1):
        row, soft = run.steps[step], [a["parts"]["soft"] for a in answers if "soft" in a["parts"]]
        assert row["reward/emg_dataset/n"] == len(answers) == 16 and row["reward/failed/count"] == 0
        if soft:
            assert row["reward/emg_dataset/soft/mean"] == pytest.approx(sum(soft) / len(soft))
        assert row["critic/score/mean"] == pytest.approx(sum(a["score"] for a in answers) / len(answers))
    softs = {round(a["parts"]["soft"], 6) for answers in trained for a in answers if "soft" in a["parts"]}
    assert softs - {0.0}, f"no answer was judged: {softs}"
    # Each different answer is asked for once over training and validation.
    asked = [seen.body["messages"][1]["content"].splitlines()[1] for seen in server.seen]
    judged = {a["text"] for a in everything if "soft/depth" in a["extra"]}
    assert len(asked) == len(set(asked)) and 0 < len(asked) <= len(judged)
    assert {seen.headers["authorization"] for seen in server.seen} == {f"Bearer {KEY}"}
    last = {name: value for row in run.rows for name, value in row.items()}
    assert last["judge/asked"] <= len(asked) and last["judge/spent/calls"] <= len(asked)
    assert {"val/test_score/emg_dataset", "val/acc/emg_dataset", "test/acc/emg_dataset"} <= set(last)
    if any("soft" in a["parts"] for a in answers_of(read_lines(run.folder / "validations" / "test.jsonl"))):
        assert 0 <= last["test-aux/emg_dataset/soft/mean@1"] <= 1
    assert run.report("test")["reports"]["emg_dataset"]["failed"] == {}
    check_secrets(run)


def check_secrets(run: Run) -> None:
    """The judge's key is in no file of the run and not in its output; the cache of verdicts is there."""
    assert (run.folder / "judge.sqlite").is_file()
    files = [path for path in run.folder.rglob("*") if path.is_file()]
    assert KEY not in run.out and not [path for path in files if KEY.encode() in path.read_bytes()]


def test_run_emg_trains_one_step_with_the_three_part_reward_on_made_up_recordings(
    work: Path, made_up: Data, server: JudgeServer, launcher: Launcher
) -> None:
    run = train(made_up, taught(made_up, work / "emg_taught"), work / "emg_run", server, launcher, steps=1)
    check_run(run, server, steps=1)


@pytest.mark.slow
def test_run_emg_trains_three_steps_with_the_three_part_reward_on_the_published_recordings(
    work: Path, published: Data, server: JudgeServer, launcher: Launcher
) -> None:
    run = train(
        published, taught(published, work / "emg_real_taught"), work / "emg_real_run", server, launcher, steps=3
    )
    check_run(run, server, steps=3)
