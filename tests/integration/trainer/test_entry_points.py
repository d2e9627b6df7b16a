"""Every further entry point on three rows: answers of a file, their scores, the two steps of the data, old names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from in_process import generation_here
from model_fixtures import write_tiny
from runs import ROOT, Data, Launcher, Run, sft_overrides

from verl.config.loader import load, resolve
from verl.trainer import main_eval

CLASSES = ("Standing", "Running", "Walking", "Badminton")


@pytest.fixture(scope="module")
def rows(work: Path, data: Data) -> str:
    return data.edited(work / "three.parquet", "test", lambda number, row: None, rows=3)


def generation(rows: str, model: Path, output: Path, *extra: str) -> list[str]:
    return [
        f"data.path={rows}",
        f"data.output_path={output}",
        "data.n_samples=2",
        "data.batch_size=2",
        f"model.path={model}",
        "rollout.name=hf",
        "rollout.prompt_length=96",
        "rollout.response_length=24",
        "trainer.n_gpus_per_node=1",
        "trainer.device=cpu",
        *extra,
    ]


@pytest.fixture(scope="module")
def answers(work: Path, rows: str, start: Path) -> Run:
    output = work / "answers.parquet"
    return generation_here(generation(rows, start, output, "rollout.top_k=-1", "rollout.top_p=1.0"), output).ok()


def test_generation_keeps_the_rows_and_adds_the_answers(answers: Run, rows: str) -> None:
    given, made = pq.read_table(rows), pq.read_table(answers.folder)
    assert made.column_names == [*given.column_names, "responses"]
    assert made.drop_columns(["responses"]).to_pylist() == given.to_pylist()
    texts = made.column("responses").to_pylist()
    assert [len(of_row) for of_row in texts] == [2, 2, 2] and all(text for of_row in texts for text in of_row)
    assert "generation: 3 of 3 rows" in answers.out


def test_the_answers_do_not_depend_on_ranks_or_batches(
    answers: Run, work: Path, rows: str, start: Path, launcher: Launcher
) -> None:
    """Through Ray, two engines, one batch; in the test's process one engine and batches of two."""
    output = work / "answers_of_two.parquet"
    more = ("rollout.top_k=-1", "rollout.top_p=1.0", "data.batch_size=128", "trainer.n_gpus_per_node=2")
    run = launcher.run("main_generation_server", generation(rows, start, output, *more), output)
    assert run.code == 0, run.out
    assert pq.read_table(output).column("responses") == pq.read_table(answers.folder).column("responses")


def test_the_picture_reaches_the_model(work: Path, data: Data) -> None:
    """The same rows with other plots get other answers at the same noise, from a model that is not trained yet."""
    model = write_tiny(work / "sharp")
    pictures = [row["images"] for row in pq.read_table(data.file("test")).slice(10, 3).to_pylist()]
    texts = []
    for name, swap in (("own", False), ("others", True)):
        (work / name).mkdir()  # the file's name is a part of the noise: it stays the same

        def edit(number: int, row: dict[str, Any], swap: bool = swap) -> None:
            row.update({"images": pictures[number]} if swap else {})

        output = work / name / "answers.parquet"
        source = data.edited(work / name / "three.parquet", "test", edit, rows=3)
        sampling = ("rollout.top_k=-1", "rollout.top_p=1.0", "rollout.prompt_length=700")
        generation_here(generation(source, model, output, *sampling), output).ok()
        texts.append(pq.read_table(output).column("responses").to_pylist())
    assert all(own != other for own, other in zip(*texts, strict=True)), texts


