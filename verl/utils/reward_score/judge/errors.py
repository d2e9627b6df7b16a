"""Why a judge gave no verdict."""

from __future__ import annotations

from verl.utils.reward_score.returns import FailureKind, ScoringError


class JudgeError(ScoringError):
    """No verdict. The message names no key and no answer, so that equal causes count as one reason."""

    def __init__(
        self,
        kind: FailureKind,
        message: str,
        *,
        status: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(kind, message)
        self.status = status
        """HTTP status, where the server gave one."""
        self.retry_after_s = retry_after_s
        """Seconds the server asked us to wait."""
