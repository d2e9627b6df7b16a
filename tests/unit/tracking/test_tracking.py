"""Trackers: what is written, what is said, and that nothing stops the run."""

from __future__ import annotations

import inspect
import io
import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from verl.config.secrets import mask_secrets, mask_text
from verl.utils.tracking import Sample, Tracker
from verl.utils.tracking import tracker as tracker_module
from verl.utils.tracking.base import Metrics, RunInfo
from verl.utils.tracking.console import ConsoleBackend

STEP = {
    "timing_s/step": 3.42,
    "critic/score/mean": 0.5125,
    "actor/pg_loss": 0.00312,
    "actor/kl_loss": 0.0004,
    "actor/grad_norm": 0.83,
    "actor/lr": 1e-6,
    "response_length/mean": 181.2,
    "perf/throughput": 4121.0,
    "perf/max_memory_allocated_gb": 0.0,
    "perf/cpu_memory_used_gb": 3.21,
}


def png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (28, 28), (200, 30, 30)).save(out, "PNG")
    return out.getvalue()


SAMPLE = Sample("val-3", "Which device?", "<think>flat</think><class>Desktop</class>", "Laptop", 0.1, png())


def make(names: Sequence[str], folder: Path, **options: Any) -> Tracker:
    values: dict[str, Any] = {"project": "p", "experiment": "e", "config": {"data": {"seed": 1}}, **options}
    return Tracker(names, folder, **values)


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


class Broken:
    """A tracker that fails from its k-th call on."""

    def __init__(self, run: RunInfo) -> None:
        self.calls = 0

    def log(self, step: int, metrics: Metrics) -> None:
        self.calls += 1
        raise ConnectionError("https://me:hunter22@host is away\nsecond line")

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        raise ConnectionError("away")

    def close(self) -> None:
        raise ConnectionError("away")


def test_metrics_file_holds_one_valid_json_object_per_step_whatever_was_asked_for(tmp_path: Path) -> None:
    with make([], tmp_path) as tracker:
        tracker.log(1, {"a": np.float32(0.5), "n": 3, "best": True, "why": "text"})
        tracker.log(2, {"a": math.nan, "b": math.inf})
    first, second = rows(tmp_path)
    assert (first["step"], first["a"], first["n"], first["best"], first["why"]) == (1, 0.5, 3, True, "text")
    assert (second["step"], second["a"], second["b"]) == (2, None, None) and second["time"] >= first["time"]


def test_a_metric_that_is_no_scalar_is_dropped_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with make([], tmp_path) as tracker:
        tracker.log(1, {"bad": [1, 2], "worse": np.zeros(3), "good": 1})
    assert rows(tmp_path)[0]["good"] == 1 and "bad" not in rows(tmp_path)[0]
    assert sum("is dropped" in r.message for r in caplog.records) == 2


def test_a_resumed_run_continues_after_its_step_and_loses_nothing(tmp_path: Path) -> None:
    with make([], tmp_path) as tracker:
        for step in range(5):
            tracker.log(step, {"attempt": 1})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "att')
    with make([], tmp_path, resume_step=2) as tracker:
        tracker.log(3, {"attempt": 2})
    assert [(r["step"], r["attempt"]) for r in rows(tmp_path)] == [(0, 1), (1, 1), (2, 1), (3, 2)]
    assert len((tmp_path / "metrics.1.jsonl").read_text().splitlines()) == 6


def test_a_new_run_starts_a_new_file_and_sets_the_old_one_aside(tmp_path: Path) -> None:
    for attempt in (1, 2, 3):
        with make([], tmp_path) as tracker:
            tracker.log(0, {"attempt": attempt})
    assert [r["attempt"] for r in rows(tmp_path)] == [3]
    assert [rows(tmp_path, f"metrics.{k}.jsonl")[0]["attempt"] for k in (1, 2)] == [1, 2]


