"""Invariants of `verl.timeseries.build`, its output folder, and `ctu.sh`."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_ts_readers import FAULTS
from tiny_archive import text_of, write_archive

from verl.timeseries import TaskSpec, get_task, tasks
from verl.timeseries.build import OWN_ENTRIES, TABLES, BuildConfig, build, main, parse_args
from verl.timeseries.describe import sft_answer
from verl.timeseries.folder import replacing

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "example" / "data_preprocess" / "ctu.sh"


@pytest.fixture(autouse=True)
def registered(tiny_task: TaskSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tasks._TASKS, "tiny", tiny_task)


@pytest.fixture
def output(tiny_folder: Path, tmp_path: Path) -> Path:
    config = BuildConfig(task="tiny", source=str(tiny_folder), output=str(tmp_path / "out"), workers=1)
    return build(config).output


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


def indices(folder: Path, name: str) -> list[int]:
    return [row["extra_info"]["index"] for row in rows(folder, name)]


def test_the_folder_has_the_published_entries(output: Path) -> None:
    assert {entry.name for entry in output.iterdir()} == OWN_ENTRIES
    assert len(list((output / "images" / "train").iterdir())) == 20
    assert not [p for p in output.parent.iterdir() if p.name.startswith(".out")]


def test_a_rerun_gives_identical_bytes_in_every_file(output: Path, tiny_folder: Path) -> None:
    before = digests(output)
    for cache in ("auto", None):
        build(BuildConfig(task="tiny", source=str(tiny_folder), output=str(output), workers=1, cache=cache))
        assert digests(output) == before
    elsewhere = output.parent / "other" / "place"
    build(BuildConfig(task="tiny", source=str(tiny_folder), output=str(elsewhere), workers=1, cache=None))
    assert digests(elsewhere) == before


def test_columns_and_values_are_the_published_ones(output: Path, tiny_task: TaskSpec) -> None:
    table = pq.read_table(output / "train.parquet")
    assert table.column_names == ["data_source", "prompt", "images", "ability", "reward_model", "extra_info"]
    row = table.slice(11, 1).to_pylist()[0]
    png = row.pop("images")
    assert row == {
        "data_source": "tiny_dataset",
        "prompt": [{"role": "user", "content": tiny_task.prompt_text}],
        "ability": "time series",
        "reward_model": {"style": "rule", "ground_truth": "Down"},
        "extra_info": {"split": "train", "index": 11, "answer": "Down", "question": tiny_task.full_question},
    }
    assert len(png) == 1 and png[0]["path"] is None
    assert Image.open(io.BytesIO(png[0]["bytes"])).size == (84, 56)


def test_png_files_arrow_and_parquet_hold_the_same_bytes(output: Path) -> None:
    from datasets import Image as ImageFeature
    from datasets import List, load_from_disk

    loaded = load_from_disk(str(output))
    for split in ("train", "test"):
        plain = loaded[split].cast_column("images", List(ImageFeature(decode=False)))
        for row, stored in zip(rows(output, split), plain, strict=True):
            file = output / "images" / split / f"{split}_sample_{row['extra_info']['index']:05d}.png"
            assert file.read_bytes() == row["images"][0]["bytes"] == stored["images"][0]["bytes"]


def test_datasets_reads_the_parquet_as_pictures(output: Path, tmp_path: Path) -> None:
    from datasets import load_dataset

    data = load_dataset("parquet", data_files=str(output / "fit.parquet"), cache_dir=str(tmp_path / "hf"))["train"]
    assert data[0]["images"][0].size == (84, 56) and data[0]["images"][0].mode == "RGB"


def test_fit_and_val_are_disjoint_stratified_and_together_train(output: Path) -> None:
    fit, val = indices(output, "fit"), indices(output, "val")
    assert not set(fit) & set(val) and sorted(fit + val) == indices(output, "train") == list(range(20))
    assert Counter(row["reward_model"]["ground_truth"] for row in rows(output, "val")) == {"Up": 2, "Down": 2}


def test_the_seed_moves_only_the_cut(output: Path, tiny_folder: Path) -> None:
    before, cut = digests(output), indices(output, "val")
    build(BuildConfig(task="tiny", source=str(tiny_folder), output=str(output), workers=1, seed=2))
    assert indices(output, "val") != cut
    changed = {name for name, digest in digests(output).items() if before[name] != digest}
    assert changed == {f"{t}.parquet" for t in ("fit", "val", "sft_fit", "sft_val")} | {"data_card.json"}


def test_supervised_rows_are_fit_and_val_with_a_measured_answer(
    output: Path, tiny_task: TaskSpec, tiny_folder: Path
) -> None:
    archive = tiny_task.reader.read(tiny_folder, tiny_task)
    for plain, supervised in (("fit", "sft_fit"), ("val", "sft_val")):
        for row, expected in zip(rows(output, supervised), rows(output, plain), strict=True):
            index = row["extra_info"]["index"]
            assert row.pop("response") == sft_answer(
                archive.train.series[index], archive.train.labels[index], tiny_task
            )
            assert row == expected


def test_no_label_in_any_path(output: Path, tiny_task: TaskSpec) -> None:
    for path in output.rglob("*"):
        name = str(path.relative_to(output)).lower()
        assert not [c for c in tiny_task.classes if c.lower() in name], name
        if path.suffix == ".png":
            assert re.fullmatch(r"(train|test)_sample_\d{5}\.png", path.name)


def test_the_data_card_counts_what_was_written(output: Path) -> None:
    card = json.loads((output / "data_card.json").read_text())
    assert card["rows"] == {name: len(rows(output, name)) for name in TABLES}
    assert card["rows_per_class"]["val"] == {"Up": 2, "Down": 2} and card["majority_share"]["test"] == 0.5
    assert card["series_in_train_and_test"] == 0 and set(card["source_sha256"]) == {"Tiny_TRAIN.ts", "Tiny_TEST.ts"}


def test_limit_keeps_both_classes_and_the_archives_row_numbers(tiny_folder: Path, tmp_path: Path) -> None:
    args = {"task": "tiny", "source": str(tiny_folder), "output": str(tmp_path / "out"), "workers": 1}
    build(BuildConfig(**args, limit=6))
    kept = rows(tmp_path / "out", "train")
    assert Counter(row["reward_model"]["ground_truth"] for row in kept) == {"Up": 3, "Down": 3}
    assert all((row["extra_info"]["index"] < 10) == (row["reward_model"]["ground_truth"] == "Up") for row in kept)
    with pytest.raises(ValueError, match="limit=3 is below two rows"):
        build(BuildConfig(**args, limit=3))


def test_a_new_split_keeps_sizes_and_changes_rows(output: Path, tiny_folder: Path, tmp_path: Path) -> None:
    args = {"task": "tiny", "source": str(tiny_folder), "workers": 1}
    for seed in (1, 2):
        build(BuildConfig(**args, output=str(tmp_path / f"r{seed}"), resplit_seed=seed))
    images = [
        {row["images"][0]["bytes"] for row in rows(folder, "test")}
        for folder in (output, tmp_path / "r1", tmp_path / "r2")
    ]
    assert all(len(found) == 10 for found in images) and images[0] != images[1] != images[2]
    pooled = [{r["images"][0]["bytes"] for s in ("train", "test") for r in rows(tmp_path / f"r{k}", s)} for k in (1, 2)]
    assert pooled[0] == pooled[1] and len(pooled[0]) == 30


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ([], "task=NAME is missing"),
        (["task=tiny", "sorce=x"], "unknown key 'sorce'; did you mean 'source'?"),
        (["task=tiny", "--source", "x"], "'--source' is not key=value"),
        (["task=tiny", "seed=one"], "seed=one"),
        (["task=tiny", "workers=0"], "workers=0 must be at least 1"),
        (["task=tini"], "unknown task='tini'; did you mean 'tiny'?"),
        (["task=tiny", "modality=sound"], "unknown modality='sound'"),
        (["task=tiny", "style.width=85"], "style.width=85 is not a positive multiple of 28"),
        (["task=tiny", "style.colour=red"], "unknown key style.colour"),
        (["task=tiny", "source=/no/such/place"], "source=/no/such/place does not exist"),
        (["task=tiny"], "task=tiny needs source=PATH"),
    ],
)
def test_a_user_mistake_is_one_line_and_a_non_zero_exit(
    args: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    error = capsys.readouterr().err
    assert text in error and error.startswith("error: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir()), "nothing may be left behind"


def test_arguments_keep_their_types() -> None:
    config = parse_args(
        ["task=tiny", "source=a b/c=d", "workers=null", "limit=5", "cache=null", "style.line_width=1.5"]
    )
    assert config == BuildConfig(task="tiny", source="a b/c=d", limit=5, cache=None, style={"line_width": 1.5})


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_archive_is_one_line_exit_code_2_and_nothing_written(
    fault: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = FAULTS[fault]
    path = tiny_folder / "Tiny_TRAIN.ts"
    path.write_text(change(text_of("ts", "TRAIN")), encoding="utf-8")
    before = {entry.name for entry in tmp_path.iterdir()}
    assert main(["task=tiny", f"source={tiny_folder}", f"output={tmp_path / 'out'}", "workers=1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and re.search(message, error), error
    assert {entry.name for entry in tmp_path.iterdir()} == before


def test_bad_input_leaves_the_old_folder_as_it_was(output: Path, tiny_folder: Path) -> None:
    before = digests(output)
    (tiny_folder / "Tiny_TRAIN.ts").write_text("@data\n1,2:1\n")
    with pytest.raises(ValueError, match="row 0"):
        build(BuildConfig(task="tiny", source=str(tiny_folder), output=str(output), workers=1))
    assert digests(output) == before


def test_a_failure_while_writing_leaves_the_old_folder_and_no_rubbish(
    output: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digests(output)
    monkeypatch.setattr("verl.timeseries.tables.save_to_disk", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        build(BuildConfig(task="tiny", source=str(tiny_folder), output=str(output), workers=1, seed=9))
    assert digests(output) == before
    assert {p.name for p in output.parent.iterdir()} == {"out", "Tiny", ".plot_cache"}


def test_a_folder_with_other_files_is_not_replaced_unless_asked(output: Path, tiny_folder: Path) -> None:
    (output / "notes.txt").write_text("mine")
    config = BuildConfig(task="tiny", source=str(tiny_folder), output=str(output), workers=1)
    with pytest.raises(ValueError, match=r"holds what this program did not write \(notes\.txt\)"):
        build(config)
    assert (output / "notes.txt").read_text() == "mine"
    build(BuildConfig(task="tiny", source=str(tiny_folder), output=str(output), workers=1, overwrite=True))
    assert not (output / "notes.txt").exists()


def _hold(target: str) -> None:
    with replacing(Path(target), own=frozenset()) as folder:
        (folder / "half").touch()
        print("held", flush=True)
        time.sleep(60)


def test_a_second_writer_is_refused_and_a_killed_one_is_cleaned_up(tmp_path: Path) -> None:
    target = tmp_path / "out"
    process = multiprocessing.get_context("spawn").Process(target=_hold, args=(str(target),))
    process.start()
    partial = tmp_path / ".out.partial"
    deadline = time.monotonic() + 20
    while not (partial / "half").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (partial / "half").exists()
    try:
        with pytest.raises(ValueError, match="another process is writing it"), replacing(target, own=frozenset()):
            pass
        assert (partial / "half").exists(), "the first writer's files must stay"
    finally:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert not target.exists()
    with replacing(target, own=frozenset()) as folder:
        (folder / "whole").touch()
    assert [p.name for p in target.iterdir()] == ["whole"] and [p.name for p in tmp_path.iterdir()] == ["out"]


def run_script(*args: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run(["bash", str(SCRIPT), *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def test_ctu_sh_names_the_url_of_the_task() -> None:
    download = get_task("ctu").download
    assert download is not None and download.url in SCRIPT.read_text()


@pytest.mark.timeout(600)
def test_ctu_sh_makes_the_published_rows_from_a_folder(archives: Path, tmp_path: Path) -> None:
    os.symlink(archives / "ucr", tmp_path / "my data")
    done = run_script("--source", "my data/Computers", "output=o", "cache=c", "seed=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    counts = {name: pq.read_metadata(tmp_path / "o" / f"{name}.parquet").num_rows for name in TABLES}
    assert counts == {"train": 250, "test": 250, "fit": 200, "val": 50, "sft_fit": 200, "sft_val": 50}
    for name, each in (("train", 125), ("test", 125), ("fit", 100), ("val", 25)):
        labels = Counter(row["reward_model"]["ground_truth"] for row in rows(tmp_path / "o", name))
        assert labels == {"Desktop": each, "Laptop": each}
    assert not list((tmp_path / "o").rglob("*esktop*")) and not list((tmp_path / "o").rglob("*aptop*"))
    first = digests(tmp_path / "o")
    assert json.loads((tmp_path / "o" / "data_card.json").read_text())["source_as_published"] == {
        "Computers_TRAIN.arff": True,
        "Computers_TEST.arff": True,
    }
    again = run_script("--source", "my data/Computers", "output=o", "cache=c", "seed=1", cwd=tmp_path)
    assert again.returncode == 0 and digests(tmp_path / "o") == first, "a rerun gives other bytes"
    (tmp_path / "ts").mkdir()
    for split in ("TRAIN", "TEST"):
        os.symlink(archives / "ucr" / "Computers" / f"Computers_{split}.ts", tmp_path / "ts" / f"Computers_{split}.ts")
    from_ts = run_script("--source", "ts", "output=p", "cache=c", "seed=1", cwd=tmp_path)
    assert from_ts.returncode == 0, from_ts.stderr
    other = digests(tmp_path / "p")
    assert {name for name in first.keys() | other.keys() if first.get(name) != other.get(name)} == {"data_card.json"}


def test_ctu_sh_downloads_checks_unpacks_and_does_not_download_twice(archives: Path, tmp_path: Path) -> None:
    archive, folder = tmp_path / "Computers.zip", tmp_path / "ori" / "Computers"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in ("Computers_TRAIN.arff", "Computers_TEST.arff"):
            packed.write(archives / "ucr" / "Computers" / name, name)
    settings = {"CTU_URL": archive.as_uri(), "CTU_FOLDER": str(folder)}
    folder.parent.mkdir()
    (folder.parent / "Computers.zip.part").write_bytes(archive.read_bytes()[:5000])
    done = run_script("output=o", "limit=8", cwd=tmp_path, **settings)
    assert done.returncode == 0 and "downloading" in done.stdout, done.stderr
    archive.unlink()
    again = run_script("output=o", "limit=8", cwd=tmp_path, **settings)
    assert again.returncode == 0 and "downloading" not in again.stdout and not again.stderr, again.stderr


@pytest.mark.parametrize("what", ["unreachable", "not the archive", "other bytes"])
def test_ctu_sh_fails_loudly_without_the_archive(tmp_path: Path, what: str) -> None:
    archive = tmp_path / "Computers.zip"
    if what == "not the archive":
        archive.write_text("<html>sorry</html>")
    elif what == "other bytes":
        with zipfile.ZipFile(archive, "w") as packed:
            packed.writestr("Computers_TRAIN.arff", "@data\n")
            packed.writestr("Computers_TEST.arff", "@data\n")
    settings = {"CTU_URL": archive.as_uri(), "CTU_FOLDER": str(tmp_path / "ori" / "Computers")}
    done = run_script("output=o", cwd=tmp_path, **settings)
    assert done.returncode != 0 and "wrote" not in done.stdout
    expected = {"unreachable": "Without a network", "not the archive": "not a complete zip", "other bytes": "sha256 is"}
    assert expected[what] in done.stderr
    assert not (tmp_path / "o").exists() and not (tmp_path / "ori" / "Computers.zip").exists()


def test_formats_do_not_change_the_output(tiny_folder: Path, output: Path, tmp_path: Path) -> None:
    other = write_archive(tmp_path / "arff", "arff")
    build(BuildConfig(task="tiny", source=str(other), output=str(tmp_path / "b"), workers=1))
    a, b = digests(output), digests(tmp_path / "b")
    assert {name for name in a if a[name] != b[name]} == {"data_card.json"}
