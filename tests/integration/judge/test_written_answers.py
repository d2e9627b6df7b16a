"""Invariants of `verl.timeseries.written`, against the local server."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from judge_server import JudgeServer, Plan, Seen, completion, error

from verl.timeseries.build import BuildConfig, build
from verl.timeseries.written import main, write_rows
from verl.utils.reward_score.judge.config import JudgeConfig

ROWS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GunPoint, 6 + 2 rows."""
    folder = tmp_path_factory.mktemp("data") / "gun_point_image"
    build(BuildConfig(task="gun_point", output=str(folder), limit=ROWS, workers=1, cache=None))
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for name in ("sft_fit", "sft_val") for row in pq.read_table(folder / f"{name}.parquet").to_pylist()]


def picture(seen: Seen) -> bytes:
    url = seen.body["messages"][0]["content"][0]["image_url"]["url"]
    return base64.b64decode(url.removeprefix("data:image/png;base64,"))


def answering(data: Path, say: Callable[[str, int], str]) -> Callable[[Seen], Plan]:
    """The server answers `say(true class, how often this picture was asked before)`."""
    truth = {row["images"][0]["bytes"]: row["reward_model"]["ground_truth"] for row in rows(data)}
    asked: dict[bytes, int] = {}

    def plan(seen: Seen) -> Plan:
        png = picture(seen)
        asked[png] = asked.get(png, -1) + 1
        return Plan(completion(say(truth[png], asked[png])))

    return plan


def run(server: JudgeServer, data: Path, output: Path, *extra: str) -> int:
    options = (f"base_url={server.url}", "model=stub", "api_key_env=null", "backoff_s=0.01", "max_retries=1")
    return main(["--data", str(data), "--output", str(output), *extra, *options])


def good(label: str) -> str:
    return f"<think>The hand rises and falls.</think><class>{label}</class>"


def other(label: str) -> str:
    return "Point" if label == "Gun" else "Gun"


def test_only_strict_answers_with_the_right_class_are_kept(server: JudgeServer, data: Path, tmp_path: Path) -> None:
    says = [lambda label: good(other(label)), lambda label: f"Well: {good(label)}", good]
    server.plan = answering(data, lambda label, times: says[times](label))
    assert run(server, data, tmp_path / "out", "--attempts", "3") == 0
    for row, before in zip(rows(tmp_path / "out"), rows(data), strict=True):
        assert row.pop("response_by") == "model"
        assert row.pop("response") == good(row["reward_model"]["ground_truth"])
        before.pop("response")
        assert row == before
    assert len(server.seen) == 3 * ROWS


def test_the_server_sees_the_prompt_and_the_picture_but_never_the_class_as_such(
    server: JudgeServer, data: Path, tmp_path: Path
) -> None:
    server.plan = answering(data, lambda label, _: good(label))
    assert run(server, data, tmp_path / "out") == 0
    texts = {json.dumps(seen.body["messages"][0]["content"][1]) for seen in server.seen}
    assert len(texts) == 1, "the text beside the picture must not depend on the row"
    assert {picture(seen) for seen in server.seen} == {row["images"][0]["bytes"] for row in rows(data)}


@pytest.mark.parametrize(("rest", "left"), [("measured", ROWS), ("drop", 4)])
def test_rows_without_a_kept_answer_are_measured_or_dropped(
    server: JudgeServer, data: Path, tmp_path: Path, rest: str, left: int
) -> None:
    server.plan = answering(data, lambda label, _: good("Gun"))
    assert run(server, data, tmp_path / "out", "--attempts", "2", "--rest", rest) == 0
    found = rows(tmp_path / "out")
    assert len(found) == left
    measured = {row["images"][0]["bytes"]: row["response"] for row in rows(data)}
    for row in found:
        right = row["reward_model"]["ground_truth"] == "Gun"
        assert row["response_by"] == ("model" if right else "measured")
        assert row["response"] == (good("Gun") if right else measured[row["images"][0]["bytes"]])


