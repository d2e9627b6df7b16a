"""Verdicts and spending on disk: one sqlite file, shared by processes, safe against a kill at any moment.

Invariants
- A verdict is in the file whole or not at all.
- Spending is counted before a request leaves, so that a killed process never spent more than the file says.
- No prompt, no graded answer and no key is in the file: keys are hashes, values are what the server replied.
"""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

_NO_LIMIT = 2**62
_TABLES = (
    "CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, model TEXT, verdict TEXT, at REAL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS spending (run TEXT PRIMARY KEY, calls INTEGER, tokens INTEGER) WITHOUT ROWID",
)


@dataclass(frozen=True, slots=True)
class Spending:
    """What a run has spent, requests in flight included."""

    calls: int
    tokens: int


class JudgeStore:
    """Cache and ledger. Not for use by two threads at once.

    Raises ValueError when the path cannot be opened or is not a sqlite file of this kind.
    """

    def __init__(self, path: str | None, run: str) -> None:
        self._run = run
        if path is not None:
            Path(path).expanduser().parent.mkdir(parents=True, exist_ok=True)
        name = ":memory:" if path is None else str(Path(path).expanduser())
        try:
            # Autocommit: each statement below is one transaction.
            self._db = sqlite3.connect(name, timeout=30, isolation_level=None, check_same_thread=False)
            self._prepare()
        except sqlite3.Error as error:
            raise ValueError(f"judge.cache_path={path}: cannot be used ({error}); give another file") from error

    def get(self, key: str) -> str | None:
        """The stored reply."""
        row = self._db.execute("SELECT verdict FROM verdicts WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def put(self, key: str, verdict: str, model: str) -> None:
        """Store a valid reply; a second one for the same key changes nothing."""
        self._db.execute("INSERT OR IGNORE INTO verdicts VALUES (?, ?, ?, ?)", (key, model, verdict, time.time()))

    def spent(self) -> Spending:
        """So far, over all processes and restarts of the run."""
        row = self._db.execute("SELECT calls, tokens FROM spending WHERE run = ?", (self._run,)).fetchone()
        return Spending(*row)

    def reserve(self, tokens: int, *, max_calls: int | None, max_tokens: int | None) -> bool:
        """Count one request and the most tokens it can cost; False, and nothing counted, where that passes a limit."""
        values = {
            "run": self._run,
            "tokens": tokens,
            "max_calls": _NO_LIMIT if max_calls is None else max_calls,
            "max_tokens": _NO_LIMIT if max_tokens is None else max_tokens,
        }
        done = self._db.execute(
            "UPDATE spending SET calls = calls + 1, tokens = tokens + :tokens "
            "WHERE run = :run AND calls + 1 <= :max_calls AND tokens + :tokens <= :max_tokens",
            values,
        )
        return done.rowcount == 1

    def settle(self, reserved: int, used: int) -> None:
        """Replace the reserved tokens of a request by the true ones."""
        self._db.execute("UPDATE spending SET tokens = tokens + ? WHERE run = ?", (used - reserved, self._run))

    def close(self) -> None:
        """Release the file."""
        self._db.close()

    def _prepare(self) -> None:
        deadline = time.monotonic() + 30
        # sqlite's own waiting does not cover the change to WAL when several processes open a new file together.
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                break
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        # With WAL this loses at most the last transactions on a power cut, and nothing when a process is killed.
        self._db.execute("PRAGMA synchronous = NORMAL")
        for table in _TABLES:
            self._db.execute(table)
        self._db.execute("INSERT OR IGNORE INTO spending VALUES (?, 0, 0)", (self._run,))
