"""How a worker's failure reaches the driver."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from verl.models.policy import check_model_folder
from verl.single_controller.group import UserError, WorkerError, unwrap
from verl.single_controller.worker import WorkerShell


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