def test_rows_without_pictures_truth_or_source_get_answers_too(work: Path, tiny: Path) -> None:
    source, output = work / "texts.parquet", work / "text_answers.parquet"
    pq.write_table(pa.table({"prompt": ["Which class?", "And now?", "Why?"]}), source)
    run = generation_here(generation(str(source), tiny, output, "rollout.do_sample=False", "data.n_samples=1"), output)
    assert run.code == 0, run.err
    assert [len(of_row) for of_row in pq.read_table(output).column("responses").to_pylist()] == [1, 1, 1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.prompt_length=8", "data.max_prompt_length=8"),
        ("data.path=absent.parquet", "absent.parquet: no such data file"),
        ("model.path=absent", "model.path=absent: no config.json there"),
    ],
)
def test_generation_says_what_it_cannot_do_and_writes_nothing(
    work: Path, rows: str, tiny: Path, override: str, message: str
) -> None:
    output = work / "not_written.parquet"
    run = generation_here(generation(rows, tiny, output, override), output)
    assert run.code == 2 and message in run.err, run.err
    assert not output.exists()


def test_evaluation_scores_what_generation_wrote(answers: Run, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three hand-made answers a row: right, wrong, unreadable."""
    table = pq.read_table(answers.folder)
    truths = [row["ground_truth"] for row in table.column("reward_model").to_pylist()]
    wrong = [next(name for name in CLASSES if name != truth) for truth in truths]
    texts: list[Any] = [
        [f"<think>a</think><class>{right}</class>", f"<think>a</think><class>{other}</class>", "no idea"]
        for right, other in zip(truths, wrong, strict=True)
    ]
    scored, report = work / "scored.parquet", work / "report.json"
    index = table.column_names.index("responses")
    pq.write_table(table.set_column(index, "responses", pa.array(texts)), scored)
    assert main_eval.main([f"data.path={scored}", f"data.report_path={report}"]) == 0
    shown = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    source = "basic_motions_dataset"
    assert shown[f"acc/{source}"] == "0.3333"
    assert float(shown[f"test_score/{source}"]) == pytest.approx((1.0 + 0.1 + 0.0) / 3, abs=1e-4)
    assert json.loads(report.read_text())[source]["classification"]["parse_failure_rate"] == pytest.approx(1 / 3)


def test_evaluation_takes_a_users_function_and_a_single_text_a_row(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    function, file = work / "length.py", work / "single.parquet"
    function.write_text("def compute_score(data_source, solution_str, ground_truth, extra_info):\n    return 0.25\n")
    columns = {
        "data_source": ["mine"] * 3,
        "responses": ["a", "bb", "ccc"],
        "reward_model": [{"ground_truth": "x"}] * 3,
    }
    pq.write_table(pa.table(columns), file)
    assert main_eval.main([f"data.path={file}", f"custom_reward_function.path={function}"]) == 0
    assert "test_score/mine: 0.2500" in capsys.readouterr().out
    assert main_eval.main([f"data.path={file}"]) == 2
    assert "mine" in capsys.readouterr().err
    assert main_eval.main([f"data.path={file}", "data.response_key=answer"]) == 2
    assert "no column 'answer' (data.response_key)" in capsys.readouterr().err


def test_evaluation_that_cannot_score_too_many_answers_ends_with_one_line(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    function, file, report = work / "broken.py", work / "unscored.parquet", work / "unscored.json"
    function.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n    raise KeyError(1)\n"
    )
    pq.write_table(pa.table({"data_source": ["m"], "responses": ["a"], "reward_model": [{"ground_truth": "x"}]}), file)
    options = [f"data.path={file}", f"custom_reward_function.path={function}", f"data.report_path={report}"]
    assert main_eval.main(options) == 1
    shown = capsys.readouterr()
    (line,) = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert "1 of 1" in line and "reward.max_failure_rate" in line and "KeyError" in line
    assert shown.out == "" and not report.exists()


def test_the_old_name_of_the_supervised_trainer_runs_under_torchrun(
    work: Path, data: Data, tiny: Path, launcher: Launcher
) -> None:
    rows = data.edited(work / "sft_three.parquet", "sft_fit", lambda number, row: None, rows=3)
    folder = work / "fsdp_sft"
    files = (f"data.train_files={rows}", f"data.val_files={rows}", "data.train_batch_size=3")
    steps = ("trainer.total_training_steps=1", "trainer.save_freq=-1")
    run = launcher.torchrun(1, sft_overrides(data, tiny, folder, *files, *steps), folder, module="fsdp_sft_trainer")
    assert run.ok().rows[-1]["step"] == 1 and (run.checkpoint(1) / "actor" / "huggingface").is_dir()
    bars = [
        line for line in (run.out + run.err).splitlines() if "Writing model shards" in line or "Loading weights" in line
    ]
    assert not bars, bars


PROGRAMS = {
    ("verl.trainer.fsdp_sft_trainer",): "model.partial_pretrain",
    ("verl.trainer.main_generation",): "data.output_path",
    ("verl.trainer.main_generation_server",): "data.output_path",
    ("verl.trainer.main_eval",): "data.response_key",
    ("verl.trainer.main_ppo",): "actor_rollout_ref.rollout.n",
    ("verl.model_merger", "merge"): "--target_dir",
}
"""Command -> a setting that its help must name."""


@pytest.fixture(scope="module")
def helps() -> dict[tuple[str, ...], subprocess.Popen[str]]:
    """All programs at once: most of their time goes into imports."""
    started = {}
    for command in PROGRAMS:
        line = [sys.executable, "-m", *command, "--help"]
        started[command] = subprocess.Popen(
            line,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "COLUMNS": "160"},
        )
    return started


@pytest.mark.parametrize("command", PROGRAMS, ids=" ".join)
def test_every_program_answers_help_with_its_settings(
    helps: dict[tuple[str, ...], subprocess.Popen[str]], command: tuple[str, ...]
) -> None:
    out, err = helps[command].communicate(timeout=300)
    assert helps[command].returncode == 0 and PROGRAMS[command] in out.split(), (out[-2000:], err[-2000:])


def test_generation_defaults_are_the_originals() -> None:
    config = load("generation", [])
    assert (config.data.n_samples, config.data.batch_size) == (5, 128)
    rollout = config.rollout
    assert (rollout.temperature, rollout.top_k, rollout.top_p) == (1.0, 50, 0.7)
    assert (rollout.prompt_length, rollout.response_length, rollout.tensor_model_parallel_size) == (1536, 512, 1)


def test_keys_of_training_are_accepted_by_generation_with_a_warning() -> None:
    warnings = resolve("generation", ["+actor.strategy=fsdp", "rollout.log_prob_micro_batch_size_per_gpu=8"]).warnings
    assert len(warnings) == 2 and all("nothing is trained here" in line for line in warnings), warnings
    with pytest.raises(ValueError, match=r"greedy answers are all the same; set data\.n_samples=1"):
        load("generation", ["rollout.temperature=0"])


def create_data(script: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "create_data" / script / "ctu.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
    )


def test_the_two_steps_of_create_data_write_the_same_files(archives: Path, tmp_path: Path) -> None:
    source, output, copy = archives / "ucr" / "Computers", tmp_path / "ctu_image", tmp_path / "elsewhere"
    done = create_data("image_processing", "--l7_dir", str(source), "--output_dir", str(output), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    copy.mkdir()
    for split in ("train", "test"):
        subprocess.run(["cp", "-r", str(output / split), str(copy / split)], check=True)
    done = create_data("multimodal_data_processing", "--local_dir", str(copy), "--hdfs_dir", "hdfs://x", cwd=tmp_path)
    assert done.returncode == 0 and "--hdfs_dir=hdfs://x has no effect" in done.stderr, done.stderr
    for name in ("train", "test", "fit", "val"):
        same = (copy / f"{name}.parquet").read_bytes() == (output / f"{name}.parquet").read_bytes()
        assert same, f"{name}.parquet differs between the steps"


def test_the_second_step_without_the_first_says_so(tmp_path: Path) -> None:
    done = create_data("multimodal_data_processing", "--local_dir", str(tmp_path))
    assert done.returncode == 2 and "run create_data/image_processing/ctu.py first" in done.stderr, done.stderr
