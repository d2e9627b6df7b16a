"""Unpack a downloaded archive into its folder, or check a folder that is there already.

    python3 -m verl.timeseries.unpack task=ctu into=ori_data/Computers [zip=ori_data/Computers.zip]

Invariants
- Every member's name is checked before anything is written; a name that leaves the folder, or a link, refuses the zip.
- The files whose SHA-256 the task knows must be there and match before a single file reaches the folder.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from verl.timeseries.readers import ZIP_ERRORS
from verl.timeseries.task import TaskSpec
from verl.timeseries.tasks import get_task


def check_digests(folder: Path, task: TaskSpec, archive: Path | None = None) -> None:
    """Raises ValueError, naming file and both digests, when a file the task knows is missing or differs.

    `archive`: the zip that was unpacked into `folder`, which the messages name in its place.
    """
    if task.download is None:
        raise ValueError(f"task {task.name} declares no download, so there is nothing to check {folder} against")
    for name, wanted in task.download.sha256.items():
        path = folder / name
        named = path if archive is None else f"{archive}: member {name}"
        if not path.is_file():
            raise ValueError(f"{named} is missing; the archive is incomplete")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != wanted:
            raise ValueError(
                f"{named}: sha256 is {found}, the published file has {wanted}; delete it and download again"
            )


def unpack_zip(path: Path, into: Path, task: TaskSpec | None = None) -> list[str]:
    """Unpack a zip into the folder `into`, check it against `task` if given, and return the names of its files.

    Raises ValueError, naming the member, when one would land outside or is a link, and when the zip is damaged or not
    the published one; then nothing has been written to the folder.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    into.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory(dir=into, prefix=".unpack-") as scratch:
            members = [info for info in archive.infolist() if not info.is_dir()]
            for info in members:
                _check_member(path, info)
            for info in members:
                archive.extract(info, scratch)
            if task is not None:
                check_digests(Path(scratch), task, path)
            for info in members:
                final = into / info.filename
                final.parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(scratch, info.filename), final)
    except ZIP_ERRORS as error:
        raise ValueError(f"{path}: not a complete zip ({error}); delete it and download it again") from error
    return [info.filename for info in members]


def _check_member(path: Path, info: zipfile.ZipInfo) -> None:
    name = PurePosixPath(info.filename.replace("\\", "/"))
    is_link = (info.external_attr >> 16) & 0o170000 == 0o120000
    if name.is_absolute() or not name.parts or ".." in name.parts or name.parts[0].endswith(":") or is_link:
        raise ValueError(f"{path}: member {info.filename!r} would leave the folder; this is not the original archive")


def main(args: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0 when the folder holds the published files."""
    given = sys.argv[1:] if args is None else args
    values = dict(arg.split("=", 1) for arg in given if "=" in arg)
    try:
        if len(values) != len(given) or not {"task", "into"} <= values.keys() <= {"task", "into", "zip"}:
            raise ValueError(f"usage: task=NAME into=FOLDER [zip=FILE], got {' '.join(given)!r}")
        task, into = get_task(values["task"]), Path(values["into"])
        if "zip" in values:
            unpack_zip(Path(values["zip"]), into, task)
        else:
            check_digests(into, task)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
