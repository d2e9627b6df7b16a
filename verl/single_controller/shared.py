"""What every node of a run must see alike: checked before a model is loaded, by looking from each node.

The driver writes a file into the run's folder, every other node reads it and writes one of its own, and the driver
reads that: a folder of the same name on another disk does not pass. Code and inputs need not be shared, only equal.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from verl.single_controller.placement import Node

_PATIENCE = 30.0
"""Seconds until a file that another node wrote must be seen: NFS keeps listings for some time."""
_LOOK_TIMEOUT = 120.0
CODE = "the package verl"
"""Key under which the code is compared, each node's own copy."""

Fingerprint = dict[str, int | str]


class NotSharedError(RuntimeError):
    """A node does not see what it must. The message names nodes, keys and paths."""


def check_shared(nodes: Sequence[Node], *, outputs: Path | None, inputs: Mapping[str, Path]) -> None:
    """Raises NotSharedError unless all `nodes` see `outputs` as one folder, `inputs` (key -> path) alike, and our code.

    `outputs`: an existing folder that workers write to; None: they write nothing.
    """
    if not nodes:
        return
    driver = ray.get_runtime_context().get_node_id()
    others = {node.id: node for node in nodes if node.id != driver}
    if not others:
        return
    token = uuid.uuid4().hex
    paths = {CODE: Path(__file__).parents[1]} | {key: path.absolute() for key, path in inputs.items()}
    expected = _fingerprints(paths)
    probes = None if outputs is None else _Probes(outputs.absolute(), token)
    folder = None if probes is None else probes.folder
    problems = []
    try:
        if probes is not None:
            probes.write("driver")
        looks = [_on(node).remote(folder, token, node.id, Path.cwd(), paths) for node in others.values()]
        for node, ref in zip(others.values(), looks, strict=True):
            try:
                found, seen = ray.get(ref, timeout=_LOOK_TIMEOUT)
                found += differences(expected, seen, paths)
            except RayError as error:
                found = [f"cannot run this package: {_last_line(error)}"]
            if not found and probes is not None and not probes.appears(node.id):
                found = [f"wrote to trainer.default_local_dir={probes.folder}, and the driver does not see the file"]
            problems += [f"node {node}: {line}" for line in found]
    finally:
        if probes is not None:
            probes.remove(["driver", *others])
    if problems:
        raise NotSharedError(
            "the nodes of this run do not see the same files (docs/nodes.md says what must be shared):\n  "
            + "\n  ".join(problems)
        )


def _on(node: Node) -> Any:
    here = NodeAffinitySchedulingStrategy(node.id, soft=False)
    return ray.remote(_look).options(num_cpus=0, max_retries=2, scheduling_strategy=here)


def _look(
    folder: Path | None, token: str, name: str, working_folder: Path, paths: Mapping[str, Path]
) -> tuple[list[str], dict[str, Fingerprint]]:
    return look_from_here(folder, token, name, working_folder), _fingerprints(paths)


def look_from_here(folder: Path | None, token: str, name: str, working_folder: Path) -> list[str]:
    """Runs on a node: what is wrong there with the run's folder and the folder that relative paths start from."""
    problems = []
    if not working_folder.is_dir():
        problems.append(f"there is no folder {working_folder}, where the run was started and relative paths begin")
    if folder is None:
        return problems
    probes = _Probes(folder, token)
    if not probes.appears("driver"):
        here = "is another folder there" if folder.is_dir() else "does not exist there"
        return [*problems, f"trainer.default_local_dir={folder} {here}: put it on a file system that all nodes mount"]
    try:
        probes.write(name)
    except OSError as error:
        problems.append(f"trainer.default_local_dir={folder} cannot be written to: {error}")
    return problems


def differences(
    expected: Mapping[str, Fingerprint], found: Mapping[str, Fingerprint], paths: Mapping[str, Path]
) -> list[str]:
    """One line per key whose files are missing on a node or not those that the driver sees."""
    lines = []
    for key, mine in expected.items():
        theirs = found[key]
        if mine == theirs:
            continue
        if not theirs:
            lines.append(f"{key}={paths[key]} does not exist there")
            continue
        names = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
        lines.append(f"{key}={paths[key]} differs from the driver's in {', '.join(names[:5])}")
    return lines


def fingerprint(path: Path) -> Fingerprint:
    """Sizes of a file, or of the files right inside a folder, by name; {} where there is nothing.

    Python packages (a folder with `__init__.py`) are read whole: their files by a digest.
    """
    if path.is_file():
        return {path.name: path.stat().st_size}
    if (path / "__init__.py").is_file():
        files = sorted(path.rglob("*.py")) + sorted(path.rglob("*.yaml"))
        return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files}
    if path.is_dir():
        return {file.name: file.stat().st_size for file in sorted(path.iterdir()) if file.is_file()}
    return {}


def _fingerprints(paths: Mapping[str, Path]) -> dict[str, Fingerprint]:
    own = Path(__file__).parents[1]
    return {key: fingerprint(own if key == CODE else path) for key, path in paths.items()}


class _Probes:
    """Small hidden files in the run's folder, one per writer."""

    def __init__(self, folder: Path, token: str) -> None:
        self.folder, self._token = folder, token

    def _file(self, name: str) -> Path:
        return self.folder / f".probe-{self._token}-{name}"

    def write(self, name: str) -> None:
        self._file(name).write_text(self._token)

    def appears(self, name: str) -> bool:
        return wait_until(lambda: self._file(name).is_file() and self._file(name).read_text() == self._token)

    def remove(self, names: Sequence[str]) -> None:
        for name in names:
            with suppress(OSError):
                self._file(name).unlink()


def wait_until(condition: Callable[[], bool], patience: float = _PATIENCE) -> bool:
    """Whether `condition()` becomes true within `patience` seconds."""
    end = time.monotonic() + patience
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]