def test_an_exact_resume_sets_nothing_aside(tmp_path: Path) -> None:
    with make([], tmp_path) as tracker:
        tracker.log(1, {"a": 1})
    with make([], tmp_path, resume_step=1):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "samples.jsonl"]


def test_samples_are_written_as_text_rows(tmp_path: Path) -> None:
    with make([], tmp_path) as tracker:
        tracker.log_samples(4, [SAMPLE])
    (row,) = rows(tmp_path, "samples.jsonl")
    assert row == {
        "step": 4, "uid": "val-3", "prompt": "Which device?", "answer": SAMPLE.answer, "label": "Laptop", "score": 0.1,
    }  # fmt: skip


def test_console_line_shows_what_the_step_has() -> None:
    line = ConsoleBackend(RunInfo(Path(), "p", "e", {}, 300, 0)).line(12, {**STEP, "val/acc/ctu": 0.61, "other": 1})
    assert line == (
        "step 12/300 | time 3.4s | score 0.512 | loss +0.0031 | kl 0.0004 | grad 0.83 | lr 1e-06 | len 181 |"
        " tok/s 4,121 | mem 3.2GB | val acc ctu 0.610 | left 16m"
    )


def test_console_line_of_unknown_metrics_is_not_empty() -> None:
    console = ConsoleBackend(RunInfo(Path(), "p", "e", {}, None, 0))
    assert console.line(3, {"x/y": 0.25, "bad": math.nan}) == "step 3 | x/y 0.25"
    assert (
        console.line(0, {"val/acc/a": 0.5, "val/f1_score/a": 0.25}) == "step 0 | val acc a 0.500 | val f1_score a 0.250"
    )


def test_console_prints_one_line_per_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with make(["console"], tmp_path) as tracker:
        tracker.log(1, STEP)
        tracker.log(2, STEP)
    assert [line.split(" |")[0] for line in capsys.readouterr().out.splitlines()] == ["step 1", "step 2"]


def test_tensorboard_holds_metrics_and_samples_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_DIR", str(tmp_path / "tb"))
    with make(["tensorboard"], tmp_path) as tracker:
        tracker.log(1, {"critic/score/mean": 0.25, "bad": math.nan, "text": "x"})
        tracker.log(2, {"critic/score/mean": 0.5})
        tracker.log_samples(2, [SAMPLE])
    events = EventAccumulator(str(tmp_path / "tb" / "p" / "e")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("critic/score/mean")] == [(1, 0.25), (2, 0.5)]
    assert events.Tags()["scalars"] == ["critic/score/mean"] and events.Tags()["images"] == ["samples/0"]


def test_wandb_without_a_login_is_said_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with make(["wandb", "tracking"], tmp_path) as tracker:
        tracker.log(1, STEP)
        assert tracker.active == ("file",)
    assert [r.getMessage() for r in caplog.records] == [
        "tracker wandb is off: no login (run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline); the run goes on"
    ]
    assert rows(tmp_path)[0]["critic/score/mean"] == 0.5125


def test_wandb_works_offline_and_stores_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("JUDGE_API_KEY", "super-secret-judge-key")
    config = {"reward_kwargs": {"api_key": "another-secret-key", "note": "uses super-secret-judge-key"}, "seed": 4242}
    with make(["wandb"], tmp_path, config=config) as tracker:
        assert tracker.active == ("file", "wandb")
        tracker.log(1, {"critic/score/mean": 0.5})
        tracker.log_samples(1, [SAMPLE])
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    end, wanted = time.monotonic() + 60, (b"critic/score/mean", b"4242", b"<class>Desktop</class>")
    while True:  # wandb's own process may write its last file after the run has ended
        stored = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
        if (all(text in stored for text in wanted) and len(list(run.rglob("*.png"))) == 1) or time.monotonic() > end:
            break
        time.sleep(0.1)
    assert [text for text in wanted if text not in stored] == [] and len(list(run.rglob("*.png"))) == 1
    assert b"super-secret" not in stored and b"another-secret" not in stored


