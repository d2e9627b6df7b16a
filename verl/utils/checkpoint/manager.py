"""Where checkpoints lie, which one is latest and best, and the order of steps that makes a save safe to kill.

    {root}/latest_checkpointed_iteration.txt     the step number, written last
    {root}/best_checkpoint.json                  step, metric and value of the best one (with `keep_best`)
    {root}/global_step_{N}/data.json             data order, schedule, counters: whatever json the caller gives
    {root}/global_step_{N}/manifest.json         every file with its size, the step's metrics, the number of the save
    {root}/global_step_{N}/actor/{huggingface,model,optim}/
    {root}/.lock                                 held by the run that writes here

A save: write all under `.tmp-global_step_N`, flush every file, rename the folder, flush its parent, then the best
record, then the pointer (each written aside and renamed), and only then delete old folders (first renamed out of
sight).

Saves are numbered: a folder may hold later steps of a run that was given up, and "newest" is by that number, not by
step. The checkpoints that led to one are those saved before it, each with a lower step than all saved after it.

The driver owns the manager; ranks only write into the folder that `saving` gives. All see the same file system.

Invariants
- A folder named `global_step_N` is whole; a kill at any moment leaves the last whole one to be found.
- Nothing is deleted before its successor is whole, and neither the latest nor the best ever.
- The best one is among those that led to the latest, whatever moment an earlier process was killed at.
- One run at a time writes into a root.
- Only folders that this class wrote (they have a manifest) are deleted.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from verl.utils.files import fsync_path, fsync_tree, write_json_atomic, write_text_atomic

logger = logging.getLogger(__name__)

POINTER = "latest_checkpointed_iteration.txt"
BEST = "best_checkpoint.json"
MANIFEST = "manifest.json"
LOCK = ".lock"
_STEP_NAME = re.compile(r"global_step_(\d+)")
_TEMPORARY = ".tmp-"
_REPLACED = ".replaced-"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder `global_step_N`, whole or in the making."""

    step: int
    path: Path

    @property
    def huggingface(self) -> Path:
        """A plain model folder, usable as MODEL_PATH."""
        return self.path / "actor" / "huggingface"

    @property
    def model(self) -> Path:
        """Sharded parameters."""
        return self.path / "actor" / "model"

    @property
    def adapter(self) -> Path:
        """The adapters of a model that has some, as peft's files."""
        return self.path / "actor" / "lora_adapter"

    @property
    def optimizer(self) -> Path:
        """Sharded optimizer state."""
        return self.path / "actor" / "optim"

    def read_data(self) -> dict[str, Any]:
        """The json state given at the save. Raises ValueError when it is missing or broken."""
        return _read_json(self.path / "data.json")