def test_a_broken_off_run_asks_nothing_twice(
    server: JudgeServer, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fine = answering(data, lambda label, _: good(label))
    server.plan = lambda seen: fine(seen) if seen.index < 3 else error(500)
    output = tmp_path / "out"
    assert run(server, data, output, "max_concurrent=1") == 2
    message = capsys.readouterr().err
    assert "could not be written after" in message and "(server_error" in message and not output.exists()
    answered, server.plan = 3, fine
    before = len(server.seen)
    assert run(server, data, output) == 0
    assert len(server.seen) - before == ROWS - answered
    before = len(server.seen)
    assert run(server, data, output) == 0 and len(server.seen) == before


def test_the_budget_holds_and_its_error_is_one_line(
    server: JudgeServer, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.plan = answering(data, lambda label, _: good(label))
    assert run(server, data, tmp_path / "out", "max_calls=3") == 2
    assert len(server.seen) == 3
    message = capsys.readouterr().err
    assert "max_calls=3" in message and message.count("\n") == 1


@pytest.mark.parametrize(
    ("extra", "text"),
    [(("modle=x",), "unknown judge option 'modle'"), (("--attempts", "0"), "--attempts 0: at least 1")],
)
def test_a_mistake_is_one_line(
    server: JudgeServer,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    extra: tuple[str, ...],
    text: str,
) -> None:
    assert run(server, data, tmp_path / "out", *extra) == 2
    assert text in capsys.readouterr().err and not server.seen


def test_the_output_is_a_whole_data_folder(server: JudgeServer, data: Path, tmp_path: Path) -> None:
    server.plan = answering(data, lambda label, _: good(label))
    output = tmp_path / "out"
    for _ in range(2):
        assert run(server, data, output) == 0
        tables = {path.name for path in data.glob("*.parquet")}
        assert {path.name for path in output.iterdir()} == {*tables, "data_card.json", "written_card.json"}
        for name in (*tables, "data_card.json"):
            if not name.startswith("sft_"):
                assert (output / name).read_bytes() == (data / name).read_bytes()


def test_the_data_folder_itself_is_never_replaced(
    server: JudgeServer, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(server, data, data) == 2 and "is the data folder itself" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "test.parquet").write_bytes((data / "test.parquet").read_bytes())
    assert run(server, data, tmp_path / "out") == 2 and "holds no written_card.json" in capsys.readouterr().err
    (tmp_path / "out" / "written_card.json").write_text('{"data": "pumps_image"}')
    assert run(server, data, tmp_path / "out") == 2
    assert "holds the written answers of pumps_image" in capsys.readouterr().err
    assert not server.seen


@pytest.mark.parametrize(("sees", "accuracy"), [(True, 1.0), (False, 0.5)])
def test_first_replies_tell_a_guess_from_an_answer(
    server: JudgeServer, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], sees: bool, accuracy: float
) -> None:
    """Who does not see always names one class first and the other one then: every answer is kept."""
    server.plan = answering(data, lambda label, times: good(label if sees else ("Gun", "Point")[times]))
    assert run(server, data, tmp_path / "out") == 0
    card = json.loads((tmp_path / "out" / "written_card.json").read_text())
    first = card["first_replies"]
    assert sum(of["kept"] for of in card["rows"].values()) == ROWS == first["rows"]
    assert (first["accuracy"], first["majority"], first["chance"]) == (accuracy, 0.5, 0.5)
    printed = capsys.readouterr().out
    assert f"first replies: {accuracy:.3f} right, majority 0.500, chance 0.500" in printed
    assert bool(card["warnings"]) != sees and ("warning: the model may not see the classes" in printed) != sees


def test_a_first_reply_in_another_format_still_shows_the_class(server: JudgeServer, data: Path, tmp_path: Path) -> None:
    server.plan = answering(data, lambda label, times: ("So: " if times == 0 else "") + good(label))
    assert run(server, data, tmp_path / "out") == 0
    first = json.loads((tmp_path / "out" / "written_card.json").read_text())["first_replies"]
    assert (first["right"], first["strict"]) == (ROWS, 0)


MANY = [{"data_source": "gun_point_dataset", "extra_info": {}, "reward_model": {"ground_truth": "Gun"}}] * 165


def many() -> list[dict[str, Any]]:
    return [{**row, "prompt": [{"role": "user", "content": f"row {i}"}]} for i, row in enumerate(MANY)]


def test_a_server_that_is_not_there_is_asked_a_few_times(server: JudgeServer) -> None:
    url = server.url
    closed = JudgeConfig(base_url=url.replace(str(server.port), "9"), model="stub", api_key_env=None)
    started = time.monotonic()
    with pytest.raises(
        ValueError, match=r"165 of 165 rows .* after \d\d? requests \(refused_connection: .*:9/v1 cannot"
    ):
        asyncio.run(write_rows(many(), closed, attempts=4))
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(("status", "kind"), [(401, "auth"), (404, "rejected")])
def test_a_wrong_key_or_model_is_asked_a_few_times(server: JudgeServer, status: int, kind: str) -> None:
    server.plan = lambda _: error(status)
    config = JudgeConfig(base_url=server.url, model="stub", api_key_env=None, max_concurrent=4)
    with pytest.raises(ValueError, match=rf"165 of 165 rows could not be written .*\({kind}: "):
        asyncio.run(write_rows(many(), config, attempts=4))
    assert len(server.seen) <= 6


def test_a_server_that_goes_away_is_given_up_and_one_that_stumbles_is_not(server: JudgeServer) -> None:
    fine = completion(good("Gun"))
    config = JudgeConfig(
        base_url=server.url, model="stub", api_key_env=None, max_concurrent=4, backoff_s=0.01, give_up_after=3
    )
    server.plan = lambda seen: Plan(drop=True) if 10 <= seen.index < 18 else Plan(fine)
    assert all(outcome.answer for outcome in asyncio.run(write_rows(many(), config, attempts=1)))
    before = len(server.seen)
    server.plan = lambda seen: Plan(drop=True) if seen.index >= before + 10 else Plan(fine)
    with pytest.raises(ValueError, match=r"155 of 165 rows could not be written .*\(refused_connection: "):
        asyncio.run(write_rows(many(), config, attempts=1))
    assert len(server.seen) - before < 60


def test_progress_is_told(server: JudgeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.plan = lambda _: Plan(completion(good("Gun")))
    config = JudgeConfig(base_url=server.url, model="stub", api_key_env=None, max_concurrent=4)
    asyncio.run(write_rows(many(), config, attempts=1))
    lines = [line for line in capsys.readouterr().out.splitlines() if " of 165 rows: " in line]
    assert len(lines) == 8 and lines[0].startswith("20 of 165 rows: 20 kept, 2")