class Recorded(ModuleType):
    """Stands in for a tracker that is not installed: only the calls of its documentation, with their parameters."""

    def __init__(self, name: str, **signatures: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, dict[str, Any]]] = []
        for call, parameters in signatures.items():
            setattr(self, call, self._of(call, parameters.split()))

    def _of(self, call: str, parameters: list[str]) -> Any:
        signature = inspect.Signature(
            [inspect.Parameter(p, inspect.Parameter.POSITIONAL_OR_KEYWORD) for p in parameters]
        )

        def made(*args: Any, **kwargs: Any) -> Any:
            given = dict(signature.bind_partial(*args, **kwargs).arguments)
            self.calls.append((call, given))
            return SimpleNamespace(kind=call, **given)

        return made

    def of(self, call: str) -> list[dict[str, Any]]:
        return [given for name, given in self.calls if name == call]


UNSCORED = Sample("val-4", "And this?", "no idea", "Desktop", None)


def through(name: str, folder: Path) -> None:
    with make([name], folder) as tracker:
        assert tracker.active == ("file", name)
        tracker.log(2, {"critic/score/mean": 0.5, "val-core/x/acc/mean@1": 0.25, "bad": math.nan, "text": "x"})
        tracker.log_samples(2, [SAMPLE, UNSCORED])
        assert tracker.active == ("file", name), "a call failed"


def test_mlflow_gets_metrics_and_plots_beside_their_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = Recorded(
        "mlflow",
        set_experiment="experiment_name",
        start_run="run_id experiment_id run_name",
        log_dict="dictionary artifact_file",
        log_metrics="metrics step",
        log_image="image artifact_file",
        end_run="status",
    )
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    through("mlflow", tmp_path)
    assert mlflow.of("log_metrics") == [
        {"metrics": {"critic/score/mean": 0.5, "val-core/x/acc/mean_at_1": 0.25}, "step": 2}
    ]
    (image,) = mlflow.of("log_image")
    assert image["image"].size == (28, 28) and image["artifact_file"] == "samples/step_2/0.png"
    _, answers = mlflow.of("log_dict")
    assert answers["artifact_file"] == "samples/step_2.json"
    assert answers["dictionary"]["plot"] == ["step_2/0.png", None]
    assert answers["dictionary"]["answer"] == [SAMPLE.answer, "no idea"]
    assert mlflow.calls[0][0] == "set_experiment" and mlflow.calls[-1][0] == "end_run"


def test_swanlab_gets_metrics_and_plots_captioned_by_their_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swanlab = Recorded(
        "swanlab",
        init="project experiment_name config logdir mode settings",
        log="data step",
        Settings="probe terminal",
        Text="data caption",
        Image="data_or_path mode caption",
        finish="",
    )
    swanlab.Settings.Probe = lambda **given: given
    swanlab.Settings.Terminal = lambda **given: given
    monkeypatch.setitem(sys.modules, "swanlab", swanlab)
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    through("swanlab", tmp_path)
    (init,) = swanlab.of("init")
    assert init["settings"].probe["runtime"] is False, "the command line would be stored"
    metrics, shown = swanlab.of("log")
    assert metrics == {"data": {"critic/score/mean": 0.5, "val-core/x/acc/mean@1": 0.25}, "step": 2}
    (plot,) = shown["data"]["samples_plots"]
    assert plot.kind == "Image" and plot.data_or_path.size == (28, 28)
    assert SAMPLE.answer in plot.caption and "label Laptop" in plot.caption and "score 0.1" in plot.caption
    assert [text.data for text in shown["data"]["samples"]] == [SAMPLE.answer, "no idea"]
    assert swanlab.calls[-1][0] == "finish"


