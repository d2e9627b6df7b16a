"""How a worker's failure reaches the driver."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest

from verl.models.policy import check_model_folder
from verl.single_controller.group import UserError, WorkerError, is_broken_connection, unwrap
from verl.single_controller.worker import WorkerShell, interface_of


class Worker:
    def asks(self) -> None:
        check_model_folder(Path("/absent/folder"))

    def breaks(self) -> None:
        np.zeros(2).reshape(3)  # a library's ValueError


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> WorkerShell:
    monkeypatch.setattr("faulthandler.enable", lambda: None)
    made = WorkerShell("actor", 1, 1)
    assert made.build(Worker) is None
    return made


def test_a_users_mistake_comes_as_one_line_and_its_trace_goes_to_the_debug_log(
    shell: WorkerShell, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), pytest.raises(UserError) as found:
        unwrap(shell.call("asks"))
    text = str(found.value)
    assert text.startswith("actor rank 1, phase 'asks': ") and "no config.json there" in text, text
    assert "Traceback" not in text and "Traceback" in caplog.text


def test_a_librarys_value_error_is_a_bug_and_keeps_its_trace(shell: WorkerShell) -> None:
    with pytest.raises(WorkerError, match=r"(?s)ValueError: cannot reshape.*Traceback.*reshape\(3\)") as found:
        unwrap(shell.call("breaks"))
    assert not isinstance(found.value, UserError)


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("RuntimeError: [../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:4242", True),
        ("DistBackendError: NCCL error in: ... remote process exited or there was a network error", True),
        ("RuntimeError: Broken pipe", True),
        ("ValueError: cannot reshape array of size 2 into shape (3,)", False),
        ("OutOfMemoryError: CUDA out of memory", False),
    ],
)
def test_only_an_error_of_a_connection_lets_the_driver_look_for_a_dead_peer(text: str, broken: bool) -> None:
    assert is_broken_connection(f"actor rank 0, phase 'update': {text}") is broken


def test_a_worker_works_in_the_drivers_folder_and_keeps_the_variables_of_its_node(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("faulthandler.enable", lambda: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    (tmp_path / "run").mkdir()
    WorkerShell("actor", 0, 1, str(tmp_path / "run"))
    assert (Path.cwd(), os.environ["NCCL_DEBUG"]) == (tmp_path / "run", "INFO")
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"


def test_the_interface_of_an_address_is_found() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") is None  # for documentation: nobody has it
