"""What a node says of files that it does not see as the driver does."""

from __future__ import annotations

from pathlib import Path

import pytest

from verl.single_controller import shared
from verl.single_controller.shared import differences, fingerprint, look_from_here


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared.wait_until, "__defaults__", (0.0,))


def test_a_shared_folder_passes_and_the_node_leaves_a_file_for_the_driver(tmp_path: Path) -> None:
    (tmp_path / ".probe-t-driver").write_text("t")
    assert look_from_here(tmp_path, "t", "node", tmp_path) == []
    assert (tmp_path / ".probe-t-node").read_text() == "t"


def test_a_folder_of_the_same_name_on_another_disk_does_not_pass(tmp_path: Path) -> None:
    (line,) = look_from_here(tmp_path, "t", "node", tmp_path)
    assert f"trainer.default_local_dir={tmp_path} is another folder there" in line, line
    (line,) = look_from_here(tmp_path / "absent", "t", "node", tmp_path)
    assert "does not exist there: put it on a file system that all nodes mount" in line, line


def test_a_folder_that_only_the_driver_may_write_to_does_not_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".probe-t-driver").write_text("t")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    (line,) = look_from_here(tmp_path, "t", "node", tmp_path)
    assert "cannot be written to: [Errno 13] Permission denied" in line, line


def test_a_missing_working_folder_is_named(tmp_path: Path) -> None:
    (line,) = look_from_here(None, "t", "node", tmp_path / "gone")
    assert f"there is no folder {tmp_path / 'gone'}" in line, line


def test_inputs_need_not_be_shared_but_equal(tmp_path: Path) -> None:
    mine, copy, other = (tmp_path / name for name in ("mine", "copy", "other"))
    for folder, size in ((mine, 10), (copy, 10), (other, 11)):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x" * size)
        (folder / "config.json").write_text("{}")
    expected, paths = {"model": fingerprint(mine)}, {"model": mine}
    assert differences(expected, {"model": fingerprint(copy)}, paths) == []
    (line,) = differences(expected, {"model": fingerprint(other)}, paths)
    assert line == f"model={mine} differs from the driver's in model.safetensors"
    (line,) = differences(expected, {"model": fingerprint(tmp_path / "none")}, paths)
    assert line == f"model={mine} does not exist there"


def test_code_is_compared_by_content(tmp_path: Path) -> None:
    """A changed line of equal length is another program."""
    packages = []
    for text in ("x = 1\n", "x = 2\n", "x = 1\n"):
        package = tmp_path / str(len(packages))
        (package / "sub").mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "sub" / "a.py").write_text(text)
        packages.append(fingerprint(package))
    assert packages[0] == packages[2] != packages[1]
    (line,) = differences({"code": packages[0]}, {"code": packages[1]}, {"code": tmp_path})
    assert line.endswith("differs from the driver's in sub/a.py"), line