def test_volcengines_wandb_gets_metrics_and_plots_captioned_by_their_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = Recorded("volcengine_ml_platform.wandb", init="project name config", log="data step",
                     Image="data_or_path mode caption", finish="")  # fmt: skip
    rows: list[tuple[Any, ...]] = []
    wandb.Table = lambda columns: SimpleNamespace(columns=columns, add_data=lambda *row: rows.append(row))
    platform = Recorded("volcengine_ml_platform", init="ak sk region")
    monkeypatch.setitem(sys.modules, platform.__name__, platform)
    monkeypatch.setitem(sys.modules, wandb.__name__, wandb)
    for number, name in enumerate(("VOLC_ACCESS_KEY_ID", "VOLC_SECRET_ACCESS_KEY", "MLP_TRACKING_REGION")):
        monkeypatch.setenv(name, f"value-{number}-of-the-user")
    through("vemlp_wandb", tmp_path)
    assert platform.of("init") == [
        {"ak": "value-0-of-the-user", "sk": "value-1-of-the-user", "region": "value-2-of-the-user"}
    ]
    metrics, shown = wandb.of("log")
    assert metrics["data"] == {"critic/score/mean": 0.5, "val-core/x/acc/mean@1": 0.25}
    (plot,) = shown["data"]["samples_plots"]
    assert plot.data_or_path.size == (28, 28) and SAMPLE.answer in plot.caption
    assert [row[1] for row in rows] == ["val-3", "val-4"] and wandb.calls[-1][0] == "finish"


def test_an_unknown_tracker_is_a_user_error_and_a_missing_package_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=r"trainer\.logger=wandbb: unknown tracker; choose from console"):
        make(["wandbb"], tmp_path)
    monkeypatch.setitem(sys.modules, "volcengine_ml_platform", None)
    make(["vemlp_wandb"], tmp_path).close()
    assert "volcengine-ml-platform is not installed" in caplog.records[-1].getMessage()


def test_a_failing_tracker_never_stops_the_run_and_is_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracker_module, "BACKENDS", {**tracker_module.BACKENDS, "mlflow": Broken})
    tracker = make(["mlflow"], tmp_path)
    for step in range(5):
        tracker.log(step, {"a": 1})
    tracker.log_samples(5, [SAMPLE])
    tracker.close()
    tracker.close()
    assert tracker.active == () and len(rows(tmp_path)) == 5
    messages = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert messages == [
        "tracker mlflow dropped a line: ConnectionError: https://***@host is away",
        "tracker mlflow is switched off after 3 failures in a row",
    ]


def test_a_tracker_that_recovers_stays_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Flaky(Broken):
        def log(self, step: int, metrics: Metrics) -> None:
            if step % 3:
                raise ConnectionError("away")

        def close(self) -> None:
            pass

    monkeypatch.setattr(tracker_module, "BACKENDS", {**tracker_module.BACKENDS, "mlflow": Flaky})
    with make(["mlflow"], tmp_path) as tracker:
        for step in range(9):
            tracker.log(step, {"a": 1})
        assert tracker.active == ("file", "mlflow")


def test_a_full_disk_does_not_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = make([], tmp_path)
    monkeypatch.setattr("verl.utils.tracking.files._write", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    for step in range(5):
        tracker.log(step, {"a": 1})
    monkeypatch.undo()
    tracker.log(6, {"a": 2})
    tracker.close()
    assert [r["step"] for r in rows(tmp_path)] == [6]


def test_masking_hides_secrets_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf-value-of-the-user")
    values = {
        "api_key": "abc", "hf_token": "x", "password": "p", "image_key": "images", "max_tokens": 3,
        "loss": "token-mean", 
        "urls": ("https://u:p@h/x", "https://h/x"), "note": "got hf-value-of-the-user", "empty_secret": "",
    }  # fmt: skip
    assert mask_secrets(values) == {
        "api_key": "***", "hf_token": "***", "password": "***", "image_key": "images", "max_tokens": 3,
        "loss": "token-mean", "urls": ["https://***@h/x", "https://h/x"], "note": "got ***", "empty_secret": "",
    }  # fmt: skip
    assert mask_text("Bearer sk-abcdefghijklmnop1234") == "Bearer ***"