class CheckpointManager:
    """Saves, finds and prunes the checkpoints of one run."""

    def __init__(
        self,
        root: str | Path,
        *,
        keep: int | None = None,
        keep_best: str | None = None,
        lower_is_better: bool = False,
        on_point: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`keep` newest folders stay (None or not positive: all), and the one with the best metric `keep_best`.

        `on_point` is called with the name of each step of a save as it is done; tests kill the process there.
        """
        self.root = Path(root)
        self.keep = keep if keep and keep > 0 else None
        self.keep_best = keep_best
        self.lower_is_better = lower_is_better
        self._on_point = on_point
        self._lock: IO[str] | None = None

    def lock(self) -> None:
        """Reserve the root until `close` or the end of the process; makes the folder.

        Raises ValueError naming the holder when another run writes there.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        file = open(self.root / LOCK, "a+", encoding="utf-8")  # noqa: SIM115  (open for the run's life)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise ValueError(
                f"{self.root} is in use by {holder}: wait for that run, stop it, or give trainer.experiment_name "
                "(or trainer.default_local_dir) another value"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
            logger.warning("%s: this file system has no locks; do not start a second run there", self.root)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._lock = file

    def close(self) -> None:
        """Give the root free; calling it twice is harmless."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def begin(self, start: Checkpoint | None) -> None:
        """A run starts from `start` (None: from nothing): let the best record be the best of what led there.

        A record of anything else, such as an earlier run's in the same folder, is set aside.
        """
        there = self._that_led_to(start)
        found, record = self._best_of(there), self._best_record()
        if found == record:
            return
        if record is not None:
            origin = "nothing" if start is None else start.path
            logger.warning("%s says %s, but this run starts from %s: set aside", self.root / BEST, record, origin)
            os.replace(self.root / BEST, self.root / f"{BEST}.old")
        if found is not None:
            write_json_atomic(self.root / BEST, found)

    @contextmanager
    def saving(
        self,
        step: int,
        data: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        *,
        only_best: bool = False,
        before_commit: Callable[[], None] = lambda: None,
    ) -> Iterator[Checkpoint]:
        """Gives a temporary checkpoint to write `actor/` into; leaving the block makes it `global_step_{step}`.

        An exception inside the block leaves everything as it was. `metrics` decide what is best; without the
        `keep_best` metric among them, or when it is not finite, the best one stays. `only_best`: this one is kept
        as long as it is the best, and is deleted once a better one is whole. `before_commit` is called when all is
        flushed and nothing counts yet: for records that a run which resumes from here will not make again.
        """
        value = self._metric(metrics or {})
        self.root.mkdir(parents=True, exist_ok=True)
        self._restore_replaced()
        self._remove_leftovers()
        aside = self.root / f"{_TEMPORARY}global_step_{step}"
        aside.mkdir()
        self._on_point("begun")
        try:
            yield Checkpoint(step, aside)
            self._on_point("written")
            write_json_atomic(aside / "data.json", dict(data))
            about = {"only_best": only_best, "save": 1 + max(map(_save_number, self.complete()), default=0)}
            write_json_atomic(aside / MANIFEST, _manifest(aside, step, metrics or {}) | about)
            fsync_tree(aside)
            before_commit()
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        self._on_point("flushed")
        self._commit(aside, step, value)

    def _commit(self, aside: Path, step: int, value: float | None) -> None:
        final = self.root / aside.name.removeprefix(_TEMPORARY)
        if final.exists():
            final.rename(self.root / f"{_REPLACED}{final.name}")
            self._on_point("replaced")
        aside.rename(final)
        fsync_path(self.root)
        self._on_point("renamed")
        if value is not None and self._is_better(value):
            write_json_atomic(self.root / BEST, {"step": step, "metric": self.keep_best, "value": value})
            self._on_point("best")
        write_text_atomic(self.root / POINTER, str(step))
        self._on_point("pointer")
        self._prune(step)
        self._remove_leftovers()
        self._on_point("pruned")

    def complete(self) -> list[Checkpoint]:
        """Whole checkpoints by rising step; changes nothing, so that another process may look during a save."""
        found: dict[int, Path] = {}
        for path in _children(self.root):  # a replaced folder sorts before the one that replaced it
            match = _STEP_NAME.fullmatch(path.name.removeprefix(_REPLACED))
            if match and (path / MANIFEST).is_file():
                found[int(match[1])] = path
        return [Checkpoint(step, found[step]) for step in sorted(found)]

    def latest(self) -> Checkpoint | None:
        """The checkpoint the pointer names; None in a folder without any.

        A missing or wrong pointer is reported as an error in the log, with what is there, and the whole checkpoint
        that was saved last is taken. Raises ValueError when the pointer names a step and no whole one exists.
        """
        there = self.complete()
        names = [c.path.name for c in there]
        pointer = self.root / POINTER
        text = pointer.read_text(errors="replace").strip() if pointer.is_file() else None
        for checkpoint in there:
            if text == str(checkpoint.step):
                return checkpoint
        if not there and text is None:
            return None
        says = "is missing" if text is None else f"says {text[:40]!r}"
        if not there:
            raise ValueError(
                f"{pointer} {says}, but there is no whole checkpoint in {self.root}; "
                "start anew with trainer.resume_mode=disable or name one with trainer.resume_from_path"
            )
        newest = max(there, key=_save_order)
        logger.error("%s %s, but there are %s; using %s", pointer, says, names, newest.path.name)
        return newest

    def best(self) -> Checkpoint | None:
        """The checkpoint with the best metric so far; None when none is recorded."""
        record = self._best_record()
        if record is None:
            return None
        path = self.root / f"global_step_{record['step']}"
        if not (path / MANIFEST).is_file():
            raise ValueError(f"{self.root / BEST} names {path.name}, which is not there: {_names(self.root)}")
        return Checkpoint(record["step"], path)

    def find(self, resume_mode: str = "auto", resume_from_path: str | Path | None = None) -> Checkpoint | None:
        """What a run starts from: `auto` the latest, `disable` none, `resume_path` the given path, else a path itself.

        Raises ValueError when a path holds no whole checkpoint.
        """
        if resume_mode == "disable":
            return None
        if resume_mode == "auto":
            checkpoint = self.latest()
        elif resume_mode == "resume_path":
            if not resume_from_path:
                raise ValueError("trainer.resume_mode=resume_path needs trainer.resume_from_path=.../global_step_N")
            checkpoint = open_checkpoint(resume_from_path)
        else:
            checkpoint = open_checkpoint(resume_mode)
        if checkpoint is not None:
            verify(checkpoint)
        return checkpoint

    def would_be_best(self, value: float) -> bool:
        """Whether a save with this value of the `keep_best` metric would become the best one."""
        return math.isfinite(value) and self._is_better(value)

    def _that_led_to(self, start: Checkpoint | None) -> list[Checkpoint]:
        """`start` and its ancestors in this root by rising step; nothing when it lies elsewhere."""
        if start is None or start.path.resolve().parent != self.root.resolve():
            return []
        found: list[Checkpoint] = []
        for checkpoint in sorted(self.complete(), key=_save_order, reverse=True):
            is_start = checkpoint.step == start.step
            if is_start if not found else checkpoint.step < found[-1].step:
                found.append(checkpoint)
        return found[::-1]

    def _best_of(self, checkpoints: list[Checkpoint]) -> dict[str, Any] | None:
        """The best record that saving these in order would have left."""
        if self.keep_best is None:
            record = self._best_record()
            return record if record is not None and record["step"] in {c.step for c in checkpoints} else None
        best: dict[str, Any] | None = None
        for checkpoint in checkpoints:
            value = _read_json(checkpoint.path / MANIFEST)["metrics"].get(self.keep_best)
            if value is not None and math.isfinite(value) and (best is None or self._beats(value, best["value"])):
                best = {"step": checkpoint.step, "metric": self.keep_best, "value": value}
        return best

    def _metric(self, metrics: Mapping[str, float]) -> float | None:
        if self.keep_best is None or self.keep_best not in metrics:
            return None
        value = float(metrics[self.keep_best])
        if not math.isfinite(value):
            logger.warning(
                "the keep-best metric %s is %s: this checkpoint cannot become the best", self.keep_best, value
            )
            return None
        return value

    def _best_record(self) -> dict[str, Any] | None:
        path = self.root / BEST
        return _read_json(path) if path.is_file() else None

    def _is_better(self, value: float) -> bool:
        """A tie keeps the older one; a record of another metric does not count."""
        record = self._best_record()
        if record is None or record["metric"] != self.keep_best:
            return True
        return self._beats(value, record["value"])

    def _beats(self, value: float, other: float) -> bool:
        return value < other if self.lower_is_better else value > other

    def _prune(self, latest_step: int) -> None:
        there = sorted(self.complete(), key=_save_order)
        record = self._best_record()
        never = {latest_step} | ({record["step"]} if record else set())
        regular = [c for c in there if not _read_json(c.path / MANIFEST).get("only_best")]
        kept = never | {c.step for c in (regular if self.keep is None else regular[-self.keep :])}
        for checkpoint in there:
            if checkpoint.step not in kept:
                # out of sight first: a kill while deleting leaves no half folder under a good name
                checkpoint.path.rename(self.root / f"{_TEMPORARY}old-{checkpoint.path.name}")
                self._on_point("deleting")

    def _remove_leftovers(self) -> None:
        for path in _children(self.root):
            if path.name.startswith((_TEMPORARY, _REPLACED)) and path.is_dir():
                shutil.rmtree(path)

    def _restore_replaced(self) -> None:
        """Undo a save that was killed between moving the old folder of the same step away and the new one in."""
        for path in _children(self.root):
            original = self.root / path.name.removeprefix(_REPLACED)
            if path.name.startswith(_REPLACED) and not original.exists():
                path.rename(original)


def _save_number(checkpoint: Checkpoint) -> int:
    """1 for the first save into a root; 0 where an older version did not number them."""
    return int(_read_json(checkpoint.path / MANIFEST).get("save", 0))


def _save_order(checkpoint: Checkpoint) -> tuple[int, int]:
    return _save_number(checkpoint), checkpoint.step


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at a folder `global_step_N`, or the latest of a run's folder.

    Raises ValueError naming what is there when the path holds none.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise ValueError(f"{path}: no such checkpoint folder; its parent holds {_names(path.parent)}")
    match = _STEP_NAME.fullmatch(path.resolve().name)
    if match is None:
        checkpoint = CheckpointManager(path).latest()
        if checkpoint is None:
            raise ValueError(f"{path}: neither a folder global_step_N nor one that holds them; it has {_names(path)}")
        return checkpoint
    if not (path / MANIFEST).is_file():
        raise ValueError(
            f"{path}: no {MANIFEST}, so it is not a checkpoint of this version; merge an older one with "
            "scripts/model_merger.py and start from its huggingface folder"
        )
    return Checkpoint(int(match[1]), path)


def verify(checkpoint: Checkpoint) -> None:
    """Raises ValueError naming the first file that is missing or has another size than when it was saved."""
    for name, size in _read_json(checkpoint.path / MANIFEST)["files"].items():
        path = checkpoint.path / name
        actual = path.stat().st_size if path.is_file() else None
        if actual != size:
            found = "missing" if actual is None else f"{actual} bytes long"
            raise ValueError(f"{path}: {found}, but {size} bytes were saved; the checkpoint is damaged, use another")


def _manifest(folder: Path, step: int, metrics: Mapping[str, float]) -> dict[str, Any]:
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    return {"version": 1, "step": step, "metrics": {k: float(v) for k, v in metrics.items()}, "files": files}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a json object, got {type(value).__name__}")
    return value


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _names(folder: Path) -> list[str]:
    return [path.name for path in _children(folder) if not path.name.startswith(".")][:20]
